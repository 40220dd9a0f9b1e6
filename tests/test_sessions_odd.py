"""Odd requests and odd servers: what a conversation survives, and what nobody gets past."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from client import RawClient, parse_sse
from invariants import check_invariants, eventually
from responses import (
    Terminal,
    message_item,
    reasoning_item,
    responses_events,
    responses_json,
    responses_object,
)
from rig import TEAM_B, Proxy, totals
from sessions_rig import (
    ENDS,
    NO_PARENT,
    OWN_ID,
    PATH,
    STORES,
    Holder,
    Serve,
    ask,
    check_unknown,
    heard,
    numbered,
    response_of,
    store_of,
    turn,
    use,
)
from steps import SSE_HEADERS, Step, error_answer, json_answer, stream
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait

HOLDER = "replay"

THEIRS = "msg_theirs_1"
# Ways to write a reference that a reader of JSON may take for one.
REFERENCES = {
    "plain": b'{"type":"item_reference","id":"%b"}',
    "escaped": rb'{"type":"\u0069tem_reference","id":"%b"}',
    "escaped names": rb'{"t\u0079pe":"item_reference","\u0069d":"%b"}',
    "escaped id": b'{"type":"item_reference","id":"msg\\u005ftheirs_1"}',
    "type twice": b'{"type":"message","type":"item_reference","id":"%b"}',
    "type null": b'{"type":null,"id":"%b"}',
    "no type": b'{"id":"%b"}',
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the conversations are."""
    return store_of(request.param, tmp_path)


@pytest.fixture
async def proxy(serve: Serve, store: str) -> Proxy:
    """A daemon with each kind of store."""
    return await serve(sessions={"store": store})


@pytest.fixture
async def passing(serve: Serve, upstream: ScriptedUpstream, store: str) -> Proxy:
    """A daemon whose upstream holds the conversations."""
    upstream.default = Holder()
    mode = {"scripted": {"sessions": "upstream"}}
    return await serve(upstreams=mode, sessions={"store": store})


@pytest.mark.parametrize("written", REFERENCES)
@pytest.mark.parametrize("mode", ["replay", "upstream"])
async def test_a_reference_is_one_however_it_is_written(
    serve: Serve, upstream: ScriptedUpstream, mode: str, written: str
) -> None:
    """An item of another key is not reached by spelling its reference in another way."""
    upstream.default = Holder()
    proxy = await serve(upstreams={"scripted": {"sessions": mode}})
    upstream.script(json_answer(responses_json(items=[message_item(item_id=THEIRS)])))
    await turn(proxy, key=TEAM_B)
    asked = len(upstream.requests)
    item = REFERENCES[written].replace(b"%b", THEIRS.encode())
    answer = await proxy.post(PATH, b'{"model":"gpt-test","input":[%b]}' % item)
    assert answer.status in {400, 404}, answer
    assert len(upstream.requests) == asked


@pytest.mark.parametrize("mode", ["replay", "upstream"])
async def test_a_parent_is_one_however_it_is_written(
    serve: Serve, upstream: ScriptedUpstream, mode: str
) -> None:
    """Of a parent that is given twice the one that is checked is the one that is continued."""
    upstream.default = Holder()
    proxy = await serve(upstreams={"scripted": {"sessions": mode}})
    theirs = (await turn(proxy, key=TEAM_B))["id"].encode()
    own = (await turn(proxy))["id"].encode()
    asked = len(upstream.requests)
    body = (
        rb'{"model":"gpt-test","input":"x","previous_response_id":"%b",'
        rb'"previous_response\u005fid":"%b"}'
    )
    assert (await proxy.post(PATH, body % (own, theirs))).status == 400
    assert len(upstream.requests) == asked
    assert (await proxy.post(PATH, body % (theirs, own))).status == 200
    assert theirs not in upstream.requests[-1].body


async def test_servers_that_give_everything_the_same_id(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """Mocks do; turns of ours are told apart all the same, and none is lost."""
    proxy = await serve(sessions={"store": store})
    previous, path = None, list[str]()
    for number in range(4):
        item = message_item(f"a{number}", item_id="msg_1")
        answer = responses_json(items=[item], response_id="resp_mock")
        frames = responses_events(items=[item], response_id="resp_mock")
        upstream.script(stream(frames) if number % 2 else json_answer(answer))
        response = await turn(proxy, f"q{number}", previous, streamed=bool(number % 2))
        path += [f"q{number}", f"a{number}"]
        assert heard(upstream.requests[-1]) == path[:-1]
        previous = response["id"]
    upstream.script(json_answer(responses_json(response_id="resp_mock")))
    await turn(proxy, "theirs", key=TEAM_B)


async def test_upstreams_that_give_everyone_the_same_id(
    passing: Proxy, upstream: ScriptedUpstream
) -> None:
    """An id that was given to two keys is no reason to fail for either."""
    for key in (TEAM_B, passing.key, TEAM_B):
        item = message_item(item_id="msg_1")
        upstream.script(json_answer(responses_json(items=[item], response_id="resp_mock")))
        await turn(passing, key=key)


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_upstream_that_names_the_conversation(
    passing: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """Where every turn has the same id, the id stands for the latest, and stays one's own."""
    previous = None
    for text in ("one", "two", "three", "four"):
        facts: dict[str, Any] = {"response_id": "resp_mock", "items": [message_item(text)]}
        whole = responses_json(**facts)
        step = stream(responses_events(**facts)) if streamed else json_answer(whole)
        upstream.script(step)
        upstream.default.held["resp_mock"] = whole  # type: ignore[union-attr] # the fixture's own
        previous = (await turn(passing, text, previous, streamed=streamed))["id"]
        assert (await use(passing, "get", previous)).status == 200
    assert upstream.requests[-2].json()["previous_response_id"] == "resp_mock"
    stored = totals(await passing.metrics(), "aiproxy_sessions_stored_turns", "")
    assert stored == {"": 1}
    assert (await use(passing, "delete", "resp_mock")).status == 200
    await check_unknown(passing, "resp_mock")


async def test_texts_that_are_no_unicode(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Lone surrogates and NULs are kept and replayed as they were written, and break nothing."""
    texts = [
        rb'"\ud800 \u0000"',
        rb'[{"role":"user","content":"\udfff\u0000","id":"\ud800\u0000"}]',
    ]
    previous: str | None = None
    for text in texts:
        body = b'{"model":"gpt-test","input":%b,"previous_response_id":%b}'
        answer = await proxy.post(PATH, body % (text, json.dumps(previous).encode()))
        assert answer.status == 200, answer
        previous = answer.json()["id"]
        listed = await use(proxy, "input_items", previous)
        assert listed.status == 200
        assert len(listed.json()["data"]) == 1
    await turn(proxy, "more", previous)
    assert all(text[1:-1] in upstream.requests[-1].body for text in texts)
    asked = len(upstream.requests)
    for odd in (rb"\ud800", rb"resp_\u0000", b"resp_" + b"x" * 20_000):
        body = b'{"model":"gpt-test","input":"x","previous_response_id":"%b"}' % odd
        answer = await proxy.post(PATH, body)
        assert (answer.status, answer.json()["error"]["param"]) == (400, "previous_response_id")
        body = b'{"model":"gpt-test","input":[{"type":"item_reference","id":"%b"}]}' % odd
        assert (await proxy.post(PATH, body)).status in {400, 404}
    assert len(upstream.requests) == asked
    await check_invariants(proxy, upstream)


async def test_a_turn_without_new_input(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """With a parent and nothing new the history alone goes up."""
    first = await turn(proxy, "one")
    for more in (b"", b',"input":[]'):
        body = b'{"model":"gpt-test","previous_response_id":"%b"%b}'
        answer = await proxy.post(PATH, body % (first["id"].encode(), more))
        assert answer.status == 200, answer
        assert heard(upstream.requests[-1])[0] == "one"
        assert len(heard(upstream.requests[-1])) == 2
        await turn(proxy, "next", answer.json()["id"])
        assert heard(upstream.requests[-1])[::3] == ["one", "next"]


async def test_store_null_is_the_default(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A null says nothing, so that the turn is stored and its answer says so."""
    first = await turn(proxy, "one", store=None)
    assert first["store"] is True
    await turn(proxy, "two", first["id"])


async def test_all_else_that_a_client_writes_goes_up(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """Fields that no one here reads are not changed by a replay, nor is their spelling."""
    first = await turn(proxy, "one")
    odd = rb'"x_new" : { "a":1.50e1, "b":"\u00e9\/"}'
    body = b'{"model":"gpt-test","input":"two", %b ,"previous_response_id":"%b"}'
    assert (await proxy.post(PATH, body % (odd, first["id"].encode()))).status == 200
    assert odd.split(b" : ")[1] in upstream.requests[-1].body


async def test_events_over_several_lines(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A lifecycle event that is spread over `data` lines has its values changed in place."""
    frames = []
    for fact in numbered([
        {"type": f"response.{kind}", "response": responses_object(response_id="resp_up", status=s)}
        for kind, s in (("created", "in_progress"), ("completed", "completed"))
    ]):  # fmt: skip
        head, _, data = fact.partition(b"data: ")
        lines = json.dumps(json.loads(data), indent=1).encode().split(b"\n")
        frames.append(head + b"\n".join(b"data: " + line for line in lines) + b"\n\n")
    upstream.script(stream(frames))
    answer = await ask(proxy, streamed=True)
    response = response_of(answer)
    assert OWN_ID.fullmatch(response["id"])
    told = b"".join(frames).replace(b"resp_up", response["id"].encode())
    assert answer.body == told
    await turn(proxy, "more", response["id"])


@pytest.mark.parametrize("keep", [1, -1])
async def test_streams_that_begin_or_end_at_once(
    proxy: Proxy, upstream: ScriptedUpstream, keep: int
) -> None:
    """A stream without some lifecycle events, or of a terminal event alone, is a turn as well."""
    frames = responses_events("all")
    upstream.script(stream(frames[keep:]))
    response = await turn(proxy, "go", streamed=True)
    assert OWN_ID.fullmatch(response["id"])
    await turn(proxy, "more", response["id"])
    assert heard(upstream.requests[-1]) == ["go", "all", "more"]


def paused(go_on: asyncio.Event) -> list[Step]:
    """Return a stream that waits before its terminal event."""
    *frames, last = responses_events("late")
    return [Headers(200, SSE_HEADERS), *map(Chunk, frames), Wait(go_on), Chunk(last), EndChunks()]


async def begun(proxy: Proxy, previous: str) -> RawClient:
    """Begin a streamed turn, and read up to its first delta."""
    body = {"model": "gpt-test", "input": "x", "previous_response_id": previous, "stream": True}
    client = await proxy.send(PATH, body)
    await client.read_head()
    await client.read_until(b"output_text.delta")
    return client


@pytest.mark.parametrize("reason", ["ttl", "size"])
async def test_a_conversation_that_goes_amid_a_turn(
    serve: Serve, upstream: ScriptedUpstream, store: str, reason: str
) -> None:
    """While a turn is being made its conversation stays, though others must go."""
    bound = {"ttl": "300ms"} if reason == "ttl" else {"max_bytes": "64KiB"}
    proxy = await serve(sessions={"store": store, **bound})
    root = await turn(proxy, "root")
    idle = await turn(proxy, "idle")
    go_on = asyncio.Event()
    upstream.script(paused(go_on))
    client = await begun(proxy, root["id"])

    async def gone() -> None:
        if reason == "size":
            await turn(proxy, "x" * 8000)
        evicted = totals(await proxy.metrics(), "aiproxy_sessions_evictions_total", "reason")
        assert evicted.get(reason)
        assert (await use(proxy, "get", idle["id"])).status == 404

    await eventually(gone, 5)
    assert (await use(proxy, "get", root["id"])).status == 200
    go_on.set()
    facts = [json.loads(data) for _, data in parse_sse(await client.read_body())]
    assert facts[-1]["type"] == "response.completed"
    await turn(proxy, "more", facts[-1]["response"]["id"])
    assert heard(upstream.requests[-1])[::2] == ["root", "x", "more"]


async def test_a_parent_deleted_amid_its_child(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """What needs it cannot be continued, but it is no error of the turn that was on its way."""
    root = await turn(proxy, "root")
    go_on = asyncio.Event()
    upstream.script(paused(go_on))
    client = await begun(proxy, root["id"])
    assert (await use(proxy, "delete", root["id"])).status == 200
    go_on.set()
    facts = [json.loads(data) for _, data in parse_sse(await client.read_body())]
    assert facts[-1]["type"] in ENDS
    NO_PARENT.check(await ask(proxy, "more", facts[-1]["response"]["id"]))
    await check_invariants(proxy, upstream)


async def test_a_delete_that_the_upstream_did_not_do(
    passing: Proxy, upstream: ScriptedUpstream
) -> None:
    """The id stays one's own until the upstream has deleted it."""
    own = (await turn(passing))["id"]
    upstream.script(error_answer(500))
    assert (await use(passing, "delete", own)).status == 502
    assert (await use(passing, "get", own)).status == 200
    assert (await use(passing, "delete", own)).status == 200
    await check_unknown(passing, own)


async def test_reasoning_of_another_key_is_not_looked_up(
    passing: Proxy, upstream: ScriptedUpstream
) -> None:
    """An item that the upstream would complete by its id is a reference to it, too."""
    theirs = reasoning_item(None)
    upstream.script(json_answer(responses_json(items=[theirs])))
    await turn(passing, key=TEAM_B)
    asked = len(upstream.requests)
    assert (await ask(passing, [theirs])).status in {400, 404}
    assert len(upstream.requests) == asked
    await turn(passing, [theirs], key=TEAM_B)


@pytest.mark.parametrize("terminal", [None, "failed"])
async def test_a_failed_turn_of_an_upstream_that_holds(
    passing: Proxy, upstream: ScriptedUpstream, terminal: Terminal | None
) -> None:
    """F02 there as well: what never was complete is not continued, and the upstream not asked."""
    upstream.script(stream(responses_events(terminal=terminal)))
    answer = await ask(passing, streamed=True)
    response = response_of(answer)
    assert response["status"] == "failed"
    asked = len(upstream.requests)
    NO_PARENT.check(await ask(passing, "more", response["id"]))
    assert len(upstream.requests) == asked


async def test_an_answer_larger_than_all_that_may_be_held(
    serve: Serve, upstream: ScriptedUpstream, store: str
) -> None:
    """It is no bug: it ends in some proper way, and what others hold is not touched by it."""
    proxy = await serve(sessions={"store": store, "max_bytes": "64KiB"})
    theirs = (await turn(proxy, key=TEAM_B))["id"]
    for streamed in (False, True):
        upstream.text = "x" * 100_000
        answer = await ask(proxy, streamed=streamed)
        assert answer.status in {200, 503}, answer.status
        upstream.text = "small"
        await turn(proxy)
    assert (await use(proxy, "get", theirs, key=TEAM_B)).status == 200
    await check_invariants(proxy, upstream)
