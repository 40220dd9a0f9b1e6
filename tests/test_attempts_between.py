"""Between two attempts, and over all of them: memory, and what may happen in a backoff."""

import asyncio
import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from aiproxy import attempts, relay
from client import parse_sse
from faults import check_charge, check_error
from invariants import eventually
from responses import message_item, reasoning_item, responses_events, responses_json
from sessions_rig import turn
from targets_rig import Rig, config, frames, nothing_held, refusal, said, targets
from upstream import ScriptedUpstream, Stall, Wait, json_answer

LONG = ("retry-after", "30")


# Memory


async def test_a_conversation_is_counted_once_over_all_attempts() -> None:
    """What each attempt brings in anew is in memory once: `max_buffered` has room for it."""
    size = 100_000
    each = {name: {"max_concurrent": 1} for name in "ab"}
    async with targets("abc", each=each, max_buffered="512KiB") as rig:
        for name in "abc":
            rig[name].text = "y" * size
        first = await turn(rig.proxy, "one")
        for name in "ab":
            rig[name].script(refusal(503))
        most = 0
        hold = rig.proxy.daemon._proxy._buffered
        going = asyncio.Event()
        rig["c"].script(Wait(going), json_answer(responses_json("from c")))
        client = await rig.begin(previous_response_id=first["id"])
        await rig["c"].wait_request(1)
        most = hold.held
        going.set()
        assert (await client.answer()).status == 200
        assert 2 * size <= most < 3 * size
        await nothing_held(rig)
        await rig.check()


async def test_one_that_is_found_full_has_taken_no_memory_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was brought in for a target that turned out to be full serves the next one."""
    size = 100_000
    async with targets(max_buffered="350KiB") as rig:
        for name in "ab":
            rig[name].text = "y" * size
        first = await turn(rig.proxy, "one")
        upstreams = rig.proxy.daemon._proxy.snapshot.config.upstreams
        full = rig.proxy.daemon._proxy.standings.of(upstreams["a"])
        enter = type(full).enter
        monkeypatch.setattr(
            type(full), "enter", lambda self, now: self is not full and enter(self, now)
        )
        seen = await rig.ask(previous_response_id=first["id"])
        monkeypatch.undo()
        assert said("responses", seen.answer) == "y" * size
        assert seen.line["upstream"] == "b"
        await nothing_held(rig)
        await rig.check()


async def test_items_that_are_brought_in_for_an_upstream_are_counted_once() -> None:
    """So are items held here that a request refers to, where the upstream holds conversations."""
    size = 100_000
    pools = [{"name": "a", "tier": 2}, {"name": "b"}, {"name": "c"}]
    each = {name: {"sessions": "upstream"} for name in "bc"}
    routes = [
        {"model": "gpt-test", "upstreams": pools[1:]},
        {"model": "held", "upstreams": ["a"]},
    ]
    async with targets("abc", routes=routes, each=each, max_buffered="350KiB") as rig:
        item = message_item("y" * size)
        rig["a"].script(json_answer(responses_json(items=[item])))
        assert (await rig.ask(model="held")).answer.status == 200
        reference = {"type": "item_reference", "id": item["id"]}
        for name in "bc":
            rig[name].script(refusal(503))
        seen = await rig.ask(input=[reference, {"role": "user", "content": "go on"}])
        assert seen.answer.status == 200, seen.answer
        assert seen.line["attempts"] == 3
        await nothing_held(rig)
        await rig.check()


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("store", [False, True])
async def test_a_stream_that_has_begun_needs_its_request_no_more(
    store: bool,  # noqa: FBT001
    retries: int,
) -> None:
    """Once no other attempt follows only what will be stored of the request stays in memory."""
    async with targets("a", retries=retries) as rig:
        rig["a"].script(frames(*responses_events("from a")[:5], end=Stall()))
        client = await rig.begin(streamed=True, store=store, metadata={"k": "x" * 400})
        await client.read_head()
        await client.read_until(b"output_text.delta")
        held = rig.proxy.daemon._proxy.held
        assert 0 < held < 200 if store else held == 0
        await client.close()
        await nothing_held(rig)
        await rig.check()


ENDS: dict[str, Callable[[Rig], Any]] = {
    "answered": lambda _: None,
    "refused": lambda rig: rig["b"].script(refusal(400)),
    "silent": lambda rig: rig["b"].script(Stall()),
    "failed": lambda rig: rig["b"].script(frames(end=Stall())),
    "all failed": lambda rig: setattr(rig["b"], "default", refusal(503, LONG)),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("end", ENDS)
async def test_nothing_is_held_after_any_end(end: str, streamed: bool) -> None:  # noqa: FBT001
    """Of a continued conversation that moved nothing stays counted, however its request ends."""
    times = {"first_byte": "150ms", "idle": "150ms"}
    async with targets(timeouts=times) as rig:
        items = [reasoning_item("SEALED"), message_item("hello")]
        rig["a"].script(json_answer(responses_json(items=items)))
        first = await turn(rig.proxy, "one")
        rig["a"].default = refusal(503, LONG)
        ENDS[end](rig)
        await rig.ask(streamed=streamed, previous_response_id=first["id"])
        await nothing_held(rig)
        await rig.check()


# A drain, a reload, a client that leaves: between two attempts


async def in_a_backoff(rig: Rig, **fields: Any) -> Any:
    """Begin a request at the lone target `a`, which asks for 4 s, and wait until it is waiting."""
    rig["a"].script(refusal(503, ("retry-after", "4")))
    client = await rig.begin(**fields)
    await rig["a"].wait_request(1)

    async def waiting() -> None:
        assert (await rig.attempts()).get(("a", "status_5xx")) == 1 or any(
            call.exchange.results for call in rig.proxy.daemon._proxy.live
        )

    await eventually(waiting)
    return client


@pytest.mark.parametrize("after", [refusal(503, ("retry-after-ms", "400")), []])
async def test_no_deadline_of_an_attempt_runs_in_a_backoff(
    after: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between attempts nobody is late: neither `idle` nor `first_byte` ends the wait."""
    monkeypatch.setattr(attempts, "BACKOFF", 0.4)
    monkeypatch.setattr(random, "uniform", lambda _, most: most)
    times = {"idle": "150ms", "first_byte": "150ms"}
    async with targets("a", timeouts=times, route={"retry_unsafe": True}) as rig:
        rig["a"].script(after or [Stall()])
        began = time.monotonic()
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from a"
        assert seen.line["attempts"] == 2
        assert time.monotonic() - began >= 0.4
        await rig.check()


async def test_one_that_is_left_alone_meanwhile_is_not_tried() -> None:
    """What the last one said is told, not that another takes no requests."""
    away = {"failures": 1, "cooldown": "1min", "max_cooldown": "1min"}
    async with targets(breaker=away) as rig:
        going = asyncio.Event()
        rig["a"].script(Wait(going), refusal(429, LONG))
        client = await rig.begin()
        await rig["a"].wait_request(1)
        upstreams = rig.proxy.daemon._proxy.snapshot.config.upstreams
        rig.proxy.daemon._proxy.standings.of(upstreams["b"]).breaker.refused(time.monotonic())
        going.set()
        answer = await client.answer()
        assert (answer.status, answer.headers["retry-after"]) == (429, "30")
        assert answer.headers["x-aiproxy-upstream"] == "a"
        assert rig.got == {"a": 1}
        await rig.check()


async def test_the_soonest_is_waited_for() -> None:
    """Of those that ask for a while the one that comes back first is asked first."""
    async with targets("abc", retries=3) as rig:
        for name, wait in {"a": "900", "b": "300", "c": "600"}.items():
            rig[name].script(refusal(503, ("retry-after-ms", wait)))
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from b"
        assert rig.got == {"a": 1, "b": 2, "c": 1}
        await rig.check()


async def test_nobody_is_asked_again_before_its_time() -> None:
    """What a target has asked for holds also where the one before it has just failed again."""
    async with targets(retries=3) as rig:
        rig["a"].script(refusal(503))
        rig["a"].script(refusal(503, ("retry-after", "60")))
        rig["b"].script(refusal(503, ("retry-after-ms", "800")))
        began = time.monotonic()
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from b"
        assert time.monotonic() - began >= 0.8
        assert rig.got == {"a": 2, "b": 2}
        await rig.check()


async def test_a_short_cooldown_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lone target that this request has had left alone is probed by it, though timers are early.

    Those of the event loop are of whole milliseconds.
    """
    sleep = asyncio.sleep
    monkeypatch.setattr(asyncio, "sleep", lambda seconds: sleep(max(0.0, seconds - 0.002)))
    short = {"failures": 1, "cooldown": "300ms", "max_cooldown": "1s"}
    async with targets("a", breaker=short) as rig:
        rig["a"].script(refusal(503))
        began = time.monotonic()
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from a"
        assert time.monotonic() - began >= 0.3
        assert rig.told("a") == [
            "upstream left alone",
            "upstream probed",
            "upstream available again",
        ]
        await rig.check()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_drain_in_a_backoff(streamed: bool) -> None:  # noqa: FBT001
    """At the drain's end the request is 503 `shutting_down`, and no other attempt is made."""
    async with targets("a", drain={"delay": "0s", "timeout": "100ms"}) as rig:
        client = await in_a_backoff(rig, streamed=streamed)
        reading = asyncio.create_task(client.answer())
        await rig.proxy.daemon.stop()
        answer = await asyncio.wait_for(reading, 3)
        check_error(answer, 503, "shutting_down", "responses")
        assert rig.got == {"a": 1}
        (line,) = rig.proxy.request_logs()
        assert (line["outcome"], line["attempts"]) == ("drained", 1)
        check_charge(line, "nothing")
        assert rig.proxy.daemon._proxy.held == 0


async def test_a_drain_in_a_backoff_after_a_heartbeat() -> None:
    """If a comment was sent the end of the drain is told in band."""
    drain = {"delay": "0s", "timeout": "100ms"}
    async with targets("a", drain=drain, streams={"keepalive": "50ms"}) as rig:
        client = await in_a_backoff(rig, streamed=True)
        assert (await client.read_head()).status == 200
        reading = asyncio.create_task(client.read_body())
        await rig.proxy.daemon.stop()
        body = (await asyncio.wait_for(reading, 3)).replace(b": keepalive\n\n", b"")
        assert [kind for kind, _ in parse_sse(body)] == ["response.created", "response.failed"]
        assert b"[shutting_down]" in body
        assert rig.got == {"a": 1}


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_reload_in_a_backoff(streamed: bool) -> None:  # noqa: FBT001
    """The next attempt is made under the configuration that the request began with."""
    async with ScriptedUpstream() as other, targets("a") as rig:
        rig["a"].script(refusal(503, ("retry-after-ms", "500")))
        client = await rig.begin(streamed=streamed)
        await rig["a"].wait_request(1)
        await rig.reload(config({"a": other.url}, retries=0))
        answer = await client.answer()
        assert said("responses", answer) == "from a"
        assert (len(rig["a"].requests), other.requests) == (2, [])
        assert (await rig.proxy.post()).status == 200
        assert len(other.requests) == 1


@pytest.mark.parametrize("keepalive", ["50ms", "15s"])
async def test_a_client_that_leaves_in_a_backoff(keepalive: str) -> None:
    """It is noticed at once, with and without heartbeats, and nothing is kept of it."""
    async with targets("a", streams={"keepalive": keepalive}) as rig:
        await rig.rest()
        client = await in_a_backoff(rig, streamed=True)
        await client.close()

        async def ended() -> None:
            assert 499 in {line["status"] for line in rig.proxy.request_logs()}

        await eventually(ended, 1.0)
        (line,) = [it for it in rig.proxy.request_logs() if it["status"] == 499]
        assert (line["attempts"], line["outcome"]) == (1, "client_disconnected")
        check_charge(line, "nothing")
        assert rig.got == {"a": 1}
        await nothing_held(rig)
        await rig.check()


def test_a_client_that_is_gone_when_what_was_held_is_let_go() -> None:
    """It is no error: whoever writes next is told."""

    def gone(_: Any) -> None:
        raise ConnectionResetError

    settled: list[bool] = []
    reply = SimpleNamespace(started=False)
    call: Any = SimpleNamespace(reply=reply, start_stream=gone, kept=None)
    answer: Any = SimpleNamespace(passed_on=list)
    stream: Any = None
    held = relay.Relay(call, stream, answer, 1.0, lambda: settled.append(True))
    held.release()
    held.release()
    assert settled == [True]
