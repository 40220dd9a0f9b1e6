"""The table of errors, upstream's part: what its failures and refusals become for the client."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from invariants import check_conservation
from refusals import SERVER, Refusal, assert_stays
from rig import Proxy, prompt
from steps import Step
from upstream import (
    Chunk,
    Finish,
    Garbage,
    Headers,
    Reset,
    ScriptedUpstream,
    Send,
    Stall,
    error_answer,
    json_answer,
    stream,
)

Serve = Callable[..., Awaitable[Proxy]]

R = "/v1/responses"
C = "/v1/chat/completions"
M = "/v1/messages"
E = "/v1/embeddings"

BROKEN = Refusal(502, "upstream_error", SERVER)
CREDENTIAL = Refusal(502, "upstream_credential", SERVER, headers={"x-should-retry": "false"})
OVERLOADED = Refusal(503, "upstream_overloaded", SERVER, headers={"retry-after": None})
LATE = Refusal(504, "upstream_timeout", SERVER, headers={"x-should-retry": "false"})

HTML = (("content-type", "text/html"), ("content-length", "4"))
JSON = ("content-type", "application/json")
AFTER = (("retry-after", "7"),)
AFTER_MS = (("retry-after", "7"), ("retry-after-ms", "6500"))

SCRIPTS: dict[str, tuple[list[Step], Refusal]] = {
    "reset": ([Reset()], BROKEN),
    "closed": ([Finish()], BROKEN),
    "half a head": ([Send(b"HTTP/1.1 200 OK\r\ncontent-le"), Finish()], BROKEN),
    "no HTTP": ([Garbage(300), Finish()], BROKEN),
    "another protocol": ([Send(b"220 smtp.example ESMTP\r\n"), Finish()], BROKEN),
    "100 and the end": ([Send(b"HTTP/1.1 100 Continue\r\n\r\n"), Finish()], BROKEN),
    "101": ([Headers(101, [("connection", "upgrade"), ("upgrade", "websocket")])], BROKEN),
    "204": ([Headers(204)], BROKEN),
    "redirect": (
        [Headers(307, [("location", "http://127.0.0.1:1/"), ("content-length", "0")])],
        BROKEN,
    ),
    "300": (error_answer(300), BROKEN),
    "500": (error_answer(500), BROKEN),
    "501": (error_answer(501), BROKEN),
    "502": (error_answer(502, headers=AFTER), BROKEN),
    "504": (error_answer(504), BROKEN),
    "402": (error_answer(402), BROKEN),
    "405": (error_answer(405), BROKEN),
    "408": (error_answer(408), BROKEN),
    "418": (error_answer(418), BROKEN),
    "451": (error_answer(451), BROKEN),
    "401": (error_answer(401, code="invalid_api_key"), CREDENTIAL),
    "403": (error_answer(403), CREDENTIAL),
    "503": (error_answer(503), OVERLOADED),
    "529": (error_answer(529), OVERLOADED),
    "503 with a time": (
        error_answer(503, headers=AFTER),
        Refusal(503, "upstream_overloaded", SERVER, headers={"retry-after": "7"}),
    ),
    "529 with a finer time": (
        error_answer(529, headers=AFTER_MS),
        Refusal(
            503,
            "upstream_overloaded",
            SERVER,
            headers={"retry-after": "7", "retry-after-ms": "6500"},
        ),
    ),
    "no answer in time": ([Stall()], LATE),
    "half a head in time": ([Send(b"HTTP/1.1 200 OK\r\n"), Stall()], LATE),
    "body not in time": (
        [Headers(200, [JSON, ("content-length", "100")]), Send(b'{"id"'), Stall()],
        LATE,
    ),
    "another content type": ([Headers(200, HTML), Send(b"<p/>")], BROKEN),
    "not JSON": (json_answer(b"<html>"), BROKEN),
    "half a JSON": (json_answer(b'{"object":'), BROKEN),
    "another JSON": (json_answer({"hello": 1}), BROKEN),
    "a list": (json_answer([]), BROKEN),
    "an empty body": (json_answer(b""), BROKEN),
    "a body that is cut": (
        [Headers(200, [JSON, ("content-length", "100")]), Send(b'{"id"'), Finish()],
        BROKEN,
    ),
    "chunks that are cut": (
        [Headers(200, [JSON, ("transfer-encoding", "chunked")]), Chunk(b'{"id"'), Finish()],
        BROKEN,
    ),
    "a stream that nobody asked for": (stream([b"data: {}\n\n"]), BROKEN),
}

SOON = {"timeouts": {"first_byte": "100ms", "idle": "100ms"}}


@pytest.mark.parametrize(("script", "refusal"), SCRIPTS.values(), ids=SCRIPTS)
async def test_a_failed_upstream(
    script: list[Step], refusal: Refusal, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Each failure has its status and code in both shapes; one attempt; the connection stays."""
    proxy = await serve(**SOON)
    upstream.default = script
    for number, path in enumerate((R, C, M, E), 1):
        client = await proxy.send(path)
        refusal.check(await client.answer(), anthropic=path == M, upstream="scripted")
        assert len(upstream.requests) == number
        await assert_stays(client)
        proxy.calm()


@pytest.mark.parametrize("path", [R, C, M])
async def test_an_answer_that_is_no_stream(
    path: str, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A stream that was asked for and answered with anything else is 502 before it starts."""
    proxy = await serve()
    scripts: tuple[list[Step], ...] = (
        json_answer({"object": "response", "output": []}),
        [Headers(200, HTML), Send(b"<p/>")],
        [Headers(204)],
    )
    for script in scripts:
        upstream.script(script)
        answer = await proxy.post(path, prompt(path, stream=True))
        BROKEN.check(answer, anthropic=path == M, upstream="scripted")


def unused_port() -> int:
    """Return a port of loopback on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.mark.parametrize("path", [R, M])
async def test_no_upstream_at_all(path: str, serve: Serve) -> None:
    """A refused connection is 502, and says nothing about where it went."""
    port = unused_port()
    proxy = await serve(upstreams={"scripted": {"url": f"http://127.0.0.1:{port}/v1"}})
    answer = await proxy.post(path)
    BROKEN.check(answer, anthropic=path == M, upstream="scripted")
    assert str(port).encode() not in answer.body
    assert b"127.0.0.1" not in answer.body


async def test_a_name_that_is_not_known(serve: Serve) -> None:
    """A host that does not resolve is 502."""
    proxy = await serve(upstreams={"scripted": {"url": "http://no-such-host.invalid/v1"}})
    BROKEN.check(await proxy.post(), upstream="scripted")


async def test_an_upstream_without_tls(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A TLS handshake that fails is 502."""

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        proxy = await serve(upstreams={"scripted": {"url": f"https://127.0.0.1:{port}/v1"}})
        BROKEN.check(await proxy.post(), upstream="scripted")


PASSED_ON = [400, 404, 409, 413, 422, 429]
OPENAI_BODY = b'{ "error": {"type":"t","code":"c","param":null,"message":"m","x":[1.0]} }\n'
ANTHROPIC_BODY = b'{"type":"error","request_id":"r", "error": {"type":"t","message":"m"}}'


@pytest.mark.parametrize(
    ("path", "body"), [(R, OPENAI_BODY), (C, OPENAI_BODY), (E, OPENAI_BODY), (M, ANTHROPIC_BODY)]
)
async def test_a_refusal_is_passed_on(
    path: str, body: bytes, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Its status, its Retry-After, and its body, byte for byte, where that has the shape."""
    proxy = await serve()
    for status in PASSED_ON:
        upstream.script(json_answer(body, status, [*AFTER_MS, ("x-secret", "1")]))
        answer = await proxy.post(path)
        assert (answer.status, answer.body) == (status, body)
        assert answer.headers["content-type"] == "application/json"
        assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("7", "6500")
        assert "x-secret" not in answer.headers
        assert answer.headers["x-aiproxy-upstream"] == "scripted"


OTHER_SHAPES: dict[str, tuple[Any, str | None]] = {
    "an error without all keys": ({"error": {"message": "It is wrong."}}, "It is wrong."),
    "a code that is a number": (
        {"error": {"message": "It is wrong.", "type": "t", "param": None, "code": 400}},
        "It is wrong.",
    ),
    "FastAPI's": ({"detail": "It is wrong."}, "It is wrong."),
    "FastAPI's list": ({"detail": [{"msg": "wrong"}]}, None),
    "a text": (b"wrong", None),
    "nothing": (b"", None),
    "a number": (b"5", None),
    "an error that is a text": ({"error": "It is wrong."}, None),
    "a message that is no text": ({"error": {"message": ["x"]}}, None),
    "no UTF-8": (b'{"error":{"message":"\xff"}}', None),
}


@pytest.mark.parametrize(("body", "message"), OTHER_SHAPES.values(), ids=OTHER_SHAPES)
async def test_a_refusal_of_another_shape(
    body: Any, message: str | None, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """It is told in the client's own shape, with the upstream's sentence where there is one."""
    proxy = await serve()
    upstream.default = json_answer(body, 400)
    answer = await proxy.post(R)
    error = answer.json()["error"]
    assert answer.status == 400
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    answer = await proxy.post(M)
    told = answer.json()
    assert (answer.status, set(told), set(told["error"])) == (
        400,
        {"type", "error"},
        {"type", "message"},
    )
    assert told["type"] == "error"
    if message is not None:
        assert (error["message"], told["error"]["message"]) == (message, message)


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"), (429, "requests")])
async def test_the_kind_of_a_refusal_that_cannot_be_read(
    status: int, kind: str, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Where its body says nothing, its status does: OpenAI's own types, without a code."""
    proxy = await serve()
    upstream.default = json_answer(b"wrong", status)
    error = (await proxy.post(R)).json()["error"]
    assert (error["type"], error["code"], error["param"]) == (kind, None, None)
    assert str(status) in error["message"]


@pytest.mark.parametrize(("status", "kind"), [(400, "invalid_request_error"),
                                              (404, "not_found_error"),
                                              (413, "request_too_large"),
                                              (429, "rate_limit_error"),
                                              (422, "api_error")])  # fmt: skip
async def test_an_openai_refusal_on_messages(
    status: int, kind: str, serve: Serve, upstream: ScriptedUpstream
) -> None:
    """A messages client gets Anthropic's types for its status, whoever refused."""
    proxy = await serve()
    upstream.default = json_answer(OPENAI_BODY, status)
    answer = await proxy.post(M)
    assert answer.status == status
    assert answer.json() == {"type": "error", "error": {"type": kind, "message": "m"}}


BAD_UTF_8 = {
    R: [b'{"output":[],"status":"\xff"}', b'{"output":[],"usage":{"\xff":1}}'],
    C: [b'{"choices":[{"finish_reason":"\xff"}]}', b'{"choices":[],"usage":"\xff"}'],
    M: [b'{"content":[],"stop_reason":"\xff"}', b'{"content":[],"usage":"\xff"}'],
    E: [b'{"data":[],"usage":{"a":"\xff"}}'],
}


@pytest.mark.parametrize("path", BAD_UTF_8)
async def test_an_answer_of_no_utf_8(path: str, serve: Serve, upstream: ScriptedUpstream) -> None:
    """Bytes of an upstream that are no UTF-8 are its failure, or its business; no bug of ours."""
    proxy = await serve()
    for body in BAD_UTF_8[path]:
        upstream.script(json_answer(body))
        answer = await proxy.post(path)
        if answer.status == 200:
            assert answer.body == body
        else:
            BROKEN.check(answer, anthropic=path == M, upstream="scripted")


BAD_EVENTS = {
    R: [
        b'event: response.created\ndata: {"type":"response.created\xff","response":{}}\n\n',
        b'data: {"type":"error","message":"\xff"}\n\n',
        b'data: {"type":"response.completed","response":{"status":"completed","usage":"\xff"}}\n\n',
    ],
    C: [
        b'data: {"error":"\xff"}\n\n',
        b'data: {"choices":[{"finish_reason":"\xff"}]}\n\n',
    ],
    M: [b'event: message_start\ndata: {"type":"message_start","message":{"usage":"\xff"}}\n\n'],
}


@pytest.mark.parametrize("path", BAD_EVENTS)
async def test_an_event_of_no_utf_8(path: str, serve: Serve, upstream: ScriptedUpstream) -> None:
    """The same for the events of a stream: whatever they hold, it is no bug of ours."""
    proxy = await serve()
    for event in BAD_EVENTS[path]:
        upstream.script(stream([event]))
        answer = await proxy.post(path, prompt(path, stream=True))
        assert answer.status == 200
        assert b"Internal error" not in answer.body, event


async def test_what_the_log_says_of_failures(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The line of a request has the status that was sent, the outcome and the code."""
    proxy = await serve(**SOON)
    scripts = ([Reset()], error_answer(403), error_answer(503), [Stall()], error_answer(429))
    for script in scripts:
        upstream.script(script)
        await proxy.post()
        proxy.calm()
    await check_conservation(proxy)
    facts = [(line["status"], line["outcome"], line["error_code"]) for line in proxy.request_logs()]
    assert facts[:4] == [
        (502, "upstream_error", "upstream_error"),
        (502, "upstream_error", "upstream_credential"),
        (503, "upstream_error", "upstream_overloaded"),
        (504, "upstream_timeout", "upstream_timeout"),
    ]
    assert facts[4][:2] == (429, "upstream_rejected")


async def test_a_long_refusal_is_not_passed_on_whole(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """An error body of megabytes is told by its status in the shape, not relayed."""
    proxy = await serve()
    error = {"message": "x" * 2**20, "type": "t", "param": None, "code": None}
    upstream.default = json_answer(json.dumps({"error": error}).encode(), 400)
    answer = await proxy.post()
    assert answer.status == 400
    assert len(answer.body) < 2**16
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
