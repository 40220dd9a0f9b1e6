"""How answers over a bridge to chat end, when they are told, and what they are charged."""

import asyncio
from typing import Any

import pytest

from answers import USAGE
from chat_upstream import (
    DONE,
    HELLO,
    PATH,
    THINKING,
    Fact,
    Serve,
    ask,
    begun,
    calls,
    chat_only,
    finish_frame,
    frame,
    items_of,
    piece_frame,
    send,
    text,
    thought,
    usage_frame,
)
from client import IncompleteBody, parse_sse
from invariants import Baseline, check_invariants, eventually, take_baseline
from rig import Proxy, prompt, totals
from steps import SSE_HEADERS, Chunk, EndChunks, Finish, Headers, Reset, Stall, Step, Wait
from upstream import ScriptedUpstream
from validating import check_stream, facts_of

HOLDER = "replay"
SEEN_WITHIN = 0.5  # s: 100 ms are promised; the rest is for a machine that others use, too
BEGUN = [piece_frame(thought("Hm.")), piece_frame(text("Hel"))]
CUTS: list[Any] = [
    pytest.param([EndChunks()], id="ends"),
    pytest.param([Chunk(DONE), EndChunks()], id="done without a finish"),
    pytest.param([Finish()], id="closes"),
    pytest.param([Reset()], id="resets"),
    pytest.param([Chunk(b'data: {"choices": [{"ind'), EndChunks()], id="ends within a frame"),
]


class Watched:
    """A daemon before a chat upstream, with what it holds at rest."""

    def __init__(self, proxy: Proxy, upstream: ScriptedUpstream, baseline: Baseline | None) -> None:
        self.proxy = proxy
        self.upstream = upstream
        self.baseline = baseline

    async def check(self, body: bytes | None = None, *, completed: bool = False) -> None:
        """Assert all that must be true after a case."""
        await check_invariants(
            self.proxy,
            self.upstream,
            baseline=self.baseline,
            stream=body,
            completed=completed,
        )

    async def line(self) -> Fact:
        """Return the log line of the last request."""
        seen = len(self.upstream.requests)

        async def logged() -> None:
            assert len(self.proxy.request_logs()) == seen

        await eventually(logged)
        return self.proxy.request_logs()[-1]


async def watch(
    serve: Serve, upstream: ScriptedUpstream, *, rest: bool = False, **changes: Any
) -> Watched:
    """Start a daemon before an upstream that speaks chat alone; `rest`: count what it holds."""
    proxy = await serve(upstreams=chat_only(), **changes)
    return Watched(proxy, upstream, await take_baseline(proxy, upstream) if rest else None)


FINISHED: dict[str, tuple[list[bytes], list[Step], bool]] = {
    "no [DONE]": ([usage_frame(USAGE)], [EndChunks()], True),
    "no usage": ([DONE], [EndChunks()], False),
    "neither": ([], [EndChunks()], False),
    "closed": ([], [Finish()], False),
    "reset": ([], [Reset()], False),
    "reset after the usage": ([usage_frame(USAGE)], [Reset()], True),
    "half a frame": ([b'data: {"choices": [], "usa'], [EndChunks()], False),
    "silence after [DONE]": ([usage_frame(USAGE), DONE], [Stall()], True),
}


@pytest.mark.parametrize("name", FINISHED)
async def test_after_the_finish_reason(serve: Serve, upstream: ScriptedUpstream, name: str) -> None:
    """With a finish reason the answer is complete, whatever becomes of the rest (contract 6.3)."""
    watched = await watch(serve, upstream)
    before, steps, counted = FINISHED[name]
    upstream.script(send([piece_frame(text("Hello")), finish_frame(), *before], *steps))
    answer, response = await ask(watched.proxy, streamed=True)
    assert (response["status"], items_of(response)) == ("completed", [("message", "Hello")])
    assert response["usage"] == (USAGE.responses() if counted else None)
    line = await watched.line()
    assert (line["outcome"], line["estimated"]) == ("completed", not counted)
    await watched.check(answer.body, completed=True)


@pytest.mark.parametrize("end", CUTS)
async def test_cut_before_the_finish_reason(
    serve: Serve, upstream: ScriptedUpstream, end: list[Step]
) -> None:
    """Without a finish reason the response has failed, with the items that were whole."""
    watched = await watch(serve, upstream, rest=True)
    upstream.script(send(BEGUN, *end))
    answer, response = await ask(watched.proxy, streamed=True)
    assert (response["status"], items_of(response)) == ("failed", [("reasoning", "Hm.")])
    assert response["error"]["code"] == "server_error"
    assert response["error"]["message"].startswith("[upstream_error]")
    assert (await watched.line())["outcome"] == "upstream_error"
    await watched.check(answer.body)


@pytest.mark.parametrize("end", CUTS)
async def test_cut_before_anything(
    serve: Serve, upstream: ScriptedUpstream, end: list[Step]
) -> None:
    """A stream of no frames fails too: before it begins as an error, else as a whole stream."""
    watched = await watch(serve, upstream)
    upstream.script(send([], *end))
    answer = await watched.proxy.post(PATH, prompt(stream=True))
    if answer.status == 200:
        assert check_stream(facts_of(answer.body))["status"] == "failed"
    else:
        assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_error")
    await watched.check()


async def test_a_cut_within_calls(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Calls that were not finished are not told as whole: nobody may act on them."""
    watched = await watch(serve, upstream)
    frames = [piece_frame(text("One.")), piece_frame(calls(begun(0, "c", "f", '{"rm": "/')))]
    upstream.script(send(frames, Reset()))
    answer, response = await ask(watched.proxy, streamed=True)
    assert (response["status"], items_of(response)) == ("failed", [("message", "One.")])
    await watched.check(answer.body)


async def test_an_error_frame(serve: Serve, upstream: ScriptedUpstream) -> None:
    """After the upstream's own error the response fails with its message, and nothing follows."""
    watched = await watch(serve, upstream)
    broke = frame(error={"message": "It broke.", "code": "server_error"})
    upstream.script(send([*BEGUN, broke, *HELLO.frames()], EndChunks()))
    answer, response = await ask(watched.proxy, streamed=True)
    assert response["status"] == "failed"
    assert "It broke." in response["error"]["message"]
    assert (await watched.line())["outcome"] in {"failed", "upstream_error"}
    await watched.check(answer.body)


async def test_a_stall(serve: Serve, upstream: ScriptedUpstream) -> None:
    """An upstream that is silent past `idle` before its finish fails the response."""
    watched = await watch(serve, upstream, rest=True, timeouts={"idle": "200ms"})
    upstream.script(send(BEGUN, Stall()))
    answer, response = await ask(watched.proxy, streamed=True)
    assert (response["status"], items_of(response)) == ("failed", [("reasoning", "Hm.")])
    assert response["error"]["message"].startswith("[upstream_timeout]")
    assert (await watched.line())["outcome"] == "upstream_timeout"
    await watched.check(answer.body)


async def test_a_stall_after_the_finish_reason(serve: Serve, upstream: ScriptedUpstream) -> None:
    """An upstream that is silent instead of telling its usage has still answered completely.

    With a short `idle` as without one; the end comes some seconds after the finish reason.
    """
    short = await watch(serve, upstream, timeouts={"idle": "200ms"})
    usual = await watch(serve, upstream)
    upstream.default = send([*BEGUN, finish_frame()], Stall())
    async with asyncio.timeout(30):
        both = await asyncio.gather(*(ask(each.proxy, streamed=True) for each in (short, usual)))
    for watched, (answer, response) in zip((short, usual), both, strict=True):
        assert (response["status"], response["usage"]) == ("completed", None)
        await watched.check(answer.body, completed=True)


async def test_the_end_waits_for_the_usage(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A usage that comes later than the finish reason is in the terminal event (traps, 10)."""
    watched = await watch(serve, upstream)
    gate = asyncio.Event()
    upstream.script(
        send([*BEGUN, finish_frame("length")], Wait(gate)),
        [Chunk(usage_frame(USAGE)), Chunk(DONE), EndChunks()],
    )
    client = await watched.proxy.send(PATH, prompt(stream=True))
    await client.read_head()
    body = await client.read_until(b'"Hel"')
    gate.set()
    body += await client.read_body()
    response = check_stream(facts_of(body))
    assert (response["status"], response["usage"]) == ("incomplete", USAGE.responses())
    await watched.check(body)


async def test_delivery(serve: Serve, upstream: ScriptedUpstream) -> None:
    """The client has each piece before the upstream sends the next one (traps, 13)."""
    watched = await watch(serve, upstream)
    pieces = [thought("A1"), thought("A2"), text("B1"), text("B2"), calls(begun(0, "c", "f", "C1"))]
    marks = [b'"A1"', b'"A2"', b'"B1"', b'"B2"', b'"C1"']
    gates = [asyncio.Event() for _ in pieces]
    steps: list[Step] = [Headers(200, SSE_HEADERS)]
    for piece, gate in zip(pieces, gates, strict=True):
        steps += [Chunk(piece_frame(piece)), Wait(gate)]
    upstream.script(steps, [Chunk(each) for each in HELLO.frames()[-3:]], EndChunks())
    client = await watched.proxy.send(PATH, prompt(stream=True))
    body = b""
    async with asyncio.timeout(10):
        await client.read_head()
        for mark, gate in zip(marks, gates, strict=True):
            if mark not in body:
                body += await client.read_until(mark)
            assert not upstream.requests[-1].completed
            gate.set()
        body += await client.read_body()
    assert check_stream(facts_of(body))["status"] == "completed"
    await watched.check(body, completed=True)


async def test_heartbeats(serve: Serve, upstream: ScriptedUpstream) -> None:
    """Comments come before the first byte and within the answer, and split no event."""
    watched = await watch(serve, upstream, streams={"keepalive": "50ms"})
    first, second, third = (asyncio.Event() for _ in range(3))
    frames = THINKING.frames()
    upstream.script(
        Wait(first),
        send(frames[:3], Wait(second)),
        send(frames[3:5], Wait(third))[1:],
        send(frames[5:], EndChunks())[1:],
    )
    client = await watched.proxy.send(PATH, prompt(stream=True))
    body = b""
    async with asyncio.timeout(10):
        await client.read_head()
        for gate in (first, second, third):
            body += await client.read_until(b": keepalive")
            gate.set()
        body += await client.read_body()
    response = check_stream(facts_of(body))
    assert items_of(response) == [("reasoning", "Let me think."), ("message", "Hello world")]
    assert (await watched.line())["outcome"] == "completed"
    await watched.check(body, completed=True)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("phase", ["waiting", "streaming"])
async def test_a_client_that_leaves(
    serve: Serve, upstream: ScriptedUpstream, phase: str, *, streamed: bool
) -> None:
    """The upstream is closed at once when the client is gone, in every phase (contract 6.6)."""
    watched = await watch(serve, upstream, rest=True)
    upstream.script([Stall()] if phase == "waiting" else send(BEGUN, Stall()))
    if phase == "streaming" and not streamed:
        upstream.heal()
        upstream.script(Headers(200, [("content-length", "999")]), Stall())
    count = len(upstream.requests)
    client = await watched.proxy.send(PATH, prompt(stream=streamed))
    request = await upstream.wait_request(count + 1)
    if phase == "streaming" and streamed:
        await client.read_head()
        await client.read_until(b'"Hel"')
    gone = asyncio.get_running_loop().time()
    client.abort()
    async with asyncio.timeout(5):
        await request.closed.wait()
    assert request.closed_at is not None
    assert request.closed_at - gone < SEEN_WITHIN
    line = await watched.line()
    assert (line["outcome"], line["status"]) == ("client_disconnected", 499)
    assert line["input_tokens"] > 0
    await watched.check()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("finish", "outcome"),
    [("stop", "completed"), ("length", "incomplete"), ("content_filter", "incomplete")],
)
async def test_what_is_counted(
    serve: Serve, upstream: ScriptedUpstream, finish: str, outcome: str, *, streamed: bool
) -> None:
    """Metrics and the log have the upstream's usage, type by type, and the outcome."""
    proxy = await serve(upstreams=chat_only())
    upstream.script(THINKING.but(finish=finish).script(streamed=streamed))
    await ask(proxy, streamed=streamed)
    watched = Watched(proxy, upstream, None)
    line = await watched.line()
    told = {
        "endpoint": "responses",
        "key": "team-a",
        "route": "gpt-test",
        "upstream": "scripted",
        "status": 200,
        "outcome": outcome,
        "attempts": 1,
        "estimated": False,
        "replayed_turns": 0,
    }
    assert {name: line[name] for name in told} == told
    counted = {name: line[f"{name}_tokens"] for name in USAGE.disjoint()}
    assert counted == USAGE.disjoint()
    metrics = await proxy.metrics()
    assert totals(metrics, "aiproxy_tokens_total", "type") == USAGE.disjoint()
    assert totals(metrics, "aiproxy_usage_estimated_total", "route") == {}
    assert totals(metrics, "aiproxy_requests_total", "endpoint") == {"responses": 1}
    first = totals(metrics, "aiproxy_time_to_first_token_seconds_count", "route")
    assert first == ({"gpt-test": 1} if streamed else first)
    await check_invariants(proxy, upstream)


@pytest.mark.parametrize("end", [[Finish()], [Reset()]], ids=["closes", "resets"])
async def test_a_cut_whole_answer(
    serve: Serve, upstream: ScriptedUpstream, end: list[Step]
) -> None:
    """A JSON answer that is cut is an upstream error."""
    watched = await watch(serve, upstream)
    head, body = HELLO.script(streamed=False)
    assert not isinstance(body, Headers)
    upstream.script(head, Chunk(b"{"), end)
    answer = await watched.proxy.post(PATH, prompt())
    assert (answer.status, answer.json()["error"]["code"]) == (502, "upstream_error")
    await watched.check()


async def test_the_body_ends_properly(serve: Serve, upstream: ScriptedUpstream) -> None:
    """A failed stream has its last chunk, and nothing after its terminal event."""
    watched = await watch(serve, upstream)
    upstream.script(send(BEGUN, Reset()))
    client = await watched.proxy.send(PATH, prompt(stream=True))
    await client.read_head()
    try:
        body = await client.read_body()
    except IncompleteBody:
        pytest.fail("the last chunk is missing")
    assert parse_sse(body)[-1][0] == "response.failed"
    await watched.check(body)
