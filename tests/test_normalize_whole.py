"""With `normalize: true` what is whole already stays as it is, and what is unknown passes."""

import json
from typing import Any

import pytest

from answers import sse
from normalize_rig import (
    MODES,
    SERVERS,
    TALK,
    Said,
    Serve,
    ask,
    check_native,
    check_normalized,
    ended,
    facts_of,
    normalizing,
    short,
    told_by,
)
from responses import function_item, message_item, reasoning_item, responses_events, responses_json
from rig import Proxy
from steps import json_answer, stream
from upstream import ScriptedUpstream
from validating import LIFECYCLE, TERMINAL, Fact

HOLDER = "replay"

ITEMS = [
    reasoning_item(summary="Thought."),
    message_item("Grüße, 世界 und mehr"),
    function_item("f", '{"a": 1}'),
    function_item("g", "{}"),
]
VENDOR: Fact = {"type": "vendor_thing", "id": "vt_1", "deep": {"a": [1, 2.5, None, {"b": "é"}]}}
BIG = 12345678901234567890123
OURS = ("id", "previous_response_id", "store")  # of a response whose turn aiproxy holds


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """Whoever holds conversations."""
    return str(request.param)


@pytest.fixture
async def proxy(serve: Serve, mode: str) -> Proxy:
    """A daemon that completes what comes."""
    return await normalizing(serve, mode)


def alike(fact: Fact, mode: str) -> Fact:
    """Return an event or a response without what is ours in it."""
    if mode == "upstream":
        return fact
    if "response" in fact:
        return {**fact, "response": alike(fact["response"], mode)}
    if fact.get("object") == "response":
        return {name: value for name, value in fact.items() if name not in OURS}
    return fact


ODD: Fact = {"x_number": 1.5, "x_big": BIG, "x_deep": {"a": [None, {"b": True}]}}


def strange(facts: list[Fact]) -> list[Fact]:
    """Return events with fields that nobody knows, at every depth."""
    return [_strange(fact) for fact in facts]


def _strange(fact: Fact) -> Fact:
    """Return an event, a response, an item or a part with them."""
    nested: Fact = {
        name: _strange(fact[name]) for name in ("response", "item", "part") if name in fact
    }
    lists = {
        name: [_strange(each) for each in fact[name]]
        for name in ("output", "content", "summary")
        if isinstance(fact.get(name), list)
    }
    return {**fact, **nested, **lists, **ODD}


async def test_a_whole_stream_stays(proxy: Proxy, upstream: ScriptedUpstream, mode: str) -> None:
    """Nothing is added to events that lack nothing, and nothing is taken from them."""
    for done in (False, True):
        frames = responses_events(items=ITEMS, done=done)
        upstream.script(stream(frames))
        answer = await ask(proxy, streamed=True)
        check_native(answer.body)
        sent, told = facts_of(b"".join(frames)), facts_of(answer.body)
        assert [alike(fact, mode) for fact in told] == [alike(fact, mode) for fact in sent]


async def test_a_whole_answer_stays(proxy: Proxy, upstream: ScriptedUpstream, mode: str) -> None:
    """The same of a JSON answer, unknown fields included."""
    sent = _strange(responses_json(items=ITEMS))
    upstream.script(json_answer(sent))
    answer = await ask(proxy, streamed=False)
    check_normalized(answer)
    assert alike(answer.json(), mode) == alike(sent, mode)


async def test_unknown_fields_stay(proxy: Proxy, upstream: ScriptedUpstream, mode: str) -> None:
    """Fields that nobody knows pass, in events, responses, items and parts."""
    sent = strange(facts_of(b"".join(responses_events(items=ITEMS))))
    upstream.script(stream([sse(fact, event=fact["type"]) for fact in sent]))
    told = facts_of((await ask(proxy, streamed=True)).body)
    assert [alike(fact, mode) for fact in told] == [alike(fact, mode) for fact in sent]


async def test_unknown_fields_of_other_servers_stay(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """They pass beside what is completed, too."""
    for name, server in SERVERS.items():
        facts = server.facts(told_by(server))
        upstream.script(stream(server.framed(strange(facts))))
        told = facts_of((await ask(proxy, streamed=True)).body)
        kept = [fact for fact in told if "x_deep" in fact]
        kinds = [fact["type"] for fact in kept]
        assert [kind for kind in kinds if "delta" in kind] == [
            fact["type"] for fact in facts if "delta" in fact["type"]
        ], name
        assert kept[-1]["x_big"] == kept[-1]["response"]["x_big"] == BIG
        assert kept[-1]["response"]["x_deep"] == {"a": [None, {"b": True}]}
        assert not {"x_deep"} - kept[0].keys()


async def test_unknown_events_pass(proxy: Proxy, upstream: ScriptedUpstream, mode: str) -> None:
    """Each is passed where it came, under the next number; the others are numbered on."""
    for name, server in SERVERS.items():
        said = told_by(server)
        sent: list[Fact] = []
        vendor = {"type": "response.vendor.thing", "n": 1.5, "deep": [{"a": None}], "x": BIG}
        for fact in server.facts(said):
            sent += [{key: value for key, value in fact.items() if key != "sequence_number"}]
            if fact["type"] not in (*LIFECYCLE, *TERMINAL):
                sent += [{**vendor, "at": len(sent)}]
        upstream.script(stream(server.framed(sent)))
        answer = await ask(proxy, streamed=True)
        assert short(check_native(answer.body)) == said.short(), name
        told = [fact for fact in facts_of(answer.body) if fact["type"] == vendor["type"]]
        bare = [{k: v for k, v in fact.items() if k != "sequence_number"} for fact in told]
        assert bare == [fact for fact in sent if fact["type"] == vendor["type"]]


async def test_what_is_no_event_passes(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Data that is no JSON reaches the client beside the events, and comments do no harm."""
    first, *frames = responses_events(items=ITEMS)
    strange = [b": a comment\n\n", b"data: not json at all\n\n"]
    upstream.script(stream([first, frames[0], *strange, *frames[1:]]))
    body = (await ask(proxy, streamed=True)).body
    assert b"data: not json at all\n\n" in body
    check_native(body.replace(b"data: not json at all\n\n", b""))


@pytest.mark.parametrize("streamed", [False, True])
async def test_items_of_unknown_types_pass(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """An item that nobody knows is passed as it is, among others and into the next turn."""
    items = [VENDOR, message_item("after")]
    frames = responses_events(items=items)
    upstream.script(stream(frames) if streamed else json_answer(responses_json(items=items)))
    answer = await ask(proxy, streamed=streamed)
    if streamed:
        final = ended(facts_of(answer.body))["response"]
        told = [fact.get("item") for fact in facts_of(answer.body)]
        assert told.count(VENDOR) == 2
    else:
        final = answer.json()
    assert final["output"] == items
    await ask(proxy, streamed=False, previous_response_id=final["id"])
    sent = upstream.requests[-1].json()
    if "previous_response_id" not in sent:
        assert sent["input"][1] == VENDOR


async def test_hosted_tools_pass(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Events of hosted tools are known to the API, and keep their places."""
    call: Fact = {
        "type": "web_search_call",
        "id": "ws_1",
        "status": "completed",
        "action": {"type": "search", "query": "x", "queries": ["x"], "sources": []},
    }
    first, second, *frames = [
        {k: v for k, v in fact.items() if k != "sequence_number"}
        for fact in facts_of(b"".join(responses_events(items=[call, message_item("found")])))
    ]
    place = {"output_index": 0, "item_id": "ws_1"}
    steps = [
        {"type": f"response.web_search_call.{step}", **place}
        for step in ("in_progress", "searching", "completed")
    ]
    frames[0] = {**frames[0], "item": {**call, "status": "in_progress"}}
    facts = [first, second, frames[0], *steps, *frames[1:]]
    upstream.script(stream([sse(fact, event=fact["type"]) for fact in facts]))
    body = (await ask(proxy, streamed=True)).body
    told = facts_of(body)
    assert [fact["type"] for fact in told] == [fact["type"] for fact in facts]
    assert [fact["sequence_number"] for fact in told] == list(range(len(facts)))
    final = ended(told)["response"]
    assert final["output"][0] == call
    assert short(final)[1] == ("message", "found")


async def test_an_output_that_the_end_leaves_out(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A terminal event without output gets what was told before (traps, 6)."""
    facts = facts_of(b"".join(responses_events(items=ITEMS)))
    facts[-1]["response"]["output"] = []
    upstream.script(stream([sse(fact, event=fact["type"]) for fact in facts]))
    final = check_native((await ask(proxy, streamed=True)).body)
    assert final["output"] == ITEMS


async def test_arguments_that_come_at_once(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Arguments that only the done event has are told by a delta too (traps, 7)."""
    facts = facts_of(b"".join(responses_events(items=ITEMS)))
    kept = [fact for fact in facts if fact["type"] != "response.function_call_arguments.delta"]
    bare = [{k: v for k, v in fact.items() if k != "sequence_number"} for fact in kept]
    upstream.script(stream([sse(fact, event=fact["type"]) for fact in bare]))
    final = check_native((await ask(proxy, streamed=True)).body)
    assert final["output"] == ITEMS


async def test_without_it_nothing_is_completed(
    serve: Serve, upstream: ScriptedUpstream, mode: str
) -> None:
    """By default what a server leaves out stays out."""
    proxy = await serve(upstreams={"scripted": {"apis": ["responses"], "sessions": mode}})
    server = SERVERS["llama.cpp"]
    upstream.script(server.script(TALK, streamed=True))
    told = facts_of((await ask(proxy, streamed=True)).body)
    sent = server.facts(TALK)
    assert [fact["type"] for fact in told] == [fact["type"] for fact in sent]
    assert not any("sequence_number" in fact for fact in told)


async def test_a_large_stream(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Events of some hundred kilobytes are completed too."""
    text = "word " * 60_000
    server = SERVERS["llama.cpp"]
    said = Said(text)
    facts: list[Any] = server.facts(said)
    deltas = [fact for fact in facts if "delta" in fact]
    kept = [fact for fact in facts if "delta" not in fact]
    kept.insert(facts.index(deltas[0]), {**deltas[0], "delta": text})
    upstream.script(stream(server.framed(kept), split=30_000))
    final = check_native((await ask(proxy, streamed=True)).body)
    assert short(final) == said.short()
    assert len(json.dumps(final)) > len(text)
