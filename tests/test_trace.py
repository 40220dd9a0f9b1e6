"""The trace context of a request, and what is kept of it: tables and properties."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.trace import MOST_STATE, Budget, Parent, Trace, new_span_id, parent_of, state_of

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE_ID}-{SPAN_ID}-01"
PARENT = Parent(int(TRACE_ID, 16), int(SPAN_ID, 16), sampled=True)


def trace(*, most: int = 100, room: int = 1000, content: bool = True) -> Trace:
    """Return a trace that may keep so much."""
    return Trace(
        trace_id=PARENT.trace_id,
        span_id=7,
        parent=None,
        state="",
        sampled=True,
        method="POST",
        most=most,
        content=content,
        budget=Budget(room),
    )


@pytest.mark.parametrize(
    ("fields", "parent"),
    [
        ([GOOD], PARENT),
        ([f" {GOOD}\t"], PARENT),
        ([f"00-{TRACE_ID}-{SPAN_ID}-00"], PARENT._replace(sampled=False)),
        ([f"00-{TRACE_ID}-{SPAN_ID}-ff"], PARENT),
        ([f"00-{TRACE_ID}-{SPAN_ID}-02"], PARENT._replace(sampled=False)),
        ([f"cc-{TRACE_ID}-{SPAN_ID}-01"], PARENT),
        ([f"cc-{TRACE_ID}-{SPAN_ID}-01-what-comes-later"], PARENT),
        ([], None),
        ([GOOD, GOOD], None),
        ([""], None),
        ([f"{GOOD}-more"], None),
        ([f"{GOOD}0"], None),
        ([f"ff-{TRACE_ID}-{SPAN_ID}-01"], None),
        ([f"00-{'0' * 32}-{SPAN_ID}-01"], None),
        ([f"00-{TRACE_ID}-{'0' * 16}-01"], None),
        ([f"00-{TRACE_ID.upper()}-{SPAN_ID}-01"], None),
        ([f"00-{TRACE_ID}-{SPAN_ID}-0x"], None),
        ([f"00-{TRACE_ID[1:]}-{SPAN_ID}-01"], None),
        ([f"00_{TRACE_ID}_{SPAN_ID}_01"], None),
        ([f"cc-{TRACE_ID}-{SPAN_ID}-01.later"], None),
    ],
)
def test_a_parent_is_one_good_field(fields: list[str], parent: Parent | None) -> None:
    """What W3C's section 3.2 calls a traceparent is read; all else is as if it were not there."""
    assert parent_of(fields) == parent


@given(st.lists(st.text(max_size=80), max_size=2))
def test_any_text_is_no_parent_and_no_error(fields: list[str]) -> None:
    """Whatever a client sends is read without an error."""
    assert parent_of(fields) is None


@pytest.mark.parametrize(
    ("fields", "state"),
    [
        ([], ""),
        (["a=1"], "a=1"),
        (["a=1, b=2", " c=3"], "a=1, b=2,c=3"),
        (["a" * MOST_STATE], "a" * MOST_STATE),
        (["a" * (MOST_STATE + 1)], ""),
        (["a=\r\nx: y"], ""),
        (["a=ü"], ""),
    ],
)
def test_a_state_passes_as_it_is_or_not_at_all(fields: list[str], state: str) -> None:
    """What is too long for section 3.3.1.5, or cannot be a field, is dropped."""
    assert state_of(fields) == state


def test_an_upstream_is_told_of_the_attempt() -> None:
    """The span id that is sent is the attempt's, another one each time; the trace id stays."""
    of = trace()
    seen = []
    for _ in range(3):
        told = dict(of.told())
        assert dict(of.told()) == told, "the head may be made twice for one attempt"
        attempt = of.begin("up", "http://127.0.0.1:1", 1.0)
        assert told == {"traceparent": f"00-{TRACE_ID}-{attempt.span_id:016x}-01"}
        seen.append(attempt.span_id)
    assert len(set(seen)) == 3
    assert [each.span_id for each in of.attempts] == seen


def test_the_state_goes_on_and_the_flag_too() -> None:
    """`tracestate` is passed on; who is not sampled says so."""
    of = trace()
    of.state, of.sampled = "a=1", False
    told = of.told()
    assert told[0][1].endswith("-00")
    assert told[1] == ("tracestate", "a=1")


def test_ids_differ_and_are_never_zero() -> None:
    """Zero would be an invalid id."""
    ids = {new_span_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert 0 not in ids


def test_a_request_is_kept_within_its_bound() -> None:
    """A field for which there is no room is left out, the others stay; that is said."""
    of = trace(most=20)
    fields = {"input": b"x" * 30, "a": b"1" * 10, "b": b"2" * 9, "c": b"3", "d": None}
    of.keep_request("responses", fields, fields.get)
    assert of.fields == {"a": b"1" * 10, "b": b"2" * 9}
    assert of.cut
    assert of.held == 19


def test_an_answer_is_kept_up_to_its_bound() -> None:
    """From the first part that does not fit on nothing more is kept: what is kept has no hole."""
    of = trace(most=10)
    for part in (b"1234", b"5678", b"9999", b"0"):
        of.keep_answer(part, streamed=True)
    assert of.said == [b"1234", b"5678"]
    assert of.cut
    assert of.streamed


def test_all_requests_share_one_budget() -> None:
    """What one keeps another cannot, until it is released; released twice it is free once."""
    budget = Budget(10)
    one, other = trace(), trace()
    one.budget = other.budget = budget
    one.keep_answer(b"123456", streamed=False)
    other.keep_answer(b"123456", streamed=False)
    assert (one.said, other.said, other.cut) == ([b"123456"], [], True)
    one.release()
    one.release()
    assert not budget.take(11)
    assert budget.take(10)
