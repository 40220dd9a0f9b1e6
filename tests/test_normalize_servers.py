"""With `normalize: true` every kind of server tells whole and valid answers."""

import asyncio
from typing import Any

import pytest

from answers import sse
from invariants import check_invariants, check_tokens, eventually, take_baseline
from normalize_rig import (
    MODES,
    PATH,
    SERVERS,
    TALK,
    Said,
    Serve,
    Server,
    ask,
    check_native,
    check_normalized,
    ended,
    facts_of,
    normalizing,
    short,
    told_by,
)
from refusals import SERVER, Refusal
from rig import Proxy, prompt
from sessions_rig import use
from steps import SSE_HEADERS, Chunk, EndChunks, Headers, Reset, Step, Wait, json_answer, stream
from upstream import ScriptedUpstream
from validating import timeless

HOLDER = "replay"

ASKED: dict[str, Any] = {
    "instructions": "Be brief.",
    "metadata": {"a": "b"},
    "temperature": 0.5,
    "max_output_tokens": 500,
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
    "text": {"format": {"type": "text"}},
    "prompt_cache_key": "k",
}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    """Whoever holds conversations."""
    return str(request.param)


@pytest.fixture
async def proxy(serve: Serve, mode: str) -> Proxy:
    """A daemon that completes what comes."""
    return await normalizing(serve, mode)


@pytest.fixture
async def replaying(serve: Serve) -> Proxy:
    """One that holds conversations: where that makes no difference."""
    return await normalizing(serve)


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest) -> Server:
    """Each kind of server."""
    return SERVERS[request.param]


async def test_answers_are_whole(
    proxy: Proxy, upstream: ScriptedUpstream, server: Server, mode: str
) -> None:
    """Whole or streamed, an answer is valid and says what the server said."""
    said = told_by(server)
    for streamed in (False, True):
        upstream.script(server.script(said, streamed=streamed))
        answer = await ask(proxy, streamed=streamed)
        response = check_normalized(answer)
        assert short(response) == said.short()
        assert response["status"] == "completed"
        used = response["usage"]
        assert (used["input_tokens"], used["output_tokens"]) == (11, 7)
        assert used["output_tokens_details"]["reasoning_tokens"] == 0
        assert (response["id"] == said.answer_id) is (mode == "upstream")
        assert response["model"].removesuffix("@main") == "gpt-test"
        assert upstream.requests[-1].json()["stream"] is streamed


async def test_pieces_make_no_difference(
    replaying: Proxy, upstream: ScriptedUpstream, server: Server
) -> None:
    """Line ends and chunks change nothing of the events."""
    said = told_by(server)
    seen = []
    for newline, split in ((b"\n", None), (b"\r\n", 3), (b"\r", 7), (b"\n", 1000)):
        upstream.script(stream(server.frames(said), newline=newline, split=split))
        answer = await ask(replaying, streamed=True)
        check_native(answer.body)
        seen.append(timeless(facts_of(answer.body)))
    assert all(facts == seen[0] for facts in seen)


async def test_deltas_are_those_of_the_server(
    replaying: Proxy, upstream: ScriptedUpstream, server: Server
) -> None:
    """Text comes in the pieces in which it came, none of them twice."""
    said = told_by(server)
    upstream.script(server.script(said, streamed=True))
    answer = await ask(replaying, streamed=True)
    told, sent = (
        [fact["delta"] for fact in facts if fact["type"] == "response.output_text.delta"]
        for facts in (facts_of(answer.body), server.facts(said))
    )
    assert told == sent
    assert len(told) > 2


async def test_what_is_repeated(
    replaying: Proxy, upstream: ScriptedUpstream, server: Server
) -> None:
    """Where a server says nothing of what was asked, the answer repeats the request."""
    said = told_by(server)
    for streamed in (False, True):
        upstream.script(server.script(said, streamed=streamed))
        response = check_normalized(await ask(replaying, streamed=streamed, **ASKED))
        for name in ("instructions", "metadata", "temperature", "max_output_tokens"):
            assert response[name] == ASKED[name], name
        assert response["prompt_cache_key"] == "k"
        if server.name != "transformers":  # which says that there are none
            assert [tool["name"] for tool in response["tools"]] == ["f"]


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_renamed_model(
    replaying: Proxy, upstream: ScriptedUpstream, server: Server, *, streamed: bool
) -> None:
    """The answer has the client's name of it, also where the server says none."""
    said = told_by(server)
    upstream.script(server.script(said, streamed=streamed))
    answer = await ask(replaying, streamed=streamed, model="renamed")
    assert check_normalized(answer)["model"] == "renamed"
    assert upstream.requests[-1].json()["model"] == "upstream-model"


# How it ends


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("most", "status"), [(7, "incomplete"), (8, "completed")])
async def test_a_maximum_that_was_reached(
    replaying: Proxy, upstream: ScriptedUpstream, server: Server, most: int, status: str, *,
    streamed: bool,
) -> None:  # fmt: skip
    """A server that says it completed, with all the output it was allowed, was cut."""
    said = told_by(server)
    upstream.script(server.script(said, streamed=streamed))
    answer = await ask(replaying, streamed=streamed, max_output_tokens=most)
    response = check_normalized(answer)
    reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert (response["status"], response["incomplete_details"]) == (status, reason)
    assert short(response) == said.short()

    async def logged() -> None:
        assert [line["outcome"] for line in replaying.request_logs()] == [status]

    await eventually(logged)
    await check_tokens(replaying)


async def test_every_cut_fails(
    replaying: Proxy, upstream: ScriptedUpstream, server: Server
) -> None:
    """Wherever a server's stream ends before its end, the answer failed, and is valid."""
    facts = server.facts(told_by(server))
    for at in range(len(facts)):
        upstream.script(stream(server.framed(facts[:at])))
        answer = await ask(replaying, streamed=True)
        response = check_native(answer.body)
        assert response["status"] == "failed", at
        assert response["error"]["code"] == "server_error"
        assert response["error"]["message"].startswith("[")


async def test_a_reset(replaying: Proxy, upstream: ScriptedUpstream, server: Server) -> None:
    """A connection that breaks within an event is a failed answer too."""
    frames = server.frames(told_by(server))
    half = [*frames[:5], frames[5][:-7]]
    upstream.script(stream(half)[:-1], Reset())
    response = check_native((await ask(replaying, streamed=True)).body)
    assert response["status"] == "failed"


ERRORS: dict[str, Any] = {
    "of the API": {"type": "error", "code": "server_error", "message": "scripted: no"},
    "with a number": {"type": "error", "code": 500, "message": "scripted: no", "param": None},
    "bare": {"type": "error", "message": "scripted: no"},
}


@pytest.mark.parametrize("error", ERRORS)
async def test_an_error_event(
    replaying: Proxy, upstream: ScriptedUpstream, server: Server, error: str
) -> None:
    """It is passed on as a valid one, and `response.failed` follows with its message."""
    facts = [*server.facts(told_by(server))[:5], ERRORS[error]]
    upstream.script(stream(server.framed(facts)))
    answer = await ask(replaying, streamed=True)
    response = check_native(answer.body)
    assert response["status"] == "failed"
    assert "scripted: no" in response["error"]["message"]
    kinds = [fact["type"] for fact in facts_of(answer.body)]
    assert kinds[-2:] == ["error", "response.failed"]


async def test_an_error_of_llama_cpp(replaying: Proxy, upstream: ScriptedUpstream) -> None:
    """Its error is no event of the API; the answer failed with its message all the same."""
    server = SERVERS["llama.cpp"]
    error = {"error": {"code": 500, "message": "scripted: no", "type": "server_error"}}
    upstream.script(stream([*server.frames(told_by(server))[:5], sse(error)]))
    facts = facts_of((await ask(replaying, streamed=True)).body)
    last = ended(facts)
    assert last["type"] == "response.failed"
    assert facts[0]["type"] == "response.created"
    assert "scripted: no" in last["response"]["error"]["message"]


async def test_a_failure_of_the_server(
    proxy: Proxy, upstream: ScriptedUpstream, server: Server
) -> None:
    """A bare `response.failed` is completed like every other end."""
    facts = server.facts(told_by(server))[:2]
    cause = {"code": "server_error", "message": "scripted: no"}
    failed = {"id": facts[0]["response"]["id"], "status": "failed", "error": cause}
    number = {"sequence_number": 2} if "sequence_number" in facts[0] else {}
    facts.append({"type": "response.failed", **number, "response": failed})
    upstream.script(stream(server.framed(facts)))
    response = check_native((await ask(proxy, streamed=True)).body)
    assert response["error"] == cause


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (422, {"detail": "Unsupported fields in the request: {'store'}"}),
        (400, {"error": {"code": 400, "message": "no", "type": "invalid_request_error"}}),
        (400, {"detail": [{"loc": ["body"], "msg": "no"}]}),
    ],
)
async def test_errors_of_other_shapes(
    replaying: Proxy, upstream: ScriptedUpstream, status: int, body: Any
) -> None:
    """What a server refuses in its own shape reaches the client in the API's."""
    for streamed in (False, True):
        upstream.script(json_answer(body, status))
        answer = await ask(replaying, streamed=streamed)
        assert answer.status == status
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert isinstance(error["code"], str | None)


async def test_what_is_no_answer(replaying: Proxy, upstream: ScriptedUpstream) -> None:
    """Nothing is made up around what is no response."""
    for body in (b"", b"[]", b"null", b'{"detail": "no"}', b'{"object": "list", "data": []}'):
        upstream.script(json_answer(body))
        answer = await ask(replaying, streamed=False)
        Refusal(502, "upstream_error", SERVER).check(answer, upstream="scripted")


# What follows


@pytest.mark.parametrize("streamed", [False, True])
async def test_turns_go_on(
    proxy: Proxy, upstream: ScriptedUpstream, server: Server, mode: str, *, streamed: bool
) -> None:
    """An answer that was completed here can be continued, with all that it said."""
    said = told_by(server)
    upstream.script(server.script(said, streamed=streamed))
    first = check_normalized(await ask(proxy, streamed=streamed, input="one"))
    results = [
        {"type": "function_call_output", "call_id": call_id, "output": "x"}
        for _, _, call_id in said.calls
    ]
    given = [*results, {"role": "user", "content": "two"}]
    upstream.script(server.script(told_by(server, Said("Done.")), streamed=streamed))
    again = {"input": given, "previous_response_id": first["id"]}
    second = check_normalized(await ask(proxy, streamed=streamed, **again))
    assert second["previous_response_id"] == first["id"]
    assert short(second) == [("message", "Done.")]
    sent = upstream.requests[-1].json()
    if mode == "upstream":
        assert sent["previous_response_id"] == said.answer_id
        assert sent["input"] == given
        return
    told = [each for each in sent["input"] if each.get("type") != "reasoning"]
    kinds = [each.get("type", "message") for each in told]
    calls = ["function_call"] * len(said.calls)
    outputs = ["function_call_output"] * len(said.calls)
    assert kinds == ["message", "message", *calls, *outputs, "message"]
    assert told[1]["content"][0]["text"] == said.text
    sent_calls = [(each["name"], each["arguments"], each["call_id"]) for each in told[2:-1]
                  if each["type"] == "function_call"]  # fmt: skip
    assert sent_calls == list(said.calls)
    shown = await use(proxy, "get", first["id"])
    assert shown.json() == first


async def test_the_stream_helper(proxy: Proxy, upstream: ScriptedUpstream, server: Server) -> None:
    """The SDK, which fails on most of these servers, rebuilds the response from the events."""
    said = told_by(server)
    upstream.script(server.script(said, streamed=True))
    async with proxy.openai() as client:
        asked: Any = {"model": "gpt-test", "input": "hi"}
        async with client.responses.stream(**asked) as helper:
            events: list[Any] = [event async for event in helper]
            final: Any = await helper.get_final_response()
    assert events[-1].type == "response.completed"
    assert final.output_text == said.text
    calls = [each for each in final.output if each.type == "function_call"]
    assert [(each.name, each.arguments, each.call_id) for each in calls] == list(said.calls)


async def test_nothing_waits(replaying: Proxy, upstream: ScriptedUpstream, server: Server) -> None:
    """Each piece of text reaches the client before the server sends the next one."""
    said = told_by(server)
    facts = server.facts(said)
    gates = [asyncio.Event() for _ in facts]
    steps: list[Step] = [Headers(200, SSE_HEADERS)]
    for frame, gate in zip(server.framed(facts), gates, strict=False):
        steps += [Chunk(frame), Wait(gate)]
    upstream.script(steps, EndChunks())
    client = await replaying.send(PATH, prompt(stream=True))
    async with asyncio.timeout(5):
        await client.read_head()
        seen = b""
        for fact, gate in zip(facts, gates, strict=True):
            if fact["type"] == "response.output_text.delta":
                while not _said(seen, fact["delta"]):
                    seen += (await client.read_chunk())[0]
                assert not upstream.requests[0].completed
            gate.set()
        seen += await client.read_body()
    assert short(check_native(seen)) == said.short()


def _said(seen: bytes, delta: str) -> int:
    """Count the whole events so far that tell this piece of text."""
    whole = seen[: seen.rfind(b"\n\n") + 2]
    told = [fact for fact in facts_of(whole) if fact["type"] == "response.output_text.delta"]
    return sum(fact["delta"] == delta for fact in told)


async def test_everything_is_given_back(serve: Serve, upstream: ScriptedUpstream) -> None:
    """After answers and failures that were completed here nothing is held any more."""
    proxy = await normalizing(serve)
    baseline = await take_baseline(proxy, upstream)
    server = SERVERS["llama.cpp"]
    upstream.script(server.script(TALK, streamed=True))
    answer = await ask(proxy, streamed=True)
    upstream.script(stream(server.frames(TALK)[:-1]))
    await ask(proxy, streamed=True)
    await check_invariants(proxy, upstream, baseline=baseline, stream=answer.body, completed=True)
