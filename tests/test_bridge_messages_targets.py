"""Which API a target is spoken to, and what a conversation brings from one to the other."""

import json

import pytest

from messages_items import assistant, item, output, user
from messages_upstream import Plan, Serve, ask, heard, speaking, tool_use
from refusals import Refusal
from responses import responses_json
from rig import routes
from steps import json_answer
from upstream import ScriptedUpstream
from validating import check_bridged

HOLDER = "replay"


# Which API is spoken


@pytest.mark.parametrize(
    ("apis", "path"),
    [
        (("responses", "chat", "messages"), "/v1/responses"),
        (("chat", "messages"), "/v1/chat/completions"),
        (("messages", "embeddings"), "/v1/messages"),
    ],
)
async def test_which_api_is_spoken(
    serve: Serve, upstream: ScriptedUpstream, apis: tuple[str, ...], path: str
) -> None:
    """The client's own if it can be, else chat, else messages."""
    proxy = await serve(upstreams=speaking(*apis))
    answer = await ask(proxy)
    assert answer.status == 200
    assert answer.json()["object"] == "response"
    assert upstream.requests[-1].target == path


async def test_no_api_that_could_be_spoken(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A target that speaks none of the three cannot answer."""
    proxy = await serve(upstreams=speaking("embeddings"))
    answer = await ask(proxy)
    Refusal(400, "unsupported_parameter", param="model").check(answer)
    assert not upstream.requests


# What a conversation brings in


async def test_a_conversation_that_cannot_be_said(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A stored item that a bridge cannot express is refused as part of the conversation."""
    native = {"url": upstream.url, "apis": ["responses"], "credential": {"env": "UPSTREAM_KEY"}}
    proxy = await serve(
        upstreams={**speaking("messages"), "native": native},
        routes=[*routes(), {"model": "native", "upstreams": ["native"]}],
    )
    hosted = {"type": "vendor_thing", "id": "vt_1", "n": 1}
    upstream.script(json_answer(responses_json(items=[hosted])))
    first = (await ask(proxy, "one", model="native")).json()
    answer = await ask(proxy, "two", previous_response_id=first["id"])
    refusal = Refusal(400, "unsupported_parameter", param="previous_response_id")
    refusal.check(answer, upstream=answer.headers.get("x-aiproxy-upstream"))
    assert len(upstream.requests) == 1
    answer = await ask(
        proxy, [item("user", "two"), hosted], previous_response_id=first["id"], model="native"
    )
    assert answer.status == 200
    assert len(upstream.requests) == 2


async def test_a_conversation_begun_elsewhere(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Turns of an upstream of the Responses API go on with one of messages, and back."""
    native = {"url": upstream.url, "apis": ["responses"], "credential": {"env": "UPSTREAM_KEY"}}
    proxy = await serve(
        upstreams={**speaking("messages"), "native": native},
        routes=[*routes(), {"model": "native", "upstreams": ["native"]}],
    )
    upstream.text = "one"
    first = check_bridged(await ask(proxy, "a", model="native"))
    upstream.script(
        Plan([tool_use("f", {"a": 1}, "call_9")], stop="tool_use").script(streamed=True)
    )
    second = check_bridged(await ask(proxy, "b", previous_response_id=first["id"], stream=True))
    assert heard(upstream.requests[-1]) == [user("a"), assistant("one"), user("b")]
    answer = await ask(
        proxy, [output("x", "call_9")], previous_response_id=second["id"], model="native"
    )
    assert answer.status == 200
    sent = upstream.requests[-1].json()["input"]
    kinds = [each.get("type", "message") for each in sent]
    assert kinds == ["message"] * 3 + ["function_call", "function_call_output"]
    assert json.loads(sent[3]["arguments"]) == {"a": 1}
    assert sent[3]["call_id"] == sent[4]["call_id"] == "call_9"
