"""Malformed and ambiguous HTTP on the wire.

Each row of the tables is refused in our error shape or goes upstream as exactly one well-formed
request; behind it stands another, which is served where the connection lasts, and else never seen.
"""

import random

import pytest

from aiproxy import listener
from faults import Serve
from hostile import (
    BODY,
    CHUNKED,
    HIDDEN,
    HIDDEN_BODY,
    HOST,
    KEY,
    C,
    R,
    Wrong,
    bad,
    check_after,
    check_upstream,
    check_wire,
    chunked,
    chunks,
    cut,
    dial,
    head,
    judge,
    length,
    post,
    send,
    singly,
)
from hostile_tables import CRLF, ONE, ROWS, SIZE, TABLES, framed, sized, trailed
from upstream import ScriptedUpstream


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read on but shortly behind an answer that came before the request's end."""
    monkeypatch.setattr(listener, "LINGER", 0.1)


@pytest.mark.parametrize("pieces", ["one", "bytes"])
@pytest.mark.parametrize("table", TABLES)
async def test_table(table: str, pieces: str, serve: Serve, upstream: ScriptedUpstream) -> None:
    """Whole or byte by byte: one refusal or one well-formed request, and the daemon goes on."""
    proxy = await serve()
    wrong = Wrong()
    for name, row in TABLES[table].items():
        data = row.sent + row.behind
        with wrong.row(name):
            await judge(proxy, upstream, row, [data] if pieces == "one" else singly(data))
    assert wrong == {}
    await check_after(proxy, upstream)


@pytest.mark.parametrize("seed", range(4))
async def test_in_any_pieces(seed: int, serve: Serve, upstream: ScriptedUpstream) -> None:
    """The verdict is the same for pieces of any size."""
    proxy = await serve()
    chance = random.Random(seed)  # noqa: S311 - no secret is made of it
    wrong = Wrong()
    for name, row in list(ROWS.items())[seed::4]:
        data = row.sent + row.behind
        places = [chance.randrange(len(data)) for _ in range(chance.randrange(1, 8))]
        with wrong.row(f"{name}, cut at {places}"):
            await judge(proxy, upstream, row, cut(data, places))
    assert wrong == {}
    await check_after(proxy, upstream)


OFFERS: dict[str, list[str]] = {
    "plain": [],
    "h2c": ["connection: upgrade, http2-settings", "upgrade: h2c", "http2-settings: AA"],
    "websocket": ["connection: upgrade", "upgrade: websocket"],
}
METHODS = {
    "GET": "/v1/models", "HEAD": "/v1/models", "DELETE": f"{R}/resp_1", "OPTIONS": C, "PUT": C,
    "PATCH": C, "TRACE": "/", "CONNECT": "/v1/models", "POST": "/v1/unknown", "PROPFIND": C,
}  # fmt: skip


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_is_no_request(
    framing: str, offer: str, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """What the head frames as its body is never served, whatever the method; the next may be."""
    proxy = await serve()
    by = length(HIDDEN) if framing == "length" else CHUNKED
    body = HIDDEN if framing == "length" else chunks(HIDDEN)
    wrong = Wrong()
    for method, target in METHODS.items():
        wire = await dial(proxy.port)
        if method == "HEAD":
            wire.heads = {0}
        with wrong.row(method):
            await send(wire, [head(HOST, KEY, *OFFERS[offer], by, method=method, target=target)])
            await send(wire, [body])
            found, _ = await wire.until(1)
            assert found[0].status < 500
            await send(wire, [head(HOST, method="GET", target="/")])
            found, rest = await wire.until(2)
            assert rest == b""
            assert upstream.requests == [], "the body was served"
            assert wire.closed or found[1].json() == {"status": "ok"}
            check_wire(bytes(wire.received))
        wire.transport.abort()
        upstream.requests.clear()
    assert wrong == {}
    await check_after(proxy, upstream)


BEHIND = {
    "garbage": b"hello\r\n\r\n",
    "no host": head(KEY),
    "two lengths": framed("content-length: 1", "content-length: 2"),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a long field": post("x-a: " + "x" * 33_000),
}  # fmt: skip


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("close", [True, False])
async def test_what_is_behind_a_good_request(
    serve: Serve, upstream: ScriptedUpstream, *, close: bool, at_once: bool
) -> None:
    """A good request gets its own answer; one that came in one piece with garbage may get none.

    Then nothing of it goes upstream: the parser gives out nothing of a piece that it refuses.
    """
    proxy = await serve()
    good = post("connection: close") if close else post()
    wrong = Wrong()
    for name, behind in BEHIND.items():
        upstream.requests.clear()
        wire = await dial(proxy.port)
        with wrong.row(name):
            await send(wire, [good + behind] if at_once else [good])
            await wire.until(1)
            await send(wire, [] if at_once else [behind])
            found, rest = await wire.until(2)
            assert rest == b""
            statuses = [answer.status for answer in found]
            if at_once and len(statuses) == 1 and statuses[0] in (400, 431):
                assert upstream.requests == []
                continue
            assert statuses[:1] == [200], statuses
            assert set(statuses[1:]) <= (set() if close else {400, 431}), statuses
            (request,) = upstream.requests
            check_upstream(request, BODY)
        wire.transport.abort()
    assert wrong == {}
    await check_after(proxy, upstream)


WHOLE = chunked(ONE + CRLF + BODY + CRLF + b"0\r\nx-a: 1\r\n\r\n")
PLACES = {
    "in the method": 2,
    "in the target": 12,
    "in the version": WHOLE.index(b"P/1"),
    "in a name": WHOLE.index(b"thor"),
    "in a value": WHOLE.index(b"sk-"),
    "between CR and LF": WHOLE.index(b"\n"),
    "before the head's end": WHOLE.index(b"\r\n\r\n") + 2,
    "behind the head": WHOLE.index(b"\r\n\r\n") + 4,
    "in the size": WHOLE.index(b"\r\n\r\n") + 5,
    "in the chunk": WHOLE.index(BODY) + 30,
    "behind the chunk": WHOLE.index(BODY) + SIZE,
    "before the last chunk": WHOLE.index(BODY) + SIZE + 2,
    "behind the last chunk": WHOLE.index(b"0\r\nx-a") + 3,
    "in the trailer": len(WHOLE) - 5,
    "before the end": len(WHOLE) - 2,
}  # fmt: skip


async def test_an_early_close(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A request that ends too early goes nowhere, and nothing of it is answered as a success."""
    proxy = await serve()
    wrong = Wrong()
    for name, place in PLACES.items():
        wire = await dial(proxy.port)
        with wrong.row(name):
            await send(wire, [WHOLE[:place]])
            wire.transport.write_eof()
            found, _ = await wire.until_closed()
            assert all(400 <= answer.status < 500 for answer in found)
            assert upstream.requests == []
            check_wire(bytes(wire.received))
    assert wrong == {}
    await check_after(proxy, upstream)


@pytest.mark.parametrize("size", [b"7fffffffffffffff", b"ffffffffff"])
async def test_a_chunk_that_never_ends(
    size: bytes, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A chunk of a size that nobody will send is waited for as any other body."""
    proxy = await serve(timeouts={"client_body": "200ms"})
    row = bad(sized(size), 408, "request_timeout", behind=b"")
    await judge(proxy, upstream, row, [row.sent])
    await check_after(proxy, upstream)


TRAILERS = {
    "a key": KEY.encode(),
    "another key": b"x-api-key: other",
    "a coding": b"content-encoding: gzip",
    "an expectation": b"expect: x",
    "a request id": b"x-request-id: trailer",
    "what crosses": b"x-codex-trailer: 1",
    "where from": b"x-forwarded-for: 1.2.3.4",
}  # fmt: skip


@pytest.mark.parametrize("at_once", [True, False])
async def test_a_trailer_is_not_of_the_next_request(
    serve: Serve, upstream: ScriptedUpstream, *, at_once: bool
) -> None:
    """What ends one request says nothing of the next one, which may be another client's."""
    proxy = await serve(trusted_proxies=["127.0.0.1/32"])
    wrong = Wrong()
    for name, line in TRAILERS.items():
        upstream.requests.clear()
        wire = await dial(proxy.port)
        own = [] if name == "a key" else [KEY]
        following = head(HOST, *own, length(HIDDEN_BODY)) + HIDDEN_BODY
        with wrong.row(name):
            first = trailed(line + CRLF)
            await send(wire, [first + following] if at_once else [first])
            await wire.until(1)
            await send(wire, [] if at_once else [following])
            found, rest = await wire.until(2)
            assert rest == b""
            assert wire.closed or found[1].status == (401 if name == "a key" else 200)
            for request in upstream.requests:
                assert "trailer" not in str(request.headers), "it went upstream"
        wire.transport.abort()
    assert wrong == {}
    assert "1.2.3.4" not in {line["client"] for line in proxy.request_logs()}
    await check_after(proxy, upstream)


@pytest.mark.parametrize("offer", ["h2c", "websocket"])
async def test_what_is_behind_an_offer_is_not_lost(
    offer: str, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A head that came with an offer to upgrade keeps its body: that is no request of its own."""
    proxy = await serve()
    wire = await dial(proxy.port)
    await send(wire, [post(*OFFERS[offer]) + head(HOST, KEY, length(HIDDEN))])
    await wire.until(1)
    await send(wire, [HIDDEN])
    found, rest = await wire.until(2)
    wire.transport.abort()
    assert rest == b""
    assert wire.closed or found[1].status == 400
    assert len(upstream.requests) == 1, "the body was served"
    check_upstream(upstream.requests[0], BODY)
    await check_after(proxy, upstream)
