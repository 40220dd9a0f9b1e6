"""How attempts end in odd places: nothing is left owed, held or told of the wrong upstream."""

import asyncio
from functools import partial
from typing import Any

import pytest

from aiproxy.dialects import chat_bridge
from aiproxy.upstream_pool import Pool
from aiproxy.watch import Watch
from answers import sse
from client import parse_sse
from faults import check_charge, check_error
from invariants import eventually
from responses import responses_json
from sessions_rig import Holder, turn
from targets_rig import Rig, frames, nothing_held, refusal, refusing, said, targets
from upstream import EndChunks, Headers, Sleep, Stall, error_answer, json_answer

CHAT = {"a": {"apis": ["chat"]}, "b": {"apis": ["chat"]}}
BRIDGED = {"b": {"apis": ["chat"]}}  # which cannot be asked for SEARCH
SEARCH = [{"type": "web_search"}]
LONG = ("retry-after", "30")


def chat_frame(**choice: Any) -> bytes:
    """Return a frame of a chat stream with one choice."""
    whole = {"index": 0, "delta": {}, "finish_reason": None, **choice}
    head = {"id": "c1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return sse({**head, "choices": [whole]})


# An answer without output


@pytest.mark.parametrize("retries", [0, 2])
@pytest.mark.parametrize("end", [EndChunks(), Stall()], ids=["end", "silence"])
async def test_an_empty_answer_over_a_bridge_without_its_last_frame(
    retries: int, end: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer without any output, whose stream just ends, reaches the client like any other."""
    monkeypatch.setattr(chat_bridge, "FOR_USAGE", 0.1)
    async with targets(each=CHAT, retries=retries) as rig:
        opened = chat_frame(delta={"role": "assistant"})
        rig["a"].script(frames(opened, chat_frame(finish_reason="stop"), end=end))
        seen = await rig.ask(streamed=True)
        kinds = [kind for kind, _ in parse_sse(seen.body)]
        assert kinds == ["response.created", "response.in_progress", "response.completed"]
        assert (rig.got, seen.line["outcome"]) == ({"a": 1}, "completed")
        await rig.check(stream=seen.body, completed=True)


# A client that leaves


async def left_alone(rig: Rig) -> None:
    """Assert that both upstreams have failed: the request waits for one of them."""
    assert await rig.states() == {"a": "open", "b": "open"}


@pytest.mark.parametrize(("first", "pays"), [("silent", True), ("overloaded", False)])
async def test_who_leaves_between_attempts_pays_for_one_that_may_have_acted(
    first: str,
    pays: bool,  # noqa: FBT001
) -> None:
    """With `retry_unsafe` a silent upstream may have worked, whatever the next one says."""
    options: dict[str, Any] = {
        "route": {"retry_unsafe": True},
        "timeouts": {"first_byte": "150ms"},
        "breaker": {"failures": 1, "cooldown": "4s"},  # that long both are waited for
    }
    async with targets(retries=2, **options) as rig:
        rig["a"].script([Stall()] if first == "silent" else refusal(503))
        rig["b"].script(refusal(503))
        async with await rig.begin() as client:
            await rig["b"].wait_request()
            await eventually(partial(left_alone, rig))
            await client.close()
        (line,) = await rig.lines(1)
        assert (line["outcome"], line["attempts"]) == ("client_disconnected", 2)
        assert (line["input_tokens"] > 0, line["estimated"]) == (pays, pays)
        await nothing_held(rig)
        await rig.check()


# One that cannot be asked


@pytest.mark.parametrize("streamed", [False, True])
async def test_who_was_not_asked_is_not_named(streamed: bool) -> None:  # noqa: FBT001
    """The answer and the line name the upstream that has failed, not one passed by after it."""
    async with targets(each=BRIDGED, retries=1) as rig:
        rig["a"].default = refusal(429, LONG)
        seen = await rig.ask(streamed=streamed, tools=SEARCH)
        assert (seen.answer.status, seen.answer.headers["retry-after"]) == (429, "30")
        assert seen.answer.headers["x-aiproxy-upstream"] == seen.line["upstream"] == "a"
        assert "x-aiproxy-dropped-tools" not in seen.answer.headers
        assert (seen.line["attempts"], rig.got) == (1, {"a": 1})
        check_charge(seen.line, "nothing")
        await nothing_held(rig)
        await rig.check()


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_conversation_that_the_next_one_cannot_be_told(streamed: bool) -> None:  # noqa: FBT001
    """Where only its stored items tell that a bridge cannot go on the failure before it stands."""
    async with targets(each=BRIDGED, retries=1) as rig:
        first = await clicked(rig)
        rig["a"].default = refusal(503, LONG)
        seen = await rig.ask(streamed=streamed, previous_response_id=first["id"])
        check_error(seen.answer, 503, "upstream_overloaded", "responses")
        assert seen.answer.headers["x-aiproxy-upstream"] == seen.line["upstream"] == "a"
        assert (seen.line["attempts"], rig.got) == (1, {"a": 2})
        check_charge(seen.line, "nothing")
        await nothing_held(rig)
        await rig.check()


@pytest.mark.parametrize("retries", [0, 1])
async def test_a_conversation_that_the_first_one_cannot_be_told(retries: int) -> None:
    """Then the next target is asked that can; if there is none the reason is told."""
    away = {"failures": 1, "cooldown": "1min", "max_cooldown": "1min"}
    async with targets("abc", each=BRIDGED, retries=retries, breaker=away) as rig:
        first = await clicked(rig)
        rig["a"].script(refusal(403))
        await rig.ask()
        seen = await rig.ask(previous_response_id=first["id"])
        assert said("responses", seen.answer) == "from c"
        assert (seen.line["attempts"], rig.got) == (1, {"a": 2, "c": 1})
        rig["c"].script(refusal(403))
        await rig.ask(tools=SEARCH)
        seen = await rig.ask(previous_response_id=first["id"])
        assert seen.answer.status == 400
        assert seen.answer.json()["error"]["param"] == "previous_response_id"
        check_charge(seen.line, "nothing")
        await nothing_held(rig)
        await rig.check(seen.answer.body)


async def clicked(rig: Rig) -> dict[str, Any]:
    """Return a turn at `a` that has made an item which no bridge can express."""
    click = {"type": "click", "x": 1, "y": 2, "button": "left"}
    item = {"id": "cu_1", "type": "computer_call", "call_id": "c1", "action": click}
    item |= {"pending_safety_checks": [], "status": "completed"}
    rig["a"].script(json_answer(responses_json(items=[item])))
    return await turn(rig.proxy, "one")


async def test_who_is_passed_by_costs_no_retry() -> None:
    """Only attempts that were made are counted, and the first target has its second one."""
    async with targets("abc", each=BRIDGED, retries=2) as rig:
        for name in "ac":
            rig[name].script(refusal(503))
        seen = await rig.ask(tools=SEARCH)
        assert said("responses", seen.answer) == "from a"
        assert (seen.line["attempts"], rig.got) == (3, {"a": 2, "c": 1})
        await rig.check()


async def test_the_upstreams_own_id_is_of_the_last_attempt() -> None:
    """What the log names of an upstream's request is of the upstream that it names."""
    with refusing() as url:
        async with targets("ab", {"b": url}, retries=1) as rig:
            rig["a"].script(refusal(503, ("x-request-id", "req-of-a")))
            seen = await rig.ask()
            assert (seen.line["upstream"], seen.line["upstream_request_id"]) == ("b", "")
            rig["a"].script(refusal(400, ("x-request-id", "req-of-a")))
            seen = await rig.ask()
            assert (seen.line["upstream"], seen.line["upstream_request_id"]) == ("a", "req-of-a")
            await rig.check()


async def test_a_heartbeat_and_then_nobody_that_can_be_asked() -> None:
    """After a comment the failure is told in band also where the last target was passed by."""
    async with targets(each=BRIDGED, retries=1, streams={"keepalive": "50ms"}) as rig:
        rig["a"].script(Sleep(0.2), refusal(503, LONG))
        seen = await rig.ask(streamed=True, tools=SEARCH)
        kinds = [kind for kind, _ in parse_sse(seen.body)]
        assert kinds == ["response.created", "response.failed"]
        assert (seen.line["upstream"], seen.line["outcome"]) == ("a", "upstream_error")
        await rig.check(stream=seen.body)


async def test_a_full_target_and_the_others_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that fills up meanwhile, and one that cannot be asked: 503 at once."""
    async with targets(each={"a": {"max_concurrent": 1}, **BRIDGED}, retries=3) as rig:
        standing = rig.proxy.daemon._proxy.standings.of(
            rig.proxy.daemon._proxy.snapshot.config.upstreams["a"]
        )
        monkeypatch.setattr(type(standing), "enter", lambda *_: False)
        async with asyncio.timeout(3):
            answer = await rig.proxy.post(
                body={"model": "gpt-test", "input": "hi", "tools": SEARCH}
            )
        check_error(answer, 503, "upstream_overloaded", "responses")
        monkeypatch.undo()
        assert rig.got == {}
        await nothing_held(rig)
        await rig.check(answer.body)


async def test_all_fill_up_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where each is found full only when it is asked it is 503 at once, and no backoff follows."""
    async with targets("abc", retries=3) as rig:
        standings = rig.proxy.daemon._proxy.standings
        of = type(standings.of(rig.proxy.daemon._proxy.snapshot.config.upstreams["a"]))
        asked: list[Any] = []
        monkeypatch.setattr(of, "enter", lambda self, _: asked.append(self))
        async with asyncio.timeout(3):
            seen = await rig.ask()
        monkeypatch.undo()
        check_error(seen.answer, 503, "upstream_overloaded", "responses")
        assert len({id(each) for each in asked}) == len(asked) == 3
        assert seen.line["attempts"] == 0
        check_charge(seen.line, "nothing")
        await rig.check(seen.answer.body)


@pytest.mark.parametrize(("names", "most"), [("a", 2), ("ab", 2 + 2 * 2)])
async def test_those_that_fill_up_again_and_again_are_not_tried_for_ever(
    names: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between targets that seem free and are found full a request gives up, too."""
    async with targets(names, retries=2) as rig:
        rig["a"].script(refusal(503))
        upstreams = rig.proxy.daemon._proxy.snapshot.config.upstreams
        standings = rig.proxy.daemon._proxy.standings
        kind = type(standings.of(upstreams["a"]))
        enter, tries = kind.enter, []

        def entered(self: Any, now: float) -> bool:
            tries.append(self)
            return enter(self, now) if len(tries) == 1 else False

        monkeypatch.setattr(kind, "enter", entered)
        async with asyncio.timeout(4):
            seen = await rig.ask()
        monkeypatch.undo()
        assert seen.answer.status == 503
        assert (seen.line["attempts"], len(tries)) == (1, most)
        await rig.check(seen.answer.body)


# Late by a hair


async def late_connection(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next connection come about just as its time is over."""
    watches: list[Watch] = []
    enter, acquire = Watch.enter, Pool.acquire

    def entered(self: Watch, *args: Any) -> None:
        watches.append(self)
        enter(self, *args)

    async def acquired(self: Pool) -> Any:
        connection = await acquire(self)
        if watches and watches[-1].phase == "connect":
            monkeypatch.setattr(Pool, "acquire", acquire)
            watches[-1]._since -= 1000.0
            watches[-1]._fire()
        return connection

    await rig.ask()  # the next one has a connection that is ready
    monkeypatch.setattr(Watch, "enter", entered)
    monkeypatch.setattr(Pool, "acquire", acquired)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_connection_that_comes_just_too_late(
    streamed: bool,  # noqa: FBT001
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once the request was written the upstream may have acted: nobody else gets it."""
    async with targets(each={"a": {"idle_connections": "1min"}}) as rig:
        await late_connection(rig, monkeypatch)
        rig["a"].script(Stall())
        seen = await rig.ask(streamed=streamed)
        monkeypatch.undo()
        assert "b" not in rig.got
        check_error(seen.answer, 504, "upstream_timeout", "responses")
        assert (await rig.attempts())["a", "timeout"] == 1
        await rig.check(seen.answer.body)


@pytest.mark.parametrize("phase", ["connect", "first_byte"])
async def test_counting_in_vain(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream that does not count in time is told like any silence, not as a bug."""
    times = {phase: "100ms"}
    async with targets("a", timeouts=times) as rig:
        if phase == "connect":
            monkeypatch.setattr(Pool, "acquire", lambda _: asyncio.Future())
        rig["a"].default = [Stall()]
        body = {"model": "gpt-test", "messages": [{"role": "user", "content": "hi"}]}
        async with asyncio.timeout(3):
            answer = await rig.proxy.post("/v1/messages/count_tokens", body)
        check_error(answer, 502 if phase == "connect" else 504, None, "messages")
        assert not [line for line in rig.proxy.logs() if line.get("event") == "bug"]
        result = "connect" if phase == "connect" else "timeout"
        assert await rig.attempts() == {("a", result): 1}


async def test_a_refusal_whose_body_stalls() -> None:
    """What is said by the status is done, however short `idle` is: the body is not the answer."""
    async with targets(timeouts={"idle": "150ms"}) as rig:
        fields = [("content-type", "application/json"), ("content-length", "50")]
        rig["a"].script(Headers(429, fields), Stall())
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from b"
        assert await rig.attempts() == {("a", "status_429"): 1, ("b", "ok"): 1}
        await rig.check()


# What aiproxy has added


def includes(rig: Rig) -> dict[str, list[Any]]:
    """Return the `include` of each request, by the target that got it."""
    return {name: [r.json().get("include") for r in s.requests] for name, s in rig.servers.items()}


async def test_a_target_that_takes_no_include_and_then_is_overloaded() -> None:
    """Asked once more without what was added it is overloaded: the next is asked with it."""
    added = ["reasoning.encrypted_content"]
    async with targets() as rig:
        rig["a"].script(error_answer(400, "no", param="include[0]"))
        rig["a"].script(refusal(503))
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from b"
        assert includes(rig) == {"a": [added, None], "b": [added]}
        assert (seen.line["attempts"], seen.line["upstream"]) == (3, "b")
        check_charge(seen.line, "usage")
        counted = {("a", "status_4xx"): 1, ("a", "status_5xx"): 1, ("b", "ok"): 1}
        assert await rig.attempts() == counted
        await nothing_held(rig)
        await rig.check()


async def test_an_overloaded_target_and_one_that_takes_no_include() -> None:
    """The second target is asked once more without it, and remembered; that is no retry."""
    added = ["reasoning.encrypted_content"]
    async with targets(retries=1) as rig:
        rig["a"].script(refusal(503))
        rig["b"].script(error_answer(400, "no", param="include"))
        seen = await rig.ask(streamed=True)
        assert said("responses", seen.answer) == "from b"
        assert includes(rig) == {"a": [added], "b": [added, None]}
        rig["a"].script(refusal(503))
        await rig.ask(streamed=True)
        assert includes(rig)["b"] == [added, None, None]
        await rig.check()


@pytest.mark.parametrize("holder", ["replay", "upstream"])
async def test_a_refused_include_of_the_clients_own(holder: str) -> None:
    """A target where nothing was added is not asked twice for it."""
    pools = [{"name": "a"}, {"name": "b", "tier": 2, "reasoning": holder == "upstream"}]
    async with targets(pools=pools, each={"b": {"sessions": holder}}) as rig:
        rig["a"].script(refusal(503))
        rig["b"].default = error_answer(400, "no", param="include[0]")
        seen = await rig.ask(include=["x"])
        assert (seen.answer.status, seen.line["attempts"]) == (400, 2)
        assert includes(rig)["b"] == [["x"]]
        await rig.check()


# A holder


async def test_a_holder_that_is_left_alone_is_503_for_every_verb_that_asks_it() -> None:
    """While the upstream that holds a turn is left alone GET and DELETE are 503."""
    away = {"failures": 1, "cooldown": "1min", "max_cooldown": "1min"}
    async with targets("a", each={"a": {"sessions": "upstream"}}, breaker=away) as rig:
        rig["a"].default = Holder()
        made = await turn(rig.proxy, "one")
        rig["a"].script(refusal(403))
        await rig.ask()
        before = len(rig["a"].requests)
        path = f"/v1/responses/{made['id']}"
        for method in ("GET", "DELETE"):
            client = await rig.proxy.client()
            await client.request(method, path, rig.proxy.headers())
            answer = await client.answer()
            check_error(answer, 503, "upstream_overloaded", "responses")
        assert len(rig["a"].requests) == before
        rig.calm()
        assert (await rig.proxy.get(path)).status == 200
        await rig.check()


async def test_an_item_whose_holder_is_left_alone() -> None:
    """A reference to what an upstream holds that takes no requests is 503, never `not found`."""
    away = {"failures": 1, "cooldown": "1min", "max_cooldown": "1min"}
    each = {name: {"sessions": "upstream"} for name in "ab"}
    async with targets(each=each, breaker=away) as rig:
        made = await turn(rig.proxy, "one")
        reference = {"type": "item_reference", "id": made["output"][0]["id"]}
        rig["a"].script(refusal(403))
        await rig.ask()
        seen = await rig.ask(input=[reference, {"role": "user", "content": "go on"}])
        check_error(seen.answer, 503, "upstream_overloaded", "responses")
        assert 55 <= int(seen.answer.headers["retry-after"]) <= 60
        assert rig.got == {"a": 2}
        rig.calm()
        seen = await rig.ask(input=[reference, {"role": "user", "content": "go on"}])
        assert (seen.answer.status, seen.line["upstream"]) == (200, "a")
        await rig.check()
