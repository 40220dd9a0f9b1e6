"""What a client is told of its turns: ids, bytes, the stored response, its input, its end."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from client import Answer
from responses import message_item, reasoning_item, responses_events, responses_json
from rig import ABSENT, PROMPT_CANARY, Proxy, prompt, routes
from sessions_rig import (
    ENDS,
    LIFECYCLE,
    NO_PARENT,
    NOT_FOUND,
    OWN_ID,
    PATH,
    STORES,
    Serve,
    ask,
    call,
    check_replayed,
    facts_of,
    heard,
    response_of,
    store_of,
    turn,
    unsupported,
    use,
)
from steps import body_of, json_answer, stream
from upstream import ScriptedUpstream

HOLDER = "replay"

UP = "resp_upstream_0001"
ASKED = {"store": False, "previous_response_id": None}
# Spaces where no encoder puts them, names that look like ours elsewhere, unknown fields.
ODD_RESPONSE = (
    rb'{"x_id" :"%b","store" : false ,"object":"response","status":"%b","model":"gpt-test",'
    rb'"metadata":{"id":"resp_upstream_0001","store":false,"previous_response_id":null},'
    b'\t"id":\t"resp_upstream_0001" ,"previous_response_id" :null,"n":1.0e0,'
    rb'"usage":{"input_tokens":11,"output_tokens":7,"total_tokens":18},'
    rb'"output":[%b],"y":"\u00e9\/" }'
)
ODD_ITEM = (
    rb'{"type":"message","id":"msg_1","role":"assistant","status":"completed","store":false,'
    rb'"content":[{"type":"output_text","text":"\"id\": \"resp_upstream_0001\"","annotations":[]}]}'
)


@pytest.fixture(params=STORES)
async def proxy(request: pytest.FixtureRequest, serve: Serve, tmp_path: Path) -> Proxy:
    """A daemon with each kind of store."""
    return await serve(sessions={"store": store_of(request.param, tmp_path)})


def as_told(raw: bytes, response_id: str, previous: str | None = None) -> bytes:
    """Put into `ODD_RESPONSE` or a scripted event what the client must see there."""
    ours = b"null" if previous is None else b'"%b"' % previous.encode()
    for pattern, value in (
        (rb'("id":\s*)"%b"' % UP.encode(), b'"%b"' % response_id.encode()),
        (rb'("store"\s*:\s*)false', b"true"),
        (rb'("previous_response_id"\s*:\s*)null', ours),
    ):
        raw = re.sub(pattern, rb"\g<1>" + value, raw)
    return raw


def odd(kind: bytes, status: bytes, items: bytes = b"") -> bytes:
    """Return a lifecycle event of odd spelling."""
    response = ODD_RESPONSE % (b"x", status, items)
    return b'event: %b\ndata:{ "response" :%b,"type":"%b","z":0.10}\n\n' % (kind, response, kind)


def odd_stream() -> list[bytes]:
    """Return a stream that no encoder of ours would write."""
    return [
        b": a comment\n\n",
        odd(b"response.queued", b"queued"),
        odd(b"response.created", b"in_progress"),
        b'event: vendor.news\nid: 7\ndata: {"id": "resp_upstream_0001" , "store":false}\n\n',
        b'data: {"type":"response.output_item.done","output_index":0,"item":%b}\n\n' % ODD_ITEM,
        odd(b"response.completed", b"completed", ODD_ITEM),
        b"data: [DONE]\n\n",
    ]


def odd_told(frame: bytes, response_id: str, previous: str) -> bytes:
    """Return a frame of `odd_stream` as the client must see it: three values differ, no more."""
    if b'"n":1.0e0' not in frame:
        return frame
    head, id_on = frame.split(b'\t"id"', 1)
    head = head.replace(b'"store" : false', b'"store" : true', 1)
    id_on = id_on.replace(UP.encode(), response_id.encode(), 1)
    id_on = id_on.replace(b'"previous_response_id" :null', b'"previous_response_id" :"%b"', 1)
    return head + b'\t"id"' + id_on.replace(b"%b", previous.encode(), 1)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("split", [None, 11])
async def test_three_values_of_a_stream_differ_and_nothing_else(
    proxy: Proxy, upstream: ScriptedUpstream, newline: bytes, split: int | None
) -> None:
    """The id, the previous id and `store` are ours; every other byte is the upstream's."""
    previous = (await turn(proxy, "first"))["id"]
    upstream.script(stream(odd_stream(), newline=newline, split=split))
    answer = await ask(proxy, "second", previous, streamed=True)
    response = response_of(answer)
    frames = [odd_told(frame, response["id"], previous) for frame in odd_stream()]
    assert answer.body == b"".join(frames).replace(b"\n", newline)
    await turn(proxy, "third", response["id"])
    assert ODD_ITEM in upstream.requests[-1].body


async def test_the_usual_stream_differs_in_the_same_values(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """The same id stands in created, in_progress and the end, and it is our own."""
    text = f'Not an id: {UP}, "store": false, "previous_response_id": null'
    frames = responses_events(text, response_id=UP, request=ASKED)
    upstream.script(stream(frames))
    answer = await ask(proxy, streamed=True)
    response = response_of(answer)
    assert OWN_ID.fullmatch(response["id"])
    assert (response["store"], response["previous_response_id"]) == (True, None)
    kinds = (*LIFECYCLE, *ENDS)
    told = [
        as_told(frame, response["id"]) if json.loads(frame.split(b"data: ")[1])["type"] in kinds
        else frame
        for frame in frames
    ]  # fmt: skip
    assert answer.body == b"".join(told)
    assert answer.body.count(UP.encode()) == body_of(stream(frames)).count(UP.encode()) - 3


async def test_three_values_of_a_json_answer_differ_and_nothing_else(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """The same holds for a whole answer, whose length is told rightly."""
    previous = (await turn(proxy, "first"))["id"]
    raw = ODD_RESPONSE % (b"x", b"completed", ODD_ITEM)
    upstream.script(json_answer(raw))
    answer = await ask(proxy, "second", previous)
    assert OWN_ID.fullmatch(answer.json()["id"])
    assert answer.body == odd_told(raw, answer.json()["id"], previous)


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_model_is_as_the_client_wrote_it(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """A conversation may change its model; each turn tells its own, and so does GET."""
    first = await turn(proxy, "one", streamed=streamed)
    second = await turn(proxy, "two", first["id"], streamed=streamed, model="renamed")
    assert upstream.requests[-1].json()["model"] == "upstream-model"
    assert (first["model"], second["model"]) == ("gpt-test", "renamed")
    assert (await use(proxy, "get", second["id"])).json()["model"] == "renamed"


async def test_aiproxy_holds_unless_told_otherwise(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """Without any word of sessions in the file a conversation is held in memory, and replayed."""
    proxy = await serve(upstreams={"scripted": {"sessions": ABSENT}})
    first = await turn(proxy, "one")
    await turn(proxy, "two", first["id"], streamed=True)
    check_replayed(upstream.requests[-1])
    assert heard(upstream.requests[-1])[::2] == ["one", "two"]


async def test_ids_are_never_the_same(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Two turns have two ids, also where the upstream gave both the same."""
    upstream.default = json_answer(responses_json(response_id=UP))
    ids = [(await turn(proxy))["id"] for _ in range(20)]
    assert len(set(ids)) == 20
    assert all(OWN_ID.fullmatch(made) for made in ids)


@pytest.mark.parametrize("streamed", [False, True])
async def test_get_returns_the_response_as_it_was_sent(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """The object of the JSON answer or of the terminal event comes again, by GET and HEAD."""
    root = await turn(proxy)
    upstream.script(
        stream([*responses_events(items=[reasoning_item(), message_item()])])
        if streamed
        else json_answer(responses_json(items=[reasoning_item(), message_item()]))
    )
    response = await turn(proxy, "again", root["id"], streamed=streamed, metadata={"a": "b"})
    asked = len(upstream.requests)
    answer = await use(proxy, "get", response["id"])
    assert answer.headers["content-type"].startswith("application/json")
    assert (answer.status, answer.json()) == (200, response)
    assert (await call(proxy, "HEAD", f"{PATH}/{response['id']}")).status == 200
    assert (await call(proxy, "GET", f"{PATH}/{response['id']}?stream=false")).status == 200
    assert (await call(proxy, "PUT", f"{PATH}/{response['id']}")).status == 405
    assert len(upstream.requests) == asked


async def pages(proxy: Proxy, response_id: str, query: str = "") -> Answer:
    """Ask for a page of input items."""
    return await call(proxy, "GET", f"{PATH}/{response_id}/input_items{query}")


async def test_input_items_of_a_turn(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A page has the turn's own input, newest first, 20 of them unless told otherwise."""

    def text(n: int) -> list[dict[str, str]]:
        return [{"type": "input_text", "text": f"text {n}"}]

    root = await turn(proxy, "not in the list")
    given = [
        {"type": "message", "role": "user", "id": f"msg_own_{n}", "content": text(n)}
        for n in range(25)
    ]
    response_id = (await turn(proxy, given, root["id"]))["id"]
    page = (await pages(proxy, response_id)).json()
    assert set(page) == {"object", "data", "first_id", "last_id", "has_more"}
    assert page["object"] == "list"
    ids = [item["id"] for item in page["data"]]
    assert ids == [f"msg_own_{n}" for n in range(24, 4, -1)]
    assert (page["first_id"], page["last_id"], page["has_more"]) == (ids[0], ids[-1], True)
    rest = (await pages(proxy, response_id, f"?after={page['last_id']}")).json()
    assert [item["id"] for item in rest["data"]] == [f"msg_own_{n}" for n in range(4, -1, -1)]
    assert rest["has_more"] is False
    first = (await pages(proxy, response_id, "?order=asc&limit=2")).json()
    assert [said["id"] for said in first["data"]] == ["msg_own_0", "msg_own_1"]
    assert first["has_more"] is True
    on = (await pages(proxy, response_id, "?order=asc&limit=100&after=msg_own_1")).json()
    assert [item["id"] for item in on["data"]] == [f"msg_own_{n}" for n in range(2, 25)]
    assert on["has_more"] is False
    assert on["data"] == given[2:]
    past = (await pages(proxy, response_id, "?order=asc&after=msg_own_24")).json()
    assert (past["data"], past["has_more"]) == ([], False)


async def test_a_string_input_is_one_message(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """It is listed as the API does: a message of the user with one text part and an id."""
    response = await turn(proxy, "just a string")
    page = (await pages(proxy, response["id"])).json()
    (item,) = page["data"]
    assert page["first_id"] == page["last_id"] == item["id"]
    assert (item["type"], item["role"]) == ("message", "user")
    assert item["content"] == [{"type": "input_text", "text": "just a string"}]


async def test_ids_made_for_the_list_are_stable_and_stay_here(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """Items that came without one have an id in the list, always the same, never sent upstream."""
    given = [
        {"role": "user", "content": "one"},
        {"type": "function_call_output", "call_id": "c", "output": "two"},
    ]
    response = await turn(proxy, given)
    lists = [(await pages(proxy, response["id"], "?order=asc")).json()["data"] for _ in range(2)]
    assert lists[0] == lists[1]
    made = [item.pop("id") for item in lists[0]]
    assert len(set(made)) == 2
    assert [item["type"] for item in lists[0]] == ["message", "function_call_output"]
    after = (await pages(proxy, response["id"], f"?order=asc&after={made[0]}")).json()
    assert [item["id"] for item in after["data"]] == made[1:]
    await turn(proxy, "more", response["id"])
    body = upstream.requests[-1].body
    assert not [number for number in made if number.encode() in body]
    assert upstream.requests[-1].json()["input"][:2] == given


@pytest.mark.parametrize(
    ("query", "param"),
    [("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"), ("limit=-1", "limit"),
     ("order=up", "order")],
)  # fmt: skip
async def test_a_page_that_is_none(
    proxy: Proxy, upstream: ScriptedUpstream, query: str, param: str
) -> None:
    """A limit outside 1..100, or another order, is told by its name."""
    response = await turn(proxy)
    answer = await pages(proxy, response["id"], f"?{query}")
    assert (answer.status, answer.json()["error"]["param"]) == (400, param)
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_delete(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """It acts on one turn: what needs it is over, what does not goes on."""
    root = (await turn(proxy, "root"))["id"]
    left = (await turn(proxy, "left", root))["id"]
    right = (await turn(proxy, "right", root))["id"]
    below = (await turn(proxy, "below", left))["id"]
    answer = await use(proxy, "delete", left)
    assert (answer.status, answer.json()) == (
        200,
        {"id": left, "object": "response", "deleted": True},
    )
    NOT_FOUND.check(await use(proxy, "delete", left))
    asked = len(upstream.requests)
    NO_PARENT.check(await use(proxy, "continue", left))
    NO_PARENT.check(await use(proxy, "continue", below))
    assert len(upstream.requests) == asked
    await turn(proxy, "more", right)
    assert heard(upstream.requests[-1])[::2] == ["root", "right", "more"]
    await turn(proxy, "another", root)
    assert (await use(proxy, "delete", root)).status == 200
    for gone in (right, below, root):
        NO_PARENT.check(await use(proxy, "continue", gone))


async def test_cancel(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A response of ours was made at once, so that nothing of it can be cancelled."""
    response = await turn(proxy)
    answer = await use(proxy, "cancel", response["id"])
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (answer.status, error["type"]) == (400, "invalid_request_error")
    assert error["message"] == "Cannot cancel a synchronous response."
    assert (await use(proxy, "get", response["id"])).status == 200


REFUSED: dict[str, Any] = {"conversation": "conv_1", "background": True}


@pytest.mark.parametrize("param", REFUSED)
async def test_fields_that_are_not_done(
    proxy: Proxy, upstream: ScriptedUpstream, param: str
) -> None:
    """They are named and refused, also for a turn that continues another, and nothing is asked."""
    previous = (await turn(proxy))["id"]
    asked = len(upstream.requests)
    for before in (None, previous):
        answer = await ask(proxy, "x", before, **{param: REFUSED[param]})
        unsupported(param).check(answer)
    assert len(upstream.requests) == asked


@pytest.mark.parametrize(("query", "param"), [("starting_after=1", "starting_after"),
                                              ("stream=true", "stream")])  # fmt: skip
async def test_a_stream_is_not_resumed(proxy: Proxy, query: str, param: str) -> None:
    """GET gives the whole response alone; to ask for its events is refused by name."""
    response = await turn(proxy, streamed=True)
    unsupported(param).check(await call(proxy, "GET", f"{PATH}/{response['id']}?{query}"))


async def test_a_key_is_needed(proxy: Proxy) -> None:
    """Without one every call for a response is 401, whether there is such a response or not."""
    response = await turn(proxy)
    for method, end in (("GET", ""), ("DELETE", ""), ("GET", "/input_items"), ("POST", "/cancel")):
        answer = await call(proxy, method, f"{PATH}/{response['id']}{end}", key=None)
        assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await use(proxy, "get", response["id"])).status == 200


async def test_fields_denied_to_a_key_are_refused_on_later_turns(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """What a key may not use is not smuggled in by continuing a turn."""
    proxy = await serve(keys={"team-a": {"deny": ["previous_response_id"], "limits": ABSENT}},
                        routes=routes())  # fmt: skip
    first = await turn(proxy)
    answer = await proxy.post(body=prompt(previous_response_id=first["id"]))
    unsupported("previous_response_id").check(answer)
    assert PROMPT_CANARY.encode() not in proxy.tap.raw
    assert [fact["type"] for fact in facts_of(await ask(proxy, streamed=True))][-1] == ENDS[0]
