"""Proof that the daemon keeps nothing of what it has served: the soak.

    python tests/soak.py --streams 20000 --aborts 2000
    python tests/soak.py --minutes 10

A daemon in a process of its own is put under load, round after round: streams and JSON of every
API, bridges, conversations, limits, failures, clients that leave in each phase (`soak_load`), and a
reload. After each round, once it is at rest, what it holds must be what it held after the warm-up:
to the descriptor, the task, the series, the slot. Its memory may not grow by more than 64 bytes per
request over the later rounds. Nothing may be in its output that nobody awaited or closed.

Memory is what is allocated and not freed, as the C library counts it with Python's own pools turned
off: exact to the byte, where the resident set differs by megabytes from run to run, as it has whole
pages of what is partly free. The slope is that of the line of least squares; caches are configured
so small that they are full after the warm-up. Of long runs the resident set is judged, too.

`--leak` plants a leak, which must be found. Ends with 1 if anything was.
"""
# ruff: noqa: T201 - a program for a terminal prints

import argparse
import asyncio
import json
import os
import re
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from soak_load import LEAVING, PHASES, STREAMS, Load
from soak_upstream import Plays, config_text
from soaked import LEAKS, Held
from upstream import ScriptedUpstream

HERE = Path(__file__).resolve().parent
MOST = 64  # bytes per request
LONG = 50_000  # requests over which the resident set says something
ROUNDS = 10
WARM = 40  # decks: by then all caches are full
START_LIMIT = 30.0  # seconds
PATIENCE = 20.0  # seconds for the daemon to come to rest
STILL = 3  # times that it holds the same, one after another, to be at rest
PAUSE = 0.03  # seconds between these
# So that all memory is allocated by the C library, from one heap, without caches of freed blocks.
ALLOCATION = {
    "PYTHONMALLOC": "malloc",
    "MALLOC_ARENA_MAX": "1",
    "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
}
SUSPECT = re.compile(
    r"never awaited|unclosed|never retrieved|was destroyed|Exception ignored|Traceback \("
    r'|"level":"(?:error|critical)"',
    re.IGNORECASE,
)
# What is as it was once the daemon is at rest, as sentences name it; the latter are then none.
SAME = {"descriptors": "file descriptors", "tasks": "tasks", "series": "series of metrics"}
NONE = {
    "slots": "slots of limits and upstreams",
    "in_flight": "requests in flight by the gauge",
    "calls": "requests in hand",
    "set_aside": "tokens set aside",
    "buffered": "bytes of request bodies",
    "pinned": "conversations in use",
    "clients": "client connections",
    "upstreams": "upstream connections",
}


# The daemon


class Soaked:
    """The daemon's process; `output` is what it printed besides."""

    def __init__(self, process: Process, output: Path) -> None:
        self._process = process
        self._output = output

    async def line(self) -> dict[str, Any]:
        """Return the next line that it says."""
        assert self._process.stdout is not None
        async with asyncio.timeout(START_LIMIT):
            said = await self._process.stdout.readline()
        if not said:
            raise RuntimeError(f"the daemon has ended: {self.output()}")
        found: dict[str, Any] = json.loads(said)
        return found

    async def held(self) -> Held:
        """Ask what it holds."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        return Held(**await self.line())

    def reload(self) -> None:
        """Let it read its configuration again."""
        self._process.send_signal(signal.SIGHUP)

    async def end(self) -> int:
        """Let it end in order; return its exit code."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        async with asyncio.timeout(START_LIMIT):
            return await self._process.wait()

    def output(self) -> str:
        """Return what it printed, but for its lines about requests."""
        return self._output.read_text(encoding="utf-8", errors="replace")


@asynccontextmanager
async def running(folder: Path, url: str, store: str, leak: str) -> AsyncIterator[Soaked]:
    """Run the daemon before an upstream."""
    config, output = folder / "aiproxy.yaml", folder / "output"
    config.write_text(config_text(url, store), encoding="utf-8")
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": path, "PYTHONASYNCIODEBUG": "", "STATE_DIRECTORY": str(folder)}
    environ = {**os.environ, **ALLOCATION, **settings}
    command = [sys.executable, "-W", "always", str(HERE / "soaked.py"), str(config), leak]
    with output.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            *command, env=environ, stdin=PIPE, stdout=PIPE, stderr=file, limit=2**24
        )
    soaked = Soaked(process, output)
    try:
        yield soaked
    except Exception:
        print(soaked.output()[-4000:], file=sys.stderr)
        raise
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


# The verdict


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line of least squares; 0 of too few points."""
    many = len(points)
    x, y = (sum(each) / many for each in zip(*points, strict=True)) if many else (0.0, 0.0)
    spread = sum((px - x) ** 2 for px, _ in points)
    return sum((px - x) * (py - y) for px, py in points) / spread if spread else 0.0


@dataclass
class Report:
    """What was found.

    Attributes:
        baseline: what was held after the warm-up.
        rounds: what was held after each round.
        found: what is wrong, in sentences.
    """

    baseline: Held
    rounds: list[Held] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    streams: int = 0
    left: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def later(self, name: str) -> list[tuple[float, float]]:
        """Return requests and what was held after these, of the later rounds."""
        rounds = self.rounds[len(self.rounds) // 3 :]
        return [(held.requests, getattr(held, name)) for held in rounds]

    @property
    def growth(self) -> float:
        """Bytes of memory per request, over the later rounds."""
        return slope(self.later("memory"))

    def judge_growth(self) -> None:
        """Judge the memory, after the last round."""
        over = self.rounds[-1].requests - self.rounds[len(self.rounds) // 3].requests
        kinds = {"memory": "memory"} | ({"resident": "the resident set"} if over >= LONG else {})
        for name, what in kinds.items():
            grown = slope(self.later(name))
            if grown > MOST:
                self.found.append(
                    f"{what} grows by {grown:.0f} bytes per request, at most {MOST} are allowed"
                )

    def judge(self, held: Held, made: int) -> bool:
        """Judge what is held at rest after so many requests; tell whether it is as it should be."""
        for name, what in SAME.items():
            now, then = getattr(held, name), getattr(self.baseline, name)
            if now == then:
                continue
            if name == "series":
                new = sorted(set(now) ^ set(then))
                now, then = len(now), f"{len(then)} (new or gone: {', '.join(new[:3])})"
            self.found.append(f"{what}: {now} at rest, after the warm-up {then}")
        self.found += [
            f"{what}: {getattr(held, name)} at rest"
            for name, what in NONE.items()
            if getattr(held, name)
        ]
        for many, what in ((held.logged, "lines in the log"), (held.requests, "have ended")):
            if many != made:
                self.found.append(f"{many} {what} of {made} requests")
        return not self.found

    def judge_output(self, output: str, code: int) -> None:
        """Judge how it ended, and what it printed."""
        said: dict[str, list[str]] = {}
        for line in output.splitlines():
            if (found := SUSPECT.search(line)) is not None:
                said.setdefault(found[0].lower(), []).append(line)
        for words, lines in sorted(said.items()):
            self.found.append(f"its output says {words!r}, {len(lines)} times: {lines[0]}")
        if code:
            self.found.append(f"it ended with {code}")


ROW = "{:>7} {:>9} {:>11} {:>9} {:>10} {:>6} {:>6} {:>7} {:>6} {:>10}"
HEAD = ROW.format(
    "round", "requests", "memory", "B/request", "resident", "files", "tasks", "series", "slots",
    "in flight",
)  # fmt: skip


def row(name: str, held: Held, grown: float | None) -> str:
    """Return one line of the table."""
    return ROW.format(
        name, held.requests, held.memory, "" if grown is None else f"{grown:.1f}",
        f"{held.resident / 2**20:.1f}M", held.descriptors, held.tasks, len(held.series),
        held.slots, held.in_flight,
    )  # fmt: skip


# The rounds


async def at_rest(soaked: Soaked, like: Held | None, patience: float) -> Held:
    """Return what is held at rest: what must be none is, and nothing changes; `like` it if given.

    After `patience` seconds, what is held then.
    """
    loop = asyncio.get_running_loop()
    end, same, held = loop.time() + patience, 0, await soaked.held()
    while True:
        none = not any(getattr(held, name) for name in NONE) and held.logged == held.requests
        if same >= STILL and none and (like is None or _alike(held, like)):
            return held
        if loop.time() > end:
            return held
        await asyncio.sleep(PAUSE)
        before, held = held, await soaked.held()
        same = same + 1 if _alike(held, before) and held.requests == before.requests else 0


def _alike(held: Held, other: Held) -> bool:
    return all(getattr(held, name) == getattr(other, name) for name in SAME)


@dataclass(frozen=True)
class Plan:
    """How long, and how much.

    Attributes:
        decks: of a round.
        rounds: after the warm-up.
        warm: decks of the warm-up, at least.
        minutes: then the rounds are as long as that takes.
        store: of sessions.
        leak: what the daemon is made to leak.
        patience: seconds for it to come to rest.
    """

    decks: int
    rounds: int = ROUNDS
    warm: int = WARM
    minutes: float = 0.0
    store: str = "memory:"
    leak: str = ""
    patience: float = PATIENCE


async def soak(folder: Path, plan: Plan) -> Report:
    """Put a daemon under load, and watch what it holds."""
    began = time.monotonic()
    async with ScriptedUpstream() as upstream:
        plays = upstream.default = Plays(upstream)
        async with running(folder, upstream.url, plan.store, plan.leak) as soaked:
            load = Load(plays, **await soaked.line())
            await load.begin()
            baseline, rate = await _warmed_up(soaked, load, plan)
            report = Report(baseline)
            decks = plan.decks
            if plan.minutes:
                decks = max(1, round(rate * plan.minutes * 60 / plan.rounds))
            streams, left = load.streams, load.left.copy()
            print(HEAD, row("warm-up", baseline, None), sep="\n", flush=True)
            for number in range(1, plan.rounds + 1):
                soaked.reload()
                await load.run(decks)
                held = await at_rest(soaked, baseline, plan.patience)
                report.rounds.append(held)
                grown = report.growth if number > 1 else None
                print(row(str(number), held, grown), flush=True)
                if not report.judge(held, load.made):
                    break
            else:
                report.judge_growth()
            code = await soaked.end()
            report.judge_output(soaked.output(), code)
    report.streams = load.streams - streams
    report.left = {phase: load.left[phase] - left[phase] for phase in PHASES}
    report.seconds = time.monotonic() - began
    return report


async def _warmed_up(soaked: Soaked, load: Load, plan: Plan) -> tuple[Held, float]:
    """Play until a round brings no new series; what is held then, and decks per second."""
    series: list[str] = []
    decks = plan.warm
    for _ in range(3):
        soaked.reload()
        began = time.monotonic()
        await load.run(decks)
        rate = decks / (time.monotonic() - began)
        held = await at_rest(soaked, None, plan.patience)
        if held.series == series:
            break
        series, decks = held.series, max(plan.warm // 4, 1)
    return held, rate


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--streams", type=int, default=20_000, help="in all rounds together")
    parser.add_argument("--aborts", type=int, default=2_000, help="in each phase, likewise")
    parser.add_argument("--minutes", type=float, default=0.0, help="instead of these")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--warm", type=int, default=WARM, help=f"decks of {STREAMS} streams")
    parser.add_argument("--store", choices=["memory:", "sqlite"], default="memory:")
    parser.add_argument("--leak", choices=sorted(LEAKS), default="")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds, to be at rest")
    options = vars(parser.parse_args(arguments))
    wanted = max(options.pop("streams") / STREAMS, options.pop("aborts") / LEAVING)
    decks = -int(-wanted // options["rounds"])
    with tempfile.TemporaryDirectory(prefix="aiproxy-soak-") as folder:
        if options["store"] == "sqlite":
            options["store"] = f"sqlite:{folder}/sessions.db"
        report = uvloop.run(soak(Path(folder), Plan(decks, **options)))
    left = ", ".join(f"{many} {phase}" for phase, many in report.left.items())
    print(f"{report.streams} streams; clients that left: {left}; {report.seconds:.1f} s")
    for sentence in report.found:
        print(f"RED: {sentence}")
    print("red" if report.found else f"green: {report.growth:.1f} bytes per request")
    return 1 if report.found else 0


if __name__ == "__main__":
    sys.exit(main())
