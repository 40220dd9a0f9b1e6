"""Upstreams that are left alone for a while, through the real daemon."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from faults import check_error, events_of, json_of
from invariants import eventually
from refusals import Refusal
from steps import Step
from targets_rig import NEVER, Rig, config, cooled, frames, refusal, refusing, said, targets
from upstream import (
    Finish,
    Garbage,
    Headers,
    Reset,
    ScriptedUpstream,
    Send,
    Stall,
    Wait,
    json_answer,
)

Steps = Sequence[Step]

TWO = {"failures": 2, "cooldown": "1min", "max_cooldown": "2min"}
SHORT = {"failures": 1, "cooldown": "200ms", "max_cooldown": "10s"}
UNAVAILABLE = Refusal(503, "upstream_overloaded", "server_error", headers={"retry-after": None})
JSON = ("content-type", "application/json")


async def check_left_alone(rig: Rig, seen_of: str = "a") -> None:
    """Assert that an upstream is left alone in every place that tells, and gets nothing."""
    before = len(rig[seen_of].requests) if seen_of in rig.servers else 0
    assert (await rig.states())[seen_of] == "open"
    assert (await rig.available())[seen_of] == 0
    seen = await rig.ask()
    UNAVAILABLE.check(seen.answer, upstream=seen.answer.headers.get("x-aiproxy-upstream"))
    assert int(seen.answer.headers["retry-after"]) >= 1
    assert (seen.line["attempts"], seen.line["error_code"]) == (0, "upstream_overloaded")
    if seen_of in rig.servers:
        assert len(rig[seen_of].requests) == before


FAILURES: list[Any] = [
    pytest.param(refusal(500), "status_5xx", id="500"),
    pytest.param(refusal(502), "status_5xx", id="502"),
    pytest.param(refusal(503), "status_5xx", id="503"),
    pytest.param(refusal(529), "status_5xx", id="529"),
    pytest.param(refusal(429), "status_429", id="429"),
    pytest.param([Reset()], "reset", id="reset"),
    pytest.param([Finish()], "reset", id="closed"),
    pytest.param([Stall()], "timeout", id="silent"),
    pytest.param([Garbage(100), Finish()], "protocol", id="garbage"),
    pytest.param(
        [Headers(200, [("content-type", "text/html"), ("content-length", "2")]), Send(b"hi")],
        "protocol",
        id="html",
    ),
    pytest.param([Headers(200, [JSON, ("content-length", "9")]), Reset()], "reset", id="cut"),
    pytest.param([Headers(200, [JSON, ("content-length", "9")]), Stall()], "timeout", id="idle"),
]


@pytest.mark.parametrize(("script", "result"), FAILURES)
async def test_failures_in_a_row_open_it(script: Steps, result: str) -> None:
    """So many of any kind in a row, and the upstream gets nothing for a while."""
    times = {"first_byte": "100ms", "idle": "100ms"}
    async with targets("a", retries=0, breaker=TWO, timeouts=times) as rig:
        for _ in range(2):
            assert (await rig.states())["a"] == "closed"
            assert (await rig.available())["a"] == 1
            rig["a"].script(script)
            await rig.ask()
        assert await rig.attempts() == {("a", result): 2}
        await check_left_alone(rig)
        assert rig.told("a") == ["upstream left alone"]
        await rig.check()


async def test_streams_that_are_cut_open_it() -> None:
    """A reset in the middle of a stream is a failure like any other."""
    async with targets("a", breaker=TWO) as rig:
        for _ in range(2):
            rig["a"].script(frames(*events_of("responses")[:5], end=Reset()))
            await rig.ask(streamed=True)
        assert await rig.attempts() == {("a", "reset"): 2}
        await check_left_alone(rig)
        await rig.check()


async def test_refused_connections_open_it() -> None:
    """An upstream that nobody listens at is left alone, too."""
    with refusing() as url:
        async with targets("ab", {"a": url}, breaker=TWO) as rig:
            for _ in range(4):
                seen = await rig.ask()
                assert said("responses", seen.answer) == "from b"
            assert await rig.attempts() == {("a", "connect"): 2, ("b", "ok"): 4}
            assert await rig.states() == {"a": "open", "b": "closed"}
            await rig.check()


@pytest.mark.parametrize("status", [200, 400, 404, 409, 422])
async def test_a_success_in_between(status: int) -> None:
    """A success begins anew, and so does a refusal of the request itself."""
    async with targets("a", retries=0, breaker=TWO) as rig:
        between = json_answer(json_of("responses")) if status == 200 else refusal(status)
        for script in (refusal(500), between, refusal(500), between):
            rig["a"].script(script)
            await rig.ask()
        assert await rig.states() == {"a": "closed"}
        assert rig.told("a") == []
        await rig.check()


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_credential_opens_it_at_once(status: int) -> None:
    """One 401 or 403 is enough; an error line says so; the others go on without it."""
    async with targets(breaker=TWO) as rig:
        rig["a"].script(refusal(status))
        seen = await rig.ask()
        check_error(seen.answer, 502, "upstream_credential", "responses")
        assert await rig.states() == {"a": "open", "b": "closed"}
        assert await rig.available() == {"a": 0, "b": 1}
        (line,) = [
            it
            for it in rig.proxy.logs()
            if it.get("upstream") == "a" and "level" in it and it["event"].startswith("upstream ")
        ]
        assert (line["event"], line["level"]) == ("upstream refuses our credential", "error")
        assert said("responses", (await rig.ask()).answer) == "from b"
        assert rig.got == {"a": 1, "b": 1}
        await rig.check(seen.answer.body)


# How long


async def test_it_is_probed_and_closes() -> None:
    """After the cooldown one request goes; its success closes it; each change is told once."""
    async with targets("a", retries=0, breaker=SHORT) as rig:
        rig["a"].script(refusal(500))
        await rig.ask()
        assert (await rig.ask()).answer.status == 503
        await cooled(rig)
        assert said("responses", (await rig.ask()).answer) == "from a"
        assert rig.told("a") == [
            "upstream left alone",
            "upstream probed",
            "upstream available again",
        ]
        assert (await rig.states(), await rig.available()) == ({"a": "closed"}, {"a": 1})
        await rig.check()


async def test_there_is_one_probe() -> None:
    """While the probe is under way no other request goes."""
    async with targets("a", retries=0, breaker=SHORT) as rig:
        rig["a"].script(refusal(500))
        await rig.ask()
        await cooled(rig)
        going = asyncio.Event()
        rig["a"].script(Wait(going), json_answer(json_of("responses")))
        probe = await rig.begin()
        await rig["a"].wait_request(2)
        assert await rig.states() == {"a": "half-open"}
        assert await rig.available() == {"a": 0}
        others = await asyncio.gather(*(rig.proxy.post() for _ in range(5)))
        for answer in others:
            assert (answer.status, answer.headers.get("retry-after")) == (503, "1")
        assert len(rig["a"].requests) == 2
        going.set()
        assert (await probe.answer()).status == 200
        assert await rig.states() == {"a": "closed"}
        await rig.check()


async def test_a_probe_whose_client_leaves() -> None:
    """It leaves room for another at once."""
    async with targets("a", retries=0, breaker=SHORT) as rig:
        rig["a"].script(refusal(500))
        await rig.ask()
        await cooled(rig)
        rig["a"].script(Stall())
        probe = await rig.begin()
        request = await rig["a"].wait_request(2)
        await probe.close()
        await asyncio.wait_for(request.closed.wait(), 2)
        assert said("responses", (await rig.ask()).answer) == "from a"
        await rig.check()


async def test_an_old_request_that_ends_is_no_probe() -> None:
    """A request from before it opened, whose client leaves, makes no room for a second probe."""
    async with targets("a", retries=0, breaker=SHORT) as rig:
        rig["a"].script(Stall())
        old = await rig.begin()
        first = await rig["a"].wait_request(1)
        rig["a"].script(refusal(500))
        await rig.ask()
        await cooled(rig)
        rig["a"].script(Stall())
        await rig.begin()
        await rig["a"].wait_request(3)
        await old.close()
        await asyncio.wait_for(first.closed.wait(), 2)
        assert (await rig.proxy.post()).status == 503
        assert len(rig["a"].requests) == 3
        assert await rig.states() == {"a": "half-open"}
        await rig.check()


async def test_the_cooldown_doubles_up_to_its_maximum() -> None:
    """Each probe that fails doubles it: 200, 400, 500 ms, and no more."""
    bounds = {"failures": 1, "cooldown": "200ms", "max_cooldown": "500ms"}
    async with targets("a", retries=0, breaker=bounds) as rig:
        rig["a"].default = refusal(500)
        await rig.ask()
        for wait in (0.2, 0.4, 0.5):
            await asyncio.sleep(wait)
            await rig.ask()
        alone = [it for it in rig.proxy.logs() if it.get("event") == "upstream left alone"]
        assert [it["retry_in_s"] for it in alone] == [0.2, 0.4, 0.5, 0.5]
        assert rig.got == {"a": 4}
        await rig.check()


@pytest.mark.parametrize(("asked", "least", "most"), [("7", 6, 7), ("3600", 9, 10), ("0", 1, 1)])
async def test_retry_after_lengthens_it(asked: str, least: int, most: int) -> None:
    """What the upstream asks for is kept to, up to `max_cooldown`; and told to the next client."""
    async with targets("a", retries=0, breaker=SHORT) as rig:
        rig["a"].script(refusal(503, ("retry-after", asked)))
        await rig.ask()
        seen = await rig.ask()
        assert seen.answer.status == 503
        assert least <= int(seen.answer.headers["retry-after"]) <= most
        assert rig.got == {"a": 1}
        await rig.check()


async def test_the_soonest_is_told() -> None:
    """If all are left alone Retry-After is that of the first that comes back."""
    bounds = {"failures": 1, "cooldown": "3s", "max_cooldown": "1min"}
    async with targets("abc", breaker=bounds) as rig:
        for name, wait in {"a": "40", "b": "20", "c": "50"}.items():
            rig[name].default = refusal(503, ("retry-after", wait))
        await rig.ask()
        assert rig.got == {"a": 1, "b": 1, "c": 1}
        for streamed in (False, True):
            seen = await rig.ask(streamed=streamed)
            assert seen.answer.status == 503
            assert 18 <= int(seen.answer.headers["retry-after"]) <= 20
            assert seen.line["outcome"] == "upstream_error"
        assert rig.got == {"a": 1, "b": 1, "c": 1}
        await rig.check()


async def test_a_request_waits_for_no_breaker_beyond_its_retries() -> None:
    """With one target that opens for long the failure is told at once."""
    async with targets("a", breaker={**TWO, "failures": 1}) as rig:
        rig["a"].default = refusal(503)
        seen = await asyncio.wait_for(rig.ask(), 4)
        check_error(seen.answer, 503, "upstream_overloaded", "responses")
        assert rig.got == {"a": 1}
        await rig.check()


# A reload


async def test_a_reload_forgets_nothing() -> None:
    """Who is left alone stays so under another configuration, and its counts do."""
    async with targets("a", retries=0, breaker=TWO) as rig:
        rig["a"].script(refusal(500))
        await rig.ask()
        urls = {"a": rig["a"].url}
        await rig.reload(config(urls, retries=0, breaker=TWO, log={"level": "info"}))
        rig["a"].script(refusal(500))
        await rig.ask()
        await rig.reload(config(urls, retries=0, breaker=TWO, each={"a": {"auth": "bearer"}}))
        await check_left_alone(rig)
        await rig.check()


async def test_an_upstream_at_another_address_begins_anew() -> None:
    """With another url it is available at once, and the gauge says so."""
    async with ScriptedUpstream() as other, targets("a", retries=0, breaker=TWO) as rig:
        rig["a"].default = refusal(500)
        await rig.ask()
        await rig.ask()
        assert await rig.available() == {"a": 0}
        await rig.reload(config({"a": other.url}, retries=0, breaker=TWO))
        assert await rig.states() == {"a": "closed"}
        assert await rig.available() == {"a": 1}
        assert (await rig.ask()).answer.status == 200
        assert len(other.requests) == 1


async def test_an_upstream_that_a_reload_removes_under_a_request() -> None:
    """A request in flight ends under its own configuration, other targets included."""
    async with targets() as rig:
        going = asyncio.Event()
        rig["a"].script(Wait(going), refusal(503))
        client = await rig.begin()
        await rig["a"].wait_request(1)
        await rig.reload(config({"x": rig["a"].url, "y": rig["b"].url}))
        going.set()
        answer = await client.answer()
        assert said("responses", answer) == "from b"
        assert not [it for it in rig.proxy.logs() if it.get("event") == "bug"]


async def test_a_reload_keeps_what_is_in_flight() -> None:
    """`max_concurrent` counts on over a reload, and its end is counted off."""
    full = {"a": {"max_concurrent": 1}}
    async with targets("a", each=full) as rig:
        going = asyncio.Event()
        rig["a"].script(Wait(going), json_answer(json_of("responses")))
        client = await rig.begin()
        await rig["a"].wait_request(1)
        await rig.reload(config({"a": rig["a"].url}, each=full, log={"level": "info"}))
        UNAVAILABLE.check((await rig.ask()).answer)
        going.set()
        assert (await client.answer()).status == 200
        assert (await rig.ask()).answer.status == 200
        await rig.check()


# max_concurrent


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_full_upstream_is_passed_by(streamed: bool) -> None:  # noqa: FBT001
    """While it has its most the next target is asked, and if all are full it is 503."""
    each = {"a": {"max_concurrent": 1}, "b": {"max_concurrent": 1}}
    async with targets(each=each) as rig:
        await rig.rest()
        clients = []
        for name in "ab":
            rig[name].script(Stall())
            clients.append(await rig.begin(streamed=streamed))
            await rig[name].wait_request(1)
        answer = await rig.proxy.post()
        UNAVAILABLE.check(answer, upstream=answer.headers.get("x-aiproxy-upstream"))
        assert answer.headers["retry-after"] == "1"
        assert rig.got == {"a": 1, "b": 1}
        assert await rig.states() == {"a": "closed", "b": "closed"}
        await clients[0].close()
        await asyncio.wait_for(rig["a"].requests[0].closed.wait(), 2)

        async def free_again() -> None:
            assert said("responses", await rig.proxy.post()) == "from a"

        await eventually(free_again)
        await rig.check(answer.body)


async def test_a_slot_lasts_as_long_as_the_stream() -> None:
    """A stream that was begun holds its place until its last byte."""
    async with targets("a", each={"a": {"max_concurrent": 1}}) as rig:
        events = events_of("responses")
        going = asyncio.Event()
        opened = frames(*events[:5])[:-1]
        rig["a"].script(opened, Wait(going), frames(*events[5:])[1:])
        client = await rig.begin(streamed=True)
        await client.read_head()
        await client.read_chunk()
        assert (await rig.proxy.post()).status == 503
        going.set()
        while (await client.read_chunk())[0]:
            pass
        assert (await rig.proxy.post()).status == 200
        await rig.check()


async def test_many_at_once_never_exceed_it() -> None:
    """Of many requests at once no more than `max_concurrent` are with the upstream."""
    async with targets("a", retries=0, each={"a": {"max_concurrent": 3}}) as rig:
        going = asyncio.Event()
        answer = json_answer(json_of("responses"))
        rig["a"].default = [Wait(going), *answer]
        posts = [asyncio.create_task(rig.proxy.post()) for _ in range(12)]
        await rig["a"].wait_request(3)
        refused = asyncio.as_completed(posts, timeout=5)
        for _, first in zip(range(9), refused, strict=False):
            assert (await first).status == 503
        going.set()
        statuses = [post.status for post in await asyncio.gather(*posts)]
        assert (statuses.count(200), len(rig["a"].requests)) == (3, 3)
        assert await rig.attempts() == {("a", "ok"): 3}
        await rig.check()


async def test_it_never_opens_by_being_full() -> None:
    """Requests that found it full are no failures of it."""
    bounds = {**NEVER, "failures": 1}
    async with targets("a", retries=0, breaker=bounds, each={"a": {"max_concurrent": 1}}) as rig:
        rig["a"].script(Stall())
        client = await rig.begin()
        await rig["a"].wait_request(1)
        for _ in range(3):
            assert (await rig.proxy.post()).status == 503
        assert await rig.states() == {"a": "closed"}
        await client.close()
        await rig.check()
