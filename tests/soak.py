"""The soak: what is done over and over leaves nothing behind.

    python tests/soak.py --minutes 10
    python tests/soak.py --streams 20000 --aborts 2000 [--leak bytes]

Streams and answers of every kind, failures that are tried again, and clients that leave in every
phase, in rounds; after each round, at rest, what the daemon holds. Memory may grow by 64 bytes per
request at most (least squares over the rounds after the warm-up); descriptors, tasks, slots,
series, bodies and attempts must be what they were. Ends with 1 if anything has grown. With
`--leak` the daemon is made to leak, and must be found out.
"""
# ruff: noqa: T201 - a program for a terminal prints

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import re
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from answers import chat_events, messages_events
from responses import responses_events, responses_json
from soak_load import KINDS, PHASES, Upstream, Worker
from soaked import LEAKS

HERE = Path(__file__).resolve().parent
KEY = "sk-aip-of-the-soak"
MOST_GROWTH = 64.0  # bytes per request
SETTLE = 2.5  # seconds until what was used for a round is given back
WORKERS = 24
LONGEST = 1 << 24  # bytes of what the daemon tells at once
WARM_UP, ROUNDS = 2, 6  # rounds
EXACT = ("descriptors", "tasks", "slots", "series", "in flight", "bodies", "attempts")
COMPLAINTS = re.compile(r"never awaited|[Uu]nclosed|Traceback|never retrieved|\"bug\"")
CONFIG = """\
listen: 127.0.0.1:0
admin: 127.0.0.1:0
upstreams:
  one: {{url: "http://127.0.0.1:{port}/v1", apis: [responses, chat, messages], max_concurrent: 400,
         idle_connections: 200ms}}
  two: {{url: "http://127.0.0.1:{port}/well/v1", apis: [responses], idle_connections: 200ms}}
  chat: {{url: "http://127.0.0.1:{port}/v1", apis: [chat], idle_connections: 200ms}}
routes:
  - {{model: one, upstreams: [one], limits: {{concurrent: 500}}}}
  - model: pair
    upstreams: [one, {{name: two, tier: 2}}]
    retry_unsafe: true
  - {{model: bridged, upstreams: [chat]}}
keys:
  soak:
    sha256: {key}
    limits: {{requests: 100000000/min, tokens: [900000000/min, 900000000/s],
              concurrent: 500}}
sessions: {{store: "{store}", max_bytes: 256KiB}}
breaker: {{failures: 1000000}}
log: {{level: info, format: json}}
"""


@dataclass
class Soak:
    """One run.

    Attributes:
        held: what the daemon held after each round, the warm-up's too.
        requests: how many there were by then.
        wrong: what is wrong, in sentences.
    """

    held: list[dict[str, Any]] = field(default_factory=list)
    requests: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """Bytes per request, by least squares over the rounds after the warm-up."""
        return slope(self.requests[WARM_UP - 1 :], [h["memory"] for h in self.held[WARM_UP - 1 :]])

    def judge(self, said: str) -> None:
        """Find what has grown since the warm-up, and what the daemon complains of."""
        first, last = self.held[WARM_UP - 1], self.held[-1]
        if self.growth > MOST_GROWTH:
            self.wrong.append(f"memory grows by {self.growth:.0f} bytes per request")
        self.wrong += [
            f"{name}: {first[name]} after the warm-up, {last[name]} at the end"
            for name in EXACT
            if first[name] != last[name]
        ]
        self.wrong += [f"new: {name}" for name in sorted({*last["names"]} - {*first["names"]})]
        self.wrong += [f"the daemon says: {line[:200]}" for line in complaints(said)]

    def row(self, number: int) -> str:
        """One round as a line of the table."""
        held = self.held[number]
        cells = [f"{number + 1:5}", f"{self.requests[number]:9}", f"{held['memory']:12}"]
        cells += [f"{held['resident'] // 1024:9}", *(f"{held[name]:11}" for name in EXACT)]
        return " ".join(cells)


HEADER = "round  requests memory bytes  resident " + " ".join(f"{name:>11}" for name in EXACT)


def slope(xs: list[int], ys: list[int]) -> float:
    """The rise of a line through points, by least squares."""
    middle_x, middle_y = sum(xs) / len(xs), sum(ys) / len(ys)
    across = sum((x - middle_x) ** 2 for x in xs)
    return sum((x - middle_x) * (y - middle_y) for x, y in zip(xs, ys, strict=True)) / across


def complaints(said: str) -> list[str]:
    """Return the lines of standard error that no daemon should write."""
    return [line for line in said.splitlines() if COMPLAINTS.search(line)]


def answers() -> dict[str, bytes]:
    """Return the bodies of healthy answers by what asks for them."""
    return {
        "responses": b"".join(responses_events(text="Hello world")),
        "chat": b"".join(chat_events("Hello world", include_usage=True)),
        "messages": b"".join(messages_events("Hello world")),
        "json": json.dumps(responses_json("Hello world")).encode(),
    }


class Daemon:
    """The daemon's process."""

    def __init__(self, process: Process, port: int) -> None:
        self._process = process
        self.port = port

    async def held(self) -> dict[str, Any]:
        """What it holds now."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(b"\n")
        found: dict[str, Any] = json.loads(await self._process.stdout.readline())
        return found

    async def at_rest(self, like: dict[str, Any] | None) -> dict[str, Any]:
        """What it holds once that is what it held before, or does not become so."""
        until = time.monotonic() + SETTLE
        while True:
            found = await self.held()
            same = like is None or all(found[name] == like[name] for name in EXACT)
            idle = not (found["in flight"] or found["bodies"] or found["attempts"])
            if (same and idle) or time.monotonic() > until:
                return found
            await asyncio.sleep(0.1)


@asynccontextmanager
async def running(
    port: int, store: str, leaks: Sequence[str], folder: Path
) -> AsyncIterator[Daemon]:
    """Run the daemon against the upstream on this port; what it says is in `said` there."""
    file = folder / "aiproxy.yaml"
    key = hashlib.sha256(KEY.encode()).hexdigest()
    file.write_text(CONFIG.format(port=port, key=key, store=store), encoding="utf-8")
    arguments = ["-W", "always", str(HERE / "soaked.py"), str(file), *leaks]
    environ = {
        **os.environ,
        "PYTHONMALLOC": "malloc",
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0",
        "STATE_DIRECTORY": str(folder),
    }
    with (folder / "said").open("wb") as said:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env=environ,
            stdin=PIPE,
            stdout=PIPE,
            stderr=said,
            limit=LONGEST,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(30):
                line = await process.stdout.readline()
            assert line, (folder / "said").read_text(encoding="utf-8")
            yield Daemon(process, int(line))
            process.stdin.close()
            async with asyncio.timeout(30):
                await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


async def rounds(
    streams: int, aborts: int, soak: Soak, daemon: Daemon, tell: Callable[[str], object]
) -> None:
    """Do all rounds: `streams` requests after the warm-up, and `aborts` of each phase."""
    later = ROUNDS - WARM_UP
    for number in range(ROUNDS):
        kinds = itertools.islice(itertools.cycle(KINDS), -(-streams // later))
        phases = itertools.chain.from_iterable(
            itertools.repeat(phase, -(-aborts // later)) for phase in PHASES
        )
        work = iter([*kinds, *phases])
        workers = [Worker(daemon.port, KEY) for _ in range(WORKERS)]
        done = await asyncio.gather(*(worker.run(work) for worker in workers))
        soak.requests.append((soak.requests or [0])[-1] + sum(done))
        like = soak.held[WARM_UP - 1] if number >= WARM_UP else None
        soak.held.append(await daemon.at_rest(like))
        tell(soak.row(number))


async def run(
    streams: int,
    aborts: int,
    *,
    store: str = "memory:",
    leaks: Sequence[str] = (),
    tell: Callable[[str], object] = lambda _: None,
) -> Soak:
    """Soak a daemon."""
    soak = Soak()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = f"sqlite:{folder}/sessions.db" if store == "sqlite" else store
        async with (
            Upstream(answers()) as port,
            running(port, place, leaks, folder) as daemon,
        ):
            tell(HEADER)
            await rounds(streams, aborts, soak, daemon, tell)
        soak.judge((folder / "said").read_text(encoding="utf-8"))
    return soak


def main() -> int:
    """Soak as the command line says; 1 if anything has grown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=20_000)
    parser.add_argument("--aborts", type=int, default=2_000, help="in each phase")
    parser.add_argument("--minutes", type=float, help="as many requests as these take, about")
    parser.add_argument("--store", choices=["memory:", "sqlite"], default="memory:")
    parser.add_argument("--leak", choices=sorted(LEAKS), action="append", default=[])
    given: Any = parser.parse_args()
    streams, aborts = given.streams, given.aborts
    if given.minutes:
        began = time.monotonic()
        asyncio.run(run(1000, 100, store=given.store))
        many = given.minutes * 60 / (time.monotonic() - began)
        streams, aborts = int(1000 * many), int(100 * many)
    began = time.monotonic()
    print(
        f"{streams} requests, {aborts} aborts in each of {len(PHASES)} phases: {', '.join(PHASES)}"
    )
    soak = asyncio.run(run(streams, aborts, store=given.store, leaks=given.leak, tell=print))
    took = time.monotonic() - began
    print(f"memory: {soak.growth:+.1f} bytes per request (at most {MOST_GROWTH:g}); {took:.0f} s")
    for sentence in soak.wrong or ["nothing has grown"]:
        print(sentence)
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
