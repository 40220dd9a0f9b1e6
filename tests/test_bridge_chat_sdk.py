"""The official SDKs, and a coding agent's requests, find a chat upstream a Responses API."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import openai
import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIResponsesModel,
    RunConfig,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

from answers import USAGE
from chat_upstream import (
    DONE,
    FUNCTION,
    HELLO,
    PATH,
    THINKING,
    TOOLS,
    Fact,
    Serve,
    Told,
    begun,
    calls,
    chat_only,
    check_pairs,
    frame,
    function_call,
    messages_of,
    more,
    piece_frame,
    send,
    text,
)
from invariants import check_invariants
from refusals import Refusal
from rig import Proxy, routes
from steps import EndChunks, Reset
from upstream import ScriptedUpstream
from validating import check_bridged, timeless

HOLDER = "replay"
ASK: Any = {"model": "gpt-test", "input": "hi"}
WEATHER = {"Zürich": "sunny", "Bern": "rain"}
ANSWER = "Zürich: sunny. Bern: rain."
TOOL: Any = {**FUNCTION, "name": "get_weather", "strict": False}


class City(BaseModel):
    """What structured output is parsed into."""

    name: str
    people: int


CITY = '{"name": "Bern", "people": 134000}'
PARSED = City(name="Bern", people=134000)


@pytest.fixture(autouse=True)
def _no_tracing() -> Iterator[None]:
    """Send no traces: they would go to the network."""
    set_tracing_disabled(disabled=True)
    yield
    set_tracing_disabled(disabled=False)


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """A daemon whose upstream speaks chat completions alone."""
    return await serve(upstreams=chat_only())


@pytest.fixture
async def client(proxy: Proxy) -> AsyncIterator[AsyncOpenAI]:
    """The SDK's client."""
    async with proxy.openai() as made:
        yield made


async def helped(client: AsyncOpenAI, **asked: Any) -> tuple[list[Any], Any]:
    """Use the stream helper; return its events and the response that it put together."""
    async with client.responses.stream(**{**ASK, **asked}) as helper:
        events = [event async for event in helper]
        return events, await helper.get_final_response()


@pytest.mark.parametrize("told", [HELLO, THINKING, TOOLS], ids=["text", "reasoning", "tools"])
async def test_create_and_stream(
    client: AsyncOpenAI, upstream: ScriptedUpstream, told: Told
) -> None:
    """A whole answer, a plain stream and the helper give the same response; deltas add up to it."""
    upstream.script(told.script(streamed=False))
    whole = await client.responses.create(**ASK)
    for _ in range(2):
        upstream.script(told.script(streamed=True))
    async with await client.responses.create(**ASK, stream=True) as stream:
        last: Any = [event async for event in stream][-1]
    events, final = await helped(client)
    assert last.type == events[-1].type == "response.completed"
    dumps = [
        timeless(each.model_dump(exclude={"output": {"__all__": {"parsed_arguments"}}}))
        for each in (whole, last.response)
    ]
    assert dumps[0] == dumps[1]
    for made in (last.response, final):
        assert made.output_text == whole.output_text
        assert made.usage == whole.usage
        assert [item.type for item in made.output] == [item.type for item in whole.output]
    for kind, field in (("message", "output_text"), ("function_call", "function_call_arguments")):
        for at, item in enumerate(final.output):
            name = f"response.{field}.delta"
            deltas = [e.delta for e in events if e.type == name and e.output_index == at]
            if item.type == kind:
                said = item.arguments if kind == "function_call" else item.content[0].text
                assert "".join(deltas) == said
    assert whole.usage is not None
    assert whole.usage.to_dict() == USAGE.responses()


async def test_structured_output(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    """`parse` and the helper send chat's form of the schema, and parse the same object."""
    told = Told([text(CITY[:9]), text(CITY[9:])], {"content": CITY})
    upstream.script(told.script(streamed=False))
    whole = await client.responses.parse(**ASK, text_format=City)
    upstream.script(told.script(streamed=True))
    _, final = await helped(client, text_format=City)
    assert whole.output_parsed == final.output_parsed == PARSED
    for request in upstream.requests:
        form = request.json()["response_format"]
        assert (form["type"], form["json_schema"]["name"]) == ("json_schema", "City")
        assert form["json_schema"]["strict"] is True
        assert set(form["json_schema"]["schema"]["properties"]) == {"name", "people"}


@pytest.mark.parametrize("chained", [False, True])
async def test_a_tool_loop(
    client: AsyncOpenAI, upstream: ScriptedUpstream, *, chained: bool
) -> None:
    """A loop works by `previous_response_id` and by sending all items back alike."""
    upstream.script(TOOLS.script(streamed=True))
    _, made = await helped(client, tools=[TOOL], store=chained)
    asked = [item for item in made.output if item.type == "function_call"]
    results: Any = [
        {
            "type": "function_call_output",
            "call_id": item.call_id,
            "output": WEATHER[json.loads(item.arguments)["city"]],
        }
        for item in asked
    ]
    if chained:
        await client.responses.create(
            model="gpt-test", input=results, previous_response_id=made.id, tools=[TOOL]
        )
    else:
        items: Any = [item.to_dict() for item in made.output]
        for item in items:
            item.pop("parsed_arguments", None)
        given: Any = [{"role": "user", "content": "hi"}, *items, *results]
        await client.responses.create(model="gpt-test", input=given, tools=[TOOL], store=False)
    messages = messages_of(upstream.requests[-1])
    check_pairs(messages)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool"]
    assert [message["content"] for message in messages[2:]] == ["sunny", "rain"]


async def test_other_ends(client: AsyncOpenAI, proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Limits and failures reach the SDK as its own types."""
    upstream.script(HELLO.but(finish="length").script(streamed=True))
    async with client.responses.stream(**ASK, max_output_tokens=3) as helper:
        end: Any = [event async for event in helper][-1]
    assert (end.type, end.response.status) == ("response.incomplete", "incomplete")
    assert end.response.incomplete_details.reason == "max_output_tokens"
    for bad in ([piece_frame(text("Hel")), frame(error={"message": "It broke."}), DONE], []):
        upstream.script(send(bad, EndChunks() if bad else Reset()))
        async with (
            proxy.openai() as fresh,  # after a failure the connection is closed
            await fresh.responses.create(**ASK, stream=True) as stream,
        ):
            last: Any = [event async for event in stream][-1]
        assert last.type == "response.failed"
        assert last.response.error.code == "server_error"


async def test_refused(client: AsyncOpenAI) -> None:
    """What chat cannot express is the SDK's own BadRequestError with its param."""
    tools: Any = [{"type": "web_search"}]
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.create(**ASK, tools=tools)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "tools[0]")


# openai-agents


@function_tool
def get_weather(city: str) -> str:
    """Say what the weather is in a city."""
    return WEATHER[city]


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("chained", [False, True])
async def test_an_agent(
    client: AsyncOpenAI,
    proxy: Proxy,
    upstream: ScriptedUpstream,
    *,
    streams: bool,
    chained: bool,
) -> None:
    """An agent runs its tools to the end over the bridge, chained or not, streamed or not."""
    upstream.script(TOOLS.script(streamed=streams))
    upstream.script(Told([text(ANSWER)], {"content": ANSWER}).script(streamed=streams))
    agent = Agent[Any](
        name="forecaster",
        instructions="Use the tool.",
        model=OpenAIResponsesModel("gpt-test", client),
        model_settings=ModelSettings(include_usage=True),
        tools=[get_weather],
    )
    how: Any = {"run_config": RunConfig(tracing_disabled=True)}
    how |= {"auto_previous_response_id": True} if chained else {}
    if streams:
        result: Any = Runner.run_streamed(agent, "weather?", **how)
        async for _ in result.stream_events():
            pass
    else:
        result = await Runner.run(agent, "weather?", **how)
    assert result.final_output == ANSWER
    messages = messages_of(upstream.requests[-1])
    check_pairs(messages)
    roles = ["system", "user", "assistant", "tool", "tool"]
    assert [message["role"] for message in messages] == roles
    assert [message["content"] for message in messages[3:]] == list(WEATHER.values())
    assert [each.usage.input_tokens for each in result.raw_responses] == [USAGE.input] * 2
    await check_invariants(proxy, upstream)


# A coding agent


def codex(*more_items: Fact) -> Fact:
    """Return a request as Codex makes them (wire.md)."""
    shell = {
        "type": "function",
        "name": "shell",
        "description": "Runs a command.",
        "strict": False,
        "parameters": {
            "type": "object",
            "properties": {"command": {"type": "array", "items": {"type": "string"}}},
            "required": ["command"],
            "additionalProperties": False,
        },
    }
    team = {
        "type": "namespace",
        "name": "collaboration",
        "description": "Works with others.",
        "tools": [{**shell, "name": "ask_other"}],
    }

    def said(role: str, words: str, number: int) -> Fact:
        part = {"type": "output_text" if role == "assistant" else "input_text", "text": words}
        return {"type": "message", "id": f"msg_{number}", "role": role, "content": [part]}

    return {
        "model": "gpt-test",
        "instructions": "You are a coding agent.",
        "input": [
            said("developer", "<permissions>all</permissions>", 1),
            said("user", "<environment_context/>", 2),
            said("user", "list the files", 3),
            *more_items,
        ],
        "tools": [shell, team, {"type": "web_search", "external_web_access": False}],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": True,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "0199-thread",
        "client_metadata": {"x-codex-installation-id": "1"},
        "text": {"verbosity": "low"},
    }


SHELL = '{"command":["ls"]}'
LOOP: list[Fact] = [
    {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [{"type": "summary_text", "text": "List them."}],
        "content": None,
        "encrypted_content": "gAAAA==",
    },
    {"type": "function_call", "id": "fc_1", "name": "shell", "arguments": SHELL, "call_id": "c1"},
    {"type": "function_call_output", "id": "fco_1", "call_id": "c1", "output": "a.py\nb.py"},
]


async def test_codex_with_tools_left_out(serve: Serve, upstream: ScriptedUpstream) -> None:
    """With `unsupported_tools: drop` a coding agent's loop works, and the header says at what
    cost.
    """  # noqa: D205 - one sentence does not fit the line
    proxy = await serve(upstreams=chat_only(), routes=routes(unsupported_tools="drop"))
    upstream.script(
        Told([calls(begun(0, "c1", "shell")), calls(more(0, SHELL))], finish="tool_calls").script(
            streamed=True
        )
    )
    for items in ([], LOOP):
        answer = await proxy.post(PATH, codex(*items))
        response = check_bridged(answer)
        assert response["status"] == "completed"
        dropped = "namespace:collaboration, web_search"
        assert answer.headers["x-aiproxy-dropped-tools"] == dropped
    first, second = (request.json() for request in upstream.requests)
    system = {
        "role": "system",
        "content": "You are a coding agent.\n\n<permissions>all</permissions>",
    }
    users = [
        {"role": "user", "content": "<environment_context/>"},
        {"role": "user", "content": "list the files"},
    ]
    assert first["messages"] == [system, *users]
    assert second["messages"] == [
        system,
        *users,
        {"role": "assistant", "content": None, "tool_calls": [function_call("shell", SHELL, "c1")]},
        {"role": "tool", "tool_call_id": "c1", "content": "a.py\nb.py"},
    ]
    for body in (first, second):
        del body["messages"]
        (tool,) = body.pop("tools")
        assert (tool["type"], tool["function"]["name"]) == ("function", "shell")
        assert tool["function"]["strict"] is False
        assert body == {
            "model": "gpt-test",
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning_effort": "medium",
            "prompt_cache_key": "0199-thread",
            "verbosity": "low",
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    await check_invariants(proxy, upstream)


async def test_codex_refused(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Without it the first tool that cannot be expressed is refused by its place."""
    answer = await proxy.post(PATH, codex(*LOOP))
    chosen = answer.headers.get("x-aiproxy-upstream")
    Refusal(400, "unsupported_parameter", param="tools[1]").check(answer, upstream=chosen)
    assert "namespace" in answer.json()["error"]["message"]
    assert upstream.requests == []
