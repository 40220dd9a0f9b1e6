"""Conversations over a bridge to chat, held by aiproxy, and told whole to each upstream."""

import json
from pathlib import Path
from typing import Any

import pytest

from chat_upstream import (
    FUNCTION,
    HELLO,
    TOOLS,
    Fact,
    Serve,
    chat_only,
    check_pairs,
    function_call,
    messages_of,
)
from invariants import check_invariants
from responses import message_item, responses_json
from rig import TEAM_B, Proxy
from sessions_rig import (
    NO_PARENT,
    STORES,
    ask,
    call,
    check_unknown,
    response_of,
    store_of,
    turn,
    use,
)
from steps import json_answer
from upstream import ScriptedUpstream
from validating import check_response

HOLDER = "replay"
QUESTION: Fact = {"role": "user", "content": "weather?"}
CALLS = [
    function_call("get_weather", '{"city": "Zürich"}', "call_zh"),
    function_call("get_weather", '{"city": "Bern"}', "call_be"),
]
CALLING: Fact = {"role": "assistant", "content": "Just a moment.", "tool_calls": CALLS}
OUTPUTS: list[Fact] = [
    {"type": "function_call_output", "call_id": "call_zh", "output": "sunny"},
    {"type": "function_call_output", "call_id": "call_be", "output": "rain"},
]
RESULTS: list[Fact] = [
    {"role": "tool", "tool_call_id": "call_zh", "content": "sunny"},
    {"role": "tool", "tool_call_id": "call_be", "content": "rain"},
]
TOOL: Fact = {**FUNCTION, "name": "get_weather"}


@pytest.fixture(params=STORES)
async def proxy(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Proxy:
    """A daemon before a chat upstream, with each kind of store."""
    return await serve(upstreams=chat_only(), sessions={"store": store_of(request.param, tmp_path)})


async def loop(proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool) -> list[Fact]:
    """Make three turns: calls, their results, thanks; return their responses."""
    upstream.script(TOOLS.script(streamed=streamed))
    first = await turn(proxy, "weather?", streamed=streamed, tools=[TOOL], instructions="Brief.")
    second = await turn(proxy, OUTPUTS, first["id"], streamed=not streamed, tools=[TOOL])
    third = await turn(proxy, "thanks", second["id"], streamed=streamed)
    return [first, second, third]


@pytest.mark.parametrize("streamed", [False, True])
async def test_three_turns(proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool) -> None:
    """Each turn is told with all before it, calls and results paired; instructions are not kept."""
    turns = await loop(proxy, upstream, streamed=streamed)
    first, second, third = map(messages_of, upstream.requests)
    assert first == [{"role": "system", "content": "Brief."}, QUESTION]
    assert second == [QUESTION, CALLING, *RESULTS]
    answer = {"role": "assistant", "content": "Hello world"}
    assert third == [*second, answer, {"role": "user", "content": "thanks"}]
    check_pairs(third)
    for request in upstream.requests:
        assert not {"store", "previous_response_id", "input"} & set(request.json())
    told = [each["previous_response_id"] for each in turns]
    assert told == [None, turns[0]["id"], turns[1]["id"]]
    await check_invariants(proxy, upstream)


async def test_reasoning_is_sent_back(serve: Serve, upstream: ScriptedUpstream) -> None:
    """With `reasoning_content: send` what was thought goes back with the calls it led to."""
    proxy = await serve(upstreams=chat_only(reasoning_content="send"))
    await loop(proxy, upstream, streamed=True)
    assert messages_of(upstream.requests[1])[1] == {**CALLING, "reasoning_content": "Look it up."}


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_is_kept(proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool) -> None:
    """GET gives the response as it was answered; its input is listed; DELETE ends it."""
    first, second, third = await loop(proxy, upstream, streamed=streamed)
    for made in (first, second, third):
        got = (await use(proxy, "get", made["id"])).json()
        check_response(got)
        assert got == made
    listed = (await use(proxy, "input_items", second["id"])).json()
    outputs = [(item["type"], item["call_id"], item["output"]) for item in listed["data"]]
    kind = "function_call_output"
    assert outputs == [(kind, "call_be", "rain"), (kind, "call_zh", "sunny")]
    gone = await use(proxy, "delete", second["id"])
    assert gone.json() == {"id": second["id"], "object": "response", "deleted": True}
    await check_unknown(proxy, second["id"])
    NO_PARENT.check(await ask(proxy, "more", third["id"]))
    assert (await use(proxy, "get", first["id"])).status == 200


async def test_keys_are_apart(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Another key can do nothing with a bridged turn, and the upstream hears of none of it."""
    made = await turn(proxy, "mine")
    count = len(upstream.requests)
    await check_unknown(proxy, made["id"], key=TEAM_B)
    answer = await ask(
        proxy, [{"type": "item_reference", "id": made["output"][0]["id"]}], key=TEAM_B
    )
    assert answer.status == 404
    assert len(upstream.requests) == count


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_is_not_kept(proxy: Proxy, *, streamed: bool) -> None:
    """A turn with `store: false` is told as such, and is as if it never was."""
    made = await turn(proxy, "secret", streamed=streamed, store=False)
    assert made["store"] is False
    await check_unknown(proxy, made["id"])


async def test_references(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Referenced items of a bridged turn are told as the items that they are."""
    upstream.script(TOOLS.script(streamed=True))
    made = await turn(proxy, "weather?", streamed=True)
    references = [{"type": "item_reference", "id": item["id"]} for item in made["output"]]
    await turn(proxy, [QUESTION, *references, *OUTPUTS])
    assert messages_of(upstream.requests[-1]) == [QUESTION, CALLING, *RESULTS]


async def test_branches(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Two turns may go on from the same one, and neither hears of the other."""
    made = await turn(proxy, "root")
    for name in ("left", "right"):
        await turn(proxy, name, made["id"])
        told = [message["content"] for message in messages_of(upstream.requests[-1])]
        assert told == ["root", "Hello world", name]


@pytest.mark.parametrize("finish", ["length", "content_filter"])
async def test_an_incomplete_turn_goes_on(
    proxy: Proxy, upstream: ScriptedUpstream, finish: str
) -> None:
    """An incomplete turn can be continued, with what there was of it."""
    upstream.script(HELLO.but(finish=finish).script(streamed=True))
    made = await turn(proxy, "tell", streamed=True)
    await turn(proxy, "go on", made["id"])
    told = [message["content"] for message in messages_of(upstream.requests[-1])]
    assert told == ["tell", "Hello world", "go on"]


async def test_custom_tools(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The call of a custom tool and its output are told as a function's in the next turn."""
    tools = [{"type": "custom", "name": "patch"}]
    calls = [function_call("patch", '{"input": "a\\nb"}', "c1")]
    told = HELLO.but(message={"tool_calls": calls}, finish="tool_calls")
    upstream.script(told.script(streamed=False))
    made = await turn(proxy, "patch it", tools=tools)
    output = {"type": "custom_tool_call_output", "call_id": "c1", "output": "done"}
    await turn(proxy, [output], made["id"], tools=tools)
    messages = messages_of(upstream.requests[-1])
    check_pairs(messages)
    function = messages[1]["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("patch", {"input": "a\nb"})


async def test_where_the_upstream_would_hold(serve: Serve, upstream: ScriptedUpstream) -> None:
    """On a bridge aiproxy holds the conversation even with `sessions: upstream`."""
    proxy = await serve(upstreams=chat_only(sessions="upstream"))
    await loop(proxy, upstream, streamed=True)
    assert len(messages_of(upstream.requests[-1])) == 6


# From one dialect to another


@pytest.fixture
async def both(serve: Serve, upstream: ScriptedUpstream) -> Proxy:
    """A daemon with a native route and a chat route to the same server."""
    native = {"url": upstream.url, "apis": ["responses"], "idle_connections": "500ms"}
    routes = [
        {"model": "gpt-test", "upstreams": ["scripted"]},
        {"model": "native", "upstreams": ["native"]},
    ]
    return await serve(upstreams={**chat_only(), "native": native}, routes=routes)


async def test_a_conversation_that_moves(both: Proxy, upstream: ScriptedUpstream) -> None:
    """A conversation goes from a native server to a chat one and back, and loses nothing."""
    upstream.text = "native one"
    first = await turn(both, "one", model="native")
    upstream.text = "chat two"
    second = await turn(both, "two", first["id"], streamed=True)
    told = [message["content"] for message in messages_of(upstream.requests[-1])]
    assert told == ["one", "native one", "two"]
    await turn(both, "three", second["id"], model="native", streamed=True)
    request = upstream.requests[-1]
    assert request.path == "/v1/responses"
    given = request.json()["input"]
    words = [
        each if isinstance(each := item["content"], str) else each[0]["text"] for item in given
    ]
    assert words == ["one", "native one", "two", "chat two", "three"]


async def test_what_chat_cannot_be_told(both: Proxy, upstream: ScriptedUpstream) -> None:
    """A conversation with an item that chat cannot express is refused there, and only there."""
    search = {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}}
    items: list[Any] = [search, message_item("found")]
    upstream.script(json_answer(responses_json(items=items)))
    made = await turn(both, "search", model="native")
    count = len(upstream.requests)
    for streamed in (False, True):
        answer = await ask(both, "more", made["id"], streamed=streamed)
        error = answer.json()["error"]
        assert answer.status == 400
        told = (error["code"], error["param"])
        assert told == ("unsupported_parameter", "previous_response_id")
    assert len(upstream.requests) == count
    assert response_of(await ask(both, "more", made["id"], model="native"))["status"] == "completed"


async def test_cancel(proxy: Proxy) -> None:
    """A bridged response cannot be cancelled, as any that was made at once."""
    made = await turn(proxy, "one")
    answer = await call(proxy, "POST", f"/v1/responses/{made['id']}/cancel")
    assert answer.status == 400
    assert "Cannot cancel a synchronous response." in answer.json()["error"]["message"]
