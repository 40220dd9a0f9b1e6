"""`openai-agents` runs its loops through aiproxy as it does against the upstream itself."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from openai.types.responses import ResponseTextDeltaEvent
from pydantic import BaseModel

from answers import USAGE, chat_events, chat_json, tool_call
from invariants import check_invariants, take_baseline
from responses import function_item, message_item, reasoning_item, responses_events, responses_json
from rig import Proxy
from steps import Reset, Step, json_answer, stream
from upstream import ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]
CONFIG = RunConfig(tracing_disabled=True)
SETTINGS = ModelSettings(include_usage=True)
QUESTION = "What is the weather in Zürich and in Bern?"
ANSWER = "Zürich: sunny. Bern: rain."
WEATHER = {"Zürich": "sunny", "Bern": "rain"}
CALLS = [("get_weather", json.dumps({"city": city})) for city in WEATHER]


@function_tool
def get_weather(city: str) -> str:
    """Say what the weather is in a city."""
    return WEATHER[city]


class Report(BaseModel):
    """What structured output is parsed into."""

    sunny: list[str]


@pytest.fixture(autouse=True)
def _no_tracing() -> Iterator[None]:
    """Send no traces: they would go to the network."""
    set_tracing_disabled(disabled=True)
    yield
    set_tracing_disabled(disabled=False)


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """Run the daemon as it is usually configured."""
    return await serve()


@pytest.fixture
async def clients(proxy: Proxy, upstream: ScriptedUpstream) -> AsyncIterator[list[AsyncOpenAI]]:
    """Make one client through aiproxy and one straight to the upstream."""
    async with (
        proxy.openai() as through,
        AsyncOpenAI(base_url=upstream.url, api_key="k", max_retries=0) as direct,
    ):
        yield [through, direct]


def agent(model: Any, client: AsyncOpenAI, **options: Any) -> Agent[Any]:
    """Make an agent of one of the two model classes."""
    return Agent(
        name="forecaster",
        instructions="Use the tool.",
        model=model("gpt-test", client),
        **{"tools": [get_weather], "model_settings": SETTINGS, **options},
    )


def tool_loop(model: Any, *, streams: bool) -> list[list[Step]]:
    """Answer with two tool calls at once, then with text."""
    if model is OpenAIResponsesModel:
        items = [reasoning_item(), *(function_item(*call) for call in CALLS)]
        rounds = (items, [message_item(ANSWER)])
        if streams:
            return [stream(responses_events(items=items)) for items in rounds]
        return [json_answer(responses_json(items=items)) for items in rounds]
    calls = [tool_call(*call) for call in CALLS]
    if streams:
        return [
            stream(chat_events("", tool_calls=calls, include_usage=True)),
            stream(chat_events(ANSWER, include_usage=True)),
        ]
    return [json_answer(chat_json(None, tool_calls=calls)), json_answer(chat_json(ANSWER))]


async def run(model: Any, client: AsyncOpenAI, *, streams: bool, **options: Any) -> dict[str, Any]:
    """Run an agent to its end; return all that can be seen of it."""
    made = agent(model, client, **options)
    seen: list[Any] = []
    if streams:
        result: Any = Runner.run_streamed(made, QUESTION, run_config=CONFIG)
        async for event in result.stream_events():
            if event.type == "raw_response_event":
                seen.append(event.data.model_dump(warnings=False))
            else:
                seen.append(getattr(event, "name", event.type))
    else:
        result = await Runner.run(made, QUESTION, run_config=CONFIG)
    return {
        "seen": seen,
        "final": result.final_output,
        "items": result.to_input_list(),
        "usage": [response.usage for response in result.raw_responses],
        "ids": [response.response_id for response in result.raw_responses],
    }


def timeless(value: Any) -> Any:
    """Return plain data without the times and ids that the package itself makes up."""
    if isinstance(value, dict):
        made_up = {"created_at", "id", "item_id"}
        return {k: timeless(v) for k, v in value.items() if k not in made_up}
    return [timeless(one) for one in value] if isinstance(value, list) else value


@pytest.mark.parametrize("model", [OpenAIResponsesModel, OpenAIChatCompletionsModel])
@pytest.mark.parametrize("streams", [False, True])
async def test_a_tool_loop(
    clients: list[AsyncOpenAI], upstream: ScriptedUpstream, model: Any, *, streams: bool
) -> None:
    """Tool calls are made, their results go back, and all is as without aiproxy between."""
    scripts = tool_loop(model, streams=streams)
    runs = []
    for client in clients:
        for script in scripts:
            upstream.script(script)
        runs.append(await run(model, client, streams=streams))
    assert timeless(runs[0]) == timeless(runs[1])
    assert runs[0]["ids"] == runs[1]["ids"]
    assert runs[0]["final"] == ANSWER
    assert [usage.input_tokens for usage in runs[0]["usage"]] == [USAGE.input] * 2
    bodies = [timeless(request.json()) for request in upstream.requests]
    for body in bodies:
        assert body.pop("stream", False) is streams
    assert bodies[:2] == bodies[2:]
    results = [one.get("output", one.get("content")) for one in _results(bodies[1])]
    assert results == list(WEATHER.values())


def _results(body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of tools in a request of either API."""
    return [
        one
        for one in body.get("input") or body["messages"]
        if one.get("type") == "function_call_output" or one.get("role") == "tool"
    ]


async def test_reasoning_goes_back_whole(
    clients: list[AsyncOpenAI], upstream: ScriptedUpstream
) -> None:
    """An encrypted reasoning item comes back to the upstream in the next round as it was."""
    scripts = tool_loop(OpenAIResponsesModel, streams=True)
    for script in scripts:
        upstream.script(script)
    settings = ModelSettings(store=False, response_include=["reasoning.encrypted_content"])
    await run(OpenAIResponsesModel, clients[0], streams=True, model_settings=settings)
    first, second = (request.json() for request in upstream.requests)
    (item,) = (one for one in second["input"] if one.get("type") == "reasoning")
    assert item["encrypted_content"] == "ENCRYPTED-REASONING"
    assert item["summary"] == [{"type": "summary_text", "text": "Thought about it."}]
    assert (first["store"], first["include"]) == (False, ["reasoning.encrypted_content"])


@pytest.mark.parametrize("model", [OpenAIResponsesModel, OpenAIChatCompletionsModel])
async def test_structured_output(
    clients: list[AsyncOpenAI], upstream: ScriptedUpstream, model: Any
) -> None:
    """An agent with an output type gets its object, streamed or not."""
    upstream.text = '{"sunny": ["Zürich"]}'
    for streams in (False, True):
        done = await run(model, clients[0], streams=streams, output_type=Report)
        assert done["final"] == Report(sunny=["Zürich"])


async def test_deltas_arrive(clients: list[AsyncOpenAI], upstream: ScriptedUpstream) -> None:
    """A streamed run shows the text word by word."""
    upstream.text = ANSWER
    result = Runner.run_streamed(
        agent(OpenAIResponsesModel, clients[0]), QUESTION, run_config=CONFIG
    )
    words = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and isinstance(event.data, ResponseTextDeltaEvent)
    ]
    assert words == ["Zürich: ", "sunny. ", "Bern: ", "rain."]


@pytest.mark.parametrize("model", [OpenAIResponsesModel, OpenAIChatCompletionsModel])
@pytest.mark.parametrize("streams", [False, True])
async def test_refusals_are_raised(proxy: Proxy, model: Any, *, streams: bool) -> None:
    """A key that is not known ends the run with the SDK's own exception."""
    async with proxy.openai(api_key="sk-no") as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            await run(model, client, streams=streams)
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("model", [OpenAIResponsesModel, OpenAIChatCompletionsModel])
async def test_a_cut_stream_is_no_answer(
    proxy: Proxy, clients: list[AsyncOpenAI], upstream: ScriptedUpstream, model: Any
) -> None:
    """A stream that breaks off in the middle ends the run with an exception, not half of it."""
    baseline = await take_baseline(proxy, upstream)
    events = responses_events(ANSWER) if model is OpenAIResponsesModel else chat_events(ANSWER)
    upstream.script(stream(events)[:4], Reset())
    with pytest.raises(Exception, match=r"failed|broke off"):
        await run(model, clients[0], streams=True)
    await clients[0].close()
    await check_invariants(proxy, upstream, baseline=baseline)
