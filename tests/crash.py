"""Proof that kill -9 loses nothing: every id that a client saw complete is there after it.

    python tests/crash.py --rounds 100

A daemon with a SQLite store is put under load and killed at a random moment, round after round on
the same file. Each time it is back, it is asked for every id whose answer was seen complete in the
round before and for some older ones, and to continue some of both. Ends with 1 if any was lost.
"""
# ruff: noqa: T201 - a program for a terminal prints

import argparse
import asyncio
import hashlib
import json
import random
import secrets
import signal
import socket
import sqlite3
import sys
import tempfile
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import uvloop

from client import Answer, IncompleteBody, RawClient, parse_sse
from responses import message_item, responses_events, responses_json
from steps import Chunk, EndChunks, Headers, Send, Step, json_answer, stream
from upstream import Recorded, ScriptedUpstream

ROOT = Path(__file__).resolve().parent.parent
PATH = "/v1/responses"
KEY = "sk-aip-of-the-crash-test"
HEADERS = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
START_LIMIT = 30.0  # seconds for a program to be ready
LONGEST = 8  # turns of one conversation
SAMPLE = 50  # ids of a round that are continued, and of older rounds that are asked for
CONFIG = """\
listen: 127.0.0.1:{port}
admin: 127.0.0.1:{admin}
upstreams:
  fast: {{url: "{upstream}", apis: [responses]}}
routes:
  - {{model: m, upstreams: [fast]}}
keys:
  me: {{sha256: {key}}}
sessions: {{store: "{store}", max_bytes: 64GiB}}
log: {{level: warning, format: json}}
"""


# The upstream


NUMBER, ITEMS = b"#NUMBER##", b"#IT#"  # as long as what they stand for
TEXT = f"{NUMBER.decode()} heard {ITEMS.decode()}"


class Answers:
    """Makes answers that tell how many items the upstream was given, each with ids of its own."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._upstream = upstream
        self._number = 0
        item = message_item(TEXT, item_id=f"msg_{NUMBER.decode()}")
        facts: Any = {"model": "m", "items": [item], "response_id": f"resp_{NUMBER.decode()}"}
        self._whole = _encoded(json_answer(responses_json(**facts)))
        self._streamed = _encoded(stream(responses_events(**facts)))

    def __call__(self, request: Recorded) -> Sequence[Step]:
        """Answer one request."""
        self._upstream.requests.clear()
        self._number += 1
        body = request.json()
        given = body["input"]
        items = len(given) if isinstance(given, list) else 1
        answer = self._streamed if body["stream"] else self._whole
        answer = answer.replace(NUMBER, b"%09d" % self._number)
        return [Send(answer.replace(ITEMS, b"%04d" % items))]


def _encoded(script: Iterable[Step]) -> bytes:
    writes = Headers | Send | Chunk | EndChunks
    return b"".join(step.encode() for step in script if isinstance(step, writes))


async def serve_upstream() -> None:
    """Serve until standard input ends; print the base URL first."""
    async with ScriptedUpstream() as upstream:
        upstream.default = Answers(upstream)
        print(upstream.url, flush=True)
        await asyncio.to_thread(sys.stdin.read)


@asynccontextmanager
async def running_upstream() -> AsyncIterator[str]:
    """Run the upstream in a process of its own; give its base URL."""
    command = (sys.executable, __file__, "--upstream")
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_LIMIT):
            url = (await process.stdout.readline()).decode().strip()
        yield url
    finally:
        await _end(process)


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGKILL)
    await process.wait()


# The daemon


@dataclass
class Daemon:
    """`aiproxy serve`, as often as it is started, on ports that were free and one store."""

    folder: Path
    upstream: str
    store: str
    port: int = 0
    expected: bool = False  # its end is
    process: Process | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.kill()

    async def start(self) -> None:
        """Start it and wait until it answers."""
        self.port, admin = _free_ports()
        config = self.folder / "aiproxy.yaml"
        facts = {"upstream": self.upstream, "store": self.store, "port": self.port, "admin": admin}
        hashed = hashlib.sha256(KEY.encode()).hexdigest()
        config.write_text(CONFIG.format(**facts, key=hashed))
        command = (sys.executable, "-m", "aiproxy", "serve", "--config", str(config))
        with (self.folder / "log").open("wb") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command, cwd=ROOT, stdin=DEVNULL, stdout=log, stderr=STDOUT
            )
        self.expected = False
        async with asyncio.timeout(START_LIMIT):
            while self.process.returncode is None:
                try:
                    async with await RawClient.connect(self.port):
                        return
                except OSError:
                    await asyncio.sleep(0.01)
        raise RuntimeError((self.folder / "log").read_text())

    async def kill(self) -> None:
        """End it by SIGKILL, if it runs."""
        self.expected = True
        if self.process is not None:
            await _end(self.process)


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


# The clients


class Seen(NamedTuple):
    """A response that a client saw complete: its text, and its turns from the root on."""

    id: str
    text: str
    turns: int


def response_in(body: bytes) -> Any:
    """Return the response that is complete in a JSON answer or a stream, if it has one."""
    if body.startswith(b"{"):
        return json.loads(body)
    ends = [data for kind, data in parse_sse(body) if kind == "response.completed"]
    return json.loads(ends[0])["response"] if ends else None


def text_of(response: Any) -> str:
    """Return the text of a response."""
    return str(response["output"][0]["content"][0]["text"])


async def ask(
    client: RawClient, previous: Seen | None, *, streams: bool
) -> tuple[Seen | None, Answer | None]:
    """Make a turn; return what was seen complete of it, and the answer if it came whole."""
    body: dict[str, Any] = {"model": "m", "input": "go on", "stream": streams}
    if previous is not None:
        body["previous_response_id"] = previous.id
    await client.request("POST", PATH, HEADERS, json.dumps(body).encode())
    answer = None
    try:
        answer = await client.answer()
        response = response_in(answer.body) if answer.status == 200 else None
    except IncompleteBody as cut:
        # a stream whose last event came is complete to a client, with or without its last chunk
        response = response_in(cut.partial) if streams else None
    if response is None:
        return None, answer
    turns = 1 if previous is None else previous.turns + 1
    return Seen(response["id"], text_of(response), turns), answer


def heard_all(seen: Seen) -> bool:
    """Tell whether the upstream was given all the items of the turns before."""
    return seen.text.endswith(f" heard {2 * seen.turns - 1:04}")


@dataclass
class Load:
    """Clients that ask on and on until the daemon is killed; `seen` is all they saw complete."""

    daemon: Daemon
    wanted: int
    seen: list[Seen] = field(default_factory=list)
    enough: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, connections: int, choose: random.Random) -> None:
        """Ask on so many connections; some milliseconds after enough was seen, kill the daemon."""
        async with asyncio.TaskGroup() as clients:
            for _ in range(connections):
                clients.create_task(self._client(random.Random(choose.random())))  # noqa: S311
            await self.enough.wait()
            await asyncio.sleep(choose.uniform(0, 0.05))
            await self.daemon.kill()

    async def _client(self, choose: random.Random) -> None:
        try:
            async with await RawClient.connect(self.daemon.port) as client:
                await self._talk(client, choose)
        except (OSError, IncompleteBody):
            if not self.daemon.expected:
                raise

    async def _talk(self, client: RawClient, choose: random.Random) -> None:
        mine: list[Seen] = []
        while True:
            older = [seen for seen in mine[-20:] if seen.turns < LONGEST]
            previous = choose.choice(older) if older and choose.random() < 0.5 else None
            seen, answer = await ask(client, previous, streams=choose.random() < 0.5)
            if seen is not None:
                mine.append(seen)
                self.seen.append(seen)
            if len(self.seen) >= self.wanted:
                self.enough.set()
            if answer is None:
                raise IncompleteBody(b"")
            if seen is None or not heard_all(seen):
                raise RuntimeError(f"after {previous} came {answer}")


async def is_there(client: RawClient, one: Seen) -> bool:
    """Tell whether GET has it, with what was seen of it."""
    await client.request("GET", f"{PATH}/{one.id}", HEADERS)
    answer = await client.answer()
    if answer.status != 200:
        return False
    response = answer.json()
    return (response["id"], text_of(response)) == (one.id, one.text)


async def goes_on(client: RawClient, one: Seen) -> bool:
    """Tell whether its conversation can be continued, and as a whole."""
    child, _ = await ask(client, one, streams=False)
    return child is not None and heard_all(child)


async def lost_of(
    port: int, seen: Iterable[Seen], holds: Callable[..., Any] = is_there, connections: int = 32
) -> set[str]:
    """Return the ids for which it does not hold, asked on so many connections."""
    left = iter(seen)
    lost: set[str] = set()

    async def work() -> None:
        async with await RawClient.connect(port) as client:
            for one in left:
                if not await holds(client, one):
                    lost.add(one.id)

    async with asyncio.TaskGroup() as workers:
        for _ in range(connections):
            workers.create_task(work())
    return lost


# The series


@dataclass
class Report:
    """What a series found."""

    rounds: int = 0
    seen: int = 0
    lost: list[str] = field(default_factory=list)
    integrity: str = "not a file"  # what SQLite says of it at the end
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.seen} ids seen complete, {len(self.lost)} lost,"
            f" {self.seconds:.1f} s"
        )


async def series(
    folder: Path,
    *,
    rounds: int,
    ids: int,
    connections: int = 32,
    seed: object = 0,
    store: str | None = None,
) -> Report:
    """Kill a daemon `rounds` times after its clients saw about `ids` answers each.

    The database is below `folder`, unless another `store` is given.
    """
    choose = random.Random(str(seed))  # noqa: S311 - moments, no secrets
    file = folder / "sessions.db"
    report, older, began = Report(), list[Seen](), time.monotonic()
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(running_upstream())
        daemon = Daemon(folder, upstream, store or f"sqlite:{file}")
        await stack.enter_async_context(daemon)
        await daemon.start()
        for _ in range(rounds):
            load = Load(daemon, choose.randint(ids, ids + ids // 5))
            await load.run(connections, choose)
            await daemon.start()
            known = _some(choose, older)
            some = _some(choose, load.seen) + known[: SAMPLE // 5]
            lost = await lost_of(daemon.port, load.seen + known, is_there, connections)
            lost |= await lost_of(daemon.port, some, goes_on, connections)
            report.rounds += 1
            report.seen += len(load.seen)
            report.lost += sorted(lost)
            report.seconds = time.monotonic() - began
            older += [one for one in load.seen if one.id not in lost]
            print(report, f"({len(load.seen)} and {len(lost)} in this round)", flush=True)
    if file.exists():
        report.integrity = await asyncio.to_thread(check_file, file)
    return report


def _some(choose: random.Random, seen: Sequence[Seen]) -> list[Seen]:
    return choose.sample(seen, min(SAMPLE, len(seen)))


def check_file(file: Path) -> str:
    """Return what SQLite finds wrong with a database, `ok` if nothing."""
    with closing(sqlite3.connect(file)) as connection:
        return "; ".join(row[0] for row in connection.execute("PRAGMA integrity_check"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a series; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--ids", type=int, default=1000, help="seen complete in each round")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seed", default=secrets.token_hex(4), help="of choices and moments")
    parser.add_argument("--store", help="instead of a file; `memory:` shows what a loss looks like")
    parser.add_argument("--upstream", action="store_true", help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    if options.pop("upstream"):
        uvloop.run(serve_upstream())
        return 0
    print(f"seed {options['seed']}", flush=True)
    with tempfile.TemporaryDirectory(prefix="aiproxy-crash-") as folder:
        report = uvloop.run(series(Path(folder), **options))
    for lost in report.lost[:20]:
        print(f"lost: {lost}")
    print(f"{report}; integrity: {report.integrity}")
    return 1 if report.lost or report.integrity not in {"ok", "not a file"} else 0


if __name__ == "__main__":
    sys.exit(main())
