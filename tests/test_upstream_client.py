"""What goes to an upstream before any body, and answers that came in a coding all the same."""

import asyncio
import gzip
import json
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import Mock

import brotli  # type: ignore[import-untyped] # it has no stubs
import pytest

from aiproxy.breaker import Breaker
from aiproxy.coding import Decoder
from aiproxy.errors import ProxyError
from aiproxy.standing import Standing
from aiproxy.upstream import MAX_ANSWER, MAX_PIECE, Ask
from aiproxy.upstream_answer import Head
from aiproxy.upstream_client import ANTHROPIC_VERSION, Client
from aiproxy.upstream_errors import asked_for
from faults import PATHS, Serve, asked, check_error, events_of, json_of, results_of
from rig import ABSENT, CREDENTIAL, config_text, load
from steps import SSE_HEADERS, Step
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Stall, Wait, json_answer

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

# What a refusal asks for


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ({}, 0.0),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500", "retry-after": "7"}, 1.5),
        ({"retry-after-ms": "0", "retry-after": "7"}, 0.0),
        ({"retry-after-ms": "-1", "retry-after": "7"}, 7.0),
        ({"retry-after-ms": "inf", "retry-after": "7"}, 7.0),
        ({"retry-after-ms": "nan", "retry-after": "7"}, 7.0),
        ({"retry-after-ms": "soon", "retry-after": "7"}, 7.0),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0.0),
        ({"retry-after": "123456789012345"}, 123456789012.0),
    ],
)
def test_how_long_an_upstream_asks_to_be_left_alone(fields: dict[str, str], seconds: float) -> None:
    """Its milliseconds count before its seconds; what is no number of them is passed over."""
    assert asked_for(Head(503, list(fields.items()), fields).get) == seconds


async def test_an_upstream_that_takes_none_is_not_asked() -> None:
    """Who finds it full when the body is ready goes away: nothing was sent, nothing is held."""
    standing = Standing(Breaker(1, 5.0, 5.0, lambda *_: None), 0)
    made = client()
    made.pool = Mock()
    exchange = Mock(results=[])
    ask = Ask(made, standing, exchange, Mock(), shape="openai")
    with pytest.raises(ProxyError) as raised:
        await ask.send(b"", b"")
    assert (raised.value.status, ask.sent, ask.acted, ask.result) == (503, False, False, None)
    assert (standing.in_flight, exchange.results, made.pool.mock_calls) == (0, [], [])


# Heads

URL = "http://upstream.invalid:8000/v1"
BEARER = ("Authorization", f"Bearer {CREDENTIAL}")
TYPE = ("Content-Type", "application/json")
VERSION = ("anthropic-version", ANTHROPIC_VERSION)
Pairs = Sequence[tuple[str, str]]


def client(url: str = URL, **facts: Any) -> Client:
    """Make the client of an upstream."""
    config = load(config_text(url, upstreams={"scripted": facts}))
    return Client(config.upstreams["scripted"])


@dataclass(frozen=True)
class Case:
    """A request, and the fields of its head but for those that every head has."""

    name: str
    api: str
    received: Pairs
    fields: Pairs
    facts: tuple[tuple[str, Any], ...] = ()
    host: str = "upstream.invalid:8000"
    url: str = URL


CASES = [
    Case("nothing of the client's", "chat", (), (TYPE, BEARER)),
    Case("the client's type", "chat", (("content-type", "application/json; x=1"),),
         (("content-type", "application/json; x=1"), BEARER)),
    Case("the client's key and framing", "responses",
         (("authorization", "Bearer sk-client"), ("x-api-key", "sk-client"), ("host", "evil"),
          ("content-length", "999"), ("transfer-encoding", "chunked"), ("connection", "close"),
          ("accept-encoding", "br"), ("cookie", "a=b"), ("x-request-id", "theirs")),
         (TYPE, BEARER)),
    Case("a version", "messages", (), (TYPE, VERSION), (("credential", ABSENT),)),
    Case("the client's version", "messages", (("Anthropic-Version", "2024-01-01"),),
         (("Anthropic-Version", "2024-01-01"), TYPE), (("credential", ABSENT),)),
    Case("a version of the configuration", "messages", (("anthropic-version", "2024-01-01"),),
         (TYPE, ("Anthropic-Version", "2025-01-01")),
         (("credential", ABSENT), ("headers", {"Anthropic-Version": "2025-01-01"}))),
    Case("a header of the configuration", "chat", (("openai-organization", "theirs"),),
         (TYPE, ("OpenAI-Organization", "ours"), BEARER),
         (("headers", {"OpenAI-Organization": "ours"}),)),
    Case("the port of the scheme", "chat", (), (TYPE, BEARER), host="upstream.invalid",
         url="http://upstream.invalid:80/v1"),
    Case("an address of version 6", "chat", (), (TYPE, BEARER), host="[::1]:8000",
         url="http://[::1]:8000/v1"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_head_of_a_request(case: Case) -> None:
    """One Host, one length, one id, no coding, and of the rest exactly what may pass."""
    asking = client(case.url, **dict(case.facts))
    for _ in "12":  # the second time from what is kept
        head = asking.request_head(
            case.api, "/v1/x?y", case.received, request_id="req-1", size=12
        ).decode()
        first, *lines = head.removesuffix("\r\n\r\n").split("\r\n")
        assert head.endswith("\r\n\r\n")
        assert first == "POST /v1/x?y HTTP/1.1"
        always = {
            f"Host: {case.host}", "Content-Length: 12", "Accept-Encoding: identity",
            "x-request-id: req-1",
        }  # fmt: skip
        found = [line for line in lines if line not in always]
        assert len(lines) == len(found) + len(always)
        assert found == [f"{name}: {value}" for name, value in case.fields]


TARGETS = [
    ("http://h", "/chat", None, "/v1/chat"),
    ("http://h/", "/chat", None, "/v1/chat"),
    ("http://h/v1", "/chat", None, "/v1/chat"),
    ("http://h/v1/", "/chat", None, "/v1/chat"),
    ("http://h/a/b%2Fc/", "/chat", None, "/a/b%2Fc/chat"),
    ("http://h/v1?key=a%26b", "/chat", None, "/v1/chat?key=a%26b"),
    ("http://h?key=a", "/chat", None, "/v1/chat?key=a"),
    ("http://h/v1?key=a", "/messages", "true", "/v1/messages?key=a&beta=true"),
    ("http://h/v1", "/messages", "true", "/v1/messages?beta=true"),
    ("http://h/v1", "/messages", "", "/v1/messages?beta="),
    (
        "http://h/v1",
        "/messages",
        "a b&c=/\r\n\xe9",
        "/v1/messages?beta=a%20b%26c%3D%2F%0D%0A%C3%A9",
    ),
]


@pytest.mark.parametrize(("url", "path", "beta", "expected"), TARGETS)
def test_the_target_of_a_request(url: str, path: str, beta: str | None, expected: str) -> None:
    """The base with its query, the path, and `beta` as a value that cannot be more than one."""
    query = [] if beta is None else [("beta", beta)]
    assert client(url).target(path, query) == expected


# Codings that nobody asked for


def _zlib(wbits: int) -> Callable[[Sequence[bytes]], list[bytes]]:
    def pack(pieces: Sequence[bytes]) -> list[bytes]:
        packer = zlib.compressobj(wbits=wbits)
        packed = [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces]
        return [*packed, packer.flush()]

    return pack


def _brotli(pieces: Sequence[bytes]) -> list[bytes]:
    packer = brotli.Compressor(quality=1)
    packed = [bytes(packer.process(piece) + packer.flush()) for piece in pieces]
    return [*packed, bytes(packer.finish())]


def _zstd(pieces: Sequence[bytes]) -> list[bytes]:
    packer = zstd.ZstdCompressor()
    packed = [packer.compress(piece, packer.FLUSH_BLOCK) for piece in pieces]
    return [*packed, packer.flush()]


PACKERS: dict[str, tuple[str, Callable[[Sequence[bytes]], list[bytes]]]] = {
    "gzip": ("gzip", _zlib(31)),
    "GZIP": (" GZip ", _zlib(31)),
    "deflate": ("deflate", _zlib(15)),
    "raw deflate": ("deflate", _zlib(-15)),
    "br": ("br", _brotli),
    "zstd": ("zstd", _zstd),
}
coded = pytest.mark.parametrize(("coding", "pack"), PACKERS.values(), ids=PACKERS)
Pack = Callable[[Sequence[bytes]], list[bytes]]


def packed_json(coding: str, body: bytes, status: int = 200) -> list[Step]:
    """Answer with a body in a coding."""
    return json_answer(body, status, [("content-encoding", coding)])


@coded
async def test_a_coded_answer_is_decoded(
    serve: Serve, upstream: ScriptedUpstream, coding: str, pack: Pack
) -> None:
    """An answer and a refusal come out as they were packed, with their own length."""
    proxy = await serve()
    body = json.dumps(json_of("responses")).encode()
    error = b'{"error": {"type": "t", "code": "c", "param": null, "message": "m"}}'
    for status, document in ((200, body), (429, error)):
        upstream.script(packed_json(coding, b"".join(pack([document])), status))
        answer = await proxy.post()
        assert (answer.status, answer.body) == (status, document)
        assert "content-encoding" not in answer.headers
    assert upstream.requests[0].header("accept-encoding") == "identity"


@coded
async def test_a_coded_stream_is_live(
    serve: Serve, upstream: ScriptedUpstream, coding: str, pack: Pack
) -> None:
    """Each event comes out when its bytes are here, though more of its coding follows."""
    proxy = await serve()
    frames = events_of("responses")
    gates = [asyncio.Event() for _ in frames]
    steps: list[Step] = [Headers(200, [*SSE_HEADERS, ("content-encoding", coding)])]
    *pieces, last = pack(frames)
    for piece, gate in zip(pieces, gates, strict=True):
        steps += [Chunk(piece), Wait(gate)]
    upstream.script([*steps, Chunk(last), EndChunks()])
    client = await proxy.send(PATHS["responses"], asked("responses", streamed=True))
    head = await client.read_head()
    assert head.header("content-encoding") is None
    async with asyncio.timeout(5):
        for frame, gate in zip(frames, gates, strict=True):
            await client.read_until(frame)
            gate.set()


@coded
async def test_a_coded_answer_that_is_cut_is_a_failure(
    serve: Serve, upstream: ScriptedUpstream, coding: str, pack: Pack
) -> None:
    """Framed well but cut in its coding: 502; in a stream what came, and then the failure."""
    proxy = await serve()
    body = json.dumps(json_of("responses")).encode()
    upstream.script(packed_json(coding, b"".join(pack([body]))[:-1]))
    check_error(await proxy.post(), 502, "upstream_error", "responses")
    frames = events_of("responses")[:4]
    *pieces, _last = pack(frames)
    fields = [*SSE_HEADERS, ("content-encoding", coding)]
    upstream.script(Headers(200, fields), *map(Chunk, pieces), EndChunks())
    answer = await proxy.post(body=asked("responses", streamed=True))
    assert answer.status == 200
    assert answer.body.startswith(b"".join(frames))
    assert answer.body.count(b"event: response.failed\n") == 1
    assert await results_of(proxy) == {"protocol": 2}


@coded
async def test_what_follows_a_coded_answer_is_a_failure(
    serve: Serve, upstream: ScriptedUpstream, coding: str, pack: Pack
) -> None:
    """Bytes behind the end of a coding are no part of an answer."""
    proxy = await serve()
    body = json.dumps(json_of("responses")).encode()
    upstream.script(packed_json(coding, b"".join(pack([body])) + b"more"))
    check_error(await proxy.post(), 502, "upstream_error", "responses")


@coded
async def test_a_bomb_is_bounded(
    serve: Serve,
    upstream: ScriptedUpstream,
    monkeypatch: pytest.MonkeyPatch,
    coding: str,
    pack: Pack,
) -> None:
    """An answer that grows beyond MAX_ANSWER is 502, its pieces are small, and it is let go."""
    sizes: list[int] = []
    take = Decoder.take

    def measured(self: Decoder, limit: int) -> bytes:
        piece = take(self, limit)
        sizes.append(len(piece))
        return piece

    monkeypatch.setattr(Decoder, "take", measured)
    proxy = await serve()
    mebibyte = b" " * 2**20
    bomb = b"".join(pack([mebibyte] * (MAX_ANSWER // 2**20 + 20)))
    upstream.script(packed_json(coding, bomb), Stall())
    check_error(await proxy.post(), 502, "upstream_error", "responses")
    assert max(sizes) <= 2 * MAX_PIECE
    assert MAX_ANSWER < sum(sizes) <= MAX_ANSWER + 2 * MAX_PIECE
    async with asyncio.timeout(2):
        await upstream.requests[0].closed.wait()


TWICE = gzip.compress(gzip.compress(b"".join(events_of("responses"))))
UNKNOWN: list[Pairs] = [
    [("content-encoding", "gzip, gzip")],
    [("content-encoding", "gzip"), ("content-encoding", "gzip")],
    [("content-encoding", "identity"), ("content-encoding", "gzip")],
    [("content-encoding", ""), ("content-encoding", "gzip")],
    [("content-encoding", "lzma")],
    [("content-encoding", "compress")],
]


@pytest.mark.parametrize("fields", UNKNOWN, ids=lambda fields: ",".join(v for _, v in fields))
async def test_a_coding_that_we_do_not_know_is_no_answer(
    serve: Serve, upstream: ScriptedUpstream, fields: Pairs
) -> None:
    """Nor are two, in one field or in two (RFC 9110 section 5.3): no byte of them is relayed."""
    proxy = await serve()
    upstream.script(Headers(200, [*SSE_HEADERS, *fields]), Chunk(TWICE), EndChunks())
    answer = await proxy.post(body=asked("responses", streamed=True))
    check_error(answer, 502, "upstream_error", "responses")


async def test_identity_is_no_coding(serve: Serve, upstream: ScriptedUpstream) -> None:
    """`Content-Encoding: identity`, which nobody should send, changes nothing."""
    proxy = await serve()
    body = json.dumps(json_of("responses")).encode()
    upstream.script(packed_json("Identity", body))
    answer = await proxy.post()
    assert (answer.status, answer.body) == (200, body)
