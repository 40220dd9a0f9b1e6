"""Heads of requests: paths, methods, framing, versions, and what a connection is good for after."""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable

import pytest

from client import Answer, RawClient
from refusals import Refusal, assert_closes, assert_stays
from rig import TEAM_A, Proxy, prompt
from upstream import ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]

R = "/v1/responses"
M = "/v1/messages"

UNKNOWN_URL = Refusal(404, "unknown_url")
NOT_HTTP = Refusal(400, "invalid_http", headers={"connection": "close"})
KEY = f"authorization: Bearer {TEAM_A}\r\n".encode()


def raw_post(*lines: str, path: str = R, version: str = "1.1", body: bytes | None = None) -> bytes:
    """Write a POST with a key; Content-Length is added unless `lines` frame the body."""
    payload = json.dumps(prompt()).encode() if body is None else body
    fields = [f"POST {path} HTTP/{version}", "host: a", f"authorization: Bearer {TEAM_A}", *lines]
    if not any(re.match("(?i)(content-length|transfer-encoding)", line) for line in lines):
        fields.append(f"content-length: {len(payload)}")
    return ("\r\n".join(fields) + "\r\n\r\n").encode("latin-1") + payload


UNKNOWN_PATHS = [
    "/v2/responses",
    "/responses",
    "/v1",
    "/v1/",
    "/v1/files",
    "//v1/responses",
    "/v1//responses",
    "/v1/./responses",
    "/v1/x/../responses",
    "/v1%2Fresponses",
    "/v1/%72esponses",
    "/V1/responses",
    "/v1/responses/",
    "/v1/responses/compact",
    "/v1/responses/input_tokens/",
    "/v1/responses/resp_1/other",
    "/v1/responses/resp_1/cancel/x",
    "/v1/chat",
    "/v1/chat/completions/",
    "/v1/chat/completions/..",
    "/v1/embeddings/..%2fresponses",
    "/v1/messages/count_tokens/",
    "/v1/messages/batches",
    "/metrics",
    "/-/healthy",
    "/%00",
]


@pytest.mark.parametrize("method", ["POST", "GET"])
async def test_unknown_paths(method: str, serve: Serve, upstream: ScriptedUpstream) -> None:
    """Paths are compared as they came: what only resembles one of ours is 404 unknown_url."""
    proxy = await serve()
    body = json.dumps(prompt()).encode() if method == "POST" else None
    for path in UNKNOWN_PATHS:
        client = await proxy.client()
        await client.request(method, path, proxy.headers(), body)
        UNKNOWN_URL.check(await client.answer(), anthropic=path.startswith(M))
        await assert_stays(client)
    assert upstream.requests == []


@pytest.mark.parametrize("path", [f"{R}/resp%2F..%2F..", f"{R}/..", f"{R}/a%3Fb%23c", f"{R}/%FF"])
async def test_ids_are_not_paths(path: str, serve: Serve, upstream: ScriptedUpstream) -> None:
    """An id with separators in it is an id that is not there."""
    proxy = await serve()
    Refusal(404, None).check(await proxy.get(path))
    assert upstream.requests == []


METHODS = {
    R: ("POST", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS"]),
    "/v1/chat/completions": ("POST", ["GET", "PUT"]),
    "/v1/embeddings": ("POST", ["GET", "DELETE"]),
    M: ("POST", ["GET", "PATCH"]),
    "/v1/models": ("GET, HEAD", ["POST", "DELETE"]),
    "/v1/models/gpt-test": ("GET, HEAD", ["POST", "DELETE"]),
    "/": ("GET, HEAD", ["POST", "PUT"]),
    f"{R}/resp_1": ("GET, HEAD, DELETE", ["POST", "PUT", "PATCH"]),
    f"{R}/resp_1/input_items": ("GET, HEAD", ["POST", "DELETE"]),
    f"{R}/resp_1/cancel": ("POST", ["GET", "HEAD", "DELETE"]),
}


async def test_other_methods(serve: Serve) -> None:
    """A known path with another method is 405 with Allow, and the connection stays."""
    proxy = await serve()
    for path, (allow, methods) in METHODS.items():
        for method in methods:
            client = await proxy.client()
            body = b"{}" if method in {"POST", "PUT", "PATCH"} else None
            await client.request(method, path, proxy.headers(), body)
            answer = await client.answer()
            assert set(answer.headers["allow"].split(", ")) == set(allow.split(", "))
            if method == "HEAD":
                assert (answer.status, answer.body) == (405, b"")
            else:
                Refusal(405, "method_not_allowed").check(answer, anthropic=path == M)
            await assert_stays(client)


async def test_the_root_and_head(serve: Serve) -> None:
    """GET / and HEAD / need no key; HEAD has the head of GET and no body."""
    proxy = await serve()
    client = await proxy.client()
    for path, fields in (("/", []), ("/v1/models", proxy.headers())):
        await client.request("GET", path, fields)
        got = await client.answer()
        await client.request("HEAD", path, fields)
        headed = await client.answer()
        assert (got.status, headed.status, headed.body) == (200, 200, b"")
        assert headed.headers["content-length"] == str(len(got.body))
        assert set(headed.headers) == set(got.headers)


UPGRADE = [("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-version", "13")]


async def test_an_upgrade(serve: Serve) -> None:
    """An Upgrade on /v1/responses is 426 with a JSON error."""
    proxy = await serve()
    for key in (TEAM_A, None):
        client = await proxy.client()
        await client.request("GET", R, proxy.headers(UPGRADE, key))
        Refusal(426, "upgrade_not_supported").check(await client.answer())


async def test_an_upgrade_to_http_2(serve: Serve) -> None:
    """A POST that offers h2c, as Java's client does, is answered in HTTP/1.1."""
    proxy = await serve()
    offer = [("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "A")]
    assert (await proxy.post("/v1/chat/completions", headers=offer)).status == 200


MALFORMED: dict[str, bytes] = {
    "no HTTP": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a line of HTTP/2.0": raw_post(version="2.0"),
    "a line of HTTP/1.2": raw_post(version="1.2"),
    "a line of HTTP/0.9": raw_post(version="0.9"),
    "absolute form": raw_post(path="http://api.openai.com/v1/responses"),
    "authority form": b"CONNECT api.openai.com:443 HTTP/1.1\r\nhost: a\r\n\r\n",
    "asterisk form": b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n",
    "no slash": raw_post(path="v1/responses"),
    "a fragment": raw_post(path="/v1/responses#x"),
    "length and chunks": raw_post(
        "content-length: 5", "transfer-encoding: chunked", body=b"0\r\n\r\n"
    ),
    "chunks and length": raw_post(
        "transfer-encoding: chunked", "content-length: 5", body=b"0\r\n\r\n"
    ),
    "two lengths": raw_post("content-length: 2", "content-length: 3", body=b"{} "),
    "the same length twice": raw_post("content-length: 2", "content-length: 2", body=b"{}"),
    "a list of lengths": raw_post("content-length: 2, 2", body=b"{}"),
    "a negative length": raw_post("content-length: -1", body=b""),
    "a length with a sign": raw_post("content-length: +2", body=b"{}"),
    "a length in hex": raw_post("content-length: 0x2", body=b"{}"),
    "another coding": raw_post("transfer-encoding: gzip", body=b""),
    "gzip and chunked": raw_post("transfer-encoding: gzip, chunked", body=b"0\r\n\r\n"),
    "chunked twice": raw_post(
        "transfer-encoding: chunked", "transfer-encoding: chunked", body=b"0\r\n\r\n"
    ),
    "chunked, misspelt": raw_post("transfer-encoding: xchunked", body=b"0\r\n\r\n"),
    "chunks in HTTP/1.0": raw_post(
        "transfer-encoding: chunked", version="1.0", body=b"0\r\n\r\n"
    ),
    "a bad chunk size": raw_post("transfer-encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "a chunk longer than it says": raw_post(
        "transfer-encoding: chunked", body=b"1\r\n{}\r\n0\r\n\r\n"
    ),
    "a space before the colon": raw_post("x-a : 1"),
    "a folded line": raw_post("x-a: 1", " 2"),
    "a line without a colon": raw_post("x-a"),
    "an empty name": raw_post(": 1"),
    "a zero byte": raw_post("x-a: 1\x002"),
    "a control character": raw_post("x-a: 1\x012"),
    "a bare CR": raw_post("x-a: 1\r2"),
    "no host": raw_post().replace(b"host: a\r\n", b""),
    "two hosts": raw_post("host: b"),
}  # fmt: skip


async def last_answer(client: RawClient) -> Answer:
    """Read an answer of any HTTP/1 version, and the close that must follow it."""
    async with asyncio.timeout(2.5):
        head, _, body = (await client.reader.read(-1)).partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    assert re.match(r"HTTP/1\.[01] \d{3} ", first), first
    fields = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in lines}
    assert fields["content-length"] == str(len(body))
    return Answer(int(first.split(" ")[1]), fields, body)


@pytest.mark.parametrize("part", range(4))
async def test_malformed_or_ambiguous(part: int, serve: Serve, upstream: ScriptedUpstream) -> None:
    """What two parsers could read in two ways is 400 invalid_http and the close."""
    proxy = await serve()
    wrong = {}
    for name, sent in list(MALFORMED.items())[part::4]:
        client = await proxy.client()
        await client.send(sent)
        try:
            NOT_HTTP.check(await last_answer(client))
        except (AssertionError, KeyError, TimeoutError, ValueError) as error:
            wrong[name] = repr(error)
    assert wrong == {}
    assert upstream.requests == []
    assert (await proxy.post()).status == 200


async def test_the_version_of_a_refusal(serve: Serve) -> None:
    """A refusal is HTTP/1.1, as every answer of this server (RFC 9110, section 6.2)."""
    proxy = await serve()
    client = await proxy.client()
    await client.send(MALFORMED["two lengths"])
    assert (await client.reader.readline()).startswith(b"HTTP/1.1 400 ")


async def test_ambiguous_on_messages(serve: Serve) -> None:
    """Where the path is known, so is the shape."""
    proxy = await serve()
    client = await proxy.client()
    await client.send(raw_post("transfer-encoding: gzip, chunked", path=M, body=b"0\r\n\r\n"))
    NOT_HTTP.check(await last_answer(client), anthropic=True)


@pytest.mark.parametrize(
    "sent",
    [
        raw_post("x-codex-a: " + "x" * 33 * 1024),
        raw_post(*(f"x-a{number}: 1" for number in range(5000))),
    ],
    ids=["a field over 32 KiB", "too many fields"],
)
async def test_a_head_that_is_too_large(sent: bytes, serve: Serve) -> None:
    """It is 431 in JSON, and the close."""
    proxy = await serve()
    client = await proxy.client()
    await client.send(sent)
    refusal = Refusal(431, "invalid_http", headers={"connection": "close"})
    refusal.check(await last_answer(client))


async def test_a_path_that_is_too_long(serve: Serve) -> None:
    """A request line beyond all bounds is refused as malformed, in JSON, and closed."""
    proxy = await serve()
    client = await proxy.client()
    await client.send(raw_post(path="/" + "x" * 200_000))
    answer = await last_answer(client)
    Refusal(400 if answer.status == 400 else 431, "invalid_http").check(answer)


async def test_a_large_field_passes(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A field of almost 32 KiB, as coding agents send, goes upstream whole."""
    proxy = await serve()
    value = "x" * (32 * 1024 - len("x-codex-turn-metadata: "))
    assert (await proxy.post(headers=[("x-codex-turn-metadata", value)])).status == 200
    assert (await upstream.wait_request()).header("x-codex-turn-metadata") == value


@pytest.mark.parametrize("keep", [False, True])
async def test_http_1_0(serve: Serve, *, keep: bool) -> None:
    """HTTP/1.0 is answered whole, JSON and streams, and closed unless it asks to stay."""
    proxy = await serve()
    for body in (prompt(), prompt(stream=True)):
        async with await RawClient.connect(proxy.port) as client:
            lines = ["connection: keep-alive"] if keep else []
            await client.send(raw_post(*lines, version="1.0", body=json.dumps(body).encode()))
            async with asyncio.timeout(3):
                head = (await client.reader.readuntil(b"\r\n\r\n")).lower()
                assert re.match(rb"http/1\.[01] 200 ", head)
                assert b"transfer-encoding" not in head
                if keep and "stream" not in body:
                    assert b"\r\nconnection: keep-alive\r\n" in head
                    continue
                whole = await client.reader.read()
            assert b"Hello world" in whole
            assert b"\r\nconnection: close\r\n" in head or not keep


# Connections


async def test_pipelining(serve: Serve) -> None:
    """Two requests at once get two answers, in their order."""
    proxy = await serve()
    client = await proxy.client()
    first = json.dumps(prompt(model="org/first")).encode()
    await client.send(
        raw_post(body=first) + b"GET /v1/models HTTP/1.1\r\nhost: a\r\n" + KEY + b"\r\n"
    )
    assert (await client.answer()).json()["model"] == "org/first"
    assert (await client.answer()).json()["object"] == "list"


REUSABLE = {
    "missing model": (R, b"{}", 400),
    "no JSON": (R, b"{", 400),
    "wrong type": (R, b'{"model":1}', 400),
    "unknown model": (R, b'{"model":"x","input":"x"}', 404),
    "unknown path": ("/v1/x", b"{}", 404),
    "no such response": (f"{R}/resp_1/cancel", b"{}", 404),
    "another method": ("/v1/models", b"{}", 405),
    "no answer": (R, b'{"model":"gpt-test","input":"x","background":true}', 400),
    "success": (R, json.dumps(prompt()).encode(), 200),
}  # fmt: skip


async def test_a_connection_is_used_again(serve: Serve) -> None:
    """After each answer that does not close it, one connection serves the next request."""
    proxy = await serve()
    client = await proxy.client()
    for _ in range(2):
        for name, (path, body, status) in REUSABLE.items():
            await client.request("POST", path, proxy.headers(), body)
            answer = await client.answer()
            assert (answer.status, answer.headers.get("connection")) == (status, None), name


async def test_connection_close_is_honoured(serve: Serve) -> None:
    """A client that asks for the close gets its answer and the close."""
    proxy = await serve()
    client = await proxy.client()
    await client.request("POST", R, proxy.headers([("connection", "close")]),
                         json.dumps(prompt()).encode())  # fmt: skip
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    await assert_closes(client)


async def closes_within(client: RawClient, seconds: float) -> bool:
    """Tell whether the daemon closes the connection in time; what it sends is passed over."""
    try:
        async with asyncio.timeout(seconds):
            await client.reader.read()
    except TimeoutError:
        return False
    return True


SLOW = {"timeouts": {"client_header": "150ms"}, "client_keepalive": "20s"}


@pytest.mark.parametrize("start", [b"", b"GE", b"GET / HTTP/1.1\r\nhost"])
async def test_a_slow_head(start: bytes, serve: Serve) -> None:
    """A head that is not complete within `client_header` of the connection's start: the close."""
    proxy = await serve(**SLOW)
    client = await proxy.client()
    if start:
        await client.send(start)
    assert await closes_within(client, 1)


async def test_a_slow_second_head(serve: Serve) -> None:
    """Also of a later request, from its first byte on."""
    proxy = await serve(**SLOW)
    client = await proxy.client()
    start = b"GET / HTTP/1.1\r\nhost"
    await client.send(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (await client.answer()).status == 200
    await asyncio.sleep(0.3)  # an idle connection is kept longer than that
    await client.send(start)
    assert await closes_within(client, 1)
