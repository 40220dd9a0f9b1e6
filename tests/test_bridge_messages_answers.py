"""Answers of an upstream of messages as the Responses API tells them, whole and streamed."""

from typing import Any, NamedTuple

import pytest

from answers import Usage
from invariants import TOKEN_FIELDS, check_tokens, eventually
from messages_upstream import (
    EMPTY,
    F1,
    F2,
    FREELY,
    HM,
    SAID_F1,
    SAID_F2,
    SIGNATURE,
    TOOLS,
    Block,
    Fact,
    Plan,
    Serve,
    answered,
    ask,
    bridged,
    frames,
    llama_facts,
    meant,
    redacted,
    short,
    text,
    thinking,
    tool_use,
)
from refusals import SERVER, Refusal
from rig import Proxy
from steps import json_answer, stream
from upstream import ScriptedUpstream
from validating import check_bridged, check_stream, facts_of

HOLDER = "replay"

LONG = 'Grüße, 世界 \U0001f30d — "quoted" \\ \u2028 ' * 8
COUNTED = Usage(1000, 300, 200, 50, cache_write=20)


class Case(NamedTuple):
    """Content blocks, and what the items of the answer say."""

    blocks: list[Block]
    expected: list[Any]


CASES: dict[str, Case] = {
    "text": Case([text("Hello world")], ["Hello world"]),
    "long text": Case([text(LONG)], [LONG]),
    "two texts": Case([text("Hello "), text("world")], ["Hello world"]),
    "a call": Case([F1], [SAID_F1]),
    "a call without input": Case([EMPTY], [("g", "call_3", {})]),
    "parallel calls": Case([F1, F2, EMPTY], [SAID_F1, SAID_F2, ("g", "call_3", {})]),
    "text and a call": Case([text("Let me see."), F1], ["Let me see.", SAID_F1]),
    "text between calls": Case([text("a"), F1, text("b"), F2], ["a", SAID_F1, "b", SAID_F2]),
    "a custom call": Case([FREELY], [("free", "call_4", 'any *text*\n"{')]),
    "custom and other calls": Case(
        [F1, FREELY, EMPTY], [SAID_F1, ("free", "call_4", 'any *text*\n"{'), ("g", "call_3", {})]
    ),
    "thoughts and text": Case([thinking("Hm."), text("Yes.")], [HM, "Yes."]),
    "thoughts and a call": Case([thinking("Hm."), F1], [HM, SAID_F1]),
    "thoughts between": Case(
        [thinking("Hm."), text("a"), thinking("Oh.", "other"), F1],
        [HM, "a", ("Oh.", "other"), SAID_F1],
    ),
    "thoughts that are not shown": Case(
        [redacted("DATA+/="), text("Yes.")], [("", "redacted_thinking:DATA+/="), "Yes."]
    ),
    "both kinds of thoughts": Case(
        [thinking("Hm."), redacted("D"), text("Yes.")], [HM, ("", "redacted_thinking:D"), "Yes."]
    ),
    "empty thoughts with a signature": Case(
        [thinking(""), text("Yes.")], [("", SIGNATURE), "Yes."]
    ),
}


def stop_of(blocks: list[Block]) -> str:
    """Return the stop reason of content blocks."""
    return "tool_use" if any(block["type"] == "tool_use" for block in blocks) else "end_turn"


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """A daemon before an upstream of messages."""
    return await bridged(serve)


@pytest.mark.parametrize("name", CASES)
async def test_what_is_said(proxy: Proxy, upstream: ScriptedUpstream, name: str) -> None:
    """However an answer comes, whole or in any pieces, it is the same valid response."""
    blocks, expected = CASES[name]
    plan = Plan(blocks, stop=stop_of(blocks))
    upstream.script(plan.script(streamed=False))
    whole = await answered(proxy, streamed=False)
    assert short(whole) == expected
    assert (whole["status"], whole["model"]) == ("completed", "gpt-test")
    scripts = [
        stream(plan.events()),
        stream(plan.events(1), newline=b"\r\n"),
        stream(plan.events(7), split=5),
        stream(plan.events(2, in_start=True), newline=b"\r", split=11),
        stream([b"data: " + frame.split(b"data: ")[1] for frame in plan.events()]),
    ]
    for number, script in enumerate(scripts):
        upstream.script(script)
        answer = await ask(proxy, stream=True, **TOOLS)
        told = check_stream(facts_of(answer.body), valid=number == 0)
        assert meant(told) == meant(whole)


# that server tells at most one text, before all calls, and shows all thoughts, unsigned
OF_LLAMA = [
    name
    for name in CASES
    if name not in {"two texts", "text between calls", "thoughts between", "both kinds of thoughts"}
    and "not shown" not in name
    and "signature" not in name
]


@pytest.mark.parametrize("name", OF_LLAMA)
async def test_what_is_said_by_llama_cpp(
    proxy: Proxy, upstream: ScriptedUpstream, name: str
) -> None:
    """Blocks that all end last, bare starts, and no start of the message make no difference."""
    blocks, expected = CASES[name]
    plan = Plan(blocks, stop=stop_of(blocks))
    unsigned = [("Hm.", None) if said == HM else said for said in expected]
    for started in (True, False):
        upstream.script(stream(frames(llama_facts(plan, started=started))))
        response = await answered(proxy, streamed=True)
        assert short(response) == unsigned
        assert response["status"] == "completed"
        used = response["usage"]
        if started:
            assert (used["input_tokens"], used["output_tokens"]) == (11, 7)
        else:
            assert used is None or used["output_tokens"] == 7


async def test_a_signature_that_comes_late(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """After the text has begun it can no longer be told, or is told everywhere alike."""
    plan = Plan([thinking("Hm."), text("Yes.")])
    upstream.script(stream(frames(llama_facts(plan, signed=SIGNATURE))))
    response = await answered(proxy, streamed=True)
    assert short(response)[1] == "Yes."
    assert short(response)[0] in {HM, ("Hm.", None)}


async def test_the_items_themselves(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Every item has the members, and the kind of id, that clients of the API know."""
    plan = Plan([thinking("Hm."), text("Yes."), F1, FREELY], stop="tool_use")
    for streamed in (False, True):
        upstream.script(plan.script(streamed=streamed))
        response = await answered(proxy, streamed=streamed)
        thought, message, function, custom = response["output"]
        ids = [item["id"] for item in response["output"]]
        assert [each.partition("_")[0] for each in ids] == ["rs", "msg", "fc", "ctc"]
        assert len(set(ids)) == 4
        assert response["id"].startswith("resp_")
        assert thought["summary"] == [{"type": "summary_text", "text": "Hm."}]
        assert thought["encrypted_content"] == SIGNATURE
        assert not thought.get("content")
        part = {"type": "output_text", "text": "Yes.", "annotations": [], "logprobs": []}
        assert message["content"] == [part]
        assert {item["status"] for item in (message, function)} == {"completed"}
        assert custom.keys() >= {"type", "id", "call_id", "name", "input"}
        assert "arguments" not in custom


async def test_the_order_of_events(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Events come in the order of the API's own, each text in pieces as it came."""
    plan = Plan([thinking("Hm. Oh."), text("a b"), F1, FREELY], stop="tool_use")
    upstream.script(stream(plan.events(2)))
    answer = await ask(proxy, stream=True, **TOOLS)
    check_bridged(answer)
    told = [fact["type"].removeprefix("response.") for fact in facts_of(answer.body)]
    kinds: list[str] = []
    for kind in told:
        if not (kinds and kind == kinds[-1] and kind.endswith("delta")):
            kinds.append(kind)
    summary, called = "reasoning_summary", "function_call_arguments"
    assert kinds[:14] == [
        "created", "in_progress",
        "output_item.added", f"{summary}_part.added", f"{summary}_text.delta",
        f"{summary}_text.done", f"{summary}_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
    ]  # fmt: skip
    assert kinds[14:16] == ["output_item.added", f"{called}.delta"]
    assert kinds[-1] == "completed"
    assert told.count("output_text.delta") == 2
    assert told.count(f"{summary}_text.delta") == 2
    assert told.count(f"{called}.done") == told.count("custom_tool_call_input.done") == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_citations_do_no_harm(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """Text with citations keeps its words, and the answer stays valid."""
    cited = {
        "type": "char_location",
        "cited_text": "x",
        "document_index": 0,
        "document_title": None,
        "file_id": None,
        "start_char_index": 0,
        "end_char_index": 1,
    }
    plan = Plan([text("It is so", citations=[cited]), text(", he said.")])
    upstream.script(plan.script(streamed=streamed))
    assert short(await answered(proxy, streamed=streamed)) == ["It is so, he said."]


@pytest.mark.parametrize("streamed", [False, True])
async def test_blocks_of_other_types_are_not_made_up(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """What the API has no item for is left out, or fails the answer; no invalid item is made."""
    odd = {"type": "server_tool_use", "id": "srv_1", "name": "web_search", "input": {"query": "x"}}
    plan = Plan([text("a"), odd, F1], stop="tool_use")
    upstream.script(plan.script(streamed=streamed))
    answer = await ask(proxy, stream=streamed, **TOOLS)
    if not streamed and answer.status != 200:
        Refusal(502, "upstream_error", SERVER).check(answer, upstream="scripted")
        return
    response = check_bridged(answer)
    assert response["status"] == "failed" or short(response) == ["a", SAID_F1]


async def test_odd_events_do_no_harm(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Pings, comments, unknown events and unknown deltas are told to nobody."""
    facts = Plan([text("a b"), F1], stop="tool_use").facts()
    odd: list[Fact] = [
        {"type": "ping"},
        {"type": "brand_new", "index": 0},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "brand_new", "x": 1}},
    ]
    events = [b": hello\n\n"]
    for fact in facts:
        within = fact["type"] == "content_block_start"
        events += frames([fact, *(odd if within else odd[:2])])
    upstream.script(stream(events))
    answer = await ask(proxy, stream=True, **TOOLS)
    assert short(check_bridged(answer)) == ["a b", SAID_F1]
    assert b"brand_new" not in answer.body
    assert b"[DONE]" not in answer.body


async def test_input_in_the_start_and_by_deltas(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """An input that is whole in the start is whole; one of which deltas come is theirs."""
    early, late = tool_use("f", {"a": 1}, "call_1"), tool_use("f", {"a": 2}, "call_2")
    facts = Plan([early], stop="tool_use").facts(in_start=True)[:-2]
    later = Plan([late], stop="tool_use").facts(3)[2:]
    upstream.script(
        stream(frames([*facts, *({**fact, "index": 1} if "index" in fact else fact
                                 for fact in later)]))
    )  # fmt: skip
    response = await answered(proxy, streamed=True)
    assert short(response) == [("f", "call_1", {"a": 1}), ("f", "call_2", {"a": 2})]


# What it cost, and what it repeats


@pytest.mark.parametrize("streamed", [False, True])
async def test_usage(proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool) -> None:
    """Input counts what the cache gave and took, and the details say how much that was."""
    upstream.script(Plan([text("x")], usage=COUNTED).script(streamed=streamed))
    response = await answered(proxy, streamed=streamed)
    assert response["usage"] == {
        "input_tokens": 1000,
        "input_tokens_details": {"cached_tokens": 300, "cache_write_tokens": 20},
        "output_tokens": 200,
        "output_tokens_details": {"reasoning_tokens": 50},
        "total_tokens": 1200,
    }


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("bad", [None, {}, {"input_tokens": -1, "output_tokens": "x"}])
async def test_bad_usage(
    proxy: Proxy, upstream: ScriptedUpstream, bad: Any, *, streamed: bool
) -> None:
    """A usage that is missing or wrong is null: nothing is made up."""
    plan = Plan([text("x")])
    facts = plan.facts()
    facts[0]["message"]["usage"] = facts[-2]["usage"] = bad
    script = stream(frames(facts)) if streamed else json_answer(plan.whole(usage=bad))
    upstream.script(script)
    response = await answered(proxy, streamed=streamed)
    assert response["usage"] is None
    assert short(response) == ["x"]


async def test_bare_usage(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Servers without a cache count but two numbers; the details are zero then."""
    bare = {"input_tokens": 5, "output_tokens": 6}
    upstream.script(json_answer(Plan([text("x")]).whole(usage=bare)))
    response = await answered(proxy, streamed=False)
    assert response["usage"] == Usage(5, 0, 6, 0).responses()


async def test_what_is_repeated(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """The response repeats what was asked for, also what the upstream has no word for."""
    asked: Fact = {
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "max_output_tokens": 50,
        "temperature": 0.5,
        "top_p": 0.25,
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "max_tool_calls": 3,
        "store": False,
    }
    for streamed in (False, True):
        upstream.script(Plan([text("x")]).script(streamed=streamed))
        response = await answered(proxy, streamed=streamed, **asked)
        assert {name: response[name] for name in asked} == asked
        assert [tool["name"] for tool in response["tools"]] == ["f", "g", "free"]
        assert [tool["type"] for tool in response["tools"]] == ["function", "function", "custom"]
        assert response["previous_response_id"] is None
        assert response["background"] is False


async def test_tokens_are_counted(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Log and metrics say what the answer says, over a bridge as elsewhere."""
    for streamed in (False, True):
        upstream.script(Plan([text("x")], usage=COUNTED).script(streamed=streamed))
        await answered(proxy, streamed=streamed)
    await check_tokens(proxy)
    await eventually(lambda: _counted(proxy))


async def _counted(proxy: Proxy) -> None:
    lines = proxy.request_logs()
    assert len(lines) == 2
    for line in lines:
        assert {name: line[name] for name in TOKEN_FIELDS.values()} == {
            TOKEN_FIELDS[kind]: number for kind, number in COUNTED.disjoint().items()
        }
        assert (line["endpoint"], line["outcome"]) == ("responses", "completed")
        assert (line["status"], line["upstream"]) == (200, "scripted")
