"""Requests as an attacker writes them, and what the wire then shows: every byte of it is judged."""

import asyncio
import json
import re
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import pytest

from client import Answer, IncompleteBody, RawClient
from invariants import SECRETS, check_invariants
from refusals import Refusal
from rig import CREDENTIAL, PROMPT_CANARY, TEAM_A, Proxy, prompt

if TYPE_CHECKING:
    from upstream import Recorded, ScriptedUpstream

C = "/v1/chat/completions"
E = "/v1/embeddings"
M = "/v1/messages"
R = "/v1/responses"

PATIENCE = 2.0  # seconds within which every connection has come to its verdict

BODY = json.dumps(prompt(C)).encode()
HIDDEN_MODEL = "org/hidden"  # of a request that stands behind another one
HIDDEN_BODY = json.dumps(prompt(C, model=HIDDEN_MODEL)).encode()

# All that may stand in a head that goes upstream (contract, section 3).
_MAY_CROSS = re.compile(
    r"host|content-(type|length)|accept(-encoding)?|user-agent|openai-beta|anthropic-(version|beta)"
    r"|x-stainless-.*|x-codex-.*|session[-_]id|thread-id|originator|x-client-request-id"
    r"|x-request-id|authorization|x-api-key"
)
_SAFE_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")


def head(*lines: str | bytes, method: str = "POST", target: str = C, version: str = "1.1") -> bytes:
    """Write a head of exactly these fields, each as it is."""
    fields = [line if isinstance(line, bytes) else line.encode("latin-1") for line in lines]
    first = f"{method} {target} HTTP/{version}".encode("latin-1")
    return b"\r\n".join([first, *fields, b"", b""])


HOST = "host: a"
KEY = f"authorization: Bearer {TEAM_A}"
CHUNKED = "transfer-encoding: chunked"


def length(body: bytes) -> str:
    """Write the field that frames a body by its length."""
    return f"content-length: {len(body)}"


def post(*lines: str | bytes, body: bytes = BODY, **first: str) -> bytes:
    """Write a good POST with further fields before the one of its length."""
    return head(HOST, KEY, *lines, length(body), **first) + body


def chunks(*pieces: bytes, last: bytes = b"0\r\n\r\n") -> bytes:
    """Write a chunked body."""
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + last


def chunked(body: bytes, *lines: str | bytes, **first: str) -> bytes:
    """Write a POST whose body is framed by chunks, and the body as it is."""
    return head(HOST, KEY, *lines, CHUNKED, **first) + body


HIDDEN = head(HOST, KEY, length(HIDDEN_BODY)) + HIDDEN_BODY


@dataclass(frozen=True)
class Row:
    """What is sent, and the one verdict on it, however it is cut into pieces."""

    sent: bytes
    refusal: Refusal | None = None  # None: it is served
    stays: bool | None = True  # whether the next request is served; None: it may be
    anthropic: bool = False
    behind: bytes = HIDDEN  # what follows, a whole request

    @property
    def expected(self) -> int:
        """The most answers that may come."""
        return 1 + (self.stays is not False and bool(self.behind))

    def on(self, path: str) -> "Row":
        """The same on another path, with its shape of errors."""
        sent = self.sent.replace(f" {C} ".encode(), f" {path} ".encode(), 1)
        return replace(self, sent=sent, anthropic=path == M)


def bad(sent: bytes, status: int = 400, code: str = "invalid_http", **more: Any) -> Row:
    """Refuse it, and close: what is behind it must not be looked at."""
    return Row(sent, Refusal(status, code, headers={"connection": "close"}), stays=False, **more)


def last(sent: bytes) -> Row:
    """Serve it, and close: aiproxy takes nothing that is behind chunks."""
    return Row(sent, stays=False)


def told(sent: bytes, status: int, code: str | None, *, anthropic: bool = False) -> Row:
    """Refuse it, and go on: it is well-formed."""
    return Row(sent, Refusal(status, code), anthropic=anthropic)


def closing(sent: bytes) -> Row:
    """Serve it, and close; what is behind it is another table's."""
    return Row(sent, stays=False, behind=b"")


class Wrong(dict[str, str]):
    """What went wrong, by the name of the row: a table is told as a whole."""

    @contextmanager
    def row(self, name: str) -> Iterator[None]:
        """Note a row that fails, and go on."""
        try:
            yield
        except TimeoutError:
            self[name] = "hangs"
        except (AssertionError, pytest.fail.Exception) as error:
            self[name] = str(error)[:300] or repr(error)


class Wire(asyncio.Protocol):
    """A connection that keeps every byte, also of one that is reset in the end."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.closed = False
        self.heads: set[int] = set()  # which answers have no body, since HEAD was asked
        self.news = asyncio.Event()
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send every piece at once, as it is."""
        self.transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Keep it."""
        self.received += data
        self.news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        """Whatever the way in which it ends."""
        self.closed = True
        self.news.set()

    async def answers(self) -> tuple[list[Answer], bytes]:
        """Return the whole answers so far, strictly read, and what is behind them."""
        found: list[Answer] = []
        rest = bytes(self.received)
        while rest:
            reader = asyncio.StreamReader()
            reader.feed_data(rest)
            reader.feed_eof()
            client = RawClient(reader, cast("Any", None))
            client._method = "HEAD" if len(found) in self.heads else "POST"
            try:
                found.append(await client.answer())
            except IncompleteBody:
                break
            rest = await reader.read()
        return found, rest

    async def until(self, number: int) -> tuple[list[Answer], bytes]:
        """Wait for so many answers, or for the close."""
        async with asyncio.timeout(PATIENCE):
            while True:
                self.news.clear()
                found, rest = await self.answers()
                if self.closed or len(found) >= number:
                    return found, rest
                await self.news.wait()

    async def until_closed(self) -> tuple[list[Answer], bytes]:
        """Wait for the close."""
        return await self.until(sys.maxsize)


async def dial(port: int) -> Wire:
    """Connect."""
    loop = asyncio.get_running_loop()
    _, wire = await loop.create_connection(Wire, "127.0.0.1", port)
    return wire


async def send(wire: Wire, pieces: Iterable[bytes]) -> None:
    """Send pieces, each on its own as far as the kernel lets them be."""
    for piece in pieces:
        if wire.closed:
            return
        wire.transport.write(piece)
        for _ in range(3):  # written, read, parsed
            await asyncio.sleep(0)


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Cut bytes at these places."""
    at = sorted({0, len(data), *(place for place in places if 0 < place < len(data))})
    return [data[start:end] for start, end in pairwise(at)]


def singly(data: bytes) -> list[bytes]:
    """Cut bytes into single ones; the middle of what is long in larger pieces."""
    whole = len(data)
    return cut(data, [*range(400), *range(400, whole, 997), *range(whole - 400, whole)])


def check_upstream(request: "Recorded", body: bytes, path: str = C) -> None:
    """Assert that this is well-formed, is all ours, and carries that body."""
    names = [name.lower() for name, _ in request.headers]
    assert len(set(names)) == len(names), names
    for name, value in request.headers:
        assert _MAY_CROSS.fullmatch(name.lower()), name
        assert _SAFE_VALUE.fullmatch(value), (name, value)
        assert TEAM_A not in value, name
    assert request.method == "POST"
    assert request.target == path
    assert request.header("content-length") == str(len(request.body))
    assert request.header("transfer-encoding") is None
    if path == M:
        assert request.header("x-api-key") == CREDENTIAL
    else:
        assert request.header("authorization") == f"Bearer {CREDENTIAL}"
    meant = json.loads(body)
    assert json.loads(request.body) == {"stream": False, **meant}


async def judge(proxy: Proxy, upstream: "ScriptedUpstream", row: Row, pieces: list[bytes]) -> None:
    """Send a row and assert its verdict, by what the client and the upstream saw."""
    before = len(upstream.requests)
    wire = await dial(proxy.port)
    try:
        await send(wire, pieces)
        found, rest = await wire.until(2 if row.behind else sys.maxsize)
    finally:
        wire.transport.abort()
    statuses = [answer.status for answer in found]
    check_wire(bytes(wire.received))
    assert rest == b""
    assert statuses, "no answer"
    if row.refusal is None:
        assert statuses[0] == 200, f"{statuses} {found[0].body!r}"
    else:
        row.refusal.check(found[0], anthropic=row.anthropic)
    if row.stays is None:
        assert wire.closed or statuses[1:] == [200]
    else:
        assert statuses[1:] == [200] * (row.expected - 1)
    bodies = [BODY] * (row.refusal is None) + [HIDDEN_BODY] * len(statuses[1:])
    seen = upstream.requests[before:]
    assert len(seen) == len(bodies), "requests went upstream"
    for request, body in zip(seen, bodies, strict=True):
        check_upstream(request, body)
    assert (await proxy.post()).status == 200


def check_wire(received: bytes) -> None:
    """Assert that nothing secret is in what a client received, and no bug of ours."""
    for secret in (*SECRETS, PROMPT_CANARY):
        assert secret.encode() not in received, secret
    assert b"internal_error" not in received
    assert b"HTTP/1.1 5" not in received, received


async def check_after(proxy: Proxy, upstream: "ScriptedUpstream") -> None:
    """Assert the invariants, and that nothing was taken for a bug."""
    await check_invariants(proxy, upstream)
    assert "internal_error" not in {line["outcome"] for line in proxy.request_logs()}
    assert [line for line in proxy.logs() if line["level"] == "error"] == []
