"""Lifecycle events that are held back while another attempt is left: contract 6.1 and 6.8."""

import asyncio
import json
from typing import Any
from unittest.mock import Mock

import pytest

from aiproxy import relay
from answers import sse
from client import parse_sse
from faults import check_charge, check_error
from responses import responses_events, responses_json
from steps import SSE_HEADERS
from targets_rig import (
    LIFECYCLE,
    Rig,
    Script,
    error_event,
    failed_events,
    frames,
    refusal,
    said,
    targets,
)
from upstream import Chunk, EndChunks, Finish, Headers, Reset, Sleep, Stall, Wait, json_answer

AGES = 30.0  # seconds: as HOLD, longer than any of these tests
ONE: list[Any] = [True, False]  # whether all comes in one chunk


def kinds_of(body: bytes) -> list[str]:
    """Return the types of the events of a stream."""
    return [json.loads(data)["type"] for _, data in parse_sse(body) if data != "[DONE]"]


def declared(how: str) -> list[bytes]:
    """Return a stream that fails by the upstream's own word before any output."""
    queued = json.loads(parse_sse(LIFECYCLE[1])[0][1])
    queued |= {"type": "response.queued", "sequence_number": 1}
    match how:
        case "failed":
            return failed_events()
        case "failed at once":
            return [failed_events()[-1]]
        case "error":
            return [*LIFECYCLE, error_event(2)]
        case "error at once":
            return [error_event(0)]
        case "error and failed":
            last = json.loads(parse_sse(failed_events()[-1])[0][1]) | {"sequence_number": 3}
            return [*LIFECYCLE, error_event(2), sse(last, event="response.failed")]
        case _:
            failed = failed_events()
            return [failed[0], sse(queued, event="response.queued"), *failed[2:]]


HOWS = ["failed", "failed at once", "error", "error at once", "error and failed", "queued"]


@pytest.mark.parametrize("end", [None, Stall()])
@pytest.mark.parametrize("whole", ONE, ids=["one chunk", "chunks"])
@pytest.mark.parametrize("how", HOWS)
async def test_a_failure_that_is_declared_first_is_followed_by_the_next(
    how: str,
    whole: bool,  # noqa: FBT001
    end: Any,
) -> None:
    """What the upstream itself says to have failed before any output moves on, unseen."""
    async with targets(timeouts={"idle": "300ms"}) as rig:
        events = declared(how)
        rig["a"].script(frames(*([b"".join(events)] if whole else events), end=end))
        seen = await rig.ask(streamed=True)
        assert said("responses", seen.answer) == "from b"
        kinds = kinds_of(seen.body)
        assert kinds[0] == "response.created"
        assert kinds.count("response.created") == kinds.count("response.completed") == 1
        assert "error" not in kinds
        assert "response.failed" not in kinds
        numbers = [json.loads(data)["sequence_number"] for _, data in parse_sse(seen.body)]
        assert numbers == list(range(len(numbers)))
        assert (seen.line["attempts"], seen.line["upstream"]) == (2, "b")
        assert seen.line["outcome"] == "completed"
        assert seen.answer.headers["x-aiproxy-upstream"] == "b"
        check_charge(seen.line, "usage")
        await rig.check(stream=seen.body, completed=True)


async def test_the_same_target_after_a_declared_failure() -> None:
    """A target that is alone is asked again."""
    async with targets("a") as rig:
        rig["a"].script(frames(*failed_events()))
        seen = await rig.ask(streamed=True)
        assert said("responses", seen.answer) == "from a"
        assert seen.line["attempts"] == 2
        await rig.check(stream=seen.body, completed=True)


@pytest.mark.parametrize("how", HOWS)
async def test_the_last_declared_failure_is_shown(how: str) -> None:
    """If nobody is left the client is told of one failure: the last one's, in whole."""
    async with targets(retries=1) as rig:
        for server in rig.servers.values():
            server.default = frames(*declared(how))
        seen = await rig.ask(streamed=True)
        assert seen.answer.status == 200
        kinds = kinds_of(seen.body)
        assert kinds.count("response.created") <= 1
        assert kinds[-1] == "response.failed"
        assert (seen.line["attempts"], seen.line["upstream"]) == (2, "b")
        assert seen.answer.headers["x-aiproxy-upstream"] == "b"
        assert rig.got == {"a": 1, "b": 1}
        await rig.check(stream=seen.body)


async def test_then_a_refusal_ends_it() -> None:
    """After an unseen failure the next one's refusal is told as such, with its status."""
    async with targets() as rig:
        rig["a"].script(frames(*failed_events()))
        rig["b"].default = refusal(400)
        seen = await rig.ask(streamed=True)
        assert seen.answer.status == 400
        assert seen.answer.json()["error"]["message"] == "scripted 400"
        check_charge(seen.line, "nothing")
        await rig.check(seen.answer.body)


async def test_a_failed_json_answer_moves_on_alike() -> None:
    """A JSON answer of status `failed` without output is followed by the next."""
    async with targets() as rig:
        error = {"code": "server_error", "message": "no"}
        failed = responses_json(items=[], usage=None) | {"status": "failed", "error": error}
        rig["a"].script(json_answer(failed))
        seen = await rig.ask()
        assert said("responses", seen.answer) == "from b"
        assert (seen.line["attempts"], seen.line["outcome"]) == (2, "completed")
        await rig.check()


@pytest.mark.parametrize(("tokens", "asked"), [(0, {"a": 1, "b": 1}), (1, {"a": 1})])
async def test_a_failed_json_answer_with_output_does_not_move_on(
    tokens: int, asked: dict[str, int]
) -> None:
    """Output that was made is paid for, be it one token, and not made twice."""
    async with targets() as rig:
        error = {"code": "server_error", "message": "no"}
        usage = {"input_tokens": 5, "output_tokens": tokens, "total_tokens": 5 + tokens}
        failed = responses_json(items=[]) | {"status": "failed", "error": error, "usage": usage}
        rig["a"].script(json_answer(failed))
        seen = await rig.ask()
        assert rig.got == asked
        assert seen.line["outcome"] == ("failed" if tokens else "completed")
        await rig.check()


# A cut or a silence


@pytest.mark.parametrize("unsafe", [False, True])
@pytest.mark.parametrize("whole", ONE, ids=["one chunk", "chunks"])
@pytest.mark.parametrize("end", [Reset(), Finish(), EndChunks(), Stall()])
async def test_a_cut_after_lifecycle_events_does_not_move_on(
    end: Any,
    whole: bool,  # noqa: FBT001
    unsafe: bool,  # noqa: FBT001
) -> None:
    """What came is passed, then response.failed: the upstream may have acted."""
    times = {"idle": "300ms"}
    async with targets(timeouts=times, route={"retry_unsafe": unsafe}) as rig:
        events = [b"".join(LIFECYCLE)] if whole else LIFECYCLE
        rig["a"].script(frames(*events, end=end))
        seen = await rig.ask(streamed=True)
        assert rig.got == {"a": 1}
        assert seen.answer.status == 200
        assert kinds_of(seen.body) == [
            "response.created",
            "response.in_progress",
            "response.failed",
        ]
        outcome = "upstream_timeout" if isinstance(end, Stall) else "upstream_error"
        assert (seen.line["attempts"], seen.line["outcome"]) == (1, outcome)
        assert seen.line["upstream"] == "a"
        await rig.check(stream=seen.body)


async def test_a_failure_after_output_does_not_move_on() -> None:
    """A response.failed after output is the answer."""
    async with targets() as rig:
        events = responses_events("from a", terminal="failed")
        rig["a"].script(frames(*events))
        seen = await rig.ask(streamed=True)
        assert said("responses", seen.answer) == "from a"
        assert kinds_of(seen.body)[-1] == "response.failed"
        assert (rig.got, seen.line["attempts"]) == ({"a": 1}, 1)
        assert seen.line["outcome"] == "failed"
        await rig.check(stream=seen.body)


@pytest.mark.parametrize("terminal", ["completed", "incomplete"])
async def test_an_answer_without_output_is_an_answer(terminal: Any) -> None:
    """A terminal event right after the lifecycle events ends it, unless it says `failed`."""
    async with targets() as rig:
        rig["a"].script(frames(*responses_events(items=[], terminal=terminal)))
        seen = await rig.ask(streamed=True)
        assert kinds_of(seen.body) == [
            "response.created",
            "response.in_progress",
            f"response.{terminal}",
        ]
        assert (rig.got, seen.line["outcome"]) == ({"a": 1}, terminal)
        check_charge(seen.line, "usage")
        await rig.check(stream=seen.body, completed=terminal == "completed")


# How long, how much


async def first_events(rig: Rig, script: Script) -> bytes:
    """Return what the client sees of a stream that goes on once it has seen something."""
    seen = asyncio.Event()
    rig["a"].script(script, Wait(seen), EndChunks())
    client = await rig.begin(streamed=True)
    async with asyncio.timeout(5):
        assert (await client.read_head()).status == 200
        data, _ = await client.read_chunk()
    seen.set()
    while more := (await client.read_chunk())[0]:
        data += more
    return data


def opened(*events: bytes) -> Script:
    """Return a stream that is not ended."""
    return [Headers(200, SSE_HEADERS), *(Chunk(event) for event in events)]


async def test_they_are_held_for_a_second() -> None:
    """If nothing follows them they go to the client all the same, and no other is asked then."""
    async with targets() as rig:
        loop = asyncio.get_running_loop()
        began = loop.time()
        body = await first_events(rig, opened(*LIFECYCLE))
        assert 0.9 <= loop.time() - began < 4
        assert kinds_of(body)[:2] == ["response.created", "response.in_progress"]
        assert rig.got == {"a": 1}
        await rig.check(stream=body)


async def test_a_failure_that_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure declared after they were let go is the client's to see."""
    monkeypatch.setattr(relay, "HOLD", 0.1)
    async with targets() as rig:
        events = failed_events()
        told = asyncio.Event()
        rig["a"].script(opened(*events[:2]), Wait(told), Chunk(events[-1]), EndChunks())
        client = await rig.begin(streamed=True)
        async with asyncio.timeout(5):
            await client.read_head()
            body, _ = await client.read_chunk()
            told.set()
            while more := (await client.read_chunk())[0]:
                body += more
        assert kinds_of(body) == ["response.created", "response.in_progress", "response.failed"]
        assert rig.got == {"a": 1}
        await rig.check(stream=body)


async def test_more_than_64_kib_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lifecycle events beyond 64 KiB go at once."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets() as rig:
        large = responses_events(request={"instructions": "x" * 70_000})
        body = await first_events(rig, opened(large[0]))
        assert kinds_of(body)[0] == "response.created"
        assert rig.got == {"a": 1}
        await rig.check(stream=body)


def test_exactly_64_kib_are_held() -> None:
    """The byte beyond them lets them go."""
    settled = Mock()
    held = relay.Relay(Mock(), Mock(begun=False), Mock(), 1.0, settled)
    held._write(b"x" * (64 * 1024 - 1))
    held._write(b"x")
    assert not settled.called
    held._write(b"x")
    assert settled.call_count == 1


async def test_output_lets_them_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first other event takes them along."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets() as rig:
        body = await first_events(rig, opened(*responses_events()[:3]))
        assert kinds_of(body)[:3] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
        ]
        await rig.check(stream=body)


async def test_an_unknown_event_lets_them_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event that aiproxy does not know counts as output."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets() as rig:
        odd = sse({"type": "vendor.thing", "sequence_number": 2}, event="vendor.thing")
        body = await first_events(rig, opened(*LIFECYCLE, odd))
        assert "vendor.thing" in kinds_of(body)
        await rig.check(stream=body)


@pytest.mark.parametrize("api", ["chat", "messages"])
async def test_other_apis_hold_nothing(api: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first event of chat and messages streams goes at once."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets() as rig:
        first = {
            "chat": sse({"object": "chat.completion.chunk", "choices": []}),
            "messages": sse({"type": "message_start", "message": {}}, event="message_start"),
        }[api]
        going = asyncio.Event()
        rig["a"].script(opened(first), Wait(going), EndChunks())
        client = await rig.begin(api, streamed=True)
        async with asyncio.timeout(5):
            await client.read_head()
            assert (await client.read_chunk())[0] == first
        going.set()
        await client.read_chunk()
        await rig.check()


async def test_nothing_is_held_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `retries: 0` each event goes as it comes, and a declared failure is shown."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets(retries=0) as rig:
        body = await first_events(rig, opened(LIFECYCLE[0]))
        assert kinds_of(body)[0] == "response.created"
        rig["a"].script(frames(*failed_events()))
        seen = await rig.ask(streamed=True)
        assert kinds_of(seen.body)[-1] == "response.failed"
        assert rig.got == {"a": 2}
        await rig.check(stream=seen.body)


async def test_nothing_is_held_in_the_last_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the retries are used up the events of the attempt go as they come."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets(retries=1) as rig:
        rig["a"].script(refusal(503))
        going = asyncio.Event()
        rig["b"].script(opened(LIFECYCLE[0]), Wait(going), EndChunks())
        client = await rig.begin(streamed=True)
        async with asyncio.timeout(5):
            await client.read_head()
            assert b"response.created" in (await client.read_chunk())[0]
            going.set()
            while (await client.read_chunk())[0]:
                pass
        await rig.check()


async def test_a_heartbeat_while_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comments go out while events are held, and the failure stays unseen."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets(streams={"keepalive": "50ms"}) as rig:
        events = failed_events()
        rig["a"].script(opened(*events[:2]), Sleep(0.3), Chunk(events[-1]), EndChunks())
        seen = await rig.ask(streamed=True)
        assert seen.answer.body.startswith(b": keepalive\n\n")
        assert said("responses", seen.answer) == "from b"
        assert kinds_of(seen.body).count("response.created") == 1
        await rig.check(stream=seen.body, completed=True)


async def test_the_client_leaves_while_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The upstream sees the close at once, and nobody else is asked."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets() as rig:
        await rig.rest()
        rig["a"].script(opened(*LIFECYCLE), Stall())
        client = await rig.begin(streamed=True)
        request = await rig["a"].wait_request(1)
        await client.close()
        await asyncio.wait_for(request.closed.wait(), 2)
        assert rig.got == {"a": 1}
        await rig.check()


async def test_a_drain_while_they_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain that ends meanwhile gives out what was held, and then response.failed."""
    monkeypatch.setattr(relay, "HOLD", AGES)
    async with targets(drain={"delay": "0s", "timeout": "100ms"}) as rig:
        rig["a"].script(opened(*LIFECYCLE), Stall())
        client = await rig.begin(streamed=True)
        await rig["a"].wait_request(1)
        reading = asyncio.create_task(client.answer())
        await rig.proxy.daemon.stop()
        answer = await asyncio.wait_for(reading, 3)
        if answer.status == 200:
            assert kinds_of(answer.body)[-1] == "response.failed"
        else:
            check_error(answer, 503, "shutting_down", "responses")
        assert rig.got == {"a": 1}
