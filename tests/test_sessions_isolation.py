"""Whose turns and items are whose: all that is not own looks as if it never was."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from invariants import eventually
from refusals import Refusal
from responses import (
    function_item,
    message_item,
    reasoning_item,
    responses_events,
    responses_json,
)
from rig import ABSENT, AMPLE, TEAM_A, TEAM_B, Proxy, key_hash
from sessions_rig import (
    NO_PARENT,
    NOT_FOUND,
    PATH,
    STORES,
    UNKNOWN,
    VERBS,
    Holder,
    Serve,
    ask,
    call,
    check_unknown,
    heard,
    held_here,
    sent,
    store_of,
    turn,
    untold,
    use,
)
from steps import SSE_HEADERS, Step, json_answer
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait

HOLDER = "replay"

MODES = ("replay", "upstream")
MALFORMED = ("resp_1", "x", "conv_0123456789", "resp_" + "A" * 31 + ".", "resp_" + "-" * 44)
ROTATED = "sk-aip-rotated-team-a-91"


async def begin(
    serve: Serve, upstream: ScriptedUpstream, folder: Path, kind: str, mode: str, **sessions: Any
) -> Proxy:
    """Start a daemon of a mode before an upstream that holds conversations itself."""
    upstream.default = Holder()
    return await serve(
        upstreams={"scripted": {"sessions": mode}},
        sessions={"store": store_of(kind, folder), **sessions},
    )


def paused(go_on: asyncio.Event) -> list[Step]:
    """Return a stream that waits before its terminal event."""
    *frames, last = responses_events("Hello")
    return [Headers(200, SSE_HEADERS), *map(Chunk, frames), Wait(go_on), Chunk(last), EndChunks()]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", STORES)
async def test_what_is_own(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path, kind: str, mode: str
) -> None:
    """The key that made a turn can do all that there is to do with it."""
    proxy = await begin(serve, upstream, tmp_path, kind, mode)
    own = (await turn(proxy, key=TEAM_B))["id"]
    for verb in ("continue", "get", "input_items"):
        assert (await use(proxy, verb, own, key=TEAM_B)).status == 200, verb
    if mode == "replay":
        assert (await use(proxy, "cancel", own, key=TEAM_B)).status == 400
    answer = await use(proxy, "delete", own, key=TEAM_B)
    assert answer.json() == {"id": own, "object": "response", "deleted": True}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", STORES)
async def test_what_is_not_own_looks_unknown(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path, kind: str, mode: str
) -> None:
    """Every verb says the same of all of it, and none of it is asked for upstream."""
    proxy = await begin(serve, upstream, tmp_path, kind, mode)
    NO_PARENT.check(await use(proxy, "continue", UNKNOWN))
    for verb in VERBS[1:]:
        NOT_FOUND.check(await use(proxy, verb, UNKNOWN))
    other = (await turn(proxy, key=TEAM_B))["id"]
    deleted = (await turn(proxy))["id"]
    assert (await use(proxy, "delete", deleted)).status == 200
    unstored = (await turn(proxy, store=False))["id"]
    raw = responses_json()
    upstream.script(json_answer(raw))
    mine = (await turn(proxy))["id"]
    go_on = asyncio.Event()
    upstream.script(paused(go_on))
    client = await proxy.send(PATH, {"model": "gpt-test", "input": "x", "stream": True})
    await client.read_head()
    begun = await client.read_until(b"output_text.delta")
    unfinished = json.loads(begun.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
    asked = len(upstream.requests)
    strangers = [other, deleted, unstored, unfinished, *MALFORMED]
    strangers += [raw["id"]] if mode == "replay" else []
    for stranger in strangers:
        await check_unknown(proxy, stranger)
    await check_unknown(proxy, mine, key=TEAM_B)
    assert len(upstream.requests) == asked
    go_on.set()
    await client.read_body()
    for own, key in ((other, TEAM_B), (mine, TEAM_A), (unfinished, TEAM_A)):
        assert (await use(proxy, "continue", own, key=key)).status == 200


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", STORES)
async def test_what_is_expired_looks_unknown(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path, kind: str, mode: str
) -> None:
    """After its time every verb says of a turn what it says of one that never was."""
    proxy = await begin(serve, upstream, tmp_path, kind, mode, ttl="300ms")
    old = (await turn(proxy))["id"]

    async def gone() -> None:
        assert (await use(proxy, "get", old)).status == 404

    await eventually(gone)
    asked = len(upstream.requests)
    await check_unknown(proxy, old)
    assert len(upstream.requests) == asked


async def test_ids_cannot_leave_their_path(serve: Serve, upstream: ScriptedUpstream) -> None:
    """What is no id reaches no other path of the upstream, however it is written."""
    upstream.default = Holder()
    proxy = await serve(upstreams={"scripted": {"sessions": "upstream"}})
    own = (await turn(proxy))["id"]
    asked = len(upstream.requests)
    for odd in ("resp_%2F..%2Fmodels", "..%2fmodels", f"{own}%3Fa=b", f"{own}%23", f"{own}%2Fx",
                f"x%2F..%2F{own}", "%00", f"{own}%20"):  # fmt: skip
        for method in ("GET", "DELETE"):
            answer = await call(proxy, method, f"{PATH}/{odd}")
            assert answer.status in {400, 404}, (method, odd, answer)
    assert len(upstream.requests) == asked
    assert (await use(proxy, "get", own)).status == 200


@pytest.mark.parametrize("kind", STORES)
async def test_a_turn_belongs_to_the_name_of_a_key(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path, kind: str
) -> None:
    """A rotated secret keeps its conversations; the old secret under another name has none."""
    store = store_of(kind, tmp_path)
    proxy = await serve(sessions={"store": store})
    own = (await turn(proxy))["id"]
    keys = {
        "team-a": {"sha256": key_hash(ROTATED), "limits": AMPLE},
        "team-b": ABSENT,
        "team-c": {"sha256": key_hash(TEAM_A)},
    }
    proxy.text = held_here(upstream, store, keys=keys)
    assert (await proxy.admin("/-/reload", "POST")).status == 200
    await check_unknown(proxy, own, key=TEAM_A)
    await turn(proxy, "more", own, key=ROTATED)
    assert heard(upstream.requests[-1])[-1] == "more"
    assert len(heard(upstream.requests[-1])) == 3


@pytest.fixture(params=STORES)
async def proxy(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Proxy:
    """A daemon with each kind of store."""
    return await serve(sessions={"store": store_of(request.param, tmp_path)})


def reference(item_id: str) -> dict[str, str]:
    """Build a reference to an item."""
    return {"type": "item_reference", "id": item_id}


async def test_references_to_own_items(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The whole history as references, as the AI SDK sends it, is replaced by the stored items."""
    made = [reasoning_item(), function_item("f", "{}"), message_item("called")]
    upstream.script(json_answer(responses_json(items=made)))
    mine = {"type": "message", "role": "user", "content": "mine", "id": "msg_mine_1"}
    await turn(proxy, [mine])
    result = {"type": "function_call_output", "call_id": made[1]["call_id"], "output": "1"}
    refs = [reference(item["id"]) for item in made]
    for store in (True, False):
        given = [reference("msg_mine_1"), *refs, result]
        await turn(proxy, given, store=store)
        expected = [json.dumps(item).encode() for item in (mine, *made, result)]
        assert sent(upstream.requests[-1]) == expected


async def test_references_into_the_path(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """What is replayed already is not sent twice; what is on another path is put in."""
    here, there = message_item("here"), message_item("there")
    for item in (there, here):
        upstream.script(json_answer(responses_json(items=[item])))
    await turn(proxy, "elsewhere")
    root = await turn(proxy, "root")
    given = [reference(here["id"]), reference(there["id"]), {"role": "user", "content": "next"}]
    child = await turn(proxy, given, root["id"], streamed=True)
    assert heard(upstream.requests[-1]) == ["root", "here", "there", "next"]
    await turn(proxy, "last", child["id"])
    told = heard(upstream.requests[-1])
    assert [*told[:4], told[-1]] == ["root", "here", "there", "next", "last"]
    assert not [item for item in sent(upstream.requests[-1]) if b"item_reference" in item]


async def test_references_to_items_that_are_not_own(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """Another key's, a deleted turn's, an unstored turn's, an unknown one: one same 404."""
    items = [message_item(f"text {n}") for n in range(3)]
    for item in items:
        upstream.script(json_answer(responses_json(items=[item])))
    await turn(proxy, key=TEAM_B)
    await turn(proxy, store=False)
    deleted = await turn(proxy)
    assert (await use(proxy, "delete", deleted["id"])).status == 200
    own = await turn(proxy)
    asked = len(upstream.requests)
    unknown = await ask(proxy, [reference("msg_unknown")])
    error = unknown.json()["error"]
    Refusal(404, None, param=error["param"]).check(unknown)
    for item in items:
        for previous in (None, own["id"]):
            given = [{"role": "user", "content": "hi"}, reference(item["id"])]
            answer = await ask(proxy, given, previous)
            plain = await ask(proxy, [*given[:1], reference("msg_unknown")], previous)
            assert untold(answer, item["id"]) == untold(plain, "msg_unknown")
            assert answer.status == 404
    assert len(upstream.requests) == asked
    await turn(proxy, [reference(items[0]["id"])], key=TEAM_B)
    assert heard(upstream.requests[-1]) == ["text 0"]


async def test_an_unstored_turn_may_continue_a_stored_one(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """It has the whole history and leaves nothing behind; its parent is as it was."""
    root = await turn(proxy, "root")
    for streamed in (False, True):
        child = await turn(proxy, "child", root["id"], store=False, streamed=streamed)
        assert heard(upstream.requests[-1])[::2] == ["root", "child"]
        assert child["store"] is False
        assert child["previous_response_id"] == root["id"]
        await check_unknown(proxy, child["id"])
    await turn(proxy, "next", root["id"])
    assert heard(upstream.requests[-1])[::2] == ["root", "next"]
