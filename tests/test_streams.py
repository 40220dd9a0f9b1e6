"""Streams through the real daemon: byte for byte, at once, and under the client's model."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest

from answers import (
    chat_events,
    chat_json,
    embeddings_json,
    messages_events,
    messages_json,
    tool_call,
)
from responses import (
    function_item,
    message_item,
    reasoning_item,
    responses_events,
    responses_json,
)
from rig import Proxy, prompt
from steps import SSE_HEADERS, Step
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait, json_answer, stream

Serve = Callable[..., Awaitable[Proxy]]
RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"
MESSAGES, EMBEDDINGS = "/v1/messages", "/v1/embeddings"
PATHS = [RESPONSES, CHAT, MESSAGES]
NEWLINES = [b"\n", b"\r", b"\r\n"]
ITEMS = [reasoning_item(), message_item("Grüße, \u4e16\u754c"), function_item()]


def events_of(path: str, model: str = "gpt-test") -> list[bytes]:
    """A healthy stream with text, a tool call and where possible reasoning."""
    if path == RESPONSES:
        return responses_events(items=ITEMS, model=model, done=True)
    if path == CHAT:
        calls = [tool_call("f", '{"a": 1}')]
        return chat_events("Grüße", model=model, include_usage=True, tool_calls=calls)
    return messages_events("Grüße", model=model, tool_uses=[("f", {"a": 1})])


def asking(path: str, **fields: Any) -> dict[str, Any]:
    """A body that asks for a stream, on chat with its usage, so that nothing is left out."""
    if path == CHAT:
        fields = {"stream_options": {"include_usage": True}, **fields}
    return prompt(path, stream=True, **fields)


def chunked(data: bytes, seed: int) -> list[Step]:
    """The bytes as a stream, cut at random places."""
    rng = random.Random(seed)  # noqa: S311 - no secret is made of it
    cuts = sorted(
        {0, len(data), *(rng.randrange(len(data)) for _ in range(rng.choice((1, 9, 99))))}
    )
    chunks = [Chunk(data[start:end]) for start, end in pairwise(cuts)]
    return [Headers(200, SSE_HEADERS), *chunks, EndChunks()]


# Byte for byte


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("newline", NEWLINES)
async def test_bytes(serve: Serve, upstream: ScriptedUpstream, path: str, newline: bytes) -> None:
    """With every line end and under any chunking the client gets the upstream's bytes."""
    proxy = await serve()
    data = b"".join(events_of(path)).replace(b"\n", newline)
    for seed in range(8):
        upstream.script(chunked(data, seed))
        answer = await proxy.post(path, asking(path))
        assert answer.body == data
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        assert answer.headers["x-aiproxy-upstream"] == "scripted"
        assert "content-length" not in answer.headers


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("back", [1, 2, 3])
async def test_a_crlf_terminal_event_in_two_parts(
    serve: Serve, upstream: ScriptedUpstream, path: str, back: int
) -> None:
    """The last line ends of the last event arrive although they come alone (traps, 1)."""
    proxy = await serve()
    frames = [frame for frame in events_of(path) if b"[DONE]" not in frame or path == CHAT]
    data = b"".join(frames).replace(b"\n", b"\r\n")
    rest = asyncio.Event()
    upstream.script(
        Headers(200, SSE_HEADERS), Chunk(data[:-back]), Wait(rest), Chunk(data[-back:]), EndChunks()
    )
    client = await proxy.send(path, asking(path))
    await client.read_head()
    seen = await client.read_until(b"event: " if path != CHAT else b"data: ")
    rest.set()
    assert seen + await client.read_body() == data


@pytest.mark.parametrize("path", [RESPONSES, MESSAGES])
async def test_without_event_lines(serve: Serve, upstream: ScriptedUpstream, path: str) -> None:
    """A server that sends no `event:` lines is relayed as it is, and its end is seen."""
    proxy = await serve()
    frames = [b"data: " + frame.split(b"data: ", 1)[1] for frame in events_of(path)]
    upstream.script(stream(frames))
    assert (await proxy.post(path, asking(path))).body == b"".join(frames)


@pytest.mark.parametrize("path", PATHS)
async def test_what_is_unknown_passes(serve: Serve, upstream: ScriptedUpstream, path: str) -> None:
    """Comments, other fields, unknown events, odd numbers and odd text pass unchanged."""
    proxy = await serve()
    events = events_of(path)
    strange = [
        b": a comment\n\n",
        b"id: 7\nretry: 10\n\n",
        b'event: response.brand_new\ndata: {"type": "response.brand_new", "n": 1.0e+2}\n\n',
        b"data: not json at all \xff\xfe\n\n",
        b'data: {"a": 1, "a": 2, "b": "\\ud800"}\ndata: \n\n',
        b"\xef\xbb\xbf: a late BOM\n\n",
    ]
    frames = [b"\xef\xbb\xbf" + events[0], *strange, *events[1:]]
    upstream.script(stream(frames))
    assert (await proxy.post(path, asking(path))).body == b"".join(frames)


async def test_a_large_event_passes(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A terminal event with megabytes in it arrives whole and is understood (traps, 4)."""
    proxy = await serve()
    events = responses_events("x" * 2**20, deltas=1)
    upstream.script(stream(events, split=40_000))
    assert (await proxy.post(RESPONSES, asking(RESPONSES))).body == b"".join(events)


async def test_an_http_1_0_client(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A client of HTTP/1.0 gets a stream without chunks that ends with the connection."""
    proxy = await serve()
    events = events_of(RESPONSES)
    upstream.script(stream(events))
    body = json.dumps(asking(RESPONSES)).encode()
    client = await proxy.client()
    head = [
        "POST /v1/responses HTTP/1.0",
        *(f"{name}: {value}" for name, value in proxy.headers()),
        f"content-length: {len(body)}",
    ]
    await client.send("\r\n".join([*head, "", ""]).encode() + body)
    received, _, got = (await client.reader.read(-1)).partition(b"\r\n\r\n")
    assert received.startswith((b"HTTP/1.0 200 ", b"HTTP/1.1 200 "))
    assert b"transfer-encoding" not in received.lower()
    assert got == b"".join(events)


# At once


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("newline", NEWLINES)
async def test_delivery(
    serve: Serve, upstream: ScriptedUpstream, path: str, newline: bytes
) -> None:
    """The client has each event before the upstream sends the next one (traps, 13)."""
    proxy = await serve()
    frames = [frame.replace(b"\n", newline) for frame in events_of(path)]
    gates = [asyncio.Event() for _ in frames]
    steps: list[Step] = [Headers(200, SSE_HEADERS)]
    for frame, gate in zip(frames, gates, strict=True):
        steps += [Chunk(frame), Wait(gate)]
    upstream.script(steps, EndChunks())
    client = await proxy.send(path, asking(path))
    async with asyncio.timeout(5):
        await client.read_head()
        for frame, gate in zip(frames, gates, strict=True):
            got = b""
            while len(got) < len(frame):
                got += (await client.read_chunk())[0]
            assert got == frame
            assert not upstream.requests[0].completed
            gate.set()
        assert await client.read_body() == b""


@pytest.mark.parametrize("path", PATHS)
async def test_an_upstreams_comment_is_not_kept_back(
    serve: Serve, upstream: ScriptedUpstream, path: str
) -> None:
    """A server's own ping reaches the client while the server is silent."""
    proxy = await serve()
    gate = asyncio.Event()
    frames = events_of(path)
    upstream.script(
        Headers(200, SSE_HEADERS),
        Chunk(b": ping 1\n\n"),
        Wait(gate),
        [Chunk(frame) for frame in frames],
        EndChunks(),
    )
    client = await proxy.send(path, asking(path))
    async with asyncio.timeout(5):
        await client.read_head()
        assert (await client.read_chunk())[0] == b": ping 1\n\n"
        gate.set()
        assert await client.read_body() == b"".join(frames)


# The model's name


def expected(data: bytes, theirs: str) -> bytes:
    """The upstream's bytes with the client's name of the model."""
    return data.replace(f'"model": "{theirs}"'.encode(), b'"model": "renamed"')


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("newline", NEWLINES)
@pytest.mark.parametrize("theirs", ["upstream-model", "upstream-model-2026-11@main"])
async def test_a_renamed_model_is_restored(
    serve: Serve, upstream: ScriptedUpstream, path: str, newline: bytes, theirs: str
) -> None:
    """Where the route renamed the model its name is the client's; all else stays (traps, 48)."""
    proxy = await serve()
    data = b"".join(events_of(path, model=theirs)).replace(b"\n", newline)
    count = data.count(theirs.encode())
    assert count >= 1
    for seed in range(3):
        upstream.script(chunked(data, seed))
        answer = await proxy.post(path, asking(path, model="renamed"))
        assert answer.body == expected(data, theirs)
        assert answer.body.count(b'"model": "renamed"') == count
    assert {request.json()["model"] for request in upstream.requests} == {"upstream-model"}


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        (RESPONSES, responses_json(model="upstream-model", items=ITEMS)),
        (CHAT, chat_json(model="upstream-model")),
        (MESSAGES, messages_json(model="upstream-model")),
        (EMBEDDINGS, embeddings_json(model="upstream-model")),
    ],
)
async def test_a_renamed_model_is_restored_in_json(
    serve: Serve, upstream: ScriptedUpstream, path: str, answer: dict[str, Any]
) -> None:
    """In a JSON answer only the model's name changes: spacing, order and numbers stay."""
    proxy = await serve()
    extra = {"metadata": {"model": "mine"}, "text": '"model": "upstream-model"', "n": 1.5}
    body = json.dumps({**answer, "x": extra}, indent=3).encode().replace(b"1.5", b"1.50e0")
    upstream.script(json_answer(body))
    got = await proxy.post(path, prompt(path, model="renamed"))
    assert got.body == expected(body, "upstream-model")
    assert got.json()["model"] == "renamed"


@pytest.mark.parametrize("path", PATHS)
async def test_other_models_are_not_touched(
    serve: Serve, upstream: ScriptedUpstream, path: str
) -> None:
    """A `model` elsewhere in the events, and text that looks like one, is the upstream's."""
    proxy = await serve()
    text = 'I am "model": "upstream-model".'
    metadata = {"model": "upstream-metadata"}
    frames = {
        RESPONSES: responses_events(text, model="upstream-model", request={"metadata": metadata}),
        CHAT: chat_events(text, model="upstream-model", include_usage=True),
        MESSAGES: messages_events(text, model="upstream-model", tool_uses=[("f", metadata)]),
    }[path]
    upstream.script(stream(frames))
    answer = await proxy.post(path, asking(path, model="renamed"))
    assert answer.body == expected(b"".join(frames), "upstream-model")


@pytest.mark.parametrize("path", PATHS)
async def test_a_model_that_was_not_renamed_stays(
    serve: Serve, upstream: ScriptedUpstream, path: str
) -> None:
    """Where the route sends the client's own name, the upstream's fuller name is passed on."""
    proxy = await serve()
    frames = events_of(path, model="gpt-test-2026-11-01")
    upstream.script(stream(frames))
    assert (await proxy.post(path, asking(path))).body == b"".join(frames)
