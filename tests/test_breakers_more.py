"""What a breaker learns from requests that are not its probe, and what a reload leaves behind."""

import asyncio
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from aiproxy.breaker import Breaker
from aiproxy.standing import Standing
from faults import events_of
from targets_rig import NEVER, Rig, config, cooled, frames, refusal, said, targets
from upstream import Reset, ScriptedUpstream, Stall, Wait

ONCE = {"failures": 1, "cooldown": "100ms", "max_cooldown": "10s"}
LASTING = {"failures": 1, "cooldown": "1min", "max_cooldown": "1min"}


def breaker(failures: int = 1) -> tuple[Breaker, list[tuple[Any, ...]]]:
    """Return one of 5 to 60 s, and what it tells."""
    told: list[tuple[Any, ...]] = []
    return Breaker(failures, 5.0, 60.0, lambda *what: told.append(what)), told


async def half_open(rig: Rig) -> None:
    """Have `a` left alone, and its cooldown pass."""
    rig["a"].script(refusal(500))
    await rig.ask()
    assert await rig.states() == {"a": "open"}
    await cooled(rig)


# Requests that began before


def test_old_failures_double_nothing() -> None:
    """A request from before that fails after the cooldown is no probe: it lengthens nothing."""
    made, told = breaker()
    made.failed(0.0)
    for _ in range(5):
        made.failed(7.0)
    assert made.wait(7.0) == 0.0
    assert told == [("open", "failures", 5.0)]
    assert made.admits(7.0)
    made.failed(7.0, probe=True)
    assert told[-1] == ("open", "failures", 10.0)


def test_an_old_failure_that_asks_for_time() -> None:
    """What it asks for is waited for all the same, up to the maximum."""
    made, told = breaker()
    made.failed(0.0)
    made.failed(7.0, 20.0)
    assert made.wait(7.0) == 20.0
    made.failed(8.0, 9999.0)
    assert made.wait(8.0) == 60.0
    assert len(told) == 1


def test_old_failures_beside_a_probe() -> None:
    """They do not end the probe's chance, nor does an old request that ends without a word."""
    made, _ = breaker()
    made.failed(0.0)
    assert made.admits(5.0)
    made.failed(5.0)
    made.unknown()
    made.succeeded()
    assert (made.state, made.admits(6.0)) == ("half-open", False)
    made.succeeded(probe=True)
    assert made.state == "closed"


def test_an_old_request_that_begins_to_be_answered() -> None:
    """Its head closes nothing, neither before the probe nor beside it."""
    made, _ = breaker()
    made.failed(0.0)
    made.answered(probe=False)
    assert not made.admits(1.0)
    assert made.admits(5.0)
    made.answered(probe=False)
    assert made.state == "half-open"


def test_a_probe_that_ends_without_a_word_is_followed_by_one() -> None:
    """It closes nothing: one request at a time tries the upstream still."""
    made, told = breaker()
    made.failed(0.0)
    assert made.admits(5.0)
    made.unknown(probe=True)
    assert (made.state, made.wait(5.0)) == ("open", 0.0)
    assert [made.admits(5.0), made.admits(5.0)] == [True, False]
    assert told[-2:] == [("open", "failures", 0.0), ("half-open", "", 0.0)]


def test_a_credential_that_an_old_request_finds_refused() -> None:
    """A refused credential says something of now, whoever finds it: it opens beside a probe."""
    made, told = breaker()
    made.failed(0.0)
    assert made.admits(5.0)
    made.refused(5.0)
    assert told[-1] == ("open", "credential", 10.0)


def test_a_success_begins_the_cooldowns_anew() -> None:
    """After a probe's success as many failures are needed as before, and the cooldown is short."""
    made, told = breaker(failures=2)
    made.failed(0.0)
    made.failed(0.0)
    assert made.admits(5.0)
    made.failed(5.0, probe=True)
    assert made.admits(15.0)
    made.answered(probe=True)
    made.succeeded()
    made.failed(15.0)
    assert made.state == "closed"
    made.failed(15.0)
    assert told[-1] == ("open", "failures", 5.0)


def test_a_credential_refused_counts_on_from_the_bound() -> None:
    """A probe after it that only begins to answer, and breaks off, opens it again at once."""
    made, _ = breaker(failures=5)
    made.refused(0.0)
    assert made.admits(5.0)
    made.answered(probe=True)
    made.failed(5.0)
    assert made.state == "open"


def test_a_cooldown_beyond_its_maximum() -> None:
    """The larger of both is the maximum, also after a reload."""
    made, told = breaker()
    made.configure(1, 30.0, 10.0)
    made.failed(0.0, 9999.0)
    assert told == [("open", "failures", 30.0)]


def test_a_full_upstream_makes_nobody_its_probe() -> None:
    """Who finds it full is not admitted, hence is no probe that never ends."""
    made, _ = breaker()
    standing = Standing(made, 1)
    assert standing.enter(0.0)
    made.failed(0.0)
    assert not standing.enter(6.0)
    assert made.state == "open"
    standing.leave()
    assert standing.enter(6.0)
    assert (made.state, standing.in_flight) == ("half-open", 1)


async def test_a_long_probe_is_one_of_many_once_it_has_begun() -> None:
    """A probe's stream whose end comes after others have failed closes nothing."""
    async with targets("a", retries=0, breaker=ONCE) as rig:
        await half_open(rig)
        events, going = events_of("responses"), asyncio.Event()
        rig["a"].script(frames(*events[:5])[:-1], Wait(going), frames(*events[5:])[1:])
        probe = await rig.begin(streamed=True)
        await probe.read_head()
        assert await rig.states() == {"a": "closed"}
        rig["a"].script(refusal(503, ("retry-after", "9")))
        await rig.ask()
        going.set()
        while (await probe.read_chunk())[0]:
            pass
        await rig.lines(3)
        assert await rig.states() == {"a": "open"}
        assert await rig.available() == {"a": 0}
        await rig.check()


async def test_a_probe_that_begins_and_breaks_off() -> None:
    """Its head lets others go; its end leaves the upstream alone again, for twice as long."""
    bounds = {"failures": 3, "cooldown": "100ms", "max_cooldown": "10s"}
    async with targets("a", retries=0, breaker=bounds) as rig:
        for _ in range(3):
            rig["a"].script(refusal(500))
            await rig.ask()
        await cooled(rig)
        rig["a"].script(frames(*events_of("responses")[:5], end=Reset()))
        await rig.ask(streamed=True)
        assert await rig.states() == {"a": "open"}
        waits = [it["retry_in_s"] for it in rig.proxy.logs() if "retry_in_s" in it]
        assert waits == [0.1, 0.2]
        await rig.check()


# Retry-After


@pytest.mark.parametrize("status", [429, 503, 529])
async def test_a_retry_after_that_is_a_date(status: int) -> None:
    """It is understood as well: nobody asks again before, and the breaker waits for it."""
    async with targets("a", breaker=LASTING | {"max_cooldown": "10min"}) as rig:
        until = format_datetime(datetime.now(UTC) + timedelta(minutes=5), usegmt=True)
        rig["a"].default = refusal(status, ("retry-after", until))
        seen = await rig.ask()
        assert seen.answer.headers["retry-after"] == until
        assert (rig.got, seen.line["attempts"]) == ({"a": 1}, 1)
        seen = await rig.ask()
        assert 295 <= int(seen.answer.headers["retry-after"]) <= 300
        await rig.check()


@pytest.mark.parametrize(
    "said_after", ["soon", "nan", "inf", "-3", "Sun, 06 Nov 1994 08:49:37 GMT", "99:99"]
)
async def test_a_retry_after_that_says_nothing(said_after: str) -> None:
    """One that is past, or no time at all, is as none: the target is asked again."""
    async with targets("a") as rig:
        rig["a"].script(refusal(503, ("retry-after", said_after)))
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from a"
        assert seen.line["attempts"] == 2
        await rig.check()


# A reload


async def test_the_end_of_a_request_to_where_an_upstream_was() -> None:
    """An attempt at an old address that fails after a reload says nothing of the new one."""
    async with ScriptedUpstream() as other, targets("a", retries=0, breaker=LASTING) as rig:
        going = asyncio.Event()
        rig["a"].script(Wait(going), refusal(500))
        client = await rig.begin()
        await rig["a"].wait_request(1)
        await rig.reload(config({"a": other.url}, retries=0, breaker=LASTING))
        going.set()
        assert (await client.answer()).status == 502
        await rig.lines(1)
        assert await rig.states() == {"a": "closed"}
        assert await rig.available() == {"a": 1}
        assert rig.told("a") == []
        assert (await rig.ask()).answer.status == 200


async def test_another_attempt_at_where_an_upstream_was() -> None:
    """A request goes on at the old address under its own configuration, and judges nobody new."""
    async with ScriptedUpstream() as other, targets("a", retries=1, breaker=NEVER) as rig:
        rig["a"].script(refusal(503, ("retry-after-ms", "300")))
        rig["a"].script(refusal(403))
        client = await rig.begin()
        await rig["a"].wait_request(1)
        await rig.reload(config({"a": other.url}, retries=0, breaker=LASTING))
        assert (await client.answer()).status == 502
        assert (len(rig["a"].requests), other.requests) == (2, [])
        assert await rig.states() == {"a": "closed"}
        assert rig.told("a") == []
        assert (await rig.ask()).answer.status == 200


async def test_an_upstream_that_goes_and_comes_back() -> None:
    """Removed while it was left alone, and named again, it is available, and the gauge says so."""
    async with targets(retries=0, breaker=LASTING) as rig:
        rig["a"].script(refusal(500))
        await rig.ask()
        urls = {name: server.url for name, server in rig.servers.items()}
        await rig.reload(config({"b": urls["b"]}, breaker=LASTING))
        assert await rig.available() == {"b": 1}
        await rig.reload(config(urls, breaker=LASTING))
        assert await rig.available() == {"a": 1, "b": 1}
        assert await rig.states() == {"a": "closed", "b": "closed"}
        assert said("responses", (await rig.ask()).answer) == "from a"


async def test_a_reload_changes_the_bounds() -> None:
    """Failures so far count against the new bound; the next cooldown is the new one."""
    many = {"failures": 5, "cooldown": "1min", "max_cooldown": "1min"}
    async with targets("a", retries=0, breaker=many) as rig:
        rig["a"].default = refusal(500)
        await rig.ask()
        await rig.ask()
        few = {"failures": 3, "cooldown": "7s", "max_cooldown": "7s"}
        await rig.reload(config({"a": rig["a"].url}, retries=0, breaker=few))
        assert await rig.states() == {"a": "closed"}
        await rig.ask()
        assert await rig.states() == {"a": "open"}
        seen = await rig.ask()
        assert 6 <= int(seen.answer.headers["retry-after"]) <= 7
        await rig.check()


async def test_a_reload_changes_how_many_may_be_under_way() -> None:
    """Those under way count against the new bound at once, whether it is more or less."""

    def bounded(most: int) -> Any:
        return {"a": {"max_concurrent": most}}

    async with targets("a", retries=0, each=bounded(1)) as rig:
        rig["a"].script(Stall())
        await rig.begin()
        await rig["a"].wait_request(1)
        urls = {"a": rig["a"].url}
        assert (await rig.proxy.post()).status == 503
        await rig.reload(config(urls, retries=0, each=bounded(2)))
        assert (await rig.proxy.post()).status == 200
        rig["a"].script(Stall())
        await rig.begin()
        await rig["a"].wait_request(3)
        await rig.reload(config(urls, retries=0, each=bounded(1)))
        assert (await rig.proxy.post()).status == 503
        await rig.proxy.close_clients()
        await rig.check()


async def test_routes_that_share_an_upstream_share_what_it_takes() -> None:
    """`max_concurrent` and the breaker are the upstream's, whichever route is asked."""
    routes = [
        {"model": "gpt-test", "upstreams": ["a"]},
        {"model": "other", "upstreams": [{"name": "a", "model": "x"}, {"name": "b", "tier": 2}]},
    ]
    full = {"a": {"max_concurrent": 1}}
    async with targets(routes=routes, retries=0, each=full, breaker=LASTING) as rig:
        rig["a"].script(Stall())
        client = await rig.begin()
        await rig["a"].wait_request(1)
        assert said("responses", (await rig.ask(model="other")).answer) == "from b"
        await client.close()
        await asyncio.wait_for(rig["a"].requests[0].closed.wait(), 2)
        rig["a"].script(refusal(403))
        await rig.ask()
        assert said("responses", (await rig.ask(model="other")).answer) == "from b"
        assert rig.got == {"a": 2, "b": 2}
        await rig.check()


async def test_counting_takes_a_place_while_it_lasts() -> None:
    """A request that only counts tokens is one of those under way, and gives its place back."""
    async with targets("a", retries=0, each={"a": {"max_concurrent": 1}}) as rig:
        rig["a"].script(Stall())
        body = {"model": "gpt-test", "messages": [{"role": "user", "content": "hi"}]}
        client = await rig.proxy.send("/v1/messages/count_tokens", body)
        await rig["a"].wait_request(1)
        assert (await rig.proxy.post()).status == 503
        await client.close()
        await asyncio.wait_for(rig["a"].requests[0].closed.wait(), 2)
        assert (await rig.proxy.post()).status == 200
        await rig.check()
