"""Which of a route's targets is asked: tiers, weights, the conversation's own, bridges."""

import asyncio
import itertools
import json
from typing import Any

import pytest

from answers import chat_json
from faults import check_charge
from refusals import Refusal
from responses import function_item, message_item, reasoning_item, responses_json
from rig import TEAM_A, key_hash, totals
from sessions_rig import response_of, turn
from targets_rig import NEVER, Rig, items_sent, refusal, said, targets
from upstream import Stall, json_answer

OPENS = {"failures": 1, "cooldown": "1min", "max_cooldown": "1min"}


def who(rig: Rig) -> str:
    """Return the names of those who were asked, in order, as of the log's lines."""
    return "".join(line["upstream"] for line in rig.proxy.request_logs())


# Weights and tiers


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ({"a": 1, "b": 1}, "ab"),
        ({"a": 3, "b": 1}, "aaba"),
        ({"a": 5, "b": 1, "c": 1}, "aabacaa"),  # as nginx's own example
        ({"a": 1, "b": 2, "c": 3}, "cbacbc"),
    ],
)
async def test_targets_of_a_tier_take_turns_by_weight(weights: dict[str, int], turns: str) -> None:
    """Smooth weighted round robin: each has its share in every round, spread evenly."""
    pools = [{"name": name, "weight": weight} for name, weight in weights.items()]
    async with targets("".join(weights), pools=pools) as rig:
        for _ in range(2 * sum(weights.values())):
            await rig.ask()
        seen = who(rig)
        first = seen[: len(turns)]
        assert {name: first.count(name) for name in weights} == weights
        assert seen == first * 2
        assert max(len(list(group)) for _, group in itertools.groupby(seen)) <= max(
            len(list(group)) for _, group in itertools.groupby(turns * 2)
        )
        await rig.check()


async def test_streams_and_answers_and_apis_take_the_same_turns() -> None:
    """There is one turn for a route, whatever is asked for."""
    async with targets(pools=["a", "b"]) as rig:
        for api, streamed in (("responses", True), ("chat", False), ("messages", True)) * 2:
            await rig.ask(api, streamed=streamed)  # type: ignore[arg-type]
        assert rig.got == {"a": 3, "b": 3}
        await rig.check()


async def test_who_is_left_alone_gains_nothing_meanwhile() -> None:
    """One that comes back gets its share, and makes up for nothing."""
    async with targets(pools=["a", "b"], retries=0, breaker={**OPENS, "failures": 2}) as rig:
        rig["a"].default = refusal(500)
        for _ in range(3):
            await rig.ask()
        rig["a"].heal()
        for _ in range(6):
            await rig.ask()
        assert (await rig.states())["a"] == "open"
        asked = len(rig["a"].requests)
        rig.calm()
        for _ in range(6):
            await rig.ask()
        assert len(rig["a"].requests) - asked == 3
        await rig.check()


async def test_a_higher_tier_is_tried_when_every_lower_one_has_failed() -> None:
    """Both of the first tier are asked before the one of the second, whatever the order."""
    pools = [{"name": "c", "tier": 2}, {"name": "a", "weight": 3}, {"name": "b"}]
    async with targets("abc", pools=pools) as rig:
        for _ in range(4):
            await rig.ask()
        assert rig.got == {"a": 3, "b": 1}
        for name in "ab":
            rig[name].script(refusal(503))
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from c"
        assert rig.got == {"a": 4, "b": 2, "c": 1}
        assert seen.line["attempts"] == 3
        await rig.check()


async def test_a_higher_tier_while_lower_ones_are_left_alone_or_full() -> None:
    """What takes no requests now is passed by without an attempt."""
    each = {"b": {"max_concurrent": 1}}
    tiers = [{"name": name, "tier": 1 + (name == "c")} for name in "abc"]
    async with targets("abc", pools=tiers, breaker=OPENS, each=each) as rig:
        rig["a"].script(refusal(403))
        await rig.ask()
        rig["b"].script(Stall())
        client = await rig.begin()
        await rig["b"].wait_request(1)
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from c"
        assert (seen.line["attempts"], seen.line["upstream"]) == (1, "c")
        await client.close()
        await rig.check()


async def test_one_upstream_twice_under_two_names() -> None:
    """Targets may be models of the same upstream."""
    pools = [{"name": "a", "model": "large"}, {"name": "a", "model": "small", "tier": 2}]
    async with targets("a", pools=pools) as rig:
        rig["a"].script(refusal(503))
        seen = await rig.ask()
        assert [request.json()["model"] for request in rig["a"].requests] == ["large", "small"]
        assert (seen.line["attempts"], seen.line["upstream"]) == (2, "a")
        await rig.check()


async def test_a_target_that_does_not_speak_it_is_none() -> None:
    """Only those that speak the endpoint's API are asked, and only their state counts."""
    each = {"a": {"apis": ["responses"]}, "b": {"apis": ["chat"]}}
    async with targets(each=each, breaker=OPENS) as rig:
        seen = await rig.ask("chat")
        assert said("chat", seen.answer) == "from b"
        rig["b"].default = refusal(503, ("retry-after", "40"))
        await rig.ask("chat")
        seen = await rig.ask("chat")
        assert seen.answer.status == 503
        assert int(seen.answer.headers["retry-after"]) >= 38
        assert "a" not in rig.got
        await rig.check()


async def test_the_first_glob_that_matches_wins() -> None:
    """In the order of the file, exact names included; attempts stay within that route."""
    listed = [
        {"model": "gpt-test", "upstreams": ["a"]},
        {"model": "org/x*", "upstreams": ["b"]},
        {"model": "org/*", "upstreams": ["a"]},
        {"model": "org/xy", "upstreams": ["a"]},
        {"model": "org/????", "upstreams": ["a"]},
    ]
    async with targets(routes=listed) as rig:
        for model, name in {"org/xy": "b", "org/y": "a", "org/x": "b", "gpt-test": "a"}.items():
            seen = await rig.ask(model=model)
            assert seen.line["upstream"] == name, model
        rig["b"].default = refusal(503)
        seen = await rig.ask(model="org/xyz")
        assert (seen.answer.status, seen.line["attempts"]) == (503, 3)
        assert seen.line["route"] == "org/x*"
        assert (await rig.ask(model="ORG/x")).answer.status == 404
        await rig.check()


# Conversations


async def test_the_conversation_stays_where_it_is() -> None:
    """The upstream that made the last turn is asked first, before tiers and turns."""
    async with targets() as rig:
        rig["a"].script(refusal(503))
        first = await turn(rig.proxy, "one")
        assert rig.got == {"a": 1, "b": 1}
        second = await turn(rig.proxy, "two", first["id"], streamed=True)
        assert rig.got == {"a": 1, "b": 2}
        await turn(rig.proxy, "other")
        assert rig.got == {"a": 2, "b": 2}
        await turn(rig.proxy, "three", second["id"])
        assert rig.got == {"a": 2, "b": 3}
        await rig.check()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_replayed_conversation_arrives_whole_at_the_second_target(
    streamed: bool,  # noqa: FBT001
) -> None:
    """Every item of the conversation is sent there, as it was to the first; the turn is stored."""
    async with targets() as rig:
        items = [message_item("let me see"), function_item(call_id="call_1")]
        rig["a"].script(json_answer(responses_json(items=items)))
        first = await turn(rig.proxy, "one")
        rig["a"].script(refusal(429))
        result = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
        second = await turn(rig.proxy, [result], first["id"], streamed=streamed)
        there, moved = rig["a"].requests[-1], rig["b"].requests[-1]
        assert items_sent(there) == items_sent(moved)
        assert len(items_sent(moved)) == 4
        third = await turn(rig.proxy, "three", second["id"])
        assert third["previous_response_id"] == second["id"]
        assert rig.got == {"a": 2, "b": 2}
        assert len(items_sent(rig["b"].requests[-1])) == 6
        await rig.check()


async def test_encrypted_reasoning_stays_with_its_maker() -> None:
    """The second target gets all but the reasoning that the first one encrypted (trap 39)."""
    async with targets() as rig:
        items = [reasoning_item("SEALED-BY-A"), message_item("hello")]
        rig["a"].script(json_answer(responses_json(items=items)))
        first = await turn(rig.proxy, "one")
        rig["a"].script(refusal(503))
        await turn(rig.proxy, "two", first["id"])
        assert b"SEALED-BY-A" in rig["a"].requests[-1].body
        assert b"SEALED-BY-A" not in rig["b"].requests[-1].body
        assert len(items_sent(rig["b"].requests[-1])) == 3
        await rig.check()


@pytest.mark.parametrize("named", [False, True])
async def test_reasoning_that_is_left_out_is_counted(named: bool) -> None:  # noqa: FBT001
    """Each item once, of the upstream that did not get it, whether replayed or named by its id."""
    async with targets() as rig:
        items = [reasoning_item("SEALED-1"), reasoning_item("SEALED-2"), message_item("hello")]
        rig["a"].script(json_answer(responses_json(items=items)))
        first = await turn(rig.proxy, "one")
        rig["a"].script(refusal(503))
        if named:
            names = [{"type": "item_reference", "id": item["id"]} for item in first["output"]]
            await turn(rig.proxy, [*names, {"role": "user", "content": "two"}])
        else:
            await turn(rig.proxy, "two", first["id"])
        assert b"SEALED" not in rig["b"].requests[-1].body
        name = "aiproxy_sessions_reasoning_left_out_total"
        assert totals(await rig.proxy.metrics(), name, "upstream") == {"b": 2}
        await rig.check()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("order", [("responses", "chat"), ("chat", "responses")])
async def test_a_bridge_and_a_native_target_in_one_route(
    order: tuple[str, str],
    streamed: bool,  # noqa: FBT001
) -> None:
    """Whichever speaks what, the other one goes on with the conversation, and back."""
    each = {name: {"apis": [api]} for name, api in zip("ab", order, strict=True)}
    async with targets(each=each) as rig:
        first = await turn(rig.proxy, "one", streamed=streamed)
        rig["a"].script(refusal(503))
        second = await turn(rig.proxy, "two", first["id"], streamed=streamed)
        rig["b"].script(refusal(503))
        await turn(rig.proxy, "three", second["id"], streamed=streamed)
        native, chat = ("a", "b") if order[0] == "responses" else ("b", "a")
        for name, texts in (("a", 5), ("b", 5)):
            last = rig[name].requests[-1].json()
            told = last["messages"] if name == chat else last["input"]
            assert len(told) == texts, name
            assert "from a" in json.dumps(told)
            assert "from b" in json.dumps(told)
        assert {r.path for r in rig[native].requests} == {"/v1/responses"}
        assert {r.path for r in rig[chat].requests} == {"/v1/chat/completions"}
        lines = await rig.lines(3)
        assert [line["attempts"] for line in lines] == [1, 2, 2]
        assert "".join(line["upstream"] for line in lines) == "aba"
        check_charge(lines[-1], "usage")
        await rig.check()


async def test_a_later_target_that_cannot_say_it_is_passed_by() -> None:
    """One that cannot be asked for this is no target: the one after it is tried."""
    each = {"b": {"apis": ["chat"]}}
    async with targets("abc", each=each) as rig:
        rig["a"].script(refusal(503))
        seen = await rig.ask(tools=[{"type": "web_search"}])
        assert seen.answer.status == 200, seen.answer
        assert said("responses", seen.answer) == "from c"
        assert rig.got == {"a": 1, "c": 1}
        await rig.check()


async def test_a_first_target_that_cannot_say_it_is_passed_by() -> None:
    """A bridge that cannot express the request leaves it to a target that can."""
    async with targets(each={"a": {"apis": ["chat"]}}) as rig:
        seen = await rig.ask(tools=[{"type": "web_search"}])
        assert said("responses", seen.answer) == "from b"
        assert (seen.line["attempts"], rig.got) == (1, {"b": 1})
        await rig.check()


async def test_no_other_target_can_say_it() -> None:
    """Then the failure of the one that was asked is told, not why the other was not."""
    async with targets(each={"b": {"apis": ["chat"]}}, retries=1) as rig:
        rig["a"].default = refusal(429, ("retry-after", "30"))
        seen = await rig.ask(tools=[{"type": "web_search"}])
        assert seen.answer.status == 429
        assert "b" not in rig.got
        await rig.check()


async def test_a_conversation_that_the_upstream_holds_goes_nowhere_else() -> None:
    """With `sessions: upstream` a 503 of its holder is tried again there, and then told."""
    each = {name: {"sessions": "upstream"} for name in "ab"}
    async with targets(each=each) as rig:
        first = await turn(rig.proxy, "one")
        rig["a"].default = refusal(503)
        seen = await rig.ask(previous_response_id=first["id"])
        assert seen.answer.status == 503
        assert "b" not in rig.got
        await rig.check()


@pytest.mark.parametrize("why", ["open", "full"])
async def test_a_conversation_whose_holder_takes_no_requests(why: str) -> None:
    """That is 503 with Retry-After, never `not found`: it is there, though not now."""
    each = {"a": {"sessions": "upstream", "max_concurrent": 1}, "b": {"sessions": "upstream"}}
    async with targets(each=each, breaker=OPENS) as rig:
        first = await turn(rig.proxy, "one")
        if why == "open":
            rig["a"].script(refusal(403))
            await rig.ask()
        else:
            rig["a"].script(Stall())
            await rig.begin()
            await rig["a"].wait_request(2)
        before = rig.got
        seen = await rig.ask(previous_response_id=first["id"])
        refused = Refusal(503, "upstream_overloaded", "server_error", headers={"retry-after": None})
        refused.check(seen.answer, upstream=seen.answer.headers.get("x-aiproxy-upstream"))
        assert rig.got == before
        await rig.check()


async def test_a_moved_turn_is_stored_once() -> None:
    """Of a turn that took two attempts one is kept, with what the second target said."""
    async with targets() as rig:
        rig["a"].script(refusal(503))
        made = await turn(rig.proxy, "one", streamed=True)
        answer = await rig.proxy.get(f"/v1/responses/{made['id']}")
        assert said("responses", answer) == "from b"
        metrics = await rig.proxy.metrics()
        assert metrics["aiproxy_sessions_stored_turns", frozenset()] == 1
        await rig.check()


# What limits


async def test_a_request_that_moves_is_one_request() -> None:
    """Attempts take no further request of a limit, and all is given back."""
    limits = {"requests": "3/h", "tokens": "100000/h", "concurrent": 1}
    keys = {"team-a": {"sha256": key_hash(TEAM_A), "limits": limits}}
    async with targets(keys=keys) as rig:
        for _ in range(3):
            rig["a"].script(refusal(503))
            seen = await rig.ask()
            assert said("responses", seen.answer) == "from b"
        assert seen.answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert (await rig.ask()).answer.status == 429
        assert rig.got == {"a": 3, "b": 3}


async def test_many_at_once_over_a_failing_target() -> None:
    """Under load each request is answered once, by the target that can."""
    async with targets("abc", pools=["a", "b", "c"], breaker=NEVER, retries=2) as rig:
        await rig.rest()
        rig["a"].default = refusal(503)
        rig["b"].default = refusal(429)
        answers = await asyncio.gather(*(rig.proxy.post() for _ in range(30)))
        assert [said("responses", answer) for answer in answers] == ["from c"] * 30
        counted: Any = await rig.attempts()
        assert counted["c", "ok"] == 30 == len(rig["c"].requests)
        assert counted["a", "status_5xx"] == len(rig["a"].requests)
        assert counted["b", "status_429"] == len(rig["b"].requests)
        lines = await rig.lines(32)  # with the two of `rest`
        assert sum(line["attempts"] for line in lines[2:]) == sum(rig.got.values())
        assert {line["upstream"] for line in lines[2:]} == {"c"}
        await rig.check()


async def test_a_bridged_answer_after_a_failed_native_one() -> None:
    """A bridged JSON answer after a failed native one is charged by its own usage."""
    async with targets(each={"b": {"apis": ["chat"]}}) as rig:
        rig["a"].script(refusal(529))
        rig["b"].script(json_answer(chat_json("from b")))
        seen = await rig.ask()
        assert response_of(seen.answer)["status"] == "completed"
        check_charge(seen.line, "usage")
        await rig.check()
