"""Whose turn it is among targets: who takes one, and when."""

import asyncio
from typing import Any

import pytest

from faults import check_error, json_of
from rig import TEAM_A, key_hash
from targets_rig import Rig, config, refusal, said, targets
from upstream import Stall, Wait, json_answer

EVEN = ["a", "b"]


async def served(rig: Rig, **fields: Any) -> dict[str, Any]:
    """Make a request that must succeed; return its answer."""
    seen = await rig.ask(**fields)
    assert seen.answer.status == 200, seen.answer
    answer: dict[str, Any] = seen.answer.json()
    return answer


async def test_a_conversation_takes_no_turn_of_another() -> None:
    """Conversations of two turns begin at each target alike: going on is nobody's turn."""
    async with targets(pools=EVEN) as rig:
        for _ in range(4):
            first = await served(rig)
            await served(rig, previous_response_id=first["id"])
        assert rig.got == {"a": 4, "b": 4}
        await rig.check()


async def test_a_conversation_that_has_to_move_takes_a_turn() -> None:
    """Where its own target takes no requests the others share its next turns."""
    away = {"failures": 1, "cooldown": "1min", "max_cooldown": "1min"}
    async with targets("abc", pools=["a", "b", "c"], breaker=away) as rig:
        first = await served(rig)
        assert rig.got == {"a": 1}
        rig["a"].script(refusal(403))
        while (await rig.states())["a"] == "closed":
            await rig.ask(store=False)
        for server in rig.servers.values():
            server.requests.clear()
        for _ in range(4):
            await served(rig, previous_response_id=first["id"])
        assert rig.got == {"b": 2, "c": 2}
        await rig.check()


@pytest.mark.parametrize("healthy", [1, 2])
async def test_a_higher_tier_has_its_turns_when_it_is_asked(healthy: int) -> None:
    """However many requests it was not asked for, its targets take turns with those it was."""
    pools = [{"name": "a"}, *({"name": name, "tier": 2} for name in "bc")]
    async with targets("abc", pools=pools) as rig:
        for _ in range(4):
            for _ in range(healthy):
                await served(rig)
            rig["a"].script(refusal(503))
            await served(rig)
        assert rig.got == {"a": 4 + 4 * healthy, "b": 2, "c": 2}
        await rig.check()


async def test_many_that_fail_over_at_once_share_the_higher_tier() -> None:
    """Whose turn it is there is decided as each comes, not as each began."""
    pools = [{"name": "a"}, *({"name": name, "tier": 2} for name in "bc")]
    async with targets("abc", pools=pools) as rig:
        going = asyncio.Event()
        rig["a"].default = [Wait(going), *refusal(503)]
        posts = [asyncio.create_task(rig.proxy.post()) for _ in range(12)]
        await rig["a"].wait_request(12)
        going.set()
        assert {post.status for post in await asyncio.gather(*posts)} == {200}
        assert rig.got == {"a": 12, "b": 6, "c": 6}
        await rig.check()


async def test_a_higher_tier_leaves_out_who_takes_no_requests() -> None:
    """One that is full has no turn, and gains nothing meanwhile."""
    pools = [{"name": "a"}, *({"name": name, "tier": 2} for name in "bc")]
    async with targets("abc", pools=pools, each={"b": {"max_concurrent": 1}}) as rig:
        rig["a"].default = refusal(503)
        rig["b"].script(Stall())
        client = await rig.begin()
        await rig["b"].wait_request(1)
        for _ in range(3):
            assert said("responses", (await rig.ask()).answer) == "from c"
        await client.close()
        await asyncio.wait_for(rig["b"].requests[0].closed.wait(), 2)
        for _ in range(4):
            await served(rig)
        assert (rig.got["b"], rig.got["c"]) == (1 + 2, 3 + 2)
        await rig.check()


async def test_a_refused_request_takes_no_turn() -> None:
    """What a limit refuses, or no target can be asked for, is nobody's turn."""
    limits = {"team-a": {"sha256": key_hash(TEAM_A), "limits": {"concurrent": 1}}}
    async with targets(pools=EVEN, keys=limits) as rig:
        for turn in range(4):
            name = "ab"[turn % 2]
            going = asyncio.Event()
            rig[name].script(Wait(going), json_answer(json_of("responses")))
            client = await rig.begin()
            await rig[name].wait_request(1 + turn // 2)
            assert (await rig.proxy.post()).status == 429
            going.set()
            assert (await client.answer()).status == 200
        assert rig.got == {"a": 2, "b": 2}


async def test_a_target_that_cannot_say_it_has_no_turn() -> None:
    """Who cannot be asked for a request loses no turn by it: in all each has its share."""
    search = [{"type": "web_search"}]
    async with targets(pools=EVEN, each={"a": {"apis": ["chat"]}}) as rig:
        for _ in range(4):
            await served(rig, tools=search, store=False)
            await served(rig, store=False)
        assert rig.got == {"a": 4, "b": 4}
        await rig.check()


async def test_counting_is_for_those_who_can_while_they_take_requests() -> None:
    """While the one that counts is left alone it is 503: a bridge cannot count for it."""
    away = {"failures": 1, "cooldown": "1min", "max_cooldown": "1min"}
    each = {"a": {"apis": ["responses"]}, "b": {"apis": ["chat"]}}
    async with targets(each=each, breaker=away) as rig:
        rig["a"].script(refusal(403))
        await rig.ask()
        body = {"model": "gpt-test", "input": "hi"}
        answer = await rig.proxy.post("/v1/responses/input_tokens", body)
        check_error(answer, 503, "upstream_overloaded", "responses")
        assert 55 <= int(answer.headers["retry-after"]) <= 60
        assert rig.got == {"a": 1}
        await rig.check(answer.body)


async def test_counting_takes_turns() -> None:
    """Counting the tokens of requests is shared by those that can count."""
    async with targets(pools=EVEN) as rig:
        for server in rig.servers.values():
            server.default = json_answer({"input_tokens": 7})
        for _ in range(4):
            body = {"model": "gpt-test", "messages": [{"role": "user", "content": "hi"}]}
            answer = await rig.proxy.post("/v1/messages/count_tokens", body)
            assert answer.status == 200, answer
        assert rig.got == {"a": 2, "b": 2}


async def test_routes_that_share_upstreams_have_turns_of_their_own() -> None:
    """Requests on one route change nothing about the turns of another."""
    routes = [
        {"model": "gpt-test", "upstreams": EVEN},
        {"model": "other", "upstreams": EVEN},
    ]
    async with targets(routes=routes) as rig:
        for _ in range(3):
            await served(rig)
            assert (await rig.ask(model="other")).answer.status == 200
        lines = await rig.lines(6)
        for route in ("gpt-test", "other"):
            asked = [line["upstream"] for line in lines if line["route"] == route]
            assert asked == ["a", "b", "a"]
        await rig.check()


async def test_a_reload_takes_other_weights() -> None:
    """From the reload on each gets its share by the new weights, exactly."""
    async with targets(pools=EVEN) as rig:
        for _ in range(3):
            await served(rig)
        urls = {name: server.url for name, server in rig.servers.items()}
        pools = [{"name": "a"}, {"name": "b", "weight": 4}]
        await rig.reload(config(urls, pools=pools))
        for server in rig.servers.values():
            server.requests.clear()
        for _ in range(10):
            await served(rig)
        assert rig.got == {"a": 2, "b": 8}
        await rig.check()
