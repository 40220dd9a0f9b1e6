"""How answers of an upstream of messages end: stop reasons, errors, cuts, what is no answer."""

import asyncio
import json
from typing import Any, NamedTuple

import pytest

from messages_upstream import (
    F1,
    HM,
    PATH,
    SAID_F1,
    Plan,
    Serve,
    answered,
    ask,
    bridged,
    frames,
    meant,
    short,
    text,
    thinking,
)
from refusals import SERVER, Refusal
from rig import Proxy, prompt
from sessions_rig import NO_PARENT
from steps import (
    SSE_HEADERS,
    Chunk,
    EndChunks,
    Finish,
    Headers,
    Reset,
    Step,
    Wait,
    json_answer,
    stream,
)
from upstream import ScriptedUpstream
from validating import check_stream, facts_of

HOLDER = "replay"


@pytest.fixture
async def proxy(serve: Serve) -> Proxy:
    """A daemon before an upstream of messages."""
    return await bridged(serve)


class End(NamedTuple):
    """A stop reason, and what it makes of the answer."""

    stop: str
    status: str
    reason: str | None = None


ENDS = [
    End("end_turn", "completed"),
    End("stop_sequence", "completed"),
    End("tool_use", "completed"),
    End("pause_turn", "completed"),
    End("max_tokens", "incomplete", "max_output_tokens"),
    End("model_context_window_exceeded", "incomplete", "max_output_tokens"),
    End("refusal", "incomplete", "content_filter"),
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.stop)
async def test_stop_reasons(proxy: Proxy, upstream: ScriptedUpstream, end: End) -> None:
    """Each is the status, and the reason, that the API has for it; the text stays."""
    sequence = "STOP" if end.stop == "stop_sequence" else None
    plan = Plan([text("so far")], stop=end.stop, stop_sequence=sequence)
    seen = []
    for streamed in (False, True):
        upstream.script(plan.script(streamed=streamed))
        response = await answered(proxy, streamed=streamed)
        reason = None if end.reason is None else {"reason": end.reason}
        assert (response["status"], response["incomplete_details"]) == (end.status, reason)
        assert response["usage"] == plan.usage.responses()
        said = "so far" if end.status == "completed" else "~so far"
        assert short(response) == [said]
        seen.append(meant(response))
    assert seen[0] == seen[1]


async def test_only_what_was_cut_is_incomplete(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Of an answer cut by its maximum the items before the last are whole."""
    plan = Plan([thinking("Hm."), text("a"), F1, text("b")], stop="max_tokens")
    for streamed in (False, True):
        upstream.script(plan.script(streamed=streamed))
        told = short(await answered(proxy, streamed=streamed))
        assert told[:2] == [HM, "a"]
        assert told[2][1:] == SAID_F1[1:]
        assert told[3] == "~b"


async def test_a_call_that_was_cut(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Arguments that end in the middle are passed on as they are, and said to be incomplete."""
    facts = Plan([F1], stop="max_tokens").facts(4)
    cut = [fact for fact in facts if fact["type"] == "content_block_delta"][2:]
    upstream.script(stream(frames([fact for fact in facts if fact not in cut])))
    response = await answered(proxy, streamed=True)
    assert response["status"] == "incomplete"
    (call,) = response["output"]
    assert call["status"] == "incomplete"
    assert call["arguments"]
    assert json.dumps({"a": 1}).startswith(call["arguments"])


async def test_a_refusal_without_a_word(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """An answer without any content is a valid one too."""
    for streamed in (False, True):
        for stop, status in (("refusal", "incomplete"), ("end_turn", "completed")):
            upstream.script(Plan([], stop=stop).script(streamed=streamed))
            response = await answered(proxy, streamed=streamed)
            assert (response["status"], response["output"]) == (status, [])


# What goes wrong


def error_event(kind: str, message: str = "scripted: no") -> bytes:
    """Return an error event."""
    fact = {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    return frames([fact])[0]


def begun(parts: int = 2) -> list[bytes]:
    """Return events of an answer with a whole text, and a call of which some deltas came."""
    facts = Plan([text("a b"), F1], stop="tool_use").facts()
    starts = [at for at, fact in enumerate(facts) if fact["type"] == "content_block_start"]
    return frames(facts[: starts[1] + parts])


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("overloaded_error", "server_error"),
        ("api_error", "server_error"),
        ("brand_new_error", "server_error"),
        ("rate_limit_error", "rate_limit_exceeded"),
    ],
)
async def test_an_error_in_the_middle(
    proxy: Proxy, upstream: ScriptedUpstream, kind: str, code: str
) -> None:
    """It ends the answer as failed, with the upstream's sentence, and nothing follows."""
    upstream.script(stream([*begun(), error_event(kind), *Plan([text("more")]).events()]))
    response = await answered(proxy, streamed=True)
    assert response["status"] == "failed"
    assert response["error"]["code"] == code
    assert "scripted: no" in response["error"]["message"]
    said = [item for item in response["output"] if item["type"] == "message"]
    assert [item["content"][0]["text"] for item in said] == ["a b"]


async def test_an_error_at_once(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """A stream that begins with an error is a valid one that failed."""
    upstream.script(stream([error_event("overloaded_error", "Overloaded")]))
    response = await answered(proxy, streamed=True)
    assert (response["status"], response["output"]) == ("failed", [])
    assert "Overloaded" in response["error"]["message"]


async def test_every_cut_fails(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Wherever a stream ends before `message_stop`, the answer failed, and is valid."""
    events = Plan([thinking("Hm."), text("a b"), F1], stop="tool_use").events()
    for at in range(len(events)):
        upstream.script(stream(events[:at]))
        response = await answered(proxy, streamed=True)
        assert response["status"] == "failed", at
        assert response["error"]["code"] == "server_error"
        assert response["error"]["message"].startswith("[")


@pytest.mark.parametrize("end", [Reset(), Finish()])
async def test_a_connection_that_breaks(
    proxy: Proxy, upstream: ScriptedUpstream, end: Reset | Finish
) -> None:
    """A reset or a close in the middle of a frame is a failed answer too."""
    half = Plan([text("more")]).events()[4][:-9]
    upstream.script(stream([*begun(), half])[:-1], end)
    response = await answered(proxy, streamed=True)
    assert response["status"] == "failed"
    assert response["output"][0]["content"][0]["text"] == "a b"


@pytest.mark.parametrize("streamed", [False, True])
async def test_what_failed_cannot_be_continued(
    proxy: Proxy, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """Its id is unknown to the next turn."""
    upstream.script(stream(begun()))
    first = await answered(proxy, streamed=True)
    NO_PARENT.check(await ask(proxy, previous_response_id=first["id"], stream=streamed))
    assert len(upstream.requests) == 1


def anthropic_error(status: int, kind: str, **options: Any) -> list[Step]:
    """Return an answer with an error in the shape of the upstream's API."""
    error = {"type": "error", "error": {"type": kind, "message": "scripted: no"}}
    return json_answer(error, status, **options)


class Failure(NamedTuple):
    """What the upstream answers, and what the client gets."""

    status: int
    kind: str
    expected: Refusal


FAILURES = [
    Failure(400, "invalid_request_error", Refusal(400, None)),
    Failure(404, "not_found_error", Refusal(404, None)),
    Failure(413, "request_too_large", Refusal(413, None)),
    Failure(429, "rate_limit_error", Refusal(429, None, headers={"retry-after": "7"})),
    Failure(401, "authentication_error", Refusal(502, "upstream_credential", SERVER)),
    Failure(500, "api_error", Refusal(502, "upstream_error", SERVER)),
    Failure(529, "overloaded_error",
            Refusal(503, "upstream_overloaded", SERVER, headers={"retry-after": None})),
]  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.kind)
@pytest.mark.parametrize("streamed", [False, True])
async def test_refusals_of_the_upstream(
    proxy: Proxy, upstream: ScriptedUpstream, failure: Failure, *, streamed: bool
) -> None:
    """A client of the Responses API gets errors in its own API's shape, never the other one."""
    options = {"headers": [("retry-after", "7")]} if failure.status == 429 else {}
    upstream.default = anthropic_error(failure.status, failure.kind, **options)
    answer = await ask(proxy, stream=streamed)
    assert answer.status == failure.expected.status, answer
    error = answer.json()["error"]
    assert answer.json().keys() == {"error"}
    assert error.keys() == {"message", "type", "param", "code"}
    if failure.expected.code is not None:
        failure.expected.check(answer, upstream="scripted")
    assert error["code"] is None or isinstance(error["code"], str)
    for name, value in failure.expected.headers.items():
        assert answer.headers[name] == (value or answer.headers[name])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"id": "msg_1"}',
        b'{"type": "message", "role": "assistant", "content": "text"}',
        b'{"type": "message", "role": "assistant", "content": [7]}',
    ],
)
async def test_what_is_no_message(proxy: Proxy, upstream: ScriptedUpstream, body: bytes) -> None:
    """A JSON answer that is no message is the upstream's error, not a made-up response."""
    upstream.script(json_answer(body))
    answer = await ask(proxy)
    Refusal(502, "upstream_error", SERVER).check(answer, upstream="scripted")


async def test_an_event_that_is_no_json(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """What cannot be read cannot be told: the answer failed, and is valid."""
    upstream.script(stream([*begun(), b"event: content_block_delta\ndata: {nope\n\n"]))
    response = await answered(proxy, streamed=True)
    assert response["status"] == "failed"


# When it is told


async def test_nothing_waits(proxy: Proxy, upstream: ScriptedUpstream) -> None:
    """Each piece of text reaches the client before the upstream sends the next one."""
    facts = Plan([text("one two three")]).facts()
    gates = [asyncio.Event() for _ in facts]
    steps: list[Step] = [Headers(200, SSE_HEADERS)]
    for frame, gate in zip(frames(facts), gates, strict=True):
        steps += [Chunk(frame), Wait(gate)]
    upstream.script(steps, EndChunks())
    client = await proxy.send(PATH, prompt(stream=True))
    async with asyncio.timeout(5):
        await client.read_head()
        seen = b""
        for fact, gate in zip(facts, gates, strict=True):
            if fact["type"] == "content_block_delta":
                said = json.dumps(fact["delta"]["text"]).encode()
                if said not in seen:
                    seen += await client.read_until(said)
                assert not upstream.requests[0].completed
            gate.set()
        seen += await client.read_body()
    assert check_stream(facts_of(seen))["status"] == "completed"
