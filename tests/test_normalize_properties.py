"""Whatever a server leaves out, and wherever its bytes are cut, its stream becomes a valid one."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from answers import sse
from normalize_rig import (
    SERVERS,
    Serve,
    ask,
    check_native,
    check_normalized,
    facts_of,
    normalizing,
    short,
    told_by,
)
from responses import function_item, message_item, reasoning_item, responses_events
from rig import Proxy
from steps import json_answer, stream
from upstream import ScriptedUpstream
from validating import Fact, timeless

HOLDER = "replay"

ONCE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    phases=[Phase.generate, Phase.shrink],  # to explain takes calls that block
    max_examples=25,
)

ITEMS = [
    reasoning_item(summary="Let me think."),
    message_item("Grüße, 世界 und mehr"),
    function_item("f", '{"a": 1}', call_id="call_1"),
]
WHOLE = facts_of(b"".join(responses_events(items=ITEMS)))
EXPECTED = [
    ("reasoning", "Let me think."),
    ("message", "Grüße, 世界 und mehr"),
    ("f", '{"a": 1}', "call_1"),
]

# Kinds of events that a stream need not have: the items, texts and parts of which they tell are
# told by others too. Without deltas a text is in its done events; without those, in the end.
OPTIONAL = sorted({fact["type"] for fact in WHOLE} - {"response.completed"})
# Members that an event need not have, and of a response, an item and a part.
MEMBERS = [
    "sequence_number", "output_index", "content_index", "summary_index", "item_id", "logprobs",
]  # fmt: skip
OF_RESPONSES = sorted(set(WHOLE[-1]["response"]) - {"id", "status", "output", "usage"})
OF_ITEMS = ["id", "status"]
OF_PARTS = ["annotations", "logprobs"]
DETAILS = ["input_tokens_details", "output_tokens_details", "total_tokens"]

KINDS = st.sets(st.sampled_from(OPTIONAL))
LEFT_OUT = st.fixed_dictionaries({
    "members": st.sets(st.sampled_from(MEMBERS)),
    "response": st.sets(st.sampled_from(OF_RESPONSES)),
    "item": st.sets(st.sampled_from(OF_ITEMS)),
    "part": st.sets(st.sampled_from(OF_PARTS)),
    "usage": st.sets(st.sampled_from(DETAILS)),
})  # fmt: skip
Names = dict[str, set[str]]

# A server that does not begin a call cannot say whose arguments come.
ADDED, ARGUMENTS = "response.output_item.added", "response.function_call_arguments"


def sensible(kinds: set[str]) -> set[str]:
    """Return kinds of events that a server may leave out together."""
    called = {f"{ARGUMENTS}.delta", f"{ARGUMENTS}.done"}
    return kinds | called if ADDED in kinds else kinds


def without(fact: Fact, names: set[str]) -> Fact:
    """Return an object without some members."""
    return {name: value for name, value in fact.items() if name not in names}


def lacking(fact: Fact, left_out: Names) -> Fact:
    """Return an event without what is left out of it, at every depth."""
    fact = without(fact, left_out["members"])
    if "response" in fact:
        fact["response"] = response = without(fact["response"], left_out["response"])
        response["output"] = [_item(item, left_out) for item in response["output"]]
        if response.get("usage"):
            response["usage"] = without(response["usage"], left_out["usage"])
    if "item" in fact:
        fact["item"] = _item(fact["item"], left_out)
    if "part" in fact:
        fact["part"] = without(fact["part"], left_out["part"])
    return fact


def _item(item: Fact, left_out: Names) -> Fact:
    item = without(item, left_out["item"])
    if "content" in item:
        item["content"] = [without(part, left_out["part"]) for part in item["content"]]
    return item


def same(response: Fact) -> bool:
    """Whether a response has all that was said; items of which more came stand first."""
    return sorted(map(repr, short(response))) == sorted(map(repr, EXPECTED))


def framed(facts: Sequence[Fact]) -> list[bytes]:
    """Encode events."""
    return [sse(fact, event=fact["type"]) for fact in facts]


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """A daemon that completes what comes."""
    return await normalizing(serve)


async def told(proxy: Proxy, upstream: ScriptedUpstream, facts: Sequence[Fact]) -> Fact:
    """Play a stream; return the response of what came of it, with every check."""
    upstream.script(stream(framed(facts)))
    return check_native((await ask(proxy, streamed=True)).body)


@ONCE
@given(KINDS, LEFT_OUT)
async def test_kinds_and_members_that_never_come(
    proxy: Proxy, upstream: ScriptedUpstream, kinds: set[str], left_out: Names
) -> None:
    """A server that knows neither some events nor some members is understood all the same."""
    facts = [lacking(fact, left_out) for fact in WHOLE if fact["type"] not in sensible(kinds)]
    response = await told(proxy, upstream, facts)
    assert same(response), short(response)
    assert response["status"] == "completed"
    assert response["usage"]["output_tokens"] == WHOLE[-1]["response"]["usage"]["output_tokens"]


@pytest.mark.parametrize("kind", OPTIONAL)
async def test_one_kind_that_never_comes(
    proxy: Proxy, upstream: ScriptedUpstream, kind: str
) -> None:
    """Each kind of event alone can be done without."""
    nothing: Names = {name: set() for name in ("members", "response", "item", "part", "usage")}
    facts = [lacking(fact, nothing) for fact in WHOLE if fact["type"] not in sensible({kind})]
    assert same(await told(proxy, upstream, facts))


@pytest.mark.parametrize("kind", [kind for kind in OPTIONAL if not kind.startswith(ARGUMENTS)])
async def test_one_kind_that_alone_comes(
    proxy: Proxy, upstream: ScriptedUpstream, kind: str
) -> None:
    """With the end, each kind of event alone is enough."""
    facts = [fact for fact in WHOLE if fact["type"] in {kind, "response.completed"}]
    assert same(await told(proxy, upstream, facts))


ALL_MEMBERS = {
    "members": MEMBERS,
    "response": OF_RESPONSES,
    "item": OF_ITEMS,
    "part": OF_PARTS,
    "usage": DETAILS,
}


@pytest.mark.parametrize("where", ALL_MEMBERS)
async def test_one_member_that_never_comes(
    proxy: Proxy, upstream: ScriptedUpstream, where: str
) -> None:
    """Each member alone can be done without, streamed and whole."""
    for name in ALL_MEMBERS[where]:
        left_out: Names = {each: {name} if each == where else set() for each in ALL_MEMBERS}
        facts = [lacking(fact, left_out) for fact in WHOLE]
        assert short(await told(proxy, upstream, facts)) == EXPECTED, name
        upstream.script(json_answer(facts[-1]["response"]))
        answer = await ask(proxy, streamed=False)
        assert short(check_normalized(answer)) == EXPECTED, name


_CALLED = [at for at, fact in enumerate(WHOLE) if fact["type"].startswith(ARGUMENTS)]
_CALL = _CALLED[0] - 1  # where it is added
_OPTIONAL_AT = [at for at, fact in enumerate(WHOLE) if "delta" not in fact and at < len(WHOLE) - 1]


@ONCE
@given(
    st.sets(st.sampled_from(_OPTIONAL_AT)),
    st.sets(st.tuples(st.sampled_from(range(len(WHOLE))), st.sampled_from(MEMBERS))),
)
async def test_events_that_are_lost(
    proxy: Proxy, upstream: ScriptedUpstream, lost: set[int], left_out: set[tuple[int, str]]
) -> None:
    """Events without a text of their own may be lost anywhere, and members of the others."""
    lost = lost | set(_CALLED) if _CALL in lost else lost
    facts = [
        without(fact, {name for where, name in left_out if where == at})
        for at, fact in enumerate(WHOLE)
        if at not in lost
    ]
    assert same(await told(proxy, upstream, facts))


@ONCE
@given(LEFT_OUT)
async def test_whole_answers(proxy: Proxy, upstream: ScriptedUpstream, left_out: Names) -> None:
    """A JSON answer that lacks any of its members is completed."""
    response = lacking(WHOLE[-1], left_out)["response"]
    upstream.script(json_answer(response))
    answer = await ask(proxy, streamed=False)
    assert short(check_normalized(answer)) == EXPECTED


@ONCE
@given(
    st.sampled_from(sorted(SERVERS)),
    st.sampled_from([b"\n", b"\r", b"\r\n"]),
    st.sets(st.integers(1, 10_000), max_size=60),
)
async def test_bytes_that_are_cut_anywhere(
    proxy: Proxy, upstream: ScriptedUpstream, name: str, newline: bytes, cuts: set[int]
) -> None:
    """Any split of the same bytes makes the same events."""
    frames = SERVERS[name].frames(told_by(SERVERS[name]))
    data = b"".join(frames).replace(b"\n", newline)
    places = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    seen: list[Any] = []
    for pieces in ([data], [data[start:end] for start, end in pairwise(places)]):
        upstream.script(stream(pieces))
        answer = await ask(proxy, streamed=True)
        check_native(answer.body)
        seen.append(timeless(facts_of(answer.body)))
    assert seen[0] == seen[1]


@ONCE
@given(KINDS, LEFT_OUT, st.integers(0, len(WHOLE)))
async def test_streams_that_are_cut(
    proxy: Proxy, upstream: ScriptedUpstream, kinds: set[str], left_out: Names, end: int
) -> None:
    """Whatever is missing besides its end, a stream without one is a valid one that failed."""
    kept = [fact for fact in WHOLE[:-1][:end] if fact["type"] not in sensible(kinds)]
    response = await told(proxy, upstream, [lacking(fact, left_out) for fact in kept])
    assert response["status"] == "failed"
