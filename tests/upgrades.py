"""Proof that an upgrade refuses, resets and cuts nothing, while clients are served.

    python tests/upgrades.py --upgrades 10 --seconds 30

This process holds a listening socket as systemd does for a socket unit. Every `seconds / upgrades`
it starts a daemon that gets the socket passed, waits until it is ready, and ends the one before by
SIGTERM; that one drains beside it. All share one file of sessions and one state directory, and each
one's event loop is blocked at random. Clients in a process of their own ask all the time, and know
their answers. Goes on at that pace until there were enough requests. Ends with 1 if anything was
refused, reset, cut, answered or sent upstream twice, or if a daemon did not end well.
"""
# ruff: noqa: T201 - a program for a terminal prints

import argparse
import asyncio
import hashlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import uvloop

from client import RawClient
from upgrades_load import KEY

HERE = Path(__file__).resolve().parent
START_LIMIT = 60.0  # seconds for a program to be ready
END_LIMIT = 90.0  # seconds for one to end, with the longest stream
CONFIG = """\
upstreams:
  fast: {{url: "{upstream}", apis: [responses]}}
routes:
  - {{model: m, upstreams: [fast]}}
keys:
  me: {{sha256: {key}, limits: {{requests: 900000000/min, concurrent: 900000}}}}
sessions: {{store: "sqlite:{folder}/sessions.db", max_bytes: 64GiB}}
retries: 0
drain: {{delay: {delay}ms, timeout: 10min}}
log: {{level: info, format: json}}
"""


# Other programs


@asynccontextmanager
async def program(*command: str) -> AsyncIterator[Process]:
    """Run a program of this directory, which ends when its standard input does."""
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, str(HERE / command[0]), *command[1:]),
        stdin=PIPE,
        stdout=PIPE,
        limit=2**24,
    )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def line_of(running: Process) -> str:
    """Return the next line of its output."""
    assert running.stdout is not None
    async with asyncio.timeout(START_LIMIT):
        line = (await running.stdout.readline()).decode()
    if not line:
        raise RuntimeError("it has ended")
    return line.strip()


class Told:
    """What a program says, line by line, each in JSON.

    Attributes:
        last: the last line.
    """

    def __init__(self, running: Process) -> None:
        self.last: Any = None
        self._running = running
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self._running.stdout is not None
        async for line in self._running.stdout:
            self.last = json.loads(line)

    async def end(self) -> Any:
        """Tell the program to end; return what it says at last."""
        assert self._running.stdin is not None
        self._running.stdin.close()
        async with asyncio.timeout(END_LIMIT):
            await self._reading
        return self.last


@dataclass
class Instance:
    """A daemon that serves on a socket that it shares.

    Attributes:
        number: of it.
        told_to_end: when, on the system's monotonic clock.
    """

    number: int
    folder: Path
    process: Process
    told_to_end: float = 0.0

    @classmethod
    async def start(cls, number: int, folder: Path, sock: socket.socket, *, block: float) -> Self:
        """Start one, and wait until it says that it is ready."""
        environ = {
            **os.environ,
            "AIPROXY_ADMIN": f"unix:{folder}/admin-{number}",
            "STATE_DIRECTORY": str(folder / "state"),
        }
        command = (str(HERE / "blocked.py"), str(sock.fileno()), str(number), str(block), "serve")
        with (folder / f"log-{number}").open("wb") as log:
            running = await asyncio.create_subprocess_exec(
                *(sys.executable, *command, "--config", str(folder / "aiproxy.yaml")),
                stdin=DEVNULL, stdout=log, stderr=STDOUT, env=environ, cwd=HERE.parent,
                pass_fds=[sock.fileno()],
            )  # fmt: skip
        one = cls(number, folder, running)
        async with asyncio.timeout(START_LIMIT):
            while not await one.is_ready():
                if running.returncode is not None:
                    raise RuntimeError(one.log())
                await asyncio.sleep(0.02)
        return one

    async def is_ready(self) -> bool:
        """Ask it on its own admin socket."""
        try:
            link = await asyncio.open_unix_connection(f"{self.folder}/admin-{self.number}")
        except OSError:
            return False
        async with RawClient(*link) as client:
            await client.request("GET", "/-/ready")
            return (await client.answer()).status == 200

    def log(self) -> str:
        """Return what it has logged."""
        return (self.folder / f"log-{self.number}").read_text()

    def end(self, number: int = signal.SIGTERM) -> None:
        """Have it end."""
        self.told_to_end = time.monotonic()
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Wait for its end; return the exit code."""
        async with asyncio.timeout(END_LIMIT):
            return await self.process.wait()


# The series


@dataclass
class Report:
    """What a series found."""

    upgrades: int
    seconds: float
    seen: dict[str, Any]
    sent: dict[str, Any]
    lived: list[int]  # of each stream, the upgrades that it lived through
    requests_logged: Counter[str]
    ends: list[str]  # of daemons that did not end well
    failures: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        """Count what must not be."""
        seen, answers = self.seen, Counter(self.seen["answers"])
        served = answers.pop("200", 0)
        logged = self.requests_logged
        self.failures = {
            "refused": seen["refused"],
            "reset": seen["reset"],
            "answered otherwise than by 200": answers.total(),
            "answered twice, or unasked": seen["twice"],
            "answers to another request": seen["wrong"],
            "sent upstream twice": len(self.sent["twice"]),
            "sent upstream, not answered": abs(self.sent["ids"] - served),
            "logged twice": sum(times > 1 for times in logged.values()),
            "not logged": abs(len(logged) - served - answers.total()),
            "streams cut": seen["cut"],
            "daemons that did not end well": len(self.ends),
        }

    def __str__(self) -> str:
        """Return a table."""
        seen, lived = self.seen, self.lived
        facts = {
            "upgrades": self.upgrades,
            "seconds": f"{self.seconds:.1f}",
            "requests": seen["asked"],
            "answers": json.dumps(seen["answers"]),
            "on a connection used before": seen["kept"],
            "connections given up as told": seen["renewed"],
            "streams": len(seen["streams"]),
            "that lived through 1 upgrade": sum(times >= 1 for times in lived),
            "that lived through 3 upgrades": sum(times >= 3 for times in lived),
            **self.failures,
        }
        lines = [f"{name:<34}{value:>12}" for name, value in facts.items()]
        return "\n".join([*lines, *(f"  {sample}" for sample in seen["samples"]), *self.ends])


async def series(
    folder: Path,
    *,
    upgrades: int,
    seconds: float,
    requests: int,
    streams: int = 100,
    delay: float = 1.0,
    block: float = 0.1,
    longest: float = 4.0,
    way: int = signal.SIGTERM,
) -> Report:
    """Upgrade a daemon that is under load.

    Args:
        folder: of all files.
        upgrades: at least.
        seconds: that those take.
        requests: at least.
        streams: open at any time.
        delay: seconds of `drain.delay`.
        block: the share of the time that each event loop is blocked.
        longest: a stream, in upgrades.
        way: the signal that ends a daemon.
    """
    (folder / "state").mkdir()
    period = seconds / upgrades
    async with AsyncExitStack() as stack:
        sock = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=4096))
        lengths = str(period * 0.5), str(period * longest)
        upstream = await stack.enter_async_context(program("upgrades_upstream.py", *lengths))
        key = hashlib.sha256(KEY.encode()).hexdigest()
        facts = {"upstream": await line_of(upstream), "key": key, "folder": folder}
        text = CONFIG.format(delay=int(delay * 1000), **facts)
        (folder / "aiproxy.yaml").write_text(text)
        instances = [await Instance.start(0, folder, sock, block=block)]
        stack.callback(_kill, instances)
        numbers = sock.getsockname()[1], requests / seconds * 1.15, streams, delay / 4
        load = await stack.enter_async_context(program("upgrades_load.py", *map(str, numbers)))
        began, told = time.monotonic(), Told(load)
        while len(instances) <= upgrades or told.last["asked"] < requests:
            due = began + period * len(instances)
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            instances.append(await Instance.start(len(instances), folder, sock, block=block))
            instances[-2].end(way)
        await asyncio.sleep(delay)
        lasted = time.monotonic() - began
        seen = await told.end()
        instances[-1].end()
        ends = [end for one in instances if (end := await end_of(one))]
        sent = await Told(upstream).end()
    at = [one.told_to_end for one in instances[:-1]]
    lived = [sum(began < when < ended for when in at) for began, ended in seen["streams"]]
    logged = Counter(name for one in instances for name in requests_in(one.log()))
    return Report(len(instances) - 1, lasted, seen, sent, lived, logged, ends)


def _kill(instances: Sequence[Instance]) -> None:
    for one in instances:
        if one.process.returncode is None:
            one.process.kill()


async def end_of(one: Instance) -> str:
    """Return what is wrong with the end of a daemon, if anything is."""
    try:
        code = await one.ended()
    except TimeoutError:
        return f"daemon {one.number} does not end"
    said = [fact for fact in facts_of(one.log()) if fact["event"].startswith("drained ")]
    drained = said[0]["event"] if said else "it did not drain"
    bad = [fact for fact in facts_of(one.log()) if fact["level"] == "error"]
    if code == 0 and drained.endswith(", cut 0") and not bad:
        return ""
    return f"daemon {one.number}: exit code {code}, {drained}, {bad[:3]}"


def facts_of(log: str) -> list[dict[str, Any]]:
    """Return the lines of a log."""
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


def requests_in(log: str) -> list[str]:
    """Return the requests that a log has lines of."""
    return [fact["request_id"] for fact in facts_of(log) if fact["event"] == "request"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a series; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--upgrades", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0, help="that they take")
    parser.add_argument("--requests", type=int, default=50_000, help="at least")
    parser.add_argument("--streams", type=int, default=100, help="open at any time")
    parser.add_argument("--delay", type=float, default=1.0, help="drain.delay, in seconds")
    parser.add_argument("--block", type=float, default=0.1, help="share of the time")
    options = vars(parser.parse_args(arguments))
    with tempfile.TemporaryDirectory(prefix="aiproxy-upgrades-") as folder:
        report = uvloop.run(series(Path(folder), **options))
    print(report)
    return 1 if any(report.failures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
