"""A client may leave at any moment of its attempts: nothing is kept, and nobody is stuck."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from faults import json_of
from invariants import eventually
from sessions_rig import turn
from steps import Step
from targets_rig import LIFECYCLE, Rig, failed_events, frames, refusal, said, targets
from upstream import Reset, Sleep, Stall, json_answer

TURNS = 45  # of the event loop: more than any of these requests takes to its last await
ONE = {"max_concurrent": 1}


def ok(text: str) -> list[Step]:
    """Answer well, after a moment."""
    return [Sleep(0.001), *json_answer(json_of("responses", text))]


PLAYS: dict[str, Callable[[Rig], None]] = {
    "moves on": lambda rig: rig["a"].script(refusal(503)),
    "waits": lambda rig: rig["a"].script(refusal(429, ("retry-after", "3"))),
    "declared": lambda rig: rig["a"].script(frames(*failed_events())),
    "held": lambda rig: rig["a"].script(frames(*LIFECYCLE, end=Stall())),
    "reset": lambda rig: rig["a"].script([Reset()]),
    "silent": lambda rig: rig["a"].script([Stall()]),
}


async def check_free(rig: Rig) -> None:
    """Assert that no place, no byte and no request is held."""

    async def holds() -> None:
        proxy = rig.proxy.daemon._proxy
        upstreams = proxy.snapshot.config.upstreams.values()
        assert {
            each.name: proxy.standings.of(each).in_flight for each in upstreams
        } == dict.fromkeys(rig.servers, 0)
        assert (proxy.held, proxy.live) == (0, set())

    await eventually(holds)


@pytest.mark.parametrize(
    ("play", "continued"),
    [*((play, False) for play in PLAYS), ("moves on", True), ("held", True)],
)
async def test_a_client_that_leaves_at_any_moment(play: str, continued: bool) -> None:  # noqa: FBT001
    """After any turn of the event loop the places are free, no byte is held, the next is served."""
    route = {"retry_unsafe": True}
    async with targets(each={"a": ONE, "b": ONE}, route=route) as rig:
        await rig.rest()
        fields: dict[str, Any] = {"store": False, "streamed": play in {"declared", "held"}}
        if continued:
            fields["previous_response_id"] = (await turn(rig.proxy, "one"))["id"]
        for turns in range(TURNS):
            PLAYS[play](rig)
            client = await rig.begin(**fields)
            for _ in range(turns):
                await asyncio.sleep(0)
            client.abort()
            await check_free(rig)
            for server in rig.servers.values():
                server.heal()
        assert said("responses", (await rig.ask()).answer) == "from a"
        assert not [it for it in rig.proxy.logs() if it.get("event") == "bug"]
        await rig.check()


@pytest.mark.parametrize("how", ["ok", "503", "cut", "silent", "401"])
async def test_a_probe_that_is_left_at_any_moment(how: str) -> None:
    """However far the probe came there is another: no upstream is left alone for ever."""
    scripts: dict[str, Any] = {
        "ok": ok("from a"),
        "503": refusal(503),
        "cut": frames(*LIFECYCLE, end=Reset()),
        "silent": [Stall()],
        "401": refusal(401),
    }
    bounds = {"failures": 1, "cooldown": "1ms", "max_cooldown": "1ms"}
    async with targets("a", retries=0, each={"a": ONE}, breaker=bounds) as rig:
        await rig.rest()
        for turns in range(0, TURNS, 2):
            rig["a"].script(refusal(500))
            await rig.ask()
            await asyncio.sleep(0.002)  # the cooldown itself
            rig["a"].script(scripts[how])
            client = await rig.begin(streamed=how == "cut")
            for _ in range(turns):
                await asyncio.sleep(0)
            client.abort()
            await check_free(rig)
            rig["a"].heal()
            await asyncio.sleep(0.002)
            assert said("responses", (await rig.ask()).answer) == "from a"
            assert await rig.states() == {"a": "closed"}
        assert not [it for it in rig.proxy.logs() if it.get("event") == "bug"]
        await rig.check()


async def test_many_that_leave_at_once_never_exceed_it() -> None:
    """Under many that come and leave at all moments no more than `max_concurrent` are under way."""
    async with targets(each={"a": {"max_concurrent": 3}, "b": {"max_concurrent": 2}}) as rig:
        await rig.rest()
        most: dict[str, int] = {}
        proxy = rig.proxy.daemon._proxy
        upstreams = proxy.snapshot.config.upstreams

        def slow(name: str) -> Callable[[Any], list[Step]]:
            def played(_: Any) -> list[Step]:
                now = proxy.standings.of(upstreams[name]).in_flight
                most[name] = max(most.get(name, 0), now)
                return ok(f"from {name}")

            return played

        for name in "ab":
            rig[name].default = slow(name)

        async def come(number: int) -> int:
            client = await rig.begin(streamed=False, store=False)
            if number % 3 == 0:
                for _ in range(number % 50):
                    await asyncio.sleep(0)
                client.abort()
                return 499
            return (await client.answer()).status

        for _ in range(5):
            statuses = await asyncio.gather(*(come(number) for number in range(40)))
            assert set(statuses) <= {200, 499, 503}
        assert most == {"a": 3, "b": 2}
        await check_free(rig)
        await rig.check()
