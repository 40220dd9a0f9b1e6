"""What `relay.py` measures against: an upstream, a relay as one writes it first, and a load.

Each is a process of its own, by `python relay_parts.py upstream|naive PORT ...`, so that its CPU
time can be told from that of the others.
"""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import uvloop
from aiohttp import ClientSession, ClientTimeout, TCPConnector, web

EVENTS = 22  # of a stream: created, twenty deltas, completed
PAUSE = 0.05  # seconds before each delta
KEY = "sk-aip-benchmark"

_ITEM = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant"}
_RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "status": "completed",
    "model": "m",
    "output": [{**_ITEM, "content": [{"type": "output_text", "text": "word " * 20}]}],
    "usage": {"input_tokens": 9, "output_tokens": 20, "total_tokens": 29},
}


def _event(number: int, kind: str, **members: object) -> bytes:
    data = json.dumps({"type": kind, "sequence_number": number, **members})
    return f"event: {kind}\ndata: {data}\n\n".encode()


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_WHOLE = json.dumps(_RESPONSE).encode()
JSON_ANSWER = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
    % (len(_WHOLE), _WHOLE)
)
_BEGIN = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_PARTS = [
    _BEGIN + _chunk(_event(0, "response.created", response={**_RESPONSE, "status": "in_progress"})),
    *(
        _chunk(
            _event(n, "response.output_text.delta", item_id="msg_1", output_index=0, delta="word ")
        )
        for n in range(1, EVENTS - 1)
    ),
    _chunk(_event(EVENTS - 1, "response.completed", response=_RESPONSE)) + _chunk(b""),
]


class _Upstream(asyncio.Protocol):
    """Answers each request at once, or as a paced stream; no HTTP beyond what relays send."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._had = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._had += data
        head, _, body = self._had.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
        if b"\r\n\r\n" not in self._had or len(body) < length:
            return
        self._had = body[length:]
        if b'"stream":true' in body or b'"stream": true' in body:
            self._send(0)
        else:
            self._transport.write(JSON_ANSWER)

    def _send(self, number: int) -> None:
        if not self._transport.is_closing():
            self._transport.write(_PARTS[number])
            if number + 1 < len(_PARTS):
                asyncio.get_running_loop().call_later(PAUSE, self._send, number + 1)


async def upstream(port: int) -> None:
    """Serve until the process is ended."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Upstream, "127.0.0.1", port, backlog=4096)
    await server.serve_forever()


# What one writes first: no limits, no usage, no metrics, no deadlines, no end to a broken stream.

_HOP = {"connection", "content-length", "transfer-encoding", "host", "keep-alive"}


async def _relay(url: str, session: ClientSession, request: web.Request) -> web.StreamResponse:
    if request.headers.get("Authorization") != f"Bearer {KEY}":
        return web.json_response({"error": {"message": "no key"}}, status=401)
    body = await request.read()
    asked = json.loads(body)
    headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP}
    async with session.post(url + request.path, data=body, headers=headers) as answer:
        back = {name: value for name, value in answer.headers.items() if name.lower() not in _HOP}
        if not asked.get("stream"):
            return web.Response(body=await answer.read(), status=answer.status, headers=back)
        response = web.StreamResponse(status=answer.status, headers=back)
        await response.prepare(request)
        async for chunk in answer.content.iter_any():
            await response.write(chunk)
        await response.write_eof()
        return response


async def naive(port: int, url: str) -> None:
    """Serve until the process is ended."""
    connector = TCPConnector(limit=0)
    async with ClientSession(connector=connector, timeout=ClientTimeout(total=None)) as session:
        app = web.Application()
        app.router.add_post("/v1/responses", partial(_relay, url, session))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=4096).start()
        await asyncio.Event().wait()


# The load


@dataclass
class Load:
    """Requests to one port.

    Attributes:
        connections: at the same time, each with one request at a time.
        requests: in all.
        stream: whether the answers are streams.
    """

    connections: int
    requests: int
    stream: bool

    @property
    def request(self) -> bytes:
        """A request, head and body."""
        fields = {"model": "m", "input": "word " * 9, "store": False, "stream": self.stream}
        body = json.dumps(fields).encode()
        return (
            b"POST /v1/responses HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %b\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
            % (KEY.encode(), len(body), body)
        )

    async def put_on(self, port: int) -> int:
        """Make all requests; return how many were answered in full."""
        left = iter(range(self.requests))
        clients = [_client(port, self, left) for _ in range(self.connections)]
        return sum(await asyncio.gather(*clients))


async def _client(port: int, load: Load, left: Iterator[int]) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    request, whole = load.request, 0
    for _ in left:
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b"content-length:" in head:
            body = await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
        else:
            body = await reader.readuntil(b"\r\n0\r\n\r\n")
        events = EVENTS if load.stream else 0
        whole += b" 200 " in head and body.count(b"\ndata: ") == events and b"completed" in body
    writer.close()
    return whole


def main(role: str, *arguments: str) -> None:
    """Be one of the processes."""
    roles: dict[str, Callable[..., Coroutine[None, None, None]]]
    roles = {"upstream": upstream, "naive": naive}
    port, *rest = arguments
    uvloop.run(roles[role](int(port), *rest))


if __name__ == "__main__":
    main(*sys.argv[1:])
