"""The load of the soak: requests of every kind, clients that leave in every phase, an upstream.

Raw protocols on both sides, so that most of the machine is the daemon's.
"""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

PHASES = ("head", "body", "waiting", "waiting for JSON", "streaming", "before the terminal event")
_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_MARK = re.compile(rb"soak:([a-z0-9-]+)")
_ID = re.compile(rb'"(resp_[A-Za-z0-9_-]+)"')

# What is asked: path, model, mark (what the upstream makes of it), further fields.
KINDS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "stream": ("/v1/responses", "one", "well", {"stream": True}),
    "not stored": ("/v1/responses", "one", "well", {"stream": True, "store": False}),
    "JSON": ("/v1/responses", "one", "json", {}),
    "continued": ("/v1/responses", "one", "well", {"stream": True, "previous_response_id": ""}),
    "chat": ("/v1/chat/completions", "one", "well", {"stream": True}),
    "messages": ("/v1/messages", "one", "well", {"stream": True, "max_tokens": 99}),
    "bridged": ("/v1/responses", "bridged", "well", {"stream": True}),
    "overloaded first": ("/v1/responses", "pair", "503", {"stream": True}),
    "reset first": ("/v1/responses", "pair", "reset", {"stream": True}),
    "failed first": ("/v1/responses", "pair", "failed", {"stream": True}),
    "cut": ("/v1/responses", "one", "cut", {"stream": True}),
    "cut when bridged": ("/v1/responses", "bridged", "cut", {"stream": True}),
    "not to be continued": (
        *("/v1/responses", "one", "well"),
        {"stream": True, "previous_response_id": "resp_of_nobody"},
    ),
    "refused": ("/v1/responses", "nobody", "well", {}),
}
_ABORTED = {
    "waiting": ("/v1/responses", "pair", "stall", {"stream": True}),
    "waiting for JSON": ("/v1/responses", "one", "stall", {}),
    "streaming": ("/v1/responses", "one", "stall-begun", {"stream": True}),
    "before the terminal event": ("/v1/responses", "one", "stall-end", {"stream": True}),
}


def _request(key: str, path: str, model: str, mark: str, fields: dict[str, Any]) -> bytes:
    text = f"soak:{mark}"
    asked = {"messages": [{"role": "user", "content": text}]}
    body = json.dumps({
        "model": model,
        **({"input": text} if path == "/v1/responses" else asked),
        **fields,
    }).encode()  # fmt: skip
    head = f"POST {path} HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Worker:
    """A client that does one thing after the other, on one connection as long as it lasts."""

    def __init__(self, port: int, key: str) -> None:
        self._port = port
        self._key = key
        self._last = ""  # a response that can be continued
        self._connection: _Client | None = None

    async def run(self, work: Iterator[str]) -> int:
        """Do what comes; how much that was."""
        done = 0
        for name in work:
            async with asyncio.timeout(60):
                await (self._ask(name) if name in KINDS else self._leave(name))
            done += 1
        if self._connection is not None:
            self._connection.close()
            await self._connection.closed
        return done

    async def _connect(self) -> "_Client":
        loop = asyncio.get_running_loop()
        _, client = await loop.create_connection(_Client, "127.0.0.1", self._port)
        return client

    async def _ask(self, kind: str) -> None:
        path, model, mark, fields = KINDS[kind]
        if kind == "continued":
            fields = {**fields, "previous_response_id": self._last or None}
        if self._connection is None or self._connection.closed.done():
            self._connection = await self._connect()
        seen = await self._connection.ask(_request(self._key, path, model, mark, fields))
        if b"connection: close" in seen.lower() or b"response.failed" in seen:
            self._connection.close()  # the daemon does, too
            self._connection = None
        stored = fields.get("store", True) and kind in ("stream", "continued", "JSON")
        status = int(seen[9:12])
        if kind == "continued" and status == 400:
            self._last = ""
            return
        _check(kind, status, seen)
        if stored and (found := _ID.search(seen)) is not None:
            self._last = found[1].decode()

    async def _leave(self, phase: str) -> None:
        client = await self._connect()
        if phase in _ABORTED:
            request = _request(self._key, *_ABORTED[phase])
            begun = phase in ("streaming", "before the terminal event")
            await client.leave(
                request, b"output_text.done" if "terminal" in phase else b"event:" if begun else b""
            )
        else:
            request = _request(self._key, *KINDS["stream"])
            head = request.index(b"\r\n\r\n")
            await client.leave(request[: 60 if phase == "head" else head + 20], b"")


def _check(kind: str, status: int, seen: bytes) -> None:
    """Nothing may go another way than it should: else it is something else that is soaked."""
    expected = {"refused": 404, "not to be continued": 400}.get(kind, 200)
    assert status == expected, (kind, seen[:600])
    if "cut" in kind:
        assert b"response.failed" in seen, (kind, seen[-600:])
    elif status == 200 and kind not in ("JSON", "chat", "messages"):
        assert b"response.completed" in seen, (kind, seen[-600:])


class _Client(asyncio.Protocol):
    """One connection to the daemon."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[None] = loop.create_future()
        self._answered: asyncio.Future[bytes] = loop.create_future()
        self._until = b""
        self._seen = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it."""
        if not self.closed.done():
            self.closed.set_result(None)
        if not self._answered.done():
            self._answered.set_result(self._seen)

    def data_received(self, data: bytes) -> None:
        """Look whether that is all."""
        self._seen += data
        if not self._answered.done() and (
            self._until in self._seen if self._until else self._whole()
        ):
            self._answered.set_result(self._seen)

    def _whole(self) -> bool:
        head, end, body = self._seen.partition(b"\r\n\r\n")
        if not end:
            return False
        length = _LENGTH.search(head)
        return body.endswith(b"0\r\n\r\n") if length is None else len(body) >= int(length[1])

    async def ask(self, request: bytes) -> bytes:
        """Send a request, and wait for the whole answer."""
        self._seen = b""
        self._answered = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answered

    async def leave(self, sent: bytes, until: bytes) -> None:
        """Send this, wait for that, and go."""
        self._until = until
        self._transport.write(sent)
        if until:
            await self._answered
        else:
            await asyncio.sleep(0.005)  # so that it is on its way, or not: both are well
        self._transport.abort()
        await self.closed

    def close(self) -> None:
        """Close it."""
        self._transport.close()


class Upstream:
    """A model server that does what it is told in the prompt."""

    def __init__(self, answers: dict[str, bytes]) -> None:
        self.answers = answers
        self.served: set[asyncio.Transport] = set()

    async def __aenter__(self) -> int:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Served(self), "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def __aexit__(self, *_exc: object) -> None:
        self._server.close()
        for transport in self.served:
            transport.abort()
        while self.served:  # noqa: ASYNC110 - what closes them is the event loop alone
            await asyncio.sleep(0)


class _Served(asyncio.Protocol):
    """One connection of the daemon's."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._answers = upstream.answers
        self._given = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._upstream.served.add(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._upstream.served.discard(self._transport)

    def data_received(self, data: bytes) -> None:
        """Answer once the request is whole."""
        self._given += data
        head, end, body = self._given.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if end and length is not None and len(body) >= int(length[1]):
            self._given = b""
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        path = head.split(b" ", 2)[1]
        mark = _MARK.findall(body)[-1].decode()
        if path.startswith(b"/well/"):
            mark = "well"
        if mark == "stall":
            return
        if mark == "reset":
            self._transport.abort()
        elif mark == "503":
            self._transport.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
        elif mark == "json":
            whole = self._answers["json"]
            kind = (
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            )
            self._transport.write(kind % len(whole) + whole)
        else:
            self._stream(mark, path)

    def _stream(self, mark: str, path: bytes) -> None:
        api = "chat" if b"chat" in path else "messages" if b"messages" in path else "responses"
        events = self._answers[api].split(b"\n\n")[:-1]
        if mark == "cut":
            events = events[:-3]
        elif mark == "stall-begun":
            events = events[:4]
        elif mark == "stall-end":
            events = events[:-1]
        elif mark == "failed":
            failed = events[-1].replace(b"response.completed", b"response.failed")
            events = [events[0], failed.replace(b'"completed"', b'"failed"')]
        sent = b"".join(event + b"\n\n" for event in events)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        head += b"transfer-encoding: chunked\r\n\r\n"
        ends = b"" if mark.startswith("stall") else b"0\r\n\r\n"
        self._transport.write(head + b"%x\r\n%b\r\n" % (len(sent), sent) + ends)
