"""Scripted answers are what the SDKs' own types and helpers accept."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from anthropic import AsyncAnthropic
from anthropic import types as anthropic_types
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from answers import USAGE, chat_events, chat_json, messages_events, tool_call
from client import parse_sse
from responses import (
    function_item,
    message_item,
    reasoning_item,
    responses_events,
    responses_json,
)
from upstream import (
    ScriptedUpstream,
    json_answer,
    stream,
)

STRICT = TypeAdapter[Any](ResponseStreamEvent)
ALL_ITEMS = [reasoning_item(), message_item("Grüße, world"), function_item()]


@pytest.fixture
async def openai(upstream: ScriptedUpstream) -> AsyncIterator[AsyncOpenAI]:
    """Point the SDK at the scripted upstream itself."""
    async with AsyncOpenAI(base_url=upstream.url, api_key="k", max_retries=0) as client:
        yield client


@pytest.fixture
async def anthropic(upstream: ScriptedUpstream) -> AsyncIterator[AsyncAnthropic]:
    """Point the SDK at the scripted upstream itself; it appends /v1 on its own."""
    base = upstream.url.removesuffix("/v1")
    async with AsyncAnthropic(base_url=base, api_key="k", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("terminal", ["completed", "incomplete", "failed"])
def test_responses_events_are_strictly_valid(terminal: Any) -> None:
    """Every event has every field that the SDK's types require, numbered without a gap."""
    frames = parse_sse(b"".join(responses_events(items=ALL_ITEMS, terminal=terminal)))
    events = [STRICT.validate_json(data, strict=True) for _, data in frames]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events] == [name for name, _ in frames]
    assert events[-1].type == f"response.{terminal}"


def test_responses_json_is_strictly_valid() -> None:
    """The whole object has every field that the SDK's type requires."""
    answer = Response.model_validate(responses_json(items=ALL_ITEMS), strict=True)
    assert answer.output_text == "Grüße, world"


async def test_openai_reads_responses(openai: AsyncOpenAI) -> None:
    """The SDK reads the whole answer and the plain stream of events."""
    whole = await openai.responses.create(model="m", input="hi", store=False)
    assert (whole.output_text, whole.model) == ("Hello world", "m")
    types = [e.type async for e in await openai.responses.create(model="m", input="", stream=True)]
    assert (types[0], types[-1]) == ("response.created", "response.completed")
    assert types.count("response.output_text.delta") == 2


async def test_openai_helper_rebuilds_responses(
    openai: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    """The SDK's stream helper accepts text, tool calls and reasoning in one stream."""
    events = responses_events(items=ALL_ITEMS, deltas=5)
    for split in (None, 1, 7):
        upstream.script(stream(events, newline=b"\r\n", split=split))
        async with openai.responses.stream(model="m", input="hi") as helper:
            answer = await helper.get_final_response()
        assert answer.output_text == "Grüße, world"
        assert [item.type for item in answer.output] == ["reasoning", "message", "function_call"]


async def test_openai_reads_chat(openai: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    """The SDK reads chat answers, their tool calls, and usage only where it was asked for."""
    messages: Any = [{"role": "user", "content": "hi"}]
    whole = await openai.chat.completions.create(model="m", messages=messages)
    assert whole.choices[0].message.content == "Hello world"
    assert whole.usage is not None
    assert whole.usage.total_tokens == 18
    for asked in (True, False):
        async with openai.chat.completions.stream(
            model="m", messages=messages, stream_options={"include_usage": asked}
        ) as helper:
            final = await helper.get_final_completion()
        assert final.choices[0].message.content == "Hello world"
        assert (final.usage is not None) is asked
    call = tool_call("f", '{"a": [1, 2]}')
    upstream.script(stream(chat_events("", tool_calls=[call])))
    upstream.script(json_answer(chat_json(None, tool_calls=[call])))
    async with openai.chat.completions.stream(model="m", messages=messages) as helper:
        streamed = (await helper.get_final_completion()).choices[0]
    plain = (await openai.chat.completions.create(model="m", messages=messages)).choices[0]
    for choice in (streamed, plain):
        assert choice.finish_reason == "tool_calls"
        assert choice.message.tool_calls
        found = choice.message.tool_calls[0]
        assert found.type == "function"
        assert found.function.arguments == '{"a": [1, 2]}'


async def test_openai_reads_embeddings(openai: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    """The SDK asks for base64 and reads the same numbers as from plain JSON."""
    packed = await openai.embeddings.create(model="m", input=["a", "b"])
    plain = await openai.embeddings.create(model="m", input=["a", "b"], encoding_format="float")
    assert upstream.requests[0].json()["encoding_format"] == "base64"
    assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data]
    assert len(packed.data) == 2


async def test_anthropic_reads_messages(
    anthropic: AsyncAnthropic, upstream: ScriptedUpstream
) -> None:
    """The SDK reads whole messages, and its stream helper rebuilds text, tools and usage."""
    ask: Any = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}
    whole = await anthropic.messages.create(**ask)
    upstream.script(stream(messages_events(model="m", tool_uses=[("f", {"a": [1, 2]})])))
    async with anthropic.messages.stream(**ask) as helper:
        tools = await helper.get_final_message()
    async with anthropic.messages.stream(**ask) as helper:
        text = await helper.get_final_message()
    answers: list[anthropic_types.Message] = [whole, tools, text]
    for message in answers:
        part = message.content[0]
        assert part.type == "text"
        assert (part.text, message.model) == ("Hello world", "m")
        assert message.usage.model_dump(exclude_none=True) == USAGE.messages()
    assert tools.content[1].type == "tool_use"
    assert (tools.content[1].input, tools.stop_reason) == ({"a": [1, 2]}, "tool_use")
