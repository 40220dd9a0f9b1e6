"""Streams that fail in band at their very beginning, over all APIs and bridges; what is charged."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import pytest

from aiproxy import relay
from answers import USAGE, chat_events, messages_events, sse
from client import parse_sse
from faults import FIRST_DELTA, check_charge, delivered, events_of
from responses import message_item, responses_events, responses_json
from steps import Step
from targets_rig import (
    LIFECYCLE,
    NEVER,
    failed_events,
    frames,
    nothing_held,
    refusal,
    said,
    targets,
)
from upstream import Chunk, EndChunks, Finish, Reset, Sleep, Stall, Wait, json_answer

CHAT_ERROR = sse({"error": {"message": "GPU fell off", "type": "server_error", "code": None}})
MESSAGES_ERROR = sse(
    {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}},
    event="error",
)
NATIVE: dict[str, bytes] = {"chat": CHAT_ERROR, "messages": MESSAGES_ERROR}
BEGINNING: dict[str, list[bytes]] = {
    "chat": chat_events("x")[:1],
    "messages": messages_events("x")[:1],
}
AGES = 30.0


def speaks(*apis: str) -> dict[str, dict[str, Any]]:
    """Return what each target speaks, `a` first."""
    return {name: {"apis": [api]} for name, api in zip("abc", apis, strict=False)}


def check_estimate(line: Mapping[str, Any], made: int) -> None:
    """Assert that the client's own body and so many tokens of output are charged."""
    assert line["estimated"] is True
    assert abs(line["input_tokens"] - line["bytes_in"] // 4) <= 2
    assert line["output_tokens"] == made


# The very first event


@pytest.mark.parametrize("comment", [False, True])
@pytest.mark.parametrize("api", NATIVE)
async def test_an_error_as_the_first_event_moves_on(api: Any, comment: bool) -> None:  # noqa: FBT001
    """Where the upstream declares it before any other event the client sees the next one alone."""
    async with targets() as rig:
        first = [b": hello\n\n"] if comment else []
        rig["a"].script(frames(*first, NATIVE[api]))
        seen = await rig.ask(api, streamed=True)
        assert said(api, seen.answer) == "from b"
        assert (seen.line["attempts"], seen.line["outcome"]) == (2, "completed")
        assert b"rror" not in seen.body
        check_charge(seen.line, "usage")
        await rig.check()


@pytest.mark.parametrize("api", NATIVE)
async def test_the_last_error_as_the_first_event_is_shown(api: Any) -> None:
    """Where nobody is left the upstream's own error frame is what the client gets."""
    async with targets(retries=1) as rig:
        for server in rig.servers.values():
            server.default = frames(NATIVE[api])
        seen = await rig.ask(api, streamed=True)
        assert (seen.answer.status, seen.body) == (200, NATIVE[api])
        assert (seen.line["attempts"], seen.line["outcome"]) == (2, "failed")
        await rig.check()


@pytest.mark.parametrize("api", NATIVE)
async def test_an_error_after_an_event_does_not(api: Any) -> None:
    """Any event before it was the client's: the error is, too."""
    async with targets() as rig:
        rig["a"].script(frames(*BEGINNING[api], NATIVE[api]))
        seen = await rig.ask(api, streamed=True)
        assert seen.body == b"".join(BEGINNING[api]) + NATIVE[api]
        assert (rig.got, seen.line["outcome"]) == ({"a": 1}, "failed")
        await rig.check()


# Bridges


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("api", NATIVE)
async def test_a_bridged_failure_before_output_moves_on(
    api: str,
    begun: bool,  # noqa: FBT001
    whole: bool,  # noqa: FBT001
) -> None:
    """Over a bridge an error before any output is unseen, also after events that only begin."""
    async with targets(each=speaks(api, "responses")) as rig:
        events = [*(BEGINNING[api] if begun else []), NATIVE[api]]
        rig["a"].script(frames(*([b"".join(events)] if whole else events)))
        seen = await rig.ask(streamed=True)
        assert said("responses", seen.answer) == "from b"
        kinds = [kind for kind, _ in parse_sse(seen.body)]
        assert kinds.count("response.created") == 1
        assert "response.failed" not in kinds
        numbers = [json.loads(data)["sequence_number"] for _, data in parse_sse(seen.body)]
        assert numbers == list(range(len(numbers)))
        check_charge(seen.line, "usage")
        await nothing_held(rig)
        await rig.check(stream=seen.body, completed=True)


@pytest.mark.parametrize("end", ["error", "reset", "end", "stall"])
@pytest.mark.parametrize("api", NATIVE)
async def test_a_bridged_failure_after_its_first_output_is_the_end(api: Any, end: str) -> None:
    """Once output was told the failure follows it, in band and once; nobody else is asked."""
    ends: dict[str, tuple[list[bytes], Step]] = {
        "error": ([NATIVE[api]], EndChunks()),
        "reset": ([], Reset()),
        "end": ([], EndChunks()),
        "stall": ([], Stall()),
    }
    more, last = ends[end]
    async with targets(
        each=speaks(api, "responses"), timeouts={"idle": "200ms"}, route={"retry_unsafe": True}
    ) as rig:
        begun = events_of(api, "from a")[: FIRST_DELTA[api]]
        rig["a"].script(frames(*begun, *more, end=last))
        seen = await rig.ask(streamed=True)
        kinds = [kind for kind, _ in parse_sse(seen.body)]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == "response.failed"
        assert rig.got == {"a": 1}
        check_estimate(seen.line, delivered(seen.body))
        assert seen.line["output_tokens"] > 0
        await rig.check(stream=seen.body)


@pytest.mark.parametrize("end", [Reset(), EndChunks(), Finish()])
@pytest.mark.parametrize("api", NATIVE)
async def test_a_bridged_cut_before_output_is_the_end(api: str, end: Step) -> None:
    """It declares nothing: its beginning is told, then response.failed; nobody else is asked."""
    async with targets(each=speaks(api, "responses"), route={"retry_unsafe": True}) as rig:
        rig["a"].script(frames(*BEGINNING[api], end=end))
        seen = await rig.ask(streamed=True)
        kinds = [kind for kind, _ in parse_sse(seen.body)]
        assert (kinds[0], kinds[-1]) == ("response.created", "response.failed")
        assert rig.got == {"a": 1}
        await rig.check(stream=seen.body)


async def test_a_bridge_holds_its_beginning_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bridged stream that has only begun is held, then told; its failure then is seen."""
    monkeypatch.setattr(relay, "HOLD", 0.1)
    async with targets(each=speaks("chat", "responses")) as rig:
        going = asyncio.Event()
        begun = frames(*BEGINNING["chat"])[:-1]
        rig["a"].script(begun, Wait(going), Chunk(CHAT_ERROR), EndChunks())
        client = await rig.begin(streamed=True)
        async with asyncio.timeout(5):
            await client.read_head()
            body, _ = await client.read_chunk()
            going.set()
            while more := (await client.read_chunk())[0]:
                body += more
        kinds = [kind for kind, _ in parse_sse(body)]
        assert kinds == ["response.created", "response.in_progress", "response.failed"]
        assert rig.got == {"a": 1}
        await rig.check(stream=body)


@pytest.mark.parametrize("fails", [True, False])
async def test_a_server_that_is_completed_is_held_alike(fails: bool) -> None:  # noqa: FBT001
    """With `normalize` a failure right after the beginning moves on; a cut does not."""
    async with targets(each={"a": {"normalize": True}}) as rig:
        rig["a"].script(frames(*failed_events()) if fails else frames(*LIFECYCLE, end=Reset()))
        seen = await rig.ask(streamed=True)
        kinds = [kind for kind, _ in parse_sse(seen.body)]
        assert kinds[-1] == ("response.completed" if fails else "response.failed")
        assert kinds.count("response.created") == 1
        assert rig.got == ({"a": 1, "b": 1} if fails else {"a": 1})
        await rig.check(stream=seen.body, completed=fails)


@pytest.mark.parametrize("made", ["items", "tokens"])
async def test_a_failed_json_answer_with_output_is_the_answer(made: str) -> None:
    """What was made before it failed may have been paid for: it is the client's."""
    async with targets() as rig:
        items = [message_item("half of it")] if made == "items" else []
        failed = responses_json(items=items, usage=None if made == "items" else USAGE)
        error = {"code": "server_error", "message": "no"}
        rig["a"].script(json_answer(failed | {"status": "failed", "error": error}))
        seen = await rig.ask()
        assert (seen.answer.status, seen.answer.json()["status"]) == (200, "failed")
        assert (rig.got, seen.line["outcome"]) == ({"a": 1}, "failed")
        await rig.check()


async def test_a_failed_stream_that_has_used_tokens_is_the_answer() -> None:
    """So does a stream whose failure says so itself, though no event of it carried output."""
    async with targets() as rig:
        error = {"code": "server_error", "message": "no"}
        rig["a"].script(frames(*responses_events(items=[], terminal="failed", error=error)))
        seen = await rig.ask(streamed=True)
        kinds = [kind for kind, _ in parse_sse(seen.body)]
        assert kinds == ["response.created", "response.in_progress", "response.failed"]
        assert rig.got == {"a": 1}
        check_charge(seen.line, "usage")
        await rig.check(stream=seen.body)


def test_the_bounds_of_what_is_held() -> None:
    """At most 1 s, at most 64 KiB: the contract's."""
    assert (relay.HOLD, relay.MOST_HELD) == (1.0, 65_536)


async def test_what_was_held_of_a_failure_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the next one takes, the client sees nothing of the one that failed."""
    monkeypatch.setattr(relay, "HOLD", 0.1)
    async with targets() as rig:
        rig["a"].script(frames(*failed_events()))
        rig["b"].script(Sleep(0.3), frames(*responses_events("from b")))
        seen = await rig.ask(streamed=True)
        kinds = [kind for kind, _ in parse_sse(seen.body)]
        assert kinds.count("response.created") == kinds.count("response.completed") == 1
        assert seen.answer.headers["x-aiproxy-upstream"] == "b"
        await rig.check(stream=seen.body, completed=True)


# Byte for byte


@pytest.mark.parametrize("split", [None, 1, 7, 1000])
async def test_what_was_held_arrives_as_it_was(
    split: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the upstream holds conversations all bytes are its own, held or not, however cut."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets(each={"a": {"sessions": "upstream"}}) as rig:
        whole = b": first\n\n" + b"".join(responses_events("from a"))
        pieces = (
            [whole]
            if split is None
            else [whole[at : at + split] for at in range(0, len(whole), split)]
        )
        rig["a"].script(frames(*pieces))
        seen = await rig.ask(streamed=True)
        assert seen.answer.body == whole
        await rig.check(stream=seen.body, completed=True)


# What is charged


async def test_an_unsafe_second_attempt_is_the_one_that_is_charged() -> None:
    """What may have been done before it is the operator's risk; each attempt is counted."""
    async with targets(route={"retry_unsafe": True}) as rig:
        rig["a"].script(Reset())
        seen = await rig.ask(streamed=True)
        check_charge(seen.line, "usage")
        assert (seen.line["attempts"], seen.line["upstream"]) == (2, "b")
        assert seen.line["duration_s"] >= 0
        assert await rig.attempts() == {("a", "reset"): 1, ("b", "ok"): 1}
        await rig.check(stream=seen.body, completed=True)


async def test_a_declared_failure_and_then_a_refusal_that_did_nothing() -> None:
    """Nothing of either is charged: the first made nothing, the second did nothing."""
    async with targets(retries=1) as rig:
        rig["a"].script(frames(*failed_events()))
        rig["b"].script(refusal(503, ("retry-after", "30")))
        seen = await rig.ask(streamed=True)
        assert seen.answer.status == 503
        check_charge(seen.line, "nothing")
        await rig.check(seen.answer.body)


async def test_who_leaves_in_the_second_attempt_pays_for_it_alone() -> None:
    """The input of one request, though two upstreams were asked."""
    async with targets(breaker=NEVER) as rig:
        rig["a"].script(refusal(503))
        rig["b"].script(Stall())
        client = await rig.begin(streamed=True)
        await rig["b"].wait_request(1)
        await client.close()
        (line,) = await rig.lines(1)
        assert line["outcome"] == "client_disconnected"
        check_estimate(line, 0)
        await rig.check()
