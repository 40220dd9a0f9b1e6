"""How streams end: exactly one terminal frame, and a body that ends properly."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from aiproxy import relay
from aiproxy.sse import Splitter
from answers import chat_events, sse
from client import IncompleteBody, parse_sse
from invariants import check_terminal, eventually
from responses import message_item, reasoning_item, responses_events
from rig import Proxy
from steps import SSE_HEADERS, Step
from test_streams import CHAT, MESSAGES, PATHS, RESPONSES, asking, events_of
from upstream import Chunk, EndChunks, Finish, Headers, Reset, ScriptedUpstream, Stall, Wait

Serve = Callable[..., Awaitable[Proxy]]
STRICT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
DONE = sse("[DONE]")
ENDS: list[Any] = [
    pytest.param([EndChunks()], id="ends"),
    pytest.param([Finish()], id="closes"),
    pytest.param([Reset()], id="resets"),
    pytest.param([Chunk(b"data: half an eve"), EndChunks()], id="ends within an event"),
    pytest.param([Chunk(b"data: half an eve"), Reset()], id="resets within an event"),
]


def send(*frames: bytes) -> list[Step]:
    """The head of a stream and these frames, a chunk each."""
    return [Headers(200, SSE_HEADERS), *(Chunk(frame) for frame in frames)]


async def log_line(proxy: Proxy) -> dict[str, Any]:
    """The only request's log line."""

    async def holds() -> None:
        assert proxy.request_logs()

    await eventually(holds)
    (line,) = proxy.request_logs()
    return line


def failed_after(body: bytes, passed: bytes) -> dict[str, Any]:
    """The one response.failed that follows the bytes that passed."""
    assert body.startswith(passed)
    check_terminal(body, completed=False)
    ((kind, data),) = parse_sse(body[len(passed) :])
    STRICT.validate_json(data, strict=True)
    assert kind == "response.failed"
    fact: dict[str, Any] = json.loads(data)
    return fact


# Responses


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("events", [1, 2, 4, 10])
async def test_a_cut_response(
    serve: Serve, upstream: ScriptedUpstream, end: list[Step], events: int
) -> None:
    """Without a terminal event, response.failed with the next number and the finished items."""
    proxy = await serve()
    items = [reasoning_item(), message_item("Hello")]
    frames = responses_events(items=items)[:events]
    upstream.script(send(*frames), end)
    answer = await proxy.post(RESPONSES, asking(RESPONSES))
    fact = failed_after(answer.body, b"".join(frames))
    assert fact["sequence_number"] == events
    assert fact["response"]["output"] == (items[:1] if events == 10 else [])
    assert fact["response"]["id"] == json.loads(parse_sse(frames[0])[0][1])["response"]["id"]
    assert fact["response"]["error"]["code"] == "server_error"
    assert fact["response"]["error"]["message"].startswith("[upstream_error] ")
    line = await log_line(proxy)
    assert (line["status"], line["outcome"]) == (200, "upstream_error")


@pytest.mark.parametrize("terminal", ["completed", "incomplete", "failed"])
@pytest.mark.parametrize("done", [False, True])
async def test_nothing_after_the_terminal_event(
    serve: Serve, upstream: ScriptedUpstream, terminal: Any, done: bool  # noqa: FBT001
) -> None:  # fmt: skip
    """Only [DONE] follows the terminal event; what an upstream adds is not shown."""
    proxy = await serve()
    frames = responses_events(terminal=terminal, done=done)
    more = [b": late\n\n", responses_events()[0], responses_events()[-1], b"data: x\n\n"]
    upstream.script(send(*frames, *more), EndChunks())
    answer = await proxy.post(RESPONSES, asking(RESPONSES))
    assert answer.body == b"".join(frames)
    assert (await log_line(proxy))["outcome"] == terminal


async def test_done_without_a_terminal_event(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A [DONE] before the terminal event is not shown, and response.failed follows."""
    proxy = await serve()
    frames = responses_events(terminal=None)
    upstream.script(send(*frames, DONE), EndChunks())
    answer = await proxy.post(RESPONSES, asking(RESPONSES))
    failed_after(answer.body, b"".join(frames))
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize("end", ENDS)
async def test_an_upstreams_error_event(
    serve: Serve, upstream: ScriptedUpstream, end: list[Step]
) -> None:
    """It passes; response.failed follows with its message; the request failed."""
    proxy = await serve()
    error = sse(
        {"type": "error", "code": "x", "message": "GPU fell off", "sequence_number": 2},
        event="error",
    )
    frames = [*responses_events()[:2], error]
    upstream.script(send(*frames), end)
    answer = await proxy.post(RESPONSES, asking(RESPONSES))
    fact = failed_after(answer.body, b"".join(frames))
    assert "GPU fell off" in fact["response"]["error"]["message"]
    assert fact["sequence_number"] == 3


@pytest.mark.parametrize(
    "name", ["response.in_progress", "response.output_item.done", "response.completed", "error"]
)
async def test_a_deciding_event_that_is_not_json(
    serve: Serve, upstream: ScriptedUpstream, name: str
) -> None:
    """It ends the stream with response.failed, though the upstream would go on."""
    proxy = await serve()
    frames = responses_events()
    broken = f"event: {name}\ndata: {{oops\n\n".encode()
    upstream.script(send(*frames[:3], broken, *frames[3:]), Stall())
    answer = await proxy.post(RESPONSES, asking(RESPONSES))
    assert failed_after(answer.body, b"".join(frames[:3]))["sequence_number"] == 3
    await asyncio.wait_for(upstream.requests[0].closed.wait(), 2)


async def test_another_event_that_is_not_json(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Anything else that is not JSON passes unchanged."""
    proxy = await serve()
    events = responses_events()
    events.insert(3, b"event: response.output_text.delta\ndata: {oops\n\n")
    upstream.script(send(*events), EndChunks())
    assert (await proxy.post(RESPONSES, asking(RESPONSES))).body == b"".join(events)


async def test_a_stall_ends_with_a_timeout(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A stream silent past `idle` ends with response.failed, and the upstream is let go."""
    proxy = await serve(timeouts={"idle": "100ms"})
    frames = responses_events()[:4]
    upstream.script(send(*frames), Stall())
    answer = await proxy.post(RESPONSES, asking(RESPONSES))
    fact = failed_after(answer.body, b"".join(frames))
    assert fact["response"]["error"]["message"].startswith("[upstream_timeout] ")
    assert (await log_line(proxy))["outcome"] == "upstream_timeout"
    await asyncio.wait_for(upstream.requests[0].closed.wait(), 2)


async def test_a_comment_is_a_sign_of_life(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Comments count against `idle`: a server that pings is not silent."""
    proxy = await serve(timeouts={"idle": "300ms"})
    gates = [asyncio.Event() for _ in range(4)]
    frames = responses_events()
    pings = [step for gate in gates for step in (Chunk(b": ping\n\n"), Wait(gate))]
    upstream.script(send(frames[0]), pings, [Chunk(b"".join(frames[1:]))], EndChunks())
    client = await proxy.send(RESPONSES, asking(RESPONSES))
    await client.read_head()
    for gate in gates:
        await client.read_until(b": ping\n\n")
        await asyncio.sleep(0.15)
        gate.set()
    check_terminal(frames[0] + await client.read_body(), completed=True)


async def test_the_sdk_rebuilds_a_cut_response(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The SDK's stream helper accepts the response.failed that follows a cut."""
    proxy = await serve()
    frames = responses_events()[:5]
    upstream.script(send(*frames), Reset())
    async with (
        proxy.openai() as client,
        client.responses.stream(model="gpt-test", input="Hi") as events,
    ):
        seen: list[Any] = [event async for event in events]
    assert seen[-1].type == "response.failed"
    assert seen[-1].response.status == "failed"


# The other APIs


CUT: list[tuple[str, int]] = [(CHAT, 0), (CHAT, 2), (MESSAGES, 0), (MESSAGES, 3), (MESSAGES, -1)]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize(("path", "events"), CUT)
async def test_a_cut_stream_elsewhere(
    serve: Serve, upstream: ScriptedUpstream, path: str, events: int, end: list[Step]
) -> None:
    """On chat an error frame and no [DONE], on messages an error event, after what passed."""
    proxy = await serve()
    frames = events_of(path)[:events] if events else []
    upstream.script(send(*frames), end)
    answer = await proxy.post(path, asking(path))
    passed = b"".join(frames)
    assert answer.body.startswith(passed)
    ((kind, data),) = parse_sse(answer.body[len(passed) :])
    error = json.loads(data)
    assert kind == ("message" if path == CHAT else "error")
    assert error["error"]["type"] == ("server_error" if path == CHAT else "api_error")
    assert (await log_line(proxy))["outcome"] == "upstream_error"


@pytest.mark.parametrize("end", [ENDS[0], ENDS[1], ENDS[2]])
async def test_chat_is_complete_with_a_finish_reason(
    serve: Serve, upstream: ScriptedUpstream, end: list[Step]
) -> None:
    """A chat stream that finished needs neither [DONE] nor usage, whatever comes after."""
    proxy = await serve()
    frames = chat_events(done=False)
    upstream.script(send(*frames), end)
    answer = await proxy.post(CHAT, asking(CHAT))
    assert answer.body == b"".join(frames)
    line = await log_line(proxy)
    assert (line["outcome"], line["estimated"]) == ("completed", True)


async def test_chat_done_without_a_finish_reason(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A [DONE] before any finish reason is not shown: it would look like success."""
    proxy = await serve()
    frames = chat_events(done=False)[:2]
    upstream.script(send(*frames, DONE), EndChunks())
    body = (await proxy.post(CHAT, asking(CHAT))).body
    assert b"[DONE]" not in body
    assert "error" in json.loads(parse_sse(body)[-1][1])


@pytest.mark.parametrize(
    ("path", "error"),
    [
        (CHAT, sse({"error": {"message": "GPU fell off", "type": "x"}})),
        (
            MESSAGES,
            sse({"type": "error", "error": {"type": "x", "message": "no"}}, event="error"),
        ),
    ],
)
async def test_an_upstreams_error_elsewhere(
    serve: Serve, upstream: ScriptedUpstream, path: str, error: bytes
) -> None:
    """It passes as it came and is the end: no second error, no [DONE] (traps, 9)."""
    proxy = await serve()
    first = events_of(path)[:2]
    upstream.script(send(*first, error, DONE), EndChunks())
    assert (await proxy.post(path, asking(path))).body == b"".join([*first, error])
    assert (await log_line(proxy))["outcome"] == "failed"


# The body's end


@pytest.mark.parametrize("path", PATHS)
async def test_an_upstream_that_does_not_hang_up(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """After the terminal event the client's body ends within a second, and the upstream's."""
    assert relay.TAIL <= 1
    monkeypatch.setattr(relay, "TAIL", 0.1)
    proxy = await serve()
    frames = events_of(path)
    upstream.script(send(*frames), Stall())
    async with asyncio.timeout(1):
        answer = await proxy.post(path, asking(path))
        await upstream.requests[0].closed.wait()
    assert answer.body == b"".join(frames)
    assert (await log_line(proxy))["outcome"] == "completed"


@pytest.mark.parametrize("path", PATHS)
async def test_a_healthy_end_keeps_the_connection(
    serve: Serve, upstream: ScriptedUpstream, path: str
) -> None:
    """After a complete stream the client's connection serves the next request."""
    proxy = await serve()
    client = await proxy.send(path, asking(path))
    assert (await client.answer()).status == 200
    body = json.dumps(asking(path)).encode()
    await client.request("POST", path, proxy.headers(), body)
    assert (await client.answer()).status == 200


@pytest.mark.parametrize("path", PATHS)
async def test_a_failure_ends_the_body_and_the_connection(
    serve: Serve, upstream: ScriptedUpstream, path: str
) -> None:
    """After a terminal frame of ours the last chunk comes, then the connection closes."""
    proxy = await serve()
    upstream.script(send(events_of(path)[0]), Reset())
    client = await proxy.send(path, asking(path))
    await client.answer()  # raises if the last chunk is missing
    assert await asyncio.wait_for(client.reader.read(), 2) == b""


async def test_no_terminal_frame_within_an_event(
    serve: Serve, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the client has half of an oversize event the body is left without its end."""
    monkeypatch.setattr(relay, "Splitter", lambda: Splitter(4096))
    proxy = await serve()
    big = sse({"type": "response.brand_new", "x": "y" * 10_000})
    first = responses_events()[0]
    upstream.script(send(first, big[:9000]), Reset())
    with pytest.raises(IncompleteBody) as caught:
        await proxy.post(RESPONSES, asking(RESPONSES))
    assert (first + big).startswith(caught.value.partial)
    assert (await log_line(proxy))["outcome"] == "upstream_error"
