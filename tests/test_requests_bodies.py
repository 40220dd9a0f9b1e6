"""Bodies of requests: encodings, framing, bounds, and what goes upstream of them."""

import asyncio
import gzip
import json
import os
import sys
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import brotli  # type: ignore[import-untyped]
import pytest

from refusals import Refusal, assert_stays
from rig import Proxy, prompt
from upstream import ScriptedUpstream

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Serve = Callable[..., Awaitable[Proxy]]
Pack = Callable[[bytes], bytes]

R = "/v1/responses"
C = "/v1/chat/completions"
M = "/v1/messages"
E = "/v1/embeddings"
MiB = 2**20

TOO_LARGE = Refusal(413, "request_too_large")
INVALID_JSON = Refusal(400, "invalid_json")


def _raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


WAYS: dict[str, tuple[str, Pack]] = {
    "gzip": ("gzip", gzip.compress),
    "GZIP": ("GZIP", gzip.compress),
    "deflate": ("deflate", zlib.compress),
    "raw deflate": ("deflate", _raw_deflate),
    "br": ("br", lambda data: bytes(brotli.compress(data, quality=1))),
    "zstd": ("zstd", zstd.compress),
    "identity": ("identity", bytes),
}


@pytest.mark.parametrize(("encoding", "pack"), WAYS.values(), ids=WAYS)
async def test_an_encoded_body(
    encoding: str, pack: Pack, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """It goes upstream inflated, without its encoding and with its true length."""
    proxy = await serve()
    body = json.dumps(prompt(stream=False, x="y" * 10_000)).encode()
    answer = await proxy.post(R, pack(body), [("content-encoding", encoding)])
    assert answer.status == 200
    request = await upstream.wait_request()
    assert request.json() == json.loads(body)
    assert request.header("content-encoding") is None
    assert request.header("content-length") == str(len(request.body))


@pytest.mark.parametrize("way", ["gzip", "deflate", "raw deflate", "br", "zstd"])
async def test_an_encoded_body_that_is_bad(way: str, serve: Serve) -> None:
    """Truncated or of another encoding: 400; a bomb: 413, soon; the connection is of use again."""
    proxy = await serve()
    encoding, pack = WAYS[way]
    packed = pack(json.dumps(prompt(x="y" * 1000)).encode())
    client = await proxy.client()
    fields = proxy.headers([("content-encoding", encoding)])
    for body in (packed[:-3], packed[: len(packed) // 2], b"", b"{}", os.urandom(500)):
        await client.request("POST", R, fields, body)
        INVALID_JSON.check(await client.answer())
    await assert_stays(client)
    answer = await proxy.post(R, pack(bytes(40 * MiB)), [("content-encoding", encoding)])
    TOO_LARGE.check(answer)


@pytest.mark.parametrize("encoding", ["lzma", "compress", "gzip, br", "gzip,gzip", "*", "\u00fc"])
async def test_an_unknown_encoding(encoding: str, serve: Serve) -> None:
    """Anything but one of the four is 415."""
    proxy = await serve()
    answer = await proxy.post(R, headers=[("content-encoding", encoding)])
    Refusal(415, "unsupported_content_encoding").check(answer)


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_chunked_body(size: int, serve: Serve, upstream: ScriptedUpstream) -> None:
    """It goes upstream whole and with a length, whatever its chunks, extensions and trailers.

    The connection closes: the parser would take a trailer for fields of the next request.
    """
    proxy = await serve()
    body = json.dumps(prompt(stream=False)).encode()
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    chunks = b"".join(b"%x;a=b\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    client = await proxy.client()
    fields = proxy.headers({"transfer-encoding": "chunked"})
    await client.request("POST", R, fields, chunks + b"0\r\nx-trailer: 1\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.headers["connection"]) == (200, "close")
    assert await client.reader.read() == b""
    request = await upstream.wait_request()
    assert request.json() == json.loads(body)
    assert request.header("transfer-encoding") is None
    assert request.header("x-trailer") is None


async def test_max_body(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Exactly `max_body` passes; one byte more is 413, by its length or by counting."""
    proxy = await serve(max_body="4KiB")
    body = json.dumps(prompt(x="")).encode()
    full = body.replace(b'"x": ""', b'"x": "%b"' % (b"y" * (4096 - len(body))))
    assert (len(full), (await proxy.post(R, full)).status) == (4096, 200)
    TOO_LARGE.check(await proxy.post(R, full + b" "))
    client = await proxy.client()
    await client.request("POST", R, proxy.headers({"content-length": "4097"}))
    TOO_LARGE.check(await client.answer())  # without a byte of it
    chunked = proxy.headers({"transfer-encoding": "chunked"})
    client = await proxy.client()
    await client.request("POST", R, chunked, b"1000\r\n%b\r\n" % full)
    await client.send(b"0\r\n\r\n")
    assert (await client.answer()).status == 200
    client = await proxy.client()
    await client.request("POST", R, chunked, b"1000\r\n%b\r\n1\r\n \r\n" % full)
    TOO_LARGE.check(await client.answer())  # before its end
    assert len(upstream.requests) == 2


async def test_large_bodies_pass(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Several MiB, far above every default of the HTTP library, go upstream unchanged."""
    proxy = await serve()
    text = "x" * (5 * MiB)
    assert (await proxy.post(R, prompt(input=text))).status == 200
    assert (await upstream.wait_request()).json()["input"] == text


async def test_a_body_in_pieces(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A body that arrives little by little is the same body."""
    proxy = await serve()
    body = json.dumps(prompt(stream=False)).encode()
    client = await proxy.client()
    await client.request("POST", R, proxy.headers({"content-length": str(len(body))}))
    for byte in body:
        await client.send(bytes([byte]))
        await asyncio.sleep(0)
    assert (await client.answer()).status == 200
    assert (await upstream.wait_request()).json() == json.loads(body)


# What of the body goes upstream


async def sent(proxy: Proxy, upstream: ScriptedUpstream, path: str, body: bytes) -> bytes:
    """POST a body that is good; return what went upstream."""
    answer = await proxy.post(path, body)
    assert answer.status == 200, answer
    return upstream.requests[-1].body


def pairs_of(body: bytes) -> list[tuple[str, Any]]:
    """Return the top level as it is written, duplicates and all."""
    return list(json.loads(body, object_pairs_hook=lambda pairs: pairs))


async def test_a_key_given_twice(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The last is read, and it alone goes upstream; nested duplicates are not looked at."""
    proxy = await serve()
    nested = b'{"a":1,"a":2}'
    for first, last in ((b"unknown", b"gpt-test"), (b"renamed", b"gpt-test")):
        body = rb'{"model":"%b","input":"x","mod\u0065l":"%b","metadata":%b}' % (
            first,
            last,
            nested,
        )
        received = await sent(proxy, upstream, R, body)
        assert [v for k, v in pairs_of(received) if k == "model"] == ["gpt-test"]
        assert nested in received
    refused = await proxy.post(R, b'{"model":"gpt-test","input":"x","model":"unknown"}')
    Refusal(404, "model_not_found", param="model").check(refused)


async def test_stream_is_always_explicit(serve: Serve, upstream: ScriptedUpstream) -> None:
    """`stream` goes upstream once, as what was read; embeddings have no such field."""
    proxy = await serve()
    for path in (R, C, M):
        for given, expected in ((None, False), (False, False), (True, True)):
            body = json.dumps({**prompt(path), "stream": given}).encode()
            received = pairs_of(await sent(proxy, upstream, path, body))
            assert [v for k, v in received if k == "stream"] == [expected]
        absent = await sent(proxy, upstream, path, json.dumps(prompt(path)).encode())
        assert json.loads(absent)["stream"] is False
        twice = json.dumps(prompt(path))[:-1] + ', "stream": true, "stream": false}'
        received = pairs_of(await sent(proxy, upstream, path, twice.encode()))
        assert [v for k, v in received if k == "stream"] == [False]
    assert "stream" not in json.loads(
        await sent(proxy, upstream, E, json.dumps(prompt(E)).encode())
    )


UNREAD = {
    "lone surrogates": rb'{"text":"\ud800","\udfff":[]}',
    "a number of 5,000 digits": b"9" * 5000,
    "numbers as spelt": b"[1.0,1e5,1E-7,-0,0.10,1e999]",
    "256 levels in all": b"[" * 255 + b"]" * 255,
    "escapes as spelt": rb'["\u0041\/\n","\u00fc"]',
    "space within": b'{ "a" :\t[ 1 ,\r\n2 ] }',
    "what an API may know one day": b'{"type":"unheard_of","namespace":{"tools":[null]}}',
}


@pytest.mark.parametrize("value", UNREAD.values(), ids=UNREAD)
async def test_what_is_not_read_goes_as_it_is(
    value: bytes, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A field that aiproxy does not read goes upstream byte for byte, on every endpoint."""
    proxy = await serve()
    upstream.default = [*upstream.healthy(await warm(proxy, upstream))]
    for path in (R, C, M, E):
        body = json.dumps(prompt(path)).encode()[:-1] + b',"extra":' + value + b"}"
        await proxy.post(path, body)
        assert b'"extra":' + value in upstream.requests[-1].body


async def warm(proxy: Proxy, upstream: ScriptedUpstream) -> Any:
    """Make one request, and return what the upstream recorded of it."""
    await proxy.post()
    return await upstream.wait_request()


async def test_input_with_lone_surrogates(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A prompt cut in the middle of a character is no reason to fail."""
    proxy = await serve()
    for written in (rb'"half \ud83d"', rb'[{"role":"user","content":"\udc00"}]'):
        body = b'{"model":"gpt-test","input":%b}' % written
        assert b'"input":' + written in await sent(proxy, upstream, R, body)


async def test_a_model_name_that_is_escaped(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The name is compared decoded; a renamed one goes upstream under its other name."""
    proxy = await serve()
    body = await sent(proxy, upstream, R, rb'{"model":"gpt\u002dtest","input":"x"}')
    assert json.loads(body)["model"] == "gpt-test"
    body = await sent(proxy, upstream, R, b'{"model":"renamed","input":"x"}')
    assert pairs_of(body)[0] == ("model", "upstream-model")


@pytest.mark.parametrize("model", ["\u00fc", "\U0001f600", "a\nb\x00\x7f", "\ud800", "x" * 5000])
async def test_strange_model_names(model: str, serve: Serve) -> None:
    """Whatever the name, the answer is 404 or 400, well-formed, and short."""
    proxy = await serve()
    answer = await proxy.post(R, json.dumps({"model": model, "input": "x"}).encode())
    assert answer.status == (400 if model == "\ud800" else 404)
    assert answer.json()["error"]["param"] == "model"
    assert len(answer.body) < 1000
    answer = await proxy.post(R, json.dumps({"model": f"org/{model}", "input": "x"}).encode())
    assert answer.status == (400 if model == "\ud800" else 200)
    assert all(len(line["model"]) <= 4 * 128 for line in proxy.request_logs())
