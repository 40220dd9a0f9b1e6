"""Reasoning of an upstream that keeps nothing: it is asked for encrypted, where it may be."""

from typing import Any

import pytest

from responses import message_item, reasoning_item, responses_json
from rig import Proxy
from sessions_rig import Serve, ask, heard, turn
from steps import Step, error_answer, json_answer
from upstream import Recorded, ScriptedUpstream

HOLDER = "replay"

ENCRYPTED = "reasoning.encrypted_content"
OTHER = "message.output_text.logprobs"


def reasoning(value: str | bool) -> list[dict[str, Any]]:  # noqa: FBT001 - a value of the file
    """Configure the one target."""
    return [{"model": "gpt-test", "upstreams": [{"name": "scripted", "reasoning": value}]}]


def included(request: Recorded) -> list[str]:
    """Return what the upstream was asked to include."""
    return list(request.json().get("include") or [])


def refused() -> list[Step]:
    """Answer as a model does that does not reason."""
    message = "Encrypted content is not supported with this model."
    return error_answer(400, message, param="include", code="unsupported_parameter")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("value", "added"), [("auto", True), (True, True), (False, False)])
async def test_where_it_is_asked_for(
    serve: Serve, upstream: ScriptedUpstream, *, value: str | bool, added: bool, streamed: bool
) -> None:
    """It is added to what the client asks for, once, and not where the target does not reason."""
    proxy = await serve(routes=reasoning(value))
    expected = [ENCRYPTED] if added else []
    await turn(proxy, streamed=streamed)
    assert included(upstream.requests[-1]) == expected
    await turn(proxy, streamed=streamed, include=[OTHER])
    assert included(upstream.requests[-1]) == [OTHER, *expected]
    await turn(proxy, streamed=streamed, include=[ENCRYPTED, OTHER])
    assert included(upstream.requests[-1]) == [ENCRYPTED, OTHER]
    await turn(proxy, streamed=streamed, include=None)
    assert included(upstream.requests[-1]) == expected


@pytest.mark.parametrize("value", ["auto", True])
async def test_it_is_not_asked_for_where_nothing_is_kept(
    serve: Serve, upstream: ScriptedUpstream, *, value: str | bool
) -> None:
    """With `store: false` of the client's own nothing is added, since nothing will be replayed."""
    proxy = await serve(routes=reasoning(value))
    await turn(proxy, store=False)
    assert included(upstream.requests[-1]) == []


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """A daemon that finds out by itself."""
    return await serve(routes=reasoning("auto"))


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_target_that_does_not_reason_is_remembered(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """On the one 400 that we caused it is asked once more without, and from then on at once."""
    upstream.script(refused())
    first = await turn(proxy, "one", streamed=streamed, include=[OTHER])
    assert [included(request) for request in upstream.requests] == [[OTHER, ENCRYPTED], [OTHER]]
    await turn(proxy, "two", first["id"], streamed=streamed)
    assert len(upstream.requests) == 3
    assert included(upstream.requests[-1]) == []
    assert heard(upstream.requests[-1])[::2] == ["one", "two"]


async def test_another_model_there_is_asked_for_it(
    serve: Serve, upstream: ScriptedUpstream
) -> None:
    """It is the model that is remembered, as it is sent, not its upstream."""
    routes = [
        {"model": "gpt-test", "upstreams": ["scripted"]},
        {"model": "gpt-other", "upstreams": ["scripted"]},
        {"model": "gpt-third", "upstreams": [{"name": "scripted", "model": "gpt-test"}]},
    ]
    proxy = await serve(routes=routes)
    upstream.script(refused())
    await turn(proxy)
    for model, expected in (("gpt-test", []), ("gpt-other", [ENCRYPTED]), ("gpt-third", [])):
        await turn(proxy, model=model)
        assert included(upstream.requests[-1]) == expected


async def test_it_is_asked_once_more_and_no_more(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """When it fails without it as well, the client is told what the upstream said."""
    for _ in range(2):
        upstream.script(refused())
    answer = await ask(proxy, include=[OTHER])
    assert (answer.status, answer.json()["error"]["param"]) == (400, "include")
    assert len(upstream.requests) == 2


async def test_another_refusal_is_passed_on(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A 400 that is not about `include` is the client's own, and nothing is learned of it."""
    upstream.script(error_answer(400, "no such thing", param="temperature"))
    answer = await ask(proxy)
    assert (answer.status, answer.json()["error"]["param"]) == (400, "temperature")
    assert len(upstream.requests) == 1
    await turn(proxy)
    assert included(upstream.requests[-1]) == [ENCRYPTED]


async def test_what_the_client_asked_for_itself_is_not_tried_again(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """A refusal of the client's own `include` is passed on, and nothing is learned of it."""
    upstream.script(refused())
    answer = await ask(proxy, include=[ENCRYPTED])
    assert (answer.status, answer.json()["error"]["param"]) == (400, "include")
    assert len(upstream.requests) == 1
    await turn(proxy)
    assert included(upstream.requests[-1]) == [ENCRYPTED]


async def test_reasoning_that_cannot_be_replayed_is_left_out(
    proxy: Proxy, upstream: ScriptedUpstream
) -> None:
    """An item without encrypted content means nothing to an upstream that kept nothing."""
    bare = [reasoning_item(None), {**reasoning_item(None), "encrypted_content": None}]
    items = [bare[0], reasoning_item("KEPT"), bare[1], message_item("said")]
    upstream.script(json_answer(responses_json(items=items)))
    first = await turn(proxy, "one")
    assert first["output"] == items
    await turn(proxy, "two", first["id"])
    assert upstream.requests[-1].json()["input"][1:3] == [items[1], items[3]]
    assert heard(upstream.requests[-1]) == ["one", "<reasoning>", "said", "two"]
