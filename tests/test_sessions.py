"""Conversations that aiproxy holds: each turn is asked with all that was before it, losslessly."""

import asyncio
import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from aiproxy import conversation
from aiproxy.aside import LARGE
from client import RawClient
from responses import function_item, message_item, reasoning_item, responses_events, responses_json
from rig import Proxy, prompt
from sessions_rig import (
    NO_PARENT,
    OWN_ID,
    PATH,
    STORES,
    Serve,
    ask,
    check_replayed,
    heard,
    lifecycle,
    numbered,
    raw_answer,
    response_of,
    said,
    sent,
    store_of,
    turn,
)
from steps import Reset, Step, json_answer, stream
from upstream import ScriptedUpstream

HOLDER = "replay"

# As no encoder of ours would write it: spaces, escapes, numbers, order and an unknown field.
ODD_REASONING = (
    rb'{ "encrypted_content" :"gAAAA\/b+\u00e9==","summary":[ ],"x_new": 1.50e1,'
    rb'"id":"rs_odd_1", "type":"reasoning","content": null}'
)
ODD_CALL = (
    rb'{"type":"function_call","id":"fc_odd_1","call_id":"call_odd","name":"f",'
    rb'"arguments":"{\"a\":  1}" ,"status":"completed"}'
)
ODD_UNKNOWN = (
    rb'{"type":"vendor_thing", "id":"vt_1","deep":{"a":[1,2.0,-0,{"b":null}]},'
    rb'"\u0061":"\ud83d\ude00"}'
)
IMAGE = {
    "type": "message",
    "role": "user",
    "content": [
        {"type": "input_text", "text": "what is it?"},
        {"type": "input_image", "image_url": "data:image/png;base64,iVBORw0KGgo=", "detail": "low"},
    ],
}


@pytest.fixture(params=STORES)
async def proxy(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Proxy:
    """A daemon with each kind of store."""
    return await serve(sessions={"store": store_of(request.param, tmp_path)})


async def test_turns_are_asked_with_all_that_was_before(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """Over JSON and streams mixed, items go up in order, for an upstream that keeps nothing."""
    previous, before = None, list[str]()
    for number, streamed in enumerate([False, True, True, False, True]):
        upstream.text = f"answer {number}"
        response = await turn(proxy, f"question {number}", previous, streamed=streamed)
        assert response["previous_response_id"] == previous
        assert response["store"] is True
        request = upstream.requests[-1]
        check_replayed(request)
        assert request.json()["stream"] is streamed
        assert heard(request) == [*before, f"question {number}"]
        before += [f"question {number}", f"answer {number}"]
        previous = response["id"]
    roles = [item["role"] for item in upstream.requests[-1].json()["input"]]
    assert roles == ["user", "assistant"] * 4 + ["user"]


async def test_items_of_any_kind_are_byte_equal_after_three_turns(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """Reasoning with encrypted content, calls, unknown types: what went up is what came down."""
    kinds, previous = [ODD_REASONING, ODD_CALL, ODD_UNKNOWN], None
    for streamed in (True, False):
        upstream.script(raw_answer(kinds, streamed=streamed))
        result = {"type": "function_call_output", "call_id": "call_odd", "output": "1"}
        previous = (await turn(proxy, [result], previous, streamed=streamed))["id"]
    previous = (await turn(proxy, "third", previous))["id"]
    await turn(proxy, "fourth", previous, streamed=True)
    third, fourth = (sent(request) for request in upstream.requests[-2:])
    assert third[1:4] == third[5:8] == fourth[1:4] == fourth[5:8] == kinds
    assert fourth[:8] == third[:8]


async def test_input_items_are_byte_equal_too(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """What the client wrote is replayed as it wrote it, whatever it is."""
    items = [
        ODD_UNKNOWN,
        rb'{"role":"user" , "content":[{"text":"\u00e9\/","type":"input_text","n":1.0}]}',
        ODD_REASONING,
        json.dumps(IMAGE, indent=2).encode(),
    ]
    body = b'{"model":"gpt-test","input":[ ' + b" ,\n".join(items) + b' ],"x":1}'
    first = await proxy.post(PATH, body)
    assert sent(upstream.requests[-1]) == items
    await turn(proxy, "go on", first.json()["id"])
    assert sent(upstream.requests[-1])[:4] == items


async def test_a_tool_loop(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Calls and their results stay in order over turns, each result after its call."""
    calls = [function_item("f", json.dumps({"n": n}), call_id=f"call_{n}") for n in range(3)]
    given: Any = "count"
    previous = None
    for n, call in enumerate(calls):
        items = [reasoning_item(f"SECRET-{n}"), call]
        frames = responses_events(items=items)
        upstream.script(stream(frames) if n % 2 else json_answer(responses_json(items=items)))
        previous = (await turn(proxy, given, previous, streamed=bool(n % 2)))["id"]
        given = [{"type": "function_call_output", "call_id": f"call_{n}", "output": f"result {n}"}]
    await turn(proxy, given, previous)
    facts = upstream.requests[-1].json()["input"]
    assert [said(fact) for fact in facts[1:]] == [
        "<reasoning>", "<function_call>", "<function_call_output>",
    ] * 3  # fmt: skip
    assert [fact["call_id"] for fact in facts if "call_id" in fact] == [
        f"call_{n // 2}" for n in range(6)
    ]
    assert facts[2::3] == calls


async def test_two_children_of_one_parent(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Forks never see each other, also when they are made at the same time."""
    upstream.text = "root answer"
    root = (await turn(proxy, "root"))["id"]
    upstream.text = "child answer"
    left, right = await asyncio.gather(
        turn(proxy, "left", root), turn(proxy, "right", root, streamed=True)
    )
    for side, child in (("left", left), ("right", right)):
        await turn(proxy, f"below {side}", child["id"])
        path = ["root", "root answer", side, "child answer", f"below {side}"]
        assert heard(upstream.requests[-1]) == path


async def test_any_turn_of_a_tree_is_its_path(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Whichever turn is continued, what goes up is the path from the root to it."""
    choose = random.Random(5)  # noqa: S311 - a tree, no secret
    paths: dict[str | None, list[str]] = {None: []}
    for number in range(40):
        parent = choose.choice(list(paths))
        upstream.text = f"a{number}"
        response = await turn(proxy, f"q{number}", parent, streamed=choose.random() < 0.5)
        path = [*paths[parent], f"q{number}"]
        assert heard(upstream.requests[-1]) == path
        paths[response["id"]] = [*path, f"a{number}"]


async def test_instructions_are_not_carried_over(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Each turn has its own, or none; other fields are the turn's own as well."""
    first = await turn(proxy, "one", instructions="INSTRUCTED", temperature=0.5)
    await turn(proxy, "two", first["id"])
    assert b"INSTRUCTED" not in upstream.requests[-1].body
    assert "temperature" not in upstream.requests[-1].json()
    await turn(proxy, "three", first["id"], instructions="OTHERWISE")
    assert upstream.requests[-1].json()["instructions"] == "OTHERWISE"


@pytest.mark.parametrize("streamed", [False, True])
async def test_an_incomplete_turn_can_be_continued(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """What came before the output limit is part of the conversation."""
    cut = message_item("cut sho") | {"status": "incomplete"}
    whole = responses_json(items=[cut])
    whole |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    frames = responses_events(items=[cut], terminal="incomplete")
    upstream.script(stream(frames) if streamed else json_answer(whole))
    response = await turn(proxy, "long", streamed=streamed)
    assert response["status"] == "incomplete"
    await turn(proxy, "go on", response["id"])
    assert heard(upstream.requests[-1]) == ["long", "cut sho", "go on"]


FAILED_JSON = {**responses_json(items=[]), "status": "failed", "error": {"code": "server_error"}}
BAD_ENDS: dict[str, list[Step]] = {
    "F02": stream(responses_events(terminal=None)),
    "reset": [*stream(responses_events(terminal=None))[:-1], Reset()],
    "failed": stream(responses_events(terminal="failed")),
    "failed json": json_answer(FAILED_JSON),
}


@pytest.mark.parametrize("end", BAD_ENDS)
async def test_a_turn_that_failed_cannot_be_continued(
    proxy: Proxy, upstream: ScriptedUpstream, end: str
) -> None:
    """An id that never was seen complete is unknown to the next turn, and its parent is not."""
    root = (await turn(proxy, "root"))["id"]
    upstream.script(BAD_ENDS[end])
    answer = await ask(proxy, "child", root, streamed="json" not in end)
    assert answer.status == 200
    response = response_of(answer)
    assert response["status"] == "failed"
    assert OWN_ID.fullmatch(response["id"])
    asked = len(upstream.requests)
    NO_PARENT.check(await ask(proxy, "more", response["id"]))
    assert len(upstream.requests) == asked
    await turn(proxy, "again", root)
    assert heard(upstream.requests[-1])[::2] == ["root", "again"]


async def test_a_terminal_event_without_output(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Its turn is rebuilt from what each `output_item.done` had, in its very bytes."""
    items = [reasoning_item(), function_item(), message_item("done")]
    *frames, last = responses_events(items=items)
    fact = json.loads(last.split(b"data: ")[1])
    fact["response"]["output"] = []
    upstream.script(stream([*frames, b"data: " + json.dumps(fact).encode() + b"\n\n"]))
    response = await turn(proxy, "go", streamed=True)
    await turn(proxy, "more", response["id"])
    assert sent(upstream.requests[-1])[1:4] == [json.dumps(item).encode() for item in items]


async def test_text_that_came_only_as_deltas(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Parts are told apart by output and content index, and stand among finished items."""
    done = message_item("whole")
    added = [message_item("") | {"content": [], "status": "in_progress"} for _ in range(2)]
    part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}

    def delta(at: int, index: int, text: str) -> dict[str, Any]:
        place = {"item_id": added[at // 2]["id"], "output_index": at, "content_index": index}
        return {"type": "response.output_text.delta", **place, "delta": text, "logprobs": []}

    facts: list[dict[str, Any]] = [
        lifecycle("created", "in_progress"),
        {"type": "response.output_item.added", "output_index": 0, "item": added[0]},
        {"type": "response.output_item.added", "output_index": 1, "item": done},
        {"type": "response.output_item.added", "output_index": 2, "item": added[1]},
    ]
    for at, index in ((0, 0), (0, 1), (2, 0)):
        place = {"item_id": added[at // 2]["id"], "output_index": at, "content_index": index}
        facts.append({"type": "response.content_part.added", **place, "part": part})
    facts += [delta(2, 0, "e"), delta(0, 1, "c"), delta(0, 0, "a"), delta(0, 1, "d\u00e9")]
    facts += [delta(2, 0, "f"), delta(0, 0, "b")]
    facts.append({"type": "response.output_item.done", "output_index": 1, "item": done})
    facts.append(lifecycle("completed", "completed", output=[]))
    response_id = facts[0]["response"]["id"]
    facts[-1]["response"]["id"] = response_id
    upstream.script(stream(numbered(facts)))
    response = await turn(proxy, "go", streamed=True)
    await turn(proxy, "more", response["id"])
    items = upstream.requests[-1].json()["input"][1:-1]
    parts = [[text["text"] for text in item["content"]] for item in items]
    assert parts == [["ab", "cd\u00e9"], ["whole"], ["ef"]]
    assert {item["role"] for item in items} == {"assistant"}


@pytest.mark.parametrize("kind", STORES)
async def test_a_thousand_immediate_follow_ups(
    serve: Serve, upstream: ScriptedUpstream, tmp_path: Path, kind: str
) -> None:
    """An id that was seen complete is known at once, on the same connection, without retry."""
    proxy = await serve(sessions={"store": store_of(kind, tmp_path)})
    chains = 20 if kind == "memory" else 100
    async with await RawClient.connect(proxy.port) as client:
        for _ in range(chains):
            previous = None
            for number in range(11):
                body = prompt(input="x", previous_response_id=previous, stream=number % 2 == 0)
                await client.request("POST", PATH, proxy.headers(), json.dumps(body).encode())
                answer = await client.answer()
                assert answer.status == 200, answer
                previous = response_of(answer)["id"]
    assert len(upstream.requests) == 11 * chains
    assert len(heard(upstream.requests[-1])) == 21


@pytest.mark.parametrize("large", ["asked", "answered"])
async def test_a_large_turn_is_not_looked_through_in_the_loop(
    proxy: Proxy, upstream: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch, large: str
) -> None:
    """What is kept is made ready in a thread if it is large, be it for its input or its output."""
    loop, threads = threading.get_ident(), list[int]()
    making = conversation.Conversation._turn

    def made(*arguments: Any) -> Any:
        threads.append(threading.get_ident())
        return making(*arguments)

    monkeypatch.setattr(conversation.Conversation, "_turn", made)
    await turn(proxy, "small")
    assert threads == [loop]
    if large == "answered":
        upstream.text = "x" * (LARGE + 1)
    await turn(proxy, "x" * (LARGE + 1) if large == "asked" else "small")
    assert threads[1] != loop
