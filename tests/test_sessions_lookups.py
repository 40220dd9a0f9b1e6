"""What an upstream that holds conversations for many keys can be made to look up: one's own."""

import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from aiproxy import jsontext
from aiproxy.aside import LARGE
from aiproxy.dialects import responses_named as rn
from refusals import Refusal
from responses import function_item, message_item, reasoning_item, responses_json
from rig import TEAM_B, Proxy
from sessions_rig import PATH, STORES, Holder, Serve, ask, heard, sent, store_of, turn, untold
from steps import json_answer
from upstream import Recorded, ScriptedUpstream

Begin = Callable[[str], Awaitable[Proxy]]

THEIRS = "ig_theirs_1"
BARE: dict[str, Any] = {"type": "image_generation_call", "id": THEIRS, "status": "completed"}
IMAGE = BARE | {"result": "AAAA"}
MESSAGE: dict[str, Any] = {"type": "message", "role": "user", "content": "mine", "id": THEIRS}
REFERENCE = {"type": "item_reference", "id": THEIRS}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the ids are kept."""
    return store_of(request.param, tmp_path)


@pytest.fixture
async def other() -> AsyncIterator[ScriptedUpstream]:
    """Run another upstream."""
    async with ScriptedUpstream() as server:
        server.default = Holder()
        yield server


@pytest.fixture
def begin(serve: Serve, upstream: ScriptedUpstream, other: ScriptedUpstream, store: str) -> Begin:
    """Start a daemon with an account that many share, and another upstream of a mode."""

    async def begun(mode: str) -> Proxy:
        upstream.default = Holder()
        more = {"url": other.url, "credential": {"env": "UPSTREAM_KEY"}, "apis": ["responses"]}
        return await serve(
            upstreams={"scripted": {"sessions": "upstream"}, "other": {**more, "sessions": mode}},
            routes=[
                {"model": "shared", "upstreams": ["scripted"]},
                {"model": "elsewhere", "upstreams": ["other"]},
            ],
            sessions={"store": store},
        )

    return begun


def looked_up(request: Recorded) -> bool:
    """Tell whether an upstream could look up anything for a request."""
    body = json.loads(request.body)
    named = rn.named(json.dumps(body["input"]).encode())
    return bool(named.references or named.lookups or named.unclear)


REACHES = ("bare", "reference", "continued", "continued bare", "continued reference")


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("claim", [MESSAGE, IMAGE, BARE], ids=["message", "image", "bare"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_an_id_is_not_claimed_by_sending_it_elsewhere(
    begin: Begin,
    upstream: ScriptedUpstream,
    claim: dict[str, Any],
    reach: str,
    *,
    streamed: bool,
) -> None:
    """An item of a turn that aiproxy holds makes no id of the shared account one's own."""
    proxy = await begin("replay")
    upstream.script(json_answer(responses_json(items=[IMAGE])))
    await turn(proxy, key=TEAM_B, model="shared")
    asked = len(upstream.requests)
    claimed = await turn(proxy, [claim], model="elsewhere", streamed=streamed)
    given: list[Any] = [{"role": "user", "content": "and?"}]
    if "bare" in reach:
        given.append(BARE)
    elif "reference" in reach:
        given.append(REFERENCE)
    previous = claimed["id"] if "continued" in reach else None
    answer = await ask(proxy, given, previous, model="shared", streamed=streamed)
    if claim is BARE or "bare" in reach:
        Refusal(404, None, param="input").check(answer, upstream="scripted")
        assert len(upstream.requests) == asked
    else:  # it gets what it has sent itself
        assert answer.status == 200
        assert not looked_up(upstream.requests[-1])
        assert json.loads(json.dumps(claim)) in json.loads(upstream.requests[-1].body)["input"]


async def test_an_output_that_is_held_here_is_no_claim(
    begin: Begin, upstream: ScriptedUpstream, other: ScriptedUpstream
) -> None:
    """Not even an id that another upstream gave is good at the shared account."""
    for mode in ("replay", "upstream"):
        proxy = await begin(mode)
        asked = len(upstream.requests)
        other.script(json_answer(responses_json(items=[BARE])))
        made = await turn(proxy, model="elsewhere")
        for given, previous in (([BARE], None), ([REFERENCE], None), ("more", made["id"])):
            answer = await ask(proxy, given, previous, model="shared")
            assert answer.status in {400, 404}, (mode, given, answer)
        assert len(upstream.requests) == asked
        await proxy.stop()


async def test_own_items_are_looked_up(
    begin: Begin, upstream: ScriptedUpstream, other: ScriptedUpstream
) -> None:
    """What the shared account gave to a key it may name there, and nowhere else."""
    proxy = await begin("upstream")
    items = [IMAGE, reasoning_item(None, item_id="rs_own"), {"type": "new", "id": "new_own"}]
    upstream.script(json_answer(responses_json(items=items)))
    await turn(proxy, model="shared")
    bare = [BARE, {"type": "reasoning", "id": "rs_own", "summary": []}, items[2], REFERENCE]
    await turn(proxy, bare, model="shared")
    assert upstream.requests[-1].json()["input"] == bare
    asked = len(other.requests)
    for item in bare:
        assert (await ask(proxy, [item], model="elsewhere")).status == 404
        assert (await ask(proxy, [item], model="shared", key=TEAM_B)).status == 404
    assert len(other.requests) == asked


async def test_what_is_not_own_looks_unknown(
    begin: Begin, upstream: ScriptedUpstream, other: ScriptedUpstream
) -> None:
    """The answer does not tell another key's id from one that never was, however it is asked."""
    proxy = await begin("replay")
    upstream.script(json_answer(responses_json(items=[IMAGE])))
    await turn(proxy, key=TEAM_B, model="shared")
    asked = len(upstream.requests)
    junks: list[dict[str, Any]] = [{}, {"x": 1}, {"result": False}, {"result": []}]
    for junk in junks:
        answer = await ask(proxy, [BARE | junk], model="shared")
        plain = await ask(proxy, [BARE | junk | {"id": "ig_unknown"}], model="shared")
        assert answer.status == 404
        assert untold(answer, THEIRS) == untold(plain, "ig_unknown")
    for odd in (
        b'{"type":"image_generation_call","id":"%b","result":"A","result":null}',
        b'{"type":"message","type":"reasoning","id":"%b","role":"user","content":"x"}',
        b'{"type":"image_generation_call","id":["%b"]}',
        b'{"type":"image_generation_call","id":"%b\\ud800"}',
    ):
        item = odd.replace(b"%b", THEIRS.encode())
        body = b'{"model":"shared","input":[{"role":"user","content":"x"},%b]}' % item
        answer = await proxy.post(PATH, body)
        assert (answer.status, answer.json()["error"]["code"]) == (400, "invalid_value")
        assert answer.json()["error"]["param"].startswith("input[1]")
    assert len(upstream.requests) == asked


async def test_whole_items_of_stateless_clients_pass(
    begin: Begin, upstream: ScriptedUpstream, other: ScriptedUpstream
) -> None:
    """Clients that keep all themselves send whole items with ids that nobody knows here."""
    proxy = await begin("replay")
    given = [
        {"role": "user", "content": "hi"},
        reasoning_item(item_id="rs_1"),
        function_item(item_id="fc_1"),
        {"type": "function_call_output", "call_id": "c", "output": "", "id": "fco_1"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed",
         "action": {"type": "search", "query": "q"}},
        {**IMAGE, "id": "ig_1"},
        message_item("said", item_id="msg_1"),
    ]  # fmt: skip
    for streamed in (False, True):
        await turn(proxy, given, model="shared", store=False, streamed=streamed)
        assert [json.loads(item) for item in sent(upstream.requests[-1])] == given


async def test_what_is_named_again_and_again_counts_each_time(
    begin: Begin, upstream: ScriptedUpstream, other: ScriptedUpstream
) -> None:
    """A small request does not grow beyond `max_replay` by naming one item many times."""
    proxy = await begin("replay")
    other.script(json_answer(responses_json(items=[message_item("x" * 60_000, item_id="m_1")])))
    await turn(proxy, model="elsewhere")
    asked = len(other.requests)
    reference = {"type": "item_reference", "id": "m_1"}
    await turn(proxy, [reference] * 2, model="elsewhere")
    assert heard(other.requests[-1]) == ["x" * 60_000] * 2
    too_long = Refusal(400, "context_length_exceeded", param="input")
    too_long.check(await ask(proxy, [reference] * 1000, model="elsewhere"))
    assert len(other.requests) == asked + 1


async def test_a_large_input_does_not_hold_up_others(
    begin: Begin, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items of a large input are found, and put in the place of references, in a thread."""
    proxy = await begin("replay")
    upstream.script(json_answer(responses_json(items=[IMAGE])))
    await turn(proxy, model="shared")
    loop, threads = threading.get_ident(), dict[str, int]()

    def spied(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def spy(given: Any) -> Any:
            threads[name] = threading.get_ident()
            return work(given)

        return spy

    monkeypatch.setattr(rn, "named", spied("named", rn.named))
    monkeypatch.setattr("aiproxy.conversation.elements", spied("cut", jsontext.elements))
    await turn(proxy, [REFERENCE, {"role": "user", "content": "x" * LARGE}], model="shared")
    assert set(threads) == {"named", "cut"}
    assert loop not in threads.values()
