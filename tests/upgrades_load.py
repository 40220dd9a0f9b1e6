"""The clients of the upgrades, in a process of their own: requests that know their own answers.

    python tests/upgrades_load.py PORT RATE STREAMS IDLE

RATE requests a second are made: on connections that are kept until the server says
`Connection: close`, on new ones, and as turns of conversations on either; besides, STREAMS streams
are open at any time. A connection that is kept is never silent for longer than IDLE seconds. Prints
what was seen as JSON, now and then and, once standard input and all streams have ended, at last.
"""

import asyncio
import itertools
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

from client import parse_sse

HOST = "127.0.0.1"
PATH = "/v1/responses"
KEY = "sk-aip-of-the-upgrades"
KEPT, NEW, TURNS = 40, 8, 8  # clients of each kind
SHARES = (0.7, 0.15, 0.15)  # of the rate
LONGEST = 4  # turns of a conversation
LINGER = 0.2  # seconds for which a connection that is to be closed is watched
TELL = 0.5  # seconds between reports
PATIENCE = 60.0  # seconds for an answer that is no stream
SAMPLES = 5  # of what went wrong


class Lost(Exception):  # noqa: N818 - it says what became of the connection
    """The connection ended before the answer did."""


@dataclass
class Seen:
    """What the clients saw.

    Attributes:
        answers: by status, and code where it is an error.
        refused: connections.
        reset: requests whose connection ended before the answer.
        twice: answers that nobody had asked for.
        wrong: answers to something else, or not whole.
        cut: streams that did not come whole.
        streams: begin and end of each stream, on the system's monotonic clock.
        samples: of what went wrong.
    """

    asked: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    kept: int = 0  # answers on a connection that had one before
    renewed: int = 0  # connections that were given up because the server said so
    refused: int = 0
    reset: int = 0
    twice: int = 0
    wrong: int = 0
    cut: int = 0
    streams: list[tuple[float, float]] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)

    def sample(self, what: str) -> None:
        """Keep a few of what went wrong."""
        if len(self.samples) < SAMPLES:
            self.samples.append(what[:400])


class Link(asyncio.Protocol):
    """One connection: asks one thing at a time."""

    def __init__(self, seen: Seen) -> None:
        self._seen = seen
        self._data = bytearray()
        self._body = bytearray()
        self._at = 0  # of what is not decoded yet
        self._head: dict[str, str] = {}
        self._answer: asyncio.Future[tuple[dict[str, str], bytes]] | None = None
        self.open = False
        self.answers = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where requests go."""
        self._transport = cast("asyncio.Transport", transport)
        self.open = True

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell who waits."""
        self.open = False
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Lost(f"{exc!r} after {bytes(self._data[:200])!r}"))

    async def ask(self, data: bytes, patience: float | None) -> tuple[dict[str, str], bytes]:
        """Send a request; return header fields and body of its answer.

        Raises:
            Lost: there is none.
        """
        self._answer = asyncio.get_running_loop().create_future()
        if self.open:
            self._transport.write(data)
        else:
            raise Lost("closed before")
        try:
            async with asyncio.timeout(patience):
                return await self._answer
        except TimeoutError:
            raise Lost("no answer in time") from None
        finally:
            self._answer = None

    def data_received(self, data: bytes) -> None:
        """Decode; what nobody asked for is counted."""
        if self._answer is None or self._answer.done():
            self._seen.twice += 1
            self._seen.sample(f"not asked for: {data!r}")
            return
        self._data += data
        if not self._head and not self._take_head():
            return
        if (body := self._take_body()) is None:
            return
        head, self._head = self._head, {}
        self.answers += 1
        self._answer.set_result((head, body))
        if self._data:
            self.data_received(bytes(self._data))
        if "close" in head.get("connection", ""):
            self.give_up()

    def give_up(self) -> None:
        """Use it no more; what comes yet is seen."""
        if self.open:
            self.open = False
            asyncio.get_running_loop().call_later(LINGER, self._transport.abort)

    def _take_head(self) -> bool:
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return False
        first, *lines = self._data[:end].decode("latin-1").split("\r\n")
        self._head = {"": first.split(" ")[1]}
        for line in lines:
            name, _, value = line.partition(":")
            self._head[name.lower()] = value.strip()
        del self._data[: end + 4]
        return True

    def _take_body(self) -> bytes | None:
        if "content-length" in self._head:
            size = int(self._head["content-length"])
            if len(self._data) < size:
                return None
            body = bytes(self._data[:size])
            del self._data[:size]
            return body
        while (end := self._data.find(b"\r\n")) >= 0:
            size = int(self._data[:end], 16)
            if len(self._data) < end + 4 + size:
                return None
            self._body += self._data[end + 2 : end + 2 + size]
            del self._data[: end + 4 + size]
            if not size:
                body, self._body = bytes(self._body), bytearray()
                return body
        return None


class Client:
    """Asks on a connection of its own, which it keeps as long as it may."""

    def __init__(self, port: int, seen: Seen, numbers: "itertools.count[int]") -> None:
        self._port = port
        self._seen = seen
        self._numbers = numbers
        self._link = Link(seen)
        self._where = ""  # the last answer came

    async def ask(
        self, body: dict[str, Any], *, streams: bool = False
    ) -> tuple[str, dict[str, str], bytes] | None:
        """Ask; return the name of the request and its answer, None if there was none."""
        seen = self._seen
        name = f"r{os.getpid()}-{next(self._numbers)}"
        seen.asked += 1
        try:
            if not self._link.open:
                await self._connect()
            data = request(name, {**body, "stream": streams})
            head, answer = await self._link.ask(data, None if streams else PATIENCE)
        except ConnectionRefusedError:
            seen.refused += 1
            return None
        except (Lost, OSError) as error:
            seen.reset += not streams
            seen.cut += streams
            seen.sample(f"{name} ({self._link.answers} answers came there before): {error}")
            return None
        seen.kept += self._link.answers > 1
        seen.renewed += "close" in head.get("connection", "")
        self._where = f"{name} (answer {self._link.answers} of its connection)"
        return name, head, answer

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, self._link = await loop.create_connection(lambda: Link(self._seen), HOST, self._port)

    def renew(self) -> None:
        """Take a new connection for the next request."""
        self._link.give_up()

    async def turn(self, previous: str | None, items: int, *, store: bool) -> str | None:
        """Make a turn whose upstream must be given so many items; return its id."""
        body: dict[str, Any] = {"model": "m", "input": "go on", "store": store}
        if previous is not None:
            body["previous_response_id"] = previous
        asked = await self.ask(body)
        if asked is None or not self._is_answer(asked):
            return None
        name, _, answer = asked
        response = json.loads(answer)
        if response["output"][0]["content"][0]["text"] != f"{name} {items}":
            self._seen.wrong += 1
            self._seen.sample(f"{name} with {items} items: {answer!r}")
            return None
        return str(response["id"])

    async def stream(self) -> None:
        """Read a stream, which must come whole."""
        began = time.monotonic()
        asked = await self.ask({"model": "m", "input": "go on", "store": False}, streams=True)
        if asked is not None and self._is_answer(asked):
            name, _, answer = asked
            if is_whole(name, answer):
                self._seen.streams.append((began, time.monotonic()))
            else:
                self._seen.cut += 1
                self._seen.sample(f"{name}: ...{answer[-400:]!r}")

    def _is_answer(self, asked: tuple[str, dict[str, str], bytes]) -> bool:
        """Count an answer; tell whether it is what was asked for."""
        name, head, answer = asked
        status, told = head[""], head.get("x-request-id")
        if status != "200":
            status += f" {json.loads(answer)['error']['code']}"
            status += "" if {"retry-after", "connection"} <= head.keys() else " bare"
            self._seen.sample(f"{self._where}: {status}")
        self._seen.answers[status] += 1
        if told != name:
            self._seen.wrong += 1
            self._seen.sample(f"{name} was answered for {told}")
        return status == "200" and told == name


def request(name: str, body: dict[str, Any]) -> bytes:
    """Encode a request."""
    payload = json.dumps(body).encode()
    return (
        f"POST {PATH} HTTP/1.1\r\nhost: {HOST}\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\nx-request-id: {name}\r\nx-client-request-id: {name}\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    ).encode() + payload


def is_whole(name: str, body: bytes) -> bool:
    """Tell whether a stream has all pieces in order, and their sum in its one end."""
    facts = [json.loads(data) for _, data in parse_sse(body)]
    pieces = [fact["delta"] for fact in facts if fact["type"] == "response.output_text.delta"]
    kinds = [fact["type"] for fact in facts]
    return (
        kinds[-1:] == ["response.completed"]
        and kinds.count("response.completed") == 1
        and [piece.strip() for piece in pieces] == [f"{name}:{at}" for at in range(len(pieces))]
        and facts[-1]["response"]["output"][0]["content"][0]["text"] == "".join(pieces)
        and [fact["sequence_number"] for fact in facts] == list(range(len(facts)))
    )


class Load:
    """All clients."""

    def __init__(self, port: int, rate: float, streams: int, idle: float) -> None:
        self.seen = Seen()
        self._port, self._rate, self._streams, self._idle = port, rate, streams, idle
        self._numbers = itertools.count()
        self._choose = random.Random(port)  # noqa: S311 - pauses, no secrets
        self._over = asyncio.Event()

    def _client(self) -> Client:
        return Client(self._port, self.seen, self._numbers)

    async def _paced(self, clients: int, share: float, step: Callable[[], Any]) -> None:
        """Do it again and again at a client's part of the rate, but never idle for too long."""
        period = min(clients / (self._rate * share), self._idle)
        await asyncio.sleep(self._choose.uniform(0, period))
        due = time.monotonic()
        while not self._over.is_set():
            await step()
            due = max(due + self._choose.uniform(0.5, 1.5) * period, time.monotonic())
            await asyncio.sleep(min(due - time.monotonic(), self._idle))

    async def _kept(self) -> None:
        client = self._client()
        await self._paced(KEPT, SHARES[0], lambda: client.turn(None, 1, store=False))

    async def _new(self) -> None:
        client = self._client()

        async def step() -> None:
            client.renew()
            await client.turn(None, 1, store=False)

        await self._paced(NEW, SHARES[1], step)

    async def _turns(self) -> None:
        client = self._client()
        previous, number = None, 0

        async def step() -> None:
            nonlocal previous, number
            if self._choose.random() < 0.5:
                client.renew()  # so that any instance may get it
            previous = await client.turn(previous, 1 + 2 * number, store=True)
            number += 1
            if previous is None or number == LONGEST:
                previous, number = None, 0

        await self._paced(TURNS, SHARES[2], step)

    async def _stream(self) -> None:
        while not self._over.is_set():
            client = self._client()
            await client.stream()
            client.renew()
            await asyncio.sleep(0.01)

    async def _tell(self) -> None:
        while not self._over.is_set():
            tell({"asked": self.seen.asked})
            await asyncio.sleep(TELL)

    async def run(self, ended: Callable[[], object]) -> None:
        """Ask until `ended` returns, in a thread; then until nothing is open."""
        async with asyncio.TaskGroup() as tasks:
            many = [(KEPT, self._kept), (NEW, self._new), (TURNS, self._turns)]
            for count, work in [*many, (self._streams, self._stream), (1, self._tell)]:
                for _ in range(count):
                    tasks.create_task(work())
            await asyncio.to_thread(ended)
            self._over.set()
        await asyncio.sleep(LINGER)
        tell(vars(self.seen))


def tell(report: dict[str, Any]) -> None:
    """Print a line for who started this."""
    print(json.dumps(report), flush=True)  # noqa: T201 - it is told


if __name__ == "__main__":
    port, rate, streams, idle = sys.argv[1:]
    uvloop.run(Load(int(port), float(rate), int(streams), float(idle)).run(sys.stdin.read))
