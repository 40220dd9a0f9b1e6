"""Tokens through the daemon: log, metric and what the SDK sees say the same."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from answers import (
    USAGE,
    Usage,
    chat_events,
    chat_json,
    embeddings_json,
    messages_events,
    messages_json,
)
from invariants import TOKEN_FIELDS, check_tokens, eventually
from responses import message_item, responses_events, responses_json, responses_object
from rig import Proxy, prompt, totals
from upstream import (
    Chunk,
    Finish,
    Headers,
    Recorded,
    Reset,
    ScriptedUpstream,
    Stall,
    json_answer,
    stream,
)

Serve = Callable[..., Awaitable[Proxy]]
RESPONSES, CHAT = "/v1/responses", "/v1/chat/completions"
MESSAGES, EMBEDDINGS = "/v1/messages", "/v1/embeddings"
TOLD = Usage(1000, 300, 200, 50, cache_write=20)
SSE = [("content-type", "text/event-stream"), ("transfer-encoding", "chunked")]


async def line_of(proxy: Proxy, n: int = 1) -> dict[str, Any]:
    """The log line of the n-th request, once it is there."""

    async def holds() -> None:
        assert len(proxy.request_logs()) >= n

    await eventually(holds)
    return proxy.request_logs()[n - 1]


def tokens_of(line: dict[str, Any]) -> dict[str, int]:
    """The tokens of a log line by type."""
    return {kind: line[field] for kind, field in TOKEN_FIELDS.items()}


def incomplete(usage: Usage) -> dict[str, Any]:
    """A response that was cut by its maximum."""
    return responses_object(
        status="incomplete",
        usage=usage,
        output=[message_item()],
        incomplete_reason="max_output_tokens",
    )


def failed(usage: Usage) -> dict[str, Any]:
    """A response that failed."""
    cause = {"code": "server_error", "message": "no"}
    return responses_object(status="failed", usage=usage, error=cause)


COUNTED: list[Any] = [
    pytest.param(RESPONSES, json_answer(responses_json(usage=TOLD)), "completed", id="responses"),
    pytest.param(RESPONSES, json_answer(incomplete(TOLD)), "incomplete", id="responses incomplete"),
    pytest.param(RESPONSES, json_answer(failed(TOLD)), "failed", id="responses failed"),
    *(
        pytest.param(
            RESPONSES, stream(responses_events(usage=TOLD, terminal=end)), end, id=f"stream {end}"
        )
        for end in ("completed", "incomplete", "failed")
    ),
    pytest.param(CHAT, json_answer(chat_json(usage=TOLD)), "completed", id="chat"),
    pytest.param(
        CHAT,
        json_answer(chat_json(usage=TOLD, finish_reason="length")),
        "incomplete",
        id="chat length",
    ),
    pytest.param(
        CHAT, stream(chat_events(usage=TOLD, include_usage=True)), "completed", id="chat stream"
    ),
    pytest.param(
        CHAT,
        stream(chat_events(usage=TOLD, include_usage=True, finish_reason="content_filter")),
        "incomplete",
        id="chat stream filtered",
    ),
    pytest.param(MESSAGES, json_answer(messages_json(usage=TOLD)), "completed", id="messages"),
    pytest.param(
        MESSAGES,
        json_answer(messages_json(usage=TOLD, stop_reason="max_tokens")),
        "incomplete",
        id="messages length",
    ),
    pytest.param(MESSAGES, stream(messages_events(usage=TOLD)), "completed", id="messages stream"),
    pytest.param(
        MESSAGES,
        stream(messages_events(usage=TOLD, stop_reason="max_tokens")),
        "incomplete",
        id="messages stream length",
    ),
]


@pytest.mark.parametrize(("path", "script", "outcome"), COUNTED)
async def test_counted(
    serve: Serve, upstream: ScriptedUpstream, path: str, script: Any, outcome: str
) -> None:
    """What the upstream counted is logged and counted, however the answer ended (traps, 21)."""
    proxy = await serve()
    upstream.script(script)
    streamed = dict(script[0].pairs)["content-type"] == "text/event-stream"
    assert (await proxy.post(path, prompt(path, stream=streamed))).status == 200
    line = await line_of(proxy)
    assert (line["outcome"], line["estimated"]) == (outcome, False)
    assert tokens_of(line) == TOLD.disjoint()
    await check_tokens(proxy)
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_usage_estimated_total", "reason") == {}
    assert totals(metrics, "aiproxy_tokens_total", "route") == {"gpt-test": 1200}
    assert totals(metrics, "aiproxy_tokens_total", "key") == {"team-a": 1200}


async def test_embeddings(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Embeddings are charged their input."""
    proxy = await serve()
    upstream.script(json_answer(embeddings_json(usage=USAGE)))
    await proxy.post(EMBEDDINGS)
    tokens = tokens_of(await line_of(proxy))
    assert tokens == {"input": 11, "input_cached": 0, "output": 0, "output_reasoning": 0}


# Missing, bad, cut


MISSING: list[Any] = [
    pytest.param(RESPONSES, json_answer(responses_json("x" * 400, usage=None)), "missing"),
    pytest.param(RESPONSES, stream(responses_events("x" * 400, usage=None)), "missing"),
    pytest.param(CHAT, json_answer(chat_json("x" * 400, usage=None)), "missing"),
    pytest.param(CHAT, stream(chat_events("x" * 400)), "missing"),
    pytest.param(CHAT, stream(chat_events("x" * 400, done=False)), "missing"),
    pytest.param(RESPONSES, stream(responses_events("x" * 400, usage=Usage(-5))), "bad"),
    pytest.param(RESPONSES, stream(responses_events("x" * 400, usage=Usage(10**9))), "bad"),
    pytest.param(MESSAGES, stream(messages_events("x" * 400, usage=Usage(-5))), "bad"),
    pytest.param(MESSAGES, json_answer(messages_json("x" * 400, usage=Usage(10**9))), "bad"),
]


@pytest.mark.parametrize(("path", "script", "reason"), MISSING)
async def test_estimated(
    serve: Serve, upstream: ScriptedUpstream, path: str, script: Any, reason: str
) -> None:
    """Without a good usage input and output are estimated, flagged, and counted as such."""
    proxy = await serve()
    upstream.script(script)
    streamed = dict(script[0].pairs)["content-type"] == "text/event-stream"
    assert (await proxy.post(path, prompt(path, stream=streamed))).status == 200
    line = await line_of(proxy)
    assert (line["outcome"], line["estimated"]) == ("completed", True)
    assert line["input_tokens"] > 0
    assert line["output_tokens"] >= 100
    await check_tokens(proxy)
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_usage_estimated_total", "reason") == {reason: 1}
    assert totals(metrics, "aiproxy_usage_estimated_total", "route") == {"gpt-test": 1}


@pytest.mark.parametrize("end", [Reset(), Finish()])
@pytest.mark.parametrize(
    ("path", "events"),
    [
        (RESPONSES, responses_events("x" * 400, deltas=4)[:-3]),
        (CHAT, chat_events("x" * 400, deltas=4)[:-2]),
        (MESSAGES, messages_events("x" * 400, deltas=4)[:-3]),
    ],
)
async def test_a_cut_stream_is_charged(
    serve: Serve, upstream: ScriptedUpstream, path: str, events: list[bytes], end: Any
) -> None:
    """What was delivered before a break is charged, as an estimate."""
    proxy = await serve()
    upstream.script(Headers(200, SSE), [Chunk(event) for event in events], end)
    await proxy.post(path, prompt(path, stream=True))
    line = await line_of(proxy)
    assert (line["outcome"], line["estimated"]) == ("upstream_error", True)
    assert line["input_tokens"] > 0
    assert 100 <= line["output_tokens"] <= 110
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_usage_estimated_total", "reason") == {"cut": 1}


async def test_who_leaves_pays(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A client that leaves before the last event is charged what it got (traps, 22)."""
    proxy = await serve()
    events = responses_events("x" * 400, deltas=4)[:-1]
    upstream.script(Headers(200, SSE), [Chunk(event) for event in events], Stall())
    client = await proxy.send(RESPONSES, prompt(stream=True))
    await client.read_head()
    await client.read_until(b"response.output_item.done")
    await client.close()
    line = await line_of(proxy)
    assert (line["outcome"], line["estimated"], line["status"]) == (
        "client_disconnected",
        True,
        499,
    )
    assert line["output_tokens"] >= 100
    await check_tokens(proxy)


async def test_a_refusal_costs_nothing(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A request that made no tokens is charged none, and nothing is estimated."""
    proxy = await serve()
    upstream.script(Headers(500, [("content-length", "0")]))
    await proxy.post(RESPONSES)
    await proxy.post(RESPONSES, prompt(model="unknown"))
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_tokens_total", "type") == {}
    assert totals(metrics, "aiproxy_usage_estimated_total", "reason") == {}


# Chat: the usage frame


async def ask_chat(proxy: Proxy, upstream: ScriptedUpstream, **fields: Any) -> tuple[Recorded, str]:
    """Stream a chat; return the upstream's request and the client's body."""
    upstream.script(stream(chat_events(include_usage=True, usage=TOLD)))
    answer = await proxy.post(CHAT, prompt(CHAT, stream=True, **fields))
    return upstream.requests[-1], answer.body.decode()


@pytest.mark.parametrize(
    "options", [None, {}, {"include_usage": False}, {"include_usage": None}, {"x": [1.0]}]
)
async def test_usage_is_asked_for_and_stripped(
    serve: Serve, upstream: ScriptedUpstream, options: Any
) -> None:
    """The upstream is always asked; a client that did not ask sees no frame without choices."""
    proxy = await serve()
    fields = {} if options is None else {"stream_options": options}
    request, body = await ask_chat(proxy, upstream, **fields)
    assert request.json()["stream_options"] == {**(options or {}), "include_usage": True}
    frames = [json.loads(line[6:]) for line in body.splitlines() if line.startswith("data: {")]
    assert all(frame["choices"] for frame in frames)
    assert not any(frame.get("usage") for frame in frames)
    assert body.endswith("data: [DONE]\n\n")
    assert tokens_of(await line_of(proxy)) == TOLD.disjoint()


async def test_usage_that_was_asked_for_passes(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A client that asked gets the frame, byte for byte, and its other options stay."""
    proxy = await serve()
    options = {"include_obfuscation": False, "include_usage": True, "x": {"y": 1}}
    request, body = await ask_chat(proxy, upstream, stream_options=options)
    assert request.json()["stream_options"] == options
    assert json.dumps(TOLD.chat()) in body


async def test_json_is_not_asked_for_a_usage_frame(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Without a stream there are no stream options: strict upstreams refuse them."""
    proxy = await serve()
    await proxy.post(CHAT)
    assert "stream_options" not in upstream.requests[0].json()


# What the SDKs see


async def test_the_openai_sdk_sees_the_same(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The usage in the SDK's objects is the one in the log."""
    proxy = await serve()
    upstream.usage = TOLD
    messages: Any = [{"role": "user", "content": "Hi"}]
    async with proxy.openai() as client:
        whole = await client.responses.create(model="gpt-test", input="Hi")
        async with client.responses.stream(model="gpt-test", input="Hi") as events:
            streamed = await events.get_final_response()
        chat = await client.chat.completions.create(model="gpt-test", messages=messages)
    for number, usage in enumerate((whole.usage, streamed.usage), 1):
        assert usage is not None
        tokens = tokens_of(await line_of(proxy, number))
        assert tokens["input"] + tokens["input_cached"] == usage.input_tokens
        assert tokens["input_cached"] == usage.input_tokens_details.cached_tokens
        assert tokens["output"] + tokens["output_reasoning"] == usage.output_tokens
        assert tokens["output_reasoning"] == usage.output_tokens_details.reasoning_tokens
    assert chat.usage is not None
    tokens = tokens_of(await line_of(proxy, 3))
    assert sum(tokens.values()) == chat.usage.total_tokens


async def test_the_anthropic_sdk_sees_the_same(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The three input counts of a message are the input types of the log."""
    proxy = await serve()
    upstream.usage = TOLD
    messages: Any = [{"role": "user", "content": "Hi"}]
    async with proxy.anthropic() as client:
        whole = await client.messages.create(model="gpt-test", max_tokens=9, messages=messages)
        async with client.messages.stream(
            model="gpt-test", max_tokens=9, messages=messages
        ) as events:
            streamed = await events.get_final_message()
    for number, usage in enumerate((whole.usage, streamed.usage), 1):
        tokens = tokens_of(await line_of(proxy, number))
        assert tokens["input"] == usage.input_tokens + (usage.cache_creation_input_tokens or 0)
        assert tokens["input_cached"] == usage.cache_read_input_tokens
        assert tokens["output"] + tokens["output_reasoning"] == usage.output_tokens
