"""The official SDKs hold conversations with aiproxy before an upstream that holds none."""

import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, cast

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
from openai.types.responses import Response, ResponseInputMessageItem
from pydantic import BaseModel

from invariants import eventually
from responses import function_item, message_item, reasoning_item, responses_events, responses_json
from rig import TEAM_B, Proxy
from sessions_rig import OWN_ID, UNKNOWN, Serve, check_replayed, heard, store_of
from steps import json_answer, stream
from upstream import Recorded, ScriptedUpstream

HOLDER = "replay"

MODEL: Any = {"model": "gpt-test"}
CONFIG = RunConfig(tracing_disabled=True)
QUESTION = "What is the weather in Zürich and in Bern?"
ANSWER = "Zürich: sun. Bern: rain."
WEATHER = {"Zürich": "sun", "Bern": "rain"}
LOOP = [QUESTION, "<reasoning>", *["<function_call>"] * 2, *["<function_call_output>"] * 2]


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
async def client(proxy: Proxy) -> AsyncIterator[AsyncOpenAI]:
    """Make the SDK's client."""
    async with proxy.openai() as made:
        yield made


class Report(BaseModel):
    """What structured output is parsed into."""

    city: str


# openai


def keeps(response: Response) -> Any:
    """Return `store`, which the SDK has no type for."""
    return (response.model_extra or {})["store"]


async def create(client: AsyncOpenAI, **ask: Any) -> Response:
    """Ask for a whole answer."""
    return cast("Response", await client.responses.create(**MODEL, **ask))


async def streamed(client: AsyncOpenAI, **ask: Any) -> Response:
    """Ask for plain events; return the response of the last one."""
    async with await client.responses.create(**MODEL, **ask, stream=True) as events:
        seen: list[Any] = [event async for event in events]
    assert seen[0].response.id == seen[-1].response.id
    assert seen[-1].type == "response.completed"
    return cast("Response", seen[-1].response)


async def helped(client: AsyncOpenAI, **ask: Any) -> Response:
    """Use the stream helper; return the response that it put together."""
    async with client.responses.stream(**MODEL, **ask) as helper:
        return cast("Response", await helper.get_final_response())


async def parsed(client: AsyncOpenAI, **ask: Any) -> Response:
    """Ask for structured output."""
    return cast("Response", await client.responses.parse(**MODEL, **ask, text_format=Report))


async def test_a_chain_of_every_kind(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    """Whole, streamed, helped and parsed turns continue each other, and tell of themselves."""
    whole: list[str] = []
    previous: str | None = None
    for number, ask in enumerate([create, streamed, helped, parsed, create]):
        upstream.text = json.dumps({"city": f"answer {number}"})
        chained: Any = {} if previous is None else {"previous_response_id": previous}
        response = await ask(client, input=f"question {number}", **chained)
        whole += [f"question {number}"]
        assert heard(upstream.requests[-1]) == whole
        check_replayed(upstream.requests[-1])
        assert isinstance(response, Response)
        assert OWN_ID.fullmatch(response.id)
        assert (response.previous_response_id, keeps(response)) == (previous, True)
        assert (response.model, response.output_text) == ("gpt-test", upstream.text)
        whole += [response.output_text]
        previous = response.id


async def test_tools_across_turns(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    """A result alone is enough input for the next turn: its call is in the conversation."""
    upstream.script(json_answer(responses_json(items=[reasoning_item(), function_item()])))
    asked = await create(client, input="Weather in Bern?")
    call: Any = asked.output[1]
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    await helped(client, input=[result], previous_response_id=asked.id)
    told: list[Any] = upstream.requests[-1].json()["input"]
    assert [item.get("type", "message") for item in told] == [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
    ]
    assert told[1]["encrypted_content"] == "ENCRYPTED-REASONING"
    assert (told[2]["call_id"], told[3]) == (call.call_id, result)


@pytest.mark.parametrize("ask", [create, streamed])
async def test_retrieve(client: AsyncOpenAI, ask: Any) -> None:
    """A response comes again as it was, and every field that the SDK parses is the same."""
    first = await create(client, input="one")
    made = await ask(client, input="two", previous_response_id=first.id, metadata={"a": "b"})
    again = await client.responses.retrieve(made.id)
    assert again.model_dump(warnings=False) == made.model_dump(warnings=False)
    assert (again.previous_response_id, again.metadata) == (first.id, {"a": "b"})


async def test_an_unstored_response(client: AsyncOpenAI, upstream: ScriptedUpstream) -> None:
    """With `store=False` a turn may continue another one, but cannot itself be found."""
    first = await create(client, input="one")
    made = await create(client, input="two", previous_response_id=first.id, store=False)
    assert (keeps(made), made.previous_response_id) == (False, first.id)
    assert heard(upstream.requests[-1]) == ["one", upstream.text, "two"]
    await check_gone(client, made.id)


async def check_gone(client: AsyncOpenAI, response_id: str) -> None:
    """Assert that the SDK raises for an id what it raises for one that never was."""
    responses = client.responses
    for use in (
        responses.retrieve,
        responses.delete,
        responses.cancel,
        responses.input_items.list,
    ):
        call: Any = use
        with pytest.raises(openai.NotFoundError) as absent:
            await call(response_id)
        assert (absent.value.type, absent.value.code) == ("invalid_request_error", None)
    for ask in (create, streamed, helped):
        with pytest.raises(openai.BadRequestError) as caught:
            await ask(client, input="more", previous_response_id=response_id)
        assert caught.value.code == "previous_response_not_found"
        assert caught.value.param == "previous_response_id"


async def test_delete(client: AsyncOpenAI) -> None:
    """A deleted response is gone for every call of the SDK; the one before it is not."""
    first = await create(client, input="one")
    made = await create(client, input="two", previous_response_id=first.id)
    await client.responses.delete(made.id)
    await check_gone(client, made.id)
    assert (await client.responses.retrieve(first.id)).id == first.id


async def test_ids_that_are_not_own(proxy: Proxy, client: AsyncOpenAI) -> None:
    """Another key's response and one that never was are the SDK's own NotFoundError."""
    made = await create(client, input="one")
    async with proxy.openai(api_key=TEAM_B) as other:
        await check_gone(other, made.id)
    await check_gone(client, UNKNOWN)


async def test_cancel(client: AsyncOpenAI) -> None:
    """To cancel a response that was made at once is refused in the API's own words."""
    made = await create(client, input="one")
    with pytest.raises(openai.BadRequestError, match=r"Cannot cancel a synchronous response\."):
        await client.responses.cancel(made.id)


async def test_a_stream_is_not_resumed(client: AsyncOpenAI) -> None:
    """To ask for the events of a stored response is refused by name, and not ignored."""
    made = await streamed(client, input="one")
    with pytest.raises(openai.BadRequestError) as caught:
        await client.responses.retrieve(made.id, stream=True)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "stream")


@pytest.mark.parametrize("order", ["desc", "asc", None])
async def test_input_items(client: AsyncOpenAI, order: Any) -> None:
    """The SDK's pages hold each item of this turn's own input once, in the order asked for."""
    first = await create(client, input="not of this turn")
    numbers = [str(number) for number in range(45)]
    given: Any = [{"role": "user", "content": number} for number in numbers]
    made = await create(client, input=given, previous_response_id=first.id)
    options: Any = {} if order is None else {"order": order}
    page = await client.responses.input_items.list(made.id, **options)
    assert (len(page.data), page.has_next_page()) == (20, True)
    items = [item async for item in page]
    assert all(isinstance(item, ResponseInputMessageItem) for item in items)
    texts = [cast("Any", item).content[0].text for item in items]
    assert texts == (numbers if order == "asc" else numbers[::-1])
    assert len({item.id for item in items}) == len(numbers)
    seven = client.responses.input_items.list(made.id, limit=7, **options)
    assert [item.id async for item in seven] == [item.id for item in items]


# openai-agents


@function_tool
def get_weather(city: str) -> str:
    """Say what the weather is in a city."""
    return WEATHER[city]


def script_loop(upstream: ScriptedUpstream, *, streams: bool) -> None:
    """Answer with a thought and two tool calls at once, then with text."""
    calls = [function_item("get_weather", json.dumps({"city": city})) for city in WEATHER]
    for items in ([reasoning_item(), *calls], [message_item(ANSWER)]):
        whole = stream(responses_events(items=items)) if streams else None
        upstream.script(whole or json_answer(responses_json(items=items)))


async def run(client: AsyncOpenAI, question: str, *, streams: bool, **options: Any) -> Any:
    """Run an agent to its end; return its result."""
    agent = Agent[Any](
        name="forecaster",
        instructions="Use the tool.",
        model=OpenAIResponsesModel("gpt-test", client),
        model_settings=ModelSettings(include_usage=True),
        tools=[get_weather],
    )
    if not streams:
        return await Runner.run(agent, question, run_config=CONFIG, **options)
    result = Runner.run_streamed(agent, question, run_config=CONFIG, **options)
    async for _ in result.stream_events():
        pass
    return result


async def check_loop(upstream: ScriptedUpstream, proxy: Proxy, before: list[str]) -> None:
    """Assert that the last two requests were one tool loop, told whole to the upstream."""
    asked: list[Recorded] = upstream.requests[-2:]
    assert [heard(request) for request in asked] == [[*before, QUESTION], [*before, *LOOP]]
    for request in asked:
        check_replayed(request)
        assert request.json()["instructions"] == "Use the tool."
    results = [item["output"] for item in asked[1].json()["input"][-2:]]
    assert results == list(WEATHER.values())
    rounds = len(upstream.requests)

    async def logged() -> None:
        turns = [line["replayed_turns"] for line in proxy.request_logs()]
        assert turns[-2:] == [rounds - 2, rounds - 1]

    await eventually(logged)


@pytest.mark.parametrize("streams", [False, True])
async def test_an_agent_chains_its_own_loop(
    proxy: Proxy, client: AsyncOpenAI, upstream: ScriptedUpstream, *, streams: bool
) -> None:
    """With `auto_previous_response_id` an agent sends only what is new, in every round and run."""
    script_loop(upstream, streams=streams)
    first = await run(client, QUESTION, streams=streams, auto_previous_response_id=True)
    assert first.final_output == ANSWER
    await check_loop(upstream, proxy, [])
    script_loop(upstream, streams=not streams)
    second = await run(
        client, QUESTION, streams=not streams, previous_response_id=first.last_response_id
    )
    assert second.final_output == ANSWER
    await check_loop(upstream, proxy, [*LOOP, ANSWER])
    thoughts = [i for i in upstream.requests[-1].json()["input"] if i.get("type") == "reasoning"]
    assert [one["encrypted_content"] for one in thoughts] == ["ENCRYPTED-REASONING"] * 2
    ids = [answer.response_id for result in (first, second) for answer in result.raw_responses]
    assert all(OWN_ID.fullmatch(one) for one in ids)
    kept = [(await client.responses.retrieve(one)).previous_response_id for one in ids]
    assert kept == [None, *ids[:-1]]


@pytest.mark.parametrize("streams", [False, True])
async def test_an_agent_goes_on_after_a_restart(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path, *, streams: bool
) -> None:
    """A run continues what another daemon on the same file was told before."""
    told: list[str] = []
    last: Any = {"auto_previous_response_id": True}
    for _ in range(2):
        proxy = await serve(sessions={"store": store_of("sqlite", tmp_path)})
        script_loop(upstream, streams=streams)
        async with proxy.openai() as client:
            result = await run(client, QUESTION, streams=streams, **last)
        await check_loop(upstream, proxy, told)
        told = [*LOOP, ANSWER]
        last = {"previous_response_id": result.last_response_id}
        await proxy.stop()


async def test_an_agent_is_told_of_an_id_that_is_gone(
    client: AsyncOpenAI, upstream: ScriptedUpstream
) -> None:
    """A run on a deleted response ends with the SDK's own exception, and asks no upstream."""
    made = await create(client, input="one")
    await client.responses.delete(made.id)
    for streams in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            await run(client, QUESTION, streams=streams, previous_response_id=made.id)
        assert caught.value.code == "previous_response_not_found"
    assert len(upstream.requests) == 1
