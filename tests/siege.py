"""How others fare while attackers hold slow sockets open and send decompression bombs.

    python tests/siege.py

200 clients ask now and then, by turns alone and under attack; their 99th percentiles are compared.
Upstream, daemon and attackers are processes of their own. Ends with 1 where the median of the
rounds under attack is more than twice that of the others, or anybody got a wrong answer.
"""
# ruff: noqa: T201 - a program for a terminal prints

import argparse
import asyncio
import gzip
import json
import os
import random
import statistics
import sys
import tempfile
import time
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from answers import chat_json
from child_rig import Child, child
from client import IncompleteBody, RawClient
from hostile import HOST, KEY, C, head, length, post
from rig import prompt
from steps import Step, json_answer
from upstream import Recorded, ScriptedUpstream

MIB = 2**20
WORST = 2.0  # times the latency without
BYTE_EVERY = 1.0  # seconds between the bytes of a slow socket
BODY = json.dumps(prompt(C)).encode()


@dataclass(frozen=True)
class Numbers:
    """How much of each."""

    clients: int = 200
    rate: float = 100.0  # requests per second of all clients
    seconds: float = 10.0  # of a turn
    rounds: int = 3
    slow: int = 1000  # sockets, every second of them slow in its head, the others in their body
    bombs: int = 2  # connections that send one after another
    unpacked: int = 200  # MiB of a bomb


@dataclass
class Attack:
    """What became of attackers."""

    bombs: Counter[str] = field(default_factory=Counter)  # answers by status
    slow: Counter[str] = field(default_factory=Counter)


@dataclass
class Report:
    """Seconds that each answer took, of each turn."""

    alone: list[list[float]] = field(default_factory=list)
    attacked: list[list[float]] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    attack: Attack = field(default_factory=Attack)

    @property
    def ratio(self) -> float:
        """How much worse the 99th percentile is under attack, by the medians of the turns."""
        alone, attacked = (
            statistics.median(percentile(turn, 99) for turn in turns)
            for turns in (self.alone, self.attacked)
        )
        return attacked / alone

    @property
    def right(self) -> bool:
        """Whether everybody was answered as it should be."""
        bombs, slow = set(self.attack.bombs), set(self.attack.slow)
        return set(self.statuses) == {200} and bombs <= {"413"} and slow <= {"closed", "408"}


def percentile(values: Sequence[float], percent: int) -> float:
    """Return a percentile."""
    return sorted(values)[min(len(values) - 1, len(values) * percent // 100)]


# Clients


async def normal(port: int, numbers: Numbers, report: Report) -> list[float]:
    """Let clients ask, each now and then, on connections that stay; return how long it took."""
    loop, took = asyncio.get_running_loop(), list[float]()
    end = loop.time() + numbers.seconds

    async def one(chance: random.Random) -> None:
        async with AsyncExitStack() as stack:
            client: RawClient | None = None
            while True:
                at = loop.time() + chance.expovariate(numbers.rate / numbers.clients)
                if at > end:
                    return
                await asyncio.sleep(at - loop.time())
                if client is None:  # not before: a first head is waited for but shortly
                    client = await stack.enter_async_context(await RawClient.connect(port))
                began = time.perf_counter()  # finer than the loop's clock
                await client.send(head(HOST, KEY, length(BODY)) + BODY)
                answer = await client.answer()
                took.append(time.perf_counter() - began)
                report.statuses[answer.status] += 1

    async with asyncio.TaskGroup() as clients:
        for number in range(numbers.clients):
            clients.create_task(one(random.Random(number)))  # noqa: S311 - moments, no secrets
    return took


# Attackers, in a process of their own


async def slow_socket(port: int, attack: Attack, *, in_head: bool) -> None:
    """Send a byte at a time for as long as that is taken, again and again."""
    whole = post() if in_head else head(HOST, KEY, "content-length: 100000") + b"{" * 1000
    at_once = 1 if in_head else whole.index(b"\r\n\r\n") + 5
    while True:
        async with await RawClient.connect(port) as client:
            over = asyncio.ensure_future(client.reader.read(2**16))
            try:
                await client.send(whole[:at_once])
                for at in range(at_once, len(whole)):
                    done, _ = await asyncio.wait([over], timeout=BYTE_EVERY)
                    if done:
                        break
                    await client.send(whole[at : at + 1])
                answer = await over
                attack.slow[answer[9:12].decode() if answer else "closed"] += 1
            except ConnectionError:
                attack.slow["closed"] += 1
            finally:
                over.cancel()


async def bomber(port: int, bomb: bytes, attack: Attack) -> None:
    """Send a bomb, again and again."""
    start = head(HOST, KEY, "content-encoding: gzip", "connection: close", length(bomb))
    while True:
        async with await RawClient.connect(port) as client:
            try:
                await client.send(start + bomb)
                attack.bombs[str((await client.answer()).status)] += 1
            except (ConnectionError, IncompleteBody) as error:
                attack.bombs[type(error).__name__] += 1


async def attackers(port: int, slow: int, bombs: int, unpacked: int) -> None:
    """Attack until standard input ends; tell when it has begun, and then what came of it."""
    # They stand for other machines: what they compute should not be missed here.
    os.nice(10)
    attack = Attack()
    packed = gzip.compress(bytes(unpacked * MIB), 6)
    loop = asyncio.get_running_loop()
    tasks = [
        loop.create_task(slow_socket(port, attack, in_head=number % 2 == 0))
        for number in range(slow)
    ]
    tasks += [loop.create_task(bomber(port, packed, attack)) for _ in range(bombs)]
    await asyncio.sleep(0.5)
    print("attacking", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
    print(json.dumps({"bombs": attack.bombs, "slow": attack.slow}), flush=True)


@asynccontextmanager
async def attacking(port: int, numbers: Numbers, attack: Attack) -> AsyncIterator[None]:
    """Attack meanwhile; then add what came of it."""
    facts = (port, numbers.slow, numbers.bombs, numbers.unpacked)
    command = (sys.executable, __file__, "--attack", *map(str, facts))
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert await process.stdout.readline() == b"attacking\n"
        yield
        process.stdin.close()
        told = json.loads(await process.stdout.readline())
        attack.bombs.update(told["bombs"])
        attack.slow.update(told["slow"])
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


# The upstream, in a process of its own


async def serve_upstream() -> None:
    """Answer chat completions until standard input ends; print the base URL first."""
    async with ScriptedUpstream() as upstream:
        script = json_answer(chat_json())

        def answer(_request: Recorded) -> Sequence[Step]:
            upstream.requests.clear()
            return script

        upstream.default = answer
        print(upstream.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def running_upstream() -> AsyncIterator[str]:
    """Run it; give its base URL."""
    command = (sys.executable, __file__, "--upstream")
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        await process.wait()


# The siege


async def siege(daemon: Child, numbers: Numbers) -> Report:
    """Let clients ask by turns alone and under attack."""
    report = Report()
    for _ in range(numbers.rounds):
        report.alone.append(await normal(daemon.port, numbers, report))
        async with attacking(daemon.port, numbers, report.attack):
            report.attacked.append(await normal(daemon.port, numbers, report))
        for name, turns in (("alone", report.alone), ("attacked", report.attacked)):
            halves = [f"p{each} {percentile(turns[-1], each) * 1000:.1f} ms" for each in (50, 99)]
            print(f"{name}: {len(turns[-1])} answers, {', '.join(halves)}", flush=True)
    return report


async def run(numbers: Numbers, **changes: Any) -> Report:
    """Start all of it, and let it go on for all rounds."""
    with tempfile.TemporaryDirectory(prefix="aiproxy-siege-") as folder:
        async with running_upstream() as url, child(url, Path(folder), **changes) as daemon:
            return await siege(daemon, numbers)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a siege; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, value in vars(Numbers()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--attack", type=int, nargs=4, help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    if options.pop("upstream"):
        uvloop.run(serve_upstream())
        return 0
    if attack := options.pop("attack"):
        uvloop.run(attackers(*attack))
        return 0
    report = uvloop.run(run(Numbers(**options)))
    print(f"bombs: {dict(report.attack.bombs)}, slow sockets: {dict(report.attack.slow)}")
    print(f"p99 under attack is {report.ratio:.2f} times that without")
    return 0 if report.right and report.ratio <= WORST else 1


if __name__ == "__main__":
    sys.exit(main())
