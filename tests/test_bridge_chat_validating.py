"""The checks of `validating` accept what is right, and nothing that lacks anything."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from client import parse_sse
from responses import function_item, message_item, reasoning_item, responses_events, responses_json
from validating import Fact, check_event, check_response, check_stream, facts_of, timeless

ITEMS = [
    reasoning_item(summary="Thought."),
    message_item("Grüße, Welt"),
    function_item("f", '{"a": 1}'),
    function_item("g", "{}"),
]


def healthy() -> list[Fact]:
    """Return the events of a healthy stream."""
    return facts_of(b"".join(responses_events(items=ITEMS)))


def test_a_healthy_stream_is_right() -> None:
    """A whole stream passes, and its final response is returned."""
    final = check_stream(healthy())
    assert [item["type"] for item in final["output"]] == [item["type"] for item in ITEMS]
    check_response(responses_json(items=ITEMS))


def test_other_ends_are_right() -> None:
    """Streams that end as incomplete or failed pass too."""
    for terminal in ("incomplete", "failed"):
        events = facts_of(b"".join(responses_events(items=ITEMS, terminal=terminal)))
        assert check_stream(events)["status"] == terminal


@pytest.mark.parametrize("kind", sorted({event["type"] for event in healthy()}))
def test_every_member_is_needed(kind: str) -> None:
    """An event that lacks a member, or has it as another type, is found by every check."""
    event = next(event for event in healthy() if event["type"] == kind)
    check_event(event)
    for name in event:
        if (kind, name) == ("response.function_call_arguments.done", "name"):
            continue
        lacking = {key: value for key, value in event.items() if key != name}
        with pytest.raises((AssertionError, ValidationError, KeyError)):
            check_event(lacking)
        with pytest.raises((AssertionError, ValidationError, KeyError, TypeError)):
            check_event({**event, name: ["odd"]})


@pytest.mark.parametrize("name", sorted(responses_json()))
def test_every_member_of_the_response_is_needed(name: str) -> None:
    """A response object that lacks one of its members is no whole one."""
    whole = responses_json(items=ITEMS)
    del whole[name]
    with pytest.raises((AssertionError, ValidationError, KeyError)):
        check_response(whole)


def at(events: list[Fact], kind: str) -> Fact:
    """Return the first event of a type."""
    return next(event for event in events if event["type"] == kind)


def without(kind: str) -> Callable[[list[Fact]], None]:
    """Return a change that leaves out the first event of a type, with the numbers put right."""

    def change(events: list[Fact]) -> None:
        events.remove(at(events, kind))
        for number, event in enumerate(events):
            event["sequence_number"] = number

    return change


def changed(kind: str, **members: Any) -> Callable[[list[Fact]], None]:
    """Return a change of the first event of a type."""
    return lambda events: at(events, kind).update(members)


def _final_text(events: list[Fact]) -> None:
    events[-1]["response"]["output"][1]["content"][0]["text"] += "!"


def _final_order(events: list[Fact]) -> None:
    events[-1]["response"]["output"].reverse()


def _gap(events: list[Fact]) -> None:
    events[4]["sequence_number"] = 40


def _after(events: list[Fact]) -> None:
    events.append({**events[-1], "sequence_number": len(events)})


def _other_id(events: list[Fact]) -> None:
    events[1]["response"] = {**events[1]["response"], "id": "resp_other"}


PREFIX = "response.function_call_arguments"
WRONG: dict[str, Callable[[list[Fact]], None]] = {
    "a gap": _gap,
    "two ends": _after,
    "no end": lambda events: events.__delitem__(-1),
    "another id": _other_id,
    "text not that of the deltas": _final_text,
    "items in another order": _final_order,
    "no created": without("response.created"),
    "no in_progress": without("response.in_progress"),
    "no added": without("response.output_item.added"),
    "no done": without("response.output_item.done"),
    "no part": without("response.content_part.added"),
    "part not done": without("response.content_part.done"),
    "text not done": without("response.output_text.done"),
    "a delta lost": without("response.output_text.delta"),
    "arguments not done": without(f"{PREFIX}.done"),
    "arguments lost": without(f"{PREFIX}.delta"),
    "summary lost": without("response.reasoning_summary_text.delta"),
    "summary not done": without("response.reasoning_summary_part.done"),
    "an index": changed("response.output_item.added", output_index=1),
    "another item": changed("response.output_text.delta", item_id="msg_other"),
    "another place": changed(f"{PREFIX}.delta", output_index=3),
    "another text": changed("response.output_text.done", text="no"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_stream_is_found(case: str) -> None:
    """Whatever is out of order, lost or made up in a stream is found."""
    events = copy.deepcopy(healthy())
    WRONG[case](events)
    with pytest.raises((AssertionError, ValidationError, KeyError, IndexError)):
        check_stream(events)


def test_unknown_events_are_native_alone() -> None:
    """An event of an unknown type passes where a server's own stream is looked at."""
    events = healthy()
    events.insert(4, {"type": "response.vendor", "sequence_number": 4})
    for number, event in enumerate(events):
        event["sequence_number"] = number
    check_stream(events, native=True)
    with pytest.raises(AssertionError):
        check_stream(events)


def test_names_of_events_are_their_types() -> None:
    """A stream whose `event` lines are not the types of its events is found."""
    frames = responses_events()
    assert len(facts_of(b"".join(frames))) == len(parse_sse(b"".join(frames)))
    with pytest.raises(AssertionError):
        facts_of(b"".join(frames).replace(b"event: response.created", b"event: other"))


def test_ids_and_times_are_left_out() -> None:
    """Two answers of the same content are equal but for ids and times."""
    items = [message_item("same"), function_item("f", "{}", call_id="c")]
    again = [message_item("same"), function_item("f", "{}", call_id="c")]
    assert timeless(responses_json(items=items)) == timeless(responses_json(items=again))
