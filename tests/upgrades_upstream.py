"""The upstream of the upgrades: a fast one in a process of its own, that counts requests by id.

    python tests/upgrades_upstream.py SHORTEST LONGEST

A request names itself by `x-client-request-id`, and its answer repeats that and how many items of
input came. A stream takes from SHORTEST to LONGEST seconds. The base URL is printed first; once
standard input ends, what came is printed as JSON.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from typing import cast

import msgspec
import uvloop

from responses import message_item, responses_events, responses_json
from steps import Chunk, EndChunks, Headers, json_answer

HOST = "127.0.0.1"
STREAM = Headers(200, [("content-type", "text/event-stream"), ("transfer-encoding", "chunked")])
PIECE = 0.25  # seconds between the pieces of a stream
_TEXT, _ID = "#TEXT#", "#ID#"


class Asked(msgspec.Struct):
    """What is looked at in a body."""

    input: str | list[msgspec.Raw]
    stream: bool = False


class Upstream:
    """Answers, and counts.

    Attributes:
        came: how often each id came.
    """

    def __init__(self, shortest: float, longest: float) -> None:
        self.came: Counter[str] = Counter()
        self._choose = random.Random(longest)  # noqa: S311 - lengths, no secrets
        self._range = shortest, longest
        self._number = 0
        self._tasks: set[asyncio.Task[None]] = set()
        item = message_item(_TEXT, item_id=f"msg_{_ID}")
        whole = responses_json(items=[item], response_id=f"resp_{_ID}")
        self._whole = json.dumps(whole)

    def answer(self, name: str, body: bytes, transport: asyncio.Transport) -> None:
        """Answer one request."""
        self.came[name] += 1
        self._number += 1
        asked = msgspec.json.decode(body, type=Asked)
        items = 1 if isinstance(asked.input, str) else len(asked.input)
        if asked.stream:
            task = asyncio.get_running_loop().create_task(self._stream(name, transport))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return
        text = self._whole.replace(_TEXT, f"{name} {items}").replace(_ID, f"{self._number:08d}")
        head, sent = json_answer(text.encode())
        transport.write(head.encode() + sent.encode())  # type: ignore[union-attr]  # both write

    async def _stream(self, name: str, transport: asyncio.Transport) -> None:
        """Send a text of numbered pieces, one now and then."""
        pieces = max(1, round(self._choose.uniform(*self._range) / PIECE))
        frames = responses_events(" ".join(f"{name}:{number}" for number in range(pieces)))
        transport.write(STREAM.encode())
        for frame in frames:
            if b"output_text.delta" in frame:
                await asyncio.sleep(PIECE)
            transport.write(Chunk(frame).encode())
        transport.write(EndChunks().encode())


class Connection(asyncio.Protocol):
    """One connection of aiproxy."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._data = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where answers go."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer what is complete."""
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = bytes(self._data[:end]).decode("latin-1").split("\r\n")[1:]
            fields = {line.partition(":")[0].lower(): line.partition(":")[2] for line in head}
            size = end + 4 + int(fields["content-length"])
            if len(self._data) < size:
                return
            body = bytes(self._data[end + 4 : size])
            del self._data[:size]
            name = fields["x-client-request-id"].strip()
            self._upstream.answer(name, body, self._transport)


async def serve(upstream: Upstream, ended: Callable[[], object]) -> None:
    """Serve until `ended` returns, in a thread."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(upstream), HOST, 0, backlog=4096)
    print(f"http://{HOST}:{server.sockets[0].getsockname()[1]}/v1", flush=True)  # noqa: T201 - told
    await asyncio.to_thread(ended)
    twice = [name for name, times in upstream.came.items() if times > 1]
    print(json.dumps({"ids": len(upstream.came), "twice": twice}), flush=True)  # noqa: T201 - told


if __name__ == "__main__":
    uvloop.run(serve(Upstream(float(sys.argv[1]), float(sys.argv[2])), sys.stdin.read))
