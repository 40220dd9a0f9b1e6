"""Conversations over a bridge to messages: aiproxy holds them, and thoughts go back as signed."""

from typing import Any

import pytest
from pydantic import BaseModel

from invariants import check_invariants, check_tokens, take_baseline
from messages_items import Fields, assistant, item, output, result, used, user
from messages_upstream import (
    F1,
    FREELY,
    PATH,
    SIGNATURE,
    TOOLS,
    Plan,
    Serve,
    answered,
    ask,
    bridged,
    heard,
    redacted,
    text,
    thinking,
)
from rig import TEAM_B, Proxy, prompt
from sessions_rig import NO_PARENT, use
from steps import stream
from upstream import ScriptedUpstream

HOLDER = "replay"

THOUGHT: Fields = {"type": "thinking", "thinking": "Hm.\nOh.", "signature": SIGNATURE}
HIDDEN: Fields = {"type": "redacted_thinking", "data": "DATA+/="}
FIRST = Plan(
    [thinking("Hm.\nOh."), redacted("DATA+/="), text("Let me see."), F1, FREELY], stop="tool_use"
)
SPOKEN = assistant(
    THOUGHT,
    HIDDEN,
    "Let me see.",
    used("f", {"a": 1}, "call_1"),
    used("free", {"input": 'any *text*\n"{'}, "call_4"),
)
RESULTS: list[Fields] = [output("1", "call_1"), output("2", "call_4", "custom_tool_call_output")]
SENT_RESULTS = user(result("1", call_id="call_1"), result("2", call_id="call_4"))


@pytest.fixture(params=["replay", "upstream"])
async def proxy(request: pytest.FixtureRequest, serve: Serve) -> Proxy:
    """A daemon before an upstream of messages, whoever was to hold conversations."""
    return await bridged(serve, {"sessions": request.param})


@pytest.mark.parametrize("streamed", [False, True])
async def test_thoughts_go_back_as_signed(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """By `previous_response_id` the upstream hears its own thoughts and calls, then the results."""
    upstream.script(FIRST.script(streamed=streamed))
    first = await answered(proxy, streamed=streamed, input="one")
    upstream.script(Plan([text("Done.")]).script(streamed=not streamed))
    again: Fields = {"input": RESULTS, "previous_response_id": first["id"]}
    second = await answered(proxy, streamed=not streamed, **again)
    assert second["previous_response_id"] == first["id"]
    assert heard(upstream.requests[-1]) == [user("one"), SPOKEN, SENT_RESULTS]
    await answered(proxy, streamed=streamed, input="more", previous_response_id=second["id"])
    told = [user("one"), SPOKEN, SENT_RESULTS, assistant("Done."), user("more")]
    assert heard(upstream.requests[-1]) == told
    assert not {"store", "previous_response_id"} & upstream.requests[-1].json().keys()


@pytest.mark.parametrize("streamed", [False, True])
async def test_thoughts_that_the_client_keeps(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """Without a store the client sends the items again, and the upstream hears the same."""
    upstream.script(FIRST.script(streamed=streamed))
    first = await answered(proxy, streamed=streamed, input="one", store=False)
    assert first["store"] is False
    given = [item("user", "one"), *first["output"], *RESULTS]
    await answered(proxy, streamed=streamed, input=given, store=False)
    assert heard(upstream.requests[-1]) == [user("one"), SPOKEN, SENT_RESULTS]
    codex = [{name: value for name, value in each.items() if name != "id"} for each in given]
    await answered(proxy, streamed=streamed, input=codex, store=False)
    assert heard(upstream.requests[-1]) == [user("one"), SPOKEN, SENT_RESULTS]
    NO_PARENT.check(await ask(proxy, "two", previous_response_id=first["id"]))


async def test_items_by_reference(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A client that names stored items instead of sending them is understood."""
    upstream.script(FIRST.script(streamed=False))
    first = await answered(proxy, streamed=False, input="one")
    references = [{"type": "item_reference", "id": each["id"]} for each in first["output"]]
    await answered(proxy, streamed=False, input=[item("user", "one"), *references, *RESULTS])
    assert heard(upstream.requests[-1]) == [user("one"), SPOKEN, SENT_RESULTS]


async def test_turns_of_every_kind(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """System messages stay with their turns' content; instructions are the turn's own."""
    first = await answered(
        proxy, streamed=False, input=[item("developer", "dev"), item("user", "a")],
        instructions="first alone",
    )  # fmt: skip
    upstream.script(Plan([text("cut")], stop="max_tokens").script(streamed=True))
    second = await answered(proxy, streamed=True, input="b", previous_response_id=first["id"])
    assert upstream.requests[-1].json()["system"] == "dev"
    assert second["status"] == "incomplete"
    await answered(
        proxy, streamed=False, input="c", previous_response_id=second["id"], instructions="third"
    )
    assert upstream.requests[-1].json()["system"] == "third\n\ndev"
    hello = assistant("Hello world")
    told = [user("a"), hello, user("b"), assistant("cut"), user("c")]
    assert heard(upstream.requests[-1]) == told


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_is_stored_can_be_seen(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """A response and its input are given as they were; deleted they are gone, nobody else asked."""
    upstream.script(FIRST.script(streamed=streamed))
    first = await answered(proxy, streamed=streamed, input="one")
    shown = await use(proxy, "get", first["id"])
    assert (shown.status, shown.json()) == (200, first)
    listed = await use(proxy, "input_items", first["id"])
    assert [each["role"] for each in listed.json()["data"]] == ["user"]
    assert (await use(proxy, "get", first["id"], key=TEAM_B)).status == 404
    assert (await use(proxy, "delete", first["id"])).json()["deleted"] is True
    NO_PARENT.check(await ask(proxy, "two", previous_response_id=first["id"]))
    assert len(upstream.requests) == 1


async def test_another_keys_conversation(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """It is unknown, over a bridge as elsewhere."""
    first = await answered(proxy, streamed=False)
    body = prompt(previous_response_id=first["id"])
    NO_PARENT.check(await proxy.post(PATH, body, key=TEAM_B))
    assert len(upstream.requests) == 1


async def test_tokens_of_turns(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Over several turns the tokens of log and metrics agree."""
    first = await answered(proxy, streamed=True)
    await answered(proxy, streamed=True, previous_response_id=first["id"])
    await check_tokens(proxy)


# The SDK


class Report(BaseModel):
    """What structured output is parsed into."""

    city: str


async def test_the_stream_helper(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The SDK rebuilds the response from the events alone, thoughts and calls included."""
    upstream.script(stream(FIRST.events(3)))
    async with proxy.openai() as client:
        asked: Any = {"model": "gpt-test", "input": "one", "tools": TOOLS["tools"]}
        async with client.responses.stream(**asked) as helper:
            kinds = [event.type async for event in helper]
            final = await helper.get_final_response()
    assert kinds[-1] == "response.completed"
    assert final.output_text == "Let me see."
    parsed = [each.type for each in final.output]
    assert parsed == ["reasoning", "reasoning", "message", "function_call", "custom_tool_call"]


async def test_a_tool_loop_of_the_sdk(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Output items that the SDK parsed can be sent back as they are."""
    upstream.script(FIRST.script(streamed=False))
    async with proxy.openai() as client:
        asked: Any = {"model": "gpt-test", "tools": TOOLS["tools"], "store": False}
        first = await client.responses.create(input="one", **asked)
        sent = [each.model_dump() for each in first.output]
        given: Any = [item("user", "one"), *sent, *RESULTS]
        second = await client.responses.create(input=given, **asked)
    assert second.output_text == "Hello world"
    assert heard(upstream.requests[-1]) == [user("one"), SPOKEN, SENT_RESULTS]


async def test_structured_output(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A schema goes up as the upstream's own, and what comes is parsed."""
    upstream.text = '{"city": "Bern"}'
    async with proxy.openai() as client:
        asked: Any = {"model": "gpt-test", "input": "where?", "text_format": Report}
        response = await client.responses.parse(**asked)
        async with client.responses.stream(**asked) as helper:
            final: Any = await helper.get_final_response()
    assert response.output_parsed == Report(city="Bern")
    assert final.output_parsed == Report(city="Bern")
    for request in upstream.requests:
        form = request.json()["output_config"]["format"]
        assert form["type"] == "json_schema"
        assert form["schema"]["properties"].keys() == {"city"}


async def test_everything_is_given_back(serve: Serve, upstream: ScriptedUpstream) -> None:
    """After answers, failures and refusals over a bridge nothing is held any more."""
    proxy = await bridged(serve)
    baseline = await take_baseline(proxy, upstream)
    upstream.script(FIRST.script(streamed=True))
    answer = await ask(proxy, stream=True, **TOOLS)
    upstream.script(stream(FIRST.events()[:-1]))
    await ask(proxy, stream=True, **TOOLS)
    await ask(proxy, truncation="auto")
    await check_invariants(proxy, upstream, baseline=baseline, stream=answer.body, completed=True)
