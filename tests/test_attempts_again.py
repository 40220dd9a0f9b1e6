"""What is tried again, where, how often, and what is not: contract 6.8."""

import asyncio
import gc
import json
import random
import time
from typing import Any

import pytest

from aiproxy.envelope import Envelope
from client import parse_sse
from faults import Api, check_charge, check_error, events_of, json_of
from steps import Step, stream
from targets_rig import (
    WAYS,
    frames,
    refusal,
    refusing,
    said,
    targets,
    unfinished,
)
from upstream import Chunk, Finish, Garbage, Headers, Reset, Send, Sleep, Stall, Wait, json_answer

SAFE = [429, 503, 529]
JSON = [("content-type", "application/json"), ("content-length", "100")]
SILENCE = {"first_byte": "80ms"}


@pytest.mark.parametrize(
    ("api", "streamed", "status"),
    [(*way, SAFE[turn % 3]) for turn, way in enumerate((*WAYS, *WAYS[:2]))],
)
async def test_an_overloaded_target_is_followed_by_the_next(
    api: Api,
    streamed: bool,  # noqa: FBT001
    status: int,
) -> None:
    """After 429, 503 or 529 the next target answers; each attempt counts at its own upstream."""
    async with targets() as rig:
        if api == "responses":
            await rig.rest()
        rig["a"].script(refusal(status))
        seen = await rig.ask(api, streamed=streamed)
        assert seen.answer.status == 200, seen.answer
        assert api == "embeddings" or said(api, seen.answer) == "from b"
        assert (seen.line["attempts"], seen.line["upstream"]) == (2, "b")
        assert seen.line["outcome"] == "completed"
        assert seen.answer.headers["x-aiproxy-upstream"] == "b"
        assert rig.got == {"a": 1, "b": 1}
        result = "status_429" if status == 429 else "status_5xx"
        assert await rig.attempts() == {("a", result): 1, ("b", "ok"): 1}
        if api != "embeddings":
            check_charge(seen.line, "usage")
        await rig.check()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_refused_connection_is_followed_by_the_next(
    streamed: bool,  # noqa: FBT001
) -> None:
    """Where nobody listens the next target is asked, and the result is `connect`."""
    with refusing() as url:
        async with targets("ab", {"a": url}) as rig:
            await rig.rest()
            seen = await rig.ask(streamed=streamed)
            assert said("responses", seen.answer) == "from b"
            assert (seen.line["attempts"], seen.line["upstream"]) == (2, "b")
            assert await rig.attempts() == {("a", "connect"): 1, ("b", "ok"): 1}
            await rig.check()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_late_connection_is_followed_by_the_next(streamed: bool) -> None:  # noqa: FBT001
    """Where no connection comes about within `connect` the next target is asked."""
    async with (
        unfinished() as url,
        targets("ab", {"a": url}, timeouts={"connect": "100ms"}) as rig,
    ):
        seen = await rig.ask(streamed=streamed)
        assert said("responses", seen.answer) == "from b"
        assert (seen.line["attempts"], seen.line["upstream"]) == (2, "b")
        assert await rig.attempts() == {("a", "connect"): 1, ("b", "ok"): 1}
        await rig.check()


async def test_an_unknown_host_is_followed_by_the_next() -> None:
    """F13: a name that does not resolve costs one attempt, and the next target answers."""
    away = {"a": "http://no-such-host.invalid/v1"}
    async with targets("ab", away, timeouts={"connect": "500ms"}) as rig:
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from b"
        assert await rig.attempts() == {("a", "connect"): 1, ("b", "ok"): 1}
        await rig.check()


@pytest.mark.parametrize(
    ("status", "seen_as"),
    [
        *((same, same) for same in (400, 404, 409, 422)),
        *((other, 502) for other in (302, 401, 403, 418, 500, 502, 504)),
    ],
)
async def test_an_answer_of_its_own_is_the_end(status: int, seen_as: int) -> None:
    """Who refuses, fails or redirects may have acted, or would again: nobody else is asked."""
    async with targets() as rig:
        rig["a"].default = refusal(status, ("location", rig["b"].url))
        for streamed in (False, True):
            seen = await rig.ask(streamed=streamed)
            assert seen.answer.status == seen_as
            assert (seen.line["attempts"], seen.line["upstream"]) == (1, "a")
            check_charge(seen.line, "nothing")
            rig.calm()  # after a 401
        assert rig.got == {"a": 2}
        await rig.check(seen.answer.body)


ENDS: list[Any] = [
    pytest.param([Reset()], "reset", 502, id="reset"),
    pytest.param([Finish()], "reset", 502, id="closed"),
    pytest.param([Stall()], "timeout", 504, id="silent"),
]


@pytest.mark.parametrize(("api", "streamed"), [WAYS[0], WAYS[1], WAYS[3], WAYS[4]])
@pytest.mark.parametrize(("end", "result", "status"), ENDS)
async def test_who_may_have_acted_is_the_last(
    api: Api,
    streamed: bool,  # noqa: FBT001
    end: list[Step],
    result: str,
    status: int,
) -> None:
    """After a reset or a silence nobody else gets the request."""
    async with targets(timeouts=SILENCE) as rig:
        if api == "responses":
            await rig.rest()
        rig["a"].script(end)
        seen = await rig.ask(api, streamed=streamed)
        code = "upstream_timeout" if status == 504 else "upstream_error"
        check_error(seen.answer, status, code, api)
        assert seen.answer.headers.get("x-should-retry") == ("false" if status == 504 else None)
        assert (seen.line["attempts"], seen.line["upstream"]) == (1, "a")
        assert rig.got == {"a": 1}
        assert await rig.attempts() == {("a", result): 1}
        await rig.check(seen.answer.body)


@pytest.mark.parametrize(("api", "streamed"), [WAYS[0], WAYS[1], WAYS[3], WAYS[4]])
@pytest.mark.parametrize(("end", "result", "status"), ENDS)
async def test_a_route_may_allow_to_ask_twice(
    api: Api,
    streamed: bool,  # noqa: FBT001
    end: list[Step],
    result: str,
    status: int,
) -> None:
    """With `retry_unsafe` a reset or a silence before the answer is followed by the next."""
    async with targets(timeouts=SILENCE, route={"retry_unsafe": True}) as rig:
        if api == "responses":
            await rig.rest()
        rig["a"].script(end)
        seen = await rig.ask(api, streamed=streamed)
        assert seen.answer.status == 200, seen.answer
        assert (seen.line["attempts"], seen.line["upstream"]) == (2, "b")
        assert rig.got == {"a": 1, "b": 1}
        assert await rig.attempts() == {("a", result): 1, ("b", "ok"): 1}
        await rig.check()


async def test_an_unsafe_silence_at_last_may_be_tried_again_by_the_client() -> None:
    """With `retry_unsafe` a 504 does not tell the SDKs to refrain."""
    async with targets(timeouts=SILENCE, route={"retry_unsafe": True}) as rig:
        for server in rig.servers.values():
            server.default = [Stall()]
        seen = await rig.ask()
        check_error(seen.answer, 504, "upstream_timeout", "responses")
        assert "x-should-retry" not in seen.answer.headers
        assert seen.line["attempts"] == 3
        await rig.check(seen.answer.body)


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("streamed", [False, True])
async def test_what_is_no_http_is_the_end(unsafe: bool, streamed: bool) -> None:  # noqa: FBT001
    """Garbage and a wrong media type are a 502, whatever the route allows."""
    async with targets(route={"retry_unsafe": unsafe}) as rig:
        await rig.rest()
        odd: list[list[Step]] = [
            [Garbage(200), Finish()],
            [Headers(200, [("content-type", "text/html"), ("content-length", "2")]), Send(b"hi")],
        ]
        for script in odd:
            rig["a"].script(script)
            seen = await rig.ask(streamed=streamed)
            check_error(seen.answer, 502, "upstream_error", "responses")
        assert rig.got == {"a": 2}
        assert await rig.attempts() == {("a", "protocol"): 2}
        await rig.check(seen.answer.body)


# How often


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("retries", [0, 1, 2, 4])
async def test_retries_are_counted_over_all_targets(
    retries: int,
    streamed: bool,  # noqa: FBT001
) -> None:
    """There are 1 + `retries` attempts, one target after the other, then the last failure."""
    async with targets("abc", retries=retries) as rig:
        for server in rig.servers.values():
            server.default = refusal(503, ("retry-after", "0"))
        seen = await rig.ask(streamed=streamed)
        check_error(seen.answer, 503, "upstream_overloaded", "responses")
        assert "retry-after" in seen.answer.headers
        assert seen.line["attempts"] == 1 + retries
        assert sum(rig.got.values()) == 1 + retries
        assert max(rig.got.values()) - min(rig.got.values(), default=0) <= 2
        assert set(rig.got) == set("abc"[: 1 + retries])
        assert sum((await rig.attempts()).values()) == 1 + retries
        check_charge(seen.line, "nothing")
        await rig.check(seen.answer.body)


@pytest.mark.parametrize("status", SAFE)
@pytest.mark.parametrize("streamed", [False, True])
async def test_the_same_target_again(status: int, streamed: bool) -> None:  # noqa: FBT001
    """A target that is alone is asked again after a backoff."""
    async with targets("a") as rig:
        rig["a"].script(refusal(status))
        rig["a"].script(refusal(status))
        seen = await rig.ask(streamed=streamed)
        assert said("responses", seen.answer) == "from a"
        assert (seen.line["attempts"], seen.line["upstream"]) == (3, "a")
        check_charge(seen.line, "usage")
        await rig.check()


async def test_the_last_refusal_is_passed_on() -> None:
    """A 429 at the end of all attempts is the upstream's own, body and Retry-After included."""
    async with targets(retries=1) as rig:
        rig["a"].default = refusal(503)
        rig["b"].default = refusal(429, ("retry-after", "33"))
        seen = await rig.ask()
        assert seen.answer.status == 429
        assert seen.answer.json()["error"]["message"] == "scripted 429"
        assert seen.answer.headers["retry-after"] == "33"
        assert (seen.line["upstream"], seen.line["outcome"]) == ("b", "upstream_rejected")
        await rig.check(seen.answer.body)


async def test_the_backoff_is_drawn_from_zero_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Full jitter: each wait is drawn between 0 and a bound that doubles up to 2 s."""
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    async with targets("a", retries=8) as rig:
        rig["a"].default = refusal(503)
        monkeypatch.setattr(random, "uniform", uniform)
        seen = await rig.ask()
        monkeypatch.undo()
        assert seen.line["attempts"] == 9
        assert [low for low, _ in drawn] == [0.0] * 8
        highs = [high for _, high in drawn]
        assert highs == [min(2.0, highs[0] * 2**turn) for turn in range(8)]
        await rig.check()


# Retry-After


async def test_a_short_retry_after_is_waited_for() -> None:
    """What a lone target asks for is waited for, and no less."""
    async with targets("a") as rig:
        rig["a"].script(refusal(429, ("retry-after-ms", "300")))
        began = time.monotonic()
        seen = await rig.ask()
        assert time.monotonic() - began >= 0.3
        assert said("responses", seen.answer) == "from a"
        assert seen.line["attempts"] == 2
        await rig.check()


@pytest.mark.parametrize("status", SAFE)
async def test_a_long_retry_after_is_passed_on(status: int) -> None:
    """More than 5 s are not waited for: the client is told at once."""
    async with targets("a") as rig:
        rig["a"].default = refusal(status, ("retry-after", "6"))
        async with asyncio.timeout(4):
            seen = await rig.ask()
        assert seen.answer.status == (429 if status == 429 else 503)
        assert seen.answer.headers["retry-after"] == "6"
        assert seen.line["attempts"] == 1
        await rig.check(seen.answer.body)


async def test_a_retry_after_holds_up_no_other_target() -> None:
    """Another target that is left is asked at once, however long the first asks to wait."""
    async with targets() as rig:
        rig["a"].script(refusal(503, ("retry-after", "4")))
        async with asyncio.timeout(3):
            seen = await rig.ask()
        assert said("responses", seen.answer) == "from b"
        await rig.check()


async def test_a_long_retry_after_is_kept_in_a_second_round() -> None:
    """A target that asked for more than 5 s is not asked again by the same request."""
    async with targets(retries=3) as rig:
        rig["a"].default = refusal(429, ("retry-after", "60"))
        rig["b"].script(refusal(503))
        seen = await rig.ask()
        assert rig.got["a"] == 1
        assert said("responses", seen.answer) == "from b"
        await rig.check()


async def test_a_short_retry_after_is_kept_in_a_second_round() -> None:
    """What a target asked for is kept also when another one was asked in between."""
    async with targets() as rig:
        rig["a"].script(refusal(503, ("retry-after-ms", "400")))
        rig["b"].default = refusal(503, ("retry-after", "60"))
        began = time.monotonic()
        seen = await rig.ask()
        assert rig.got == {"a": 2, "b": 1}
        assert said("responses", seen.answer) == "from a"
        assert time.monotonic() - began >= 0.4
        await rig.check()


async def test_the_only_target_left_asks_for_too_long() -> None:
    """Where all others are left alone, more than 5 s are not waited for either."""
    one_minute = {"failures": 2, "cooldown": "1min", "max_cooldown": "1min"}
    async with targets(breaker=one_minute) as rig:
        rig["a"].default = refusal(503)
        first = await rig.ask()
        assert said("responses", first.answer) == "from b"
        rig["b"].default = refusal(429, ("retry-after", "30"))
        async with asyncio.timeout(4):
            seen = await rig.ask()
        assert seen.answer.status in {429, 503}
        assert rig.got == {"a": 2, "b": 2}
        await rig.check()


# The deadline of all


@pytest.mark.parametrize("streamed", [False, True])
async def test_total_ends_a_backoff(streamed: bool) -> None:  # noqa: FBT001
    """`total` also bounds the time between two attempts."""
    async with targets("a", timeouts={"total": "300ms"}) as rig:
        rig["a"].default = refusal(503, ("retry-after", "4"))
        async with asyncio.timeout(3):
            seen = await rig.ask(streamed=streamed)
        check_error(seen.answer, 504, "upstream_timeout", "responses")
        assert (seen.line["attempts"], seen.line["outcome"]) == (1, "upstream_timeout")
        check_charge(seen.line, "nothing")
        await rig.check(seen.answer.body)


async def test_total_bounds_all_attempts_together() -> None:
    """Each attempt takes of the same `total`."""
    times = {"total": "500ms", "first_byte": "300ms"}
    async with targets(retries=10, timeouts=times, route={"retry_unsafe": True}) as rig:
        for server in rig.servers.values():
            server.default = [Stall()]
        seen = await rig.ask()
        check_error(seen.answer, 504, "upstream_timeout", "responses")
        assert seen.line["attempts"] <= 2
        await rig.check(seen.answer.body)


async def test_total_in_a_later_attempt() -> None:
    """Its passing in the second attempt is a timeout of that upstream alone."""
    async with targets(timeouts={"total": "300ms"}) as rig:
        rig["a"].script(refusal(503))
        rig["b"].script(Stall())
        seen = await rig.ask()
        check_error(seen.answer, 504, "upstream_timeout", "responses")
        assert await rig.attempts() == {("a", "status_5xx"): 1, ("b", "timeout"): 1}
        assert (seen.line["attempts"], seen.line["upstream"]) == (2, "b")
        await rig.check(seen.answer.body)


# The connection


async def test_f12_a_pooled_connection_that_was_closed() -> None:
    """F12: after a close while idle the request succeeds, or is a 502; it is never sent twice."""
    async with targets() as rig:
        await rig.ask()
        for link in list(rig["a"]._links):
            link.hang_up()
        seen = await rig.ask()
        assert seen.answer.status in {200, 502}
        assert rig.got.get("b") is None
        assert len(rig["a"].requests) <= 2
        await rig.check()


# The client


async def test_the_client_leaves_in_a_backoff() -> None:
    """A client that goes while an attempt is waited for gets no other one made."""
    async with targets("a") as rig:
        await rig.rest()
        rig["a"].default = refusal(503, ("retry-after", "4"))
        client = await rig.begin()
        await rig["a"].wait_request(1)
        await client.close()
        await rig.check()
        assert [line["outcome"] for line in rig.proxy.request_logs()].count(
            "client_disconnected"
        ) == 1


@pytest.mark.parametrize("streamed", [False, True])
async def test_the_client_leaves_in_the_second_attempt(streamed: bool) -> None:  # noqa: FBT001
    """The second upstream sees the close, and the line names it."""
    async with targets() as rig:
        await rig.rest()
        rig["a"].script(refusal(503))
        rig["b"].script(Stall())
        client = await rig.begin(streamed=streamed)
        request = await rig["b"].wait_request(1)
        await client.close()
        await asyncio.wait_for(request.closed.wait(), 2)
        await rig.check()
        (line,) = [it for it in rig.proxy.request_logs() if it["status"] == 499]
        assert (line["attempts"], line["upstream"]) == (2, "b")


# Heartbeats


async def test_a_heartbeat_is_nothing_told() -> None:
    """After a comment the next target is asked still, and its answer follows in band."""
    async with targets(streams={"keepalive": "50ms"}) as rig:
        rig["a"].script(Sleep(0.2), refusal(503))
        seen = await rig.ask("chat", streamed=True)
        assert b": keepalive\n\n" in seen.answer.body
        assert said("chat", seen.answer) == "from b"
        assert seen.line["attempts"] == 2
        await rig.check()


async def test_a_heartbeat_then_all_fail() -> None:
    """After a comment the failure of the last attempt is told in band, once."""
    async with targets(streams={"keepalive": "50ms"}) as rig:
        rig["a"].script(Sleep(0.2), refusal(503))
        rig["a"].default = rig["b"].default = refusal(503)
        seen = await rig.ask(streamed=True)
        kinds = [kind for kind, _ in parse_sse(seen.body)]
        assert kinds == ["response.created", "response.failed"]
        assert seen.line["attempts"] == 3
        await rig.check(stream=seen.body)


async def test_a_heartbeat_while_waiting_for_another_attempt() -> None:
    """Also between two attempts silence is filled with comments."""
    async with targets("a", streams={"keepalive": "50ms"}) as rig:
        rig["a"].script(refusal(503, ("retry-after-ms", "400")))
        seen = await rig.ask(streamed=True)
        assert b": keepalive\n\n" in seen.answer.body
        assert said("responses", seen.answer) == "from a"
        await rig.check()


# What was read of an answer


@pytest.mark.parametrize("unsafe", [False, True])
async def test_output_is_never_followed_by_another_attempt(unsafe: bool) -> None:  # noqa: FBT001
    """Once an event with output is out a cut is the end, whatever the route allows."""
    for api in ("responses", "chat", "messages"):
        async with targets(route={"retry_unsafe": unsafe}) as rig:
            events = events_of(api, "from a and more")[: 3 if api == "chat" else 6]
            rig["a"].script(frames(*events, end=Reset()))
            seen = await rig.ask(api, streamed=True)
            assert rig.got == {"a": 1}
            assert (seen.line["attempts"], seen.line["outcome"]) == (1, "upstream_error")
            assert seen.line["output_tokens"] > 0
            await rig.check(stream=seen.body if api == "responses" else None)


async def test_a_refused_stream_that_said_something_is_not_charged_twice() -> None:
    """Tokens are those of the answer that was relayed, not of the failed one before it."""
    async with targets() as rig:
        failed = json_of("responses") | {"status": "failed", "output": [], "usage": None}
        error = {"code": "server_error", "message": "no"}
        rig["a"].script(json_answer(failed | {"error": error}))
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from b"
        check_charge(seen.line, "usage")
        assert seen.line["attempts"] == 2
        await rig.check()


async def test_each_attempt_has_the_whole_body() -> None:
    """The second target gets what the client sent, as the first did."""
    async with targets() as rig:
        rig["a"].script(refusal(503))
        filler = "x" * 300_000
        body = {"temperature": 0.5, "metadata": {"k": "v"}, "x_unknown": [1, {"y": None}]}
        seen = await rig.ask(
            "chat", streamed=True, messages=[{"role": "user", "content": filler}], **body
        )
        assert said("chat", seen.answer) == "from b"
        first, second = rig["a"].requests[0], rig["b"].requests[0]
        assert first.body == second.body
        assert second.json()["messages"][0]["content"] == filler
        assert {name: second.json()[name] for name in body} == body
        ours = [pair for pair in second.headers if pair[0].lower() != "host"]
        assert ours == [pair for pair in first.headers if pair[0].lower() != "host"]
        await rig.check()


async def test_each_target_has_its_own_name_credential_and_headers() -> None:
    """The second target gets its own model name and headers, nothing of the first's."""
    each = {"a": {"headers": {"X-Own": "of-a"}}, "b": {"headers": {"X-Other": "of-b"}}}
    pools = [{"name": "a", "model": "model-a"}, {"name": "b", "model": "model-b", "tier": 2}]
    async with targets(each=each, pools=pools) as rig:
        rig["a"].script(refusal(503))
        seen = await rig.ask()
        (first,), (second,) = rig["a"].requests, rig["b"].requests
        assert [r.json()["model"] for r in (first, second)] == ["model-a", "model-b"]
        assert (first.header("x-own"), first.header("x-other")) == ("of-a", None)
        assert (second.header("x-own"), second.header("x-other")) == (None, "of-b")
        assert seen.answer.json()["model"] == "gpt-test"
        await rig.check()


async def test_a_slow_refusal_is_not_waited_for() -> None:
    """The next target is asked by the status of a refusal, though its body does not come."""
    async with targets() as rig:
        rig["a"].script(Headers(503, JSON), Stall())
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from b"
        await asyncio.wait_for(rig["a"].requests[0].closed.wait(), 2)
        await rig.check()


async def test_an_empty_stream_is_the_end() -> None:
    """A stream that ends without any event may have been acted on: nobody else is asked."""
    async with targets() as rig:
        for script in (stream([]), [*stream([])[:1], Chunk(b": hi\n\n"), Reset()]):
            rig["a"].script(script)
            seen = await rig.ask(streamed=True)
            if seen.answer.status == 200:
                kinds = [json.loads(data)["type"] for _, data in parse_sse(seen.body)]
                assert kinds[-1] == "response.failed"
            else:
                assert seen.answer.status == 502
        assert rig.got == {"a": 2}
        await rig.check()


@pytest.mark.parametrize("api", ["responses", "chat", "messages"])
async def test_a_stream_keeps_no_body_of_its_request(api: Api) -> None:
    """Once nothing can be tried again the body is given back, however long the answer lasts."""

    def bodies() -> int:
        gc.collect()
        return sum(isinstance(each, Envelope) for each in gc.get_objects())

    async with targets("a") as rig:
        before = bodies()
        events = events_of(api)
        going = asyncio.Event()
        rig["a"].script(frames(*events[:-1])[:-1], Wait(going), frames(*events[-1:])[1:])
        client = await rig.begin(api, streamed=True)
        await client.read_head()
        await client.read_chunk()
        kept = bodies() - before
        going.set()
        while (await client.read_chunk())[0]:
            pass
        assert kept == 0
        await rig.check()
