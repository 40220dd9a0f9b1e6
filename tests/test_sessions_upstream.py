"""Conversations that the upstream holds: ids pass, and only the ids of one's own."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from client import Answer
from invariants import eventually
from responses import message_item, reasoning_item, responses_events, responses_json
from rig import TEAM_B, Proxy
from sessions_rig import (
    NO_PARENT,
    NOT_FOUND,
    PATH,
    STORES,
    Holder,
    Serve,
    ask,
    call,
    files_with,
    heard,
    store_of,
    turn,
    untold,
    use,
)
from steps import json_answer, stream
from upstream import ScriptedUpstream

HOLDER = "replay"


@pytest.fixture
async def second() -> AsyncIterator[ScriptedUpstream]:
    """Run another upstream that holds conversations itself."""
    async with ScriptedUpstream() as server:
        server.default = Holder()
        yield server


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the ids are kept."""
    return store_of(request.param, tmp_path)


def two(second: ScriptedUpstream, mode: str = "upstream") -> dict[str, Any]:
    """Configure two upstreams on one route, and each on one of its own."""
    names = ["scripted", "second"]
    other = {"url": second.url, "credential": {"env": "UPSTREAM_KEY"}, "apis": ["responses"]}
    return {
        "upstreams": {"scripted": {"sessions": mode}, "second": {**other, "sessions": mode}},
        "routes": [
            {"model": "gpt-test", "upstreams": names},
            *({"model": name, "upstreams": [name]} for name in names),
        ],
    }


@pytest.fixture
async def proxy(serve: Serve, upstream: ScriptedUpstream, store: str) -> Proxy:
    """A daemon whose upstream holds the conversations."""
    upstream.default = Holder()
    sessions = {"store": store}
    return await serve(upstreams={"scripted": {"sessions": "upstream"}}, sessions=sessions)


@pytest.mark.parametrize("streamed", [False, True])
async def test_ids_and_fields_pass_unchanged(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """The upstream sees what the client wrote, and the client the upstream's own id."""
    first = await turn(proxy, "one", streamed=streamed)
    assert first["id"].startswith("resp_up")
    assert upstream.requests[-1].json().get("store", True) is True
    second = await turn(proxy, "two", first["id"], streamed=streamed, store=True)
    body = upstream.requests[-1].json()
    assert body["previous_response_id"] == first["id"]
    assert (body["store"], body["input"]) == (True, "two")
    assert (await use(proxy, "get", second["id"])).json() == second


async def test_a_stream_passes_byte_for_byte(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """No event is changed where the upstream holds the conversation."""
    answer = await ask(proxy, streamed=True)
    made = list(upstream.default.held)  # type: ignore[union-attr] # the fixture's own
    assert answer.body.count(made[0].encode()) >= 3


@pytest.mark.parametrize("model", ["gpt-test", "renamed"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_a_response_has_the_model_that_its_answer_had(
    proxy: Proxy, upstream: ScriptedUpstream, model: str, *, streamed: bool
) -> None:
    """GET tells the name that POST told: the upstream's, or the client's where it is renamed."""
    named = responses_json(model="dated-2026-01-01")
    facts = {"response_id": named["id"], "items": named["output"], "model": named["model"]}
    step = stream(responses_events(**facts)) if streamed else json_answer(named)
    upstream.script(step)
    upstream.default.held[named["id"]] = named  # type: ignore[union-attr] # the fixture's own
    made = await turn(proxy, model=model, streamed=streamed)
    assert made["model"] == ("renamed" if model == "renamed" else "dated-2026-01-01")
    assert (await use(proxy, "get", made["id"])).json()["model"] == made["model"]


async def test_calls_are_forwarded(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """GET, DELETE and input_items go to the upstream, the client's order, limit and after too."""
    own = (await turn(proxy))["id"]

    async def forwarded(method: str, path: str) -> tuple[Answer, str]:
        answer = await call(proxy, method, path)
        request = upstream.requests[-1]
        assert request.method == method
        assert request.header("authorization") == "Bearer sk-upstream-credential-8842-QwErTy"
        assert answer.status == 200
        return answer, request.target

    answer, target = await forwarded("GET", f"{PATH}/{own}")
    assert target == f"/v1/responses/{own}"
    assert answer.json()["id"] == own
    query = "order=asc&limit=5&after=msg_1"
    answer, target = await forwarded("GET", f"{PATH}/{own}/input_items?{query}")
    path, _, given = target.partition("?")
    assert path == f"/v1/responses/{own}/input_items"
    assert set(given.split("&")) == set(query.split("&"))
    assert answer.json()["data"][0]["id"] == "msg_upstream_input"
    answer, _ = await forwarded("DELETE", f"{PATH}/{own}")
    assert answer.json() == {"id": own, "object": "response", "deleted": True}
    asked = len(upstream.requests)
    NOT_FOUND.check(await use(proxy, "get", own))
    NO_PARENT.check(await use(proxy, "continue", own))
    assert len(upstream.requests) == asked


async def test_items_of_another_key_are_unknown(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A reference to an item passes for the key that saw the item come, and for no other."""
    item = message_item("theirs")
    upstream.script(json_answer(responses_json(items=[item])))
    await turn(proxy, key=TEAM_B)
    asked = len(upstream.requests)
    foreign = [{"type": "item_reference", "id": item["id"]}]
    unknown = [{"type": "item_reference", "id": "msg_unknown"}]
    answer, plain = await ask(proxy, foreign), await ask(proxy, unknown)
    assert (answer.status, answer.json()["error"]["code"]) == (404, None)
    assert untold(answer, item["id"]) == untold(plain, "msg_unknown")
    assert len(upstream.requests) == asked
    await turn(proxy, foreign, key=TEAM_B)
    assert upstream.requests[-1].json()["input"] == foreign


async def test_nothing_but_ids_is_kept(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """What was said is in no file where the upstream holds the conversation."""
    upstream.default = Holder()
    mode = {"scripted": {"sessions": "upstream"}}
    proxy = await serve(upstreams=mode, sessions={"store": store_of("sqlite", tmp_path)})
    first = await turn(proxy, "CANARY-UPSTREAM-MODE-1")
    await turn(proxy, "CANARY-UPSTREAM-MODE-2", first["id"], streamed=True)
    assert files_with(tmp_path, "CANARY-UPSTREAM-MODE") == []
    assert files_with(tmp_path, first["id"])  # the id itself is


@pytest.mark.parametrize("mode", ["upstream", "replay"])
async def test_a_conversation_stays_where_it_began(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream, store: str, mode: str
) -> None:
    """Of two targets a turn goes to the one that made its parent, in both modes."""
    upstream.default = Holder()
    proxy = await serve(**two(second, mode), sessions={"store": store})
    for number in range(6):
        origin = ("scripted", "second")[number % 2]
        previous = (await turn(proxy, model=origin))["id"]
        for _ in range(3):
            answer = await ask(proxy, "more", previous)
            assert answer.status == 200
            assert answer.headers["x-aiproxy-upstream"] == origin
            previous = answer.json()["id"]


async def test_encrypted_reasoning_stays_with_its_upstream(
    serve: Serve, upstream: ScriptedUpstream, second: ScriptedUpstream, store: str
) -> None:
    """Elsewhere it is left out, counted and logged; back at its origin it is whole again."""
    proxy = await serve(**two(second, "replay"), sessions={"store": store})
    here = [*(reasoning_item(f"HERE-{n}") for n in range(4)), message_item("from here")]
    there = [reasoning_item("THERE"), message_item("from there")]
    upstream.script(json_answer(responses_json(items=here)))
    second.script(json_answer(responses_json(items=there)))
    first = await turn(proxy, "one", model="scripted")
    next_ = await turn(proxy, "two", first["id"], model="second")
    assert heard(second.requests[-1]) == ["one", "from here", "two"]
    assert b"HERE-" not in second.requests[-1].body
    tokens = ("input_tokens", "output_tokens", "input_cached_tokens", "output_reasoning_tokens")

    async def logged() -> None:
        assert any(
            value == 4 and type(value) is int and name not in tokens
            for line in proxy.logs()
            for name, value in line.items()
        ), "no line tells how many items were left out"

    await eventually(logged)
    assert b"HERE-" not in proxy.tap.raw
    await turn(proxy, "three", next_["id"], model="scripted", streamed=True)
    told = ["one", *["<reasoning>"] * 4, "from here", "two", "from there", "three"]
    assert heard(upstream.requests[-1]) == told
    assert b"THERE" not in upstream.requests[-1].body
