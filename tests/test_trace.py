"""The trace context of a request, and what is kept of it: tables and properties."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.envelope import Envelope
from aiproxy.kept import (
    MOST_CONTENT,
    MOST_FIELDS,
    MOST_NAME,
    MOST_PLAIN,
    Budget,
    Kept,
)
from aiproxy.trace import (
    MOST_STATE,
    Parent,
    Trace,
    new_span_id,
    new_trace_id,
    parent_of,
    state_of,
)

TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
GOOD = f"00-{TRACE_ID}-{SPAN_ID}-01"
PARENT = Parent(int(TRACE_ID, 16), int(SPAN_ID, 16), sampled=True)


def trace(*, sampled: bool = True) -> Trace:
    """Return a trace."""
    return Trace(
        trace_id=PARENT.trace_id,
        span_id=7,
        parent=None,
        state="",
        method="POST",
        kept=Kept(Budget(1000), content=True) if sampled else None,
    )


def kept(room: int = 10**9, *, content: bool = True) -> Kept:
    """Return what may keep so much."""
    return Kept(Budget(room), content=content)


def body(**fields: Any) -> Envelope:
    """Return a request's body."""
    return Envelope.parse(json.dumps(fields).encode())


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
        (["a=1", "b=2", "c" * MOST_STATE], "a=1,b=2"),
        (["a=1", "b" * (MOST_STATE - 4)], "a=1," + "b" * (MOST_STATE - 4)),
        (["a=\r\nx: y"], ""),
        (["a=ü"], ""),
    ],
)
def test_a_state_passes_as_it_is_or_not_at_all(fields: list[str], state: str) -> None:
    """Of what is too long (section 3.3.1.5) the right-most members go; what is no field, wholly."""
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
    of = trace(sampled=False)
    of.state = "a=1"
    told = of.told()
    assert told[0][1].endswith("-00")
    assert told[1] == ("tracestate", "a=1")


def test_ids_differ_and_are_never_zero() -> None:
    """Zero would be an invalid id."""
    ids = {new_span_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert 0 not in ids


def test_ids_are_as_long_as_they_may_be() -> None:
    """All 128 and 64 bits are drawn: few of many ids are short."""
    assert max(new_trace_id() for _ in range(100)) > 2**120
    assert max(new_span_id() for _ in range(100)) > 2**56


# -- what is kept


def test_a_request_is_kept_within_its_bound() -> None:
    """A field for which there is no room is left out, the others stay; that is said."""
    of = kept()
    of.request("responses", body(input="x" * MOST_CONTENT, top_p=1, metadata={"a": "b"}, user=None))
    assert of.fields == {"top_p": b"1", "metadata": b'{"a": "b"}'}
    assert of.cut


def test_without_contents_only_what_is_known_is_kept() -> None:
    """Neither names nor values of a client's own; and messages only if they are small."""
    of = kept(content=False)
    of.request("responses", body(input="x", top_p=1, metadata={"a": "b"}, model="m"))
    assert of.fields == {"input": b'"x"', "top_p": b"1"}
    assert not of.cut
    of.request("responses", body(input="x" * MOST_PLAIN))
    assert of.cut


def test_names_of_fields_are_counted_and_bounded() -> None:
    """A body of names is no way around the bound: neither a long one nor many."""
    of = kept()
    of.request("responses", body(**{"k" * (MOST_NAME + 1): 1, "k" * MOST_NAME: 2}))
    assert [*of.fields] == ["k" * MOST_NAME]
    assert of.cut
    many = kept()
    many.request("responses", body(**{f"k{n}": n for n in range(MOST_FIELDS + 10)}))
    assert len(many.fields) == MOST_FIELDS
    assert many.cut
    full = kept(room=400)
    full.request("responses", body(**{f"k{n}": n for n in range(100)}))
    assert len(full.fields) < 4


def test_a_large_value_is_not_copied() -> None:
    """Its size is enough to know that there is no room."""
    envelope = body(input="x" * 100)
    assert envelope.raw("input", 101) is None
    assert envelope.raw("input", 102) == b'"' + b"x" * 100 + b'"'


def test_an_answer_is_kept_up_to_its_bound() -> None:
    """From the first part that does not fit on nothing more is kept: what is kept has no hole."""
    of = kept(room=10)
    for part in (b"1234", b"5678", b"9999", b"0"):
        of.answer(part, streamed=True)
    assert of.said == [b"1234", b"5678"]
    assert of.cut
    assert of.streamed
    large = kept()
    large.answer(b"x" * MOST_CONTENT, streamed=False)
    large.answer(b"x", streamed=False)
    assert len(large.said) == 1
    assert large.cut


def test_no_answer_is_kept_without_contents() -> None:
    """It would only be thrown away."""
    of = kept(content=False)
    of.answer(b"1234", streamed=True)
    assert (of.said, of.cut) == ([], False)


def test_all_requests_share_one_budget() -> None:
    """What one keeps another cannot, until it is released; released twice it is free once."""
    budget = Budget(10)
    one, other = Kept(budget, content=True), Kept(budget, content=True)
    one.answer(b"123456", streamed=False)
    other.answer(b"123456", streamed=False)
    assert (one.said, other.said, other.cut) == ([b"123456"], [], True)
    one.release()
    one.release()
    assert one.said == []
    assert not budget.take(11)
    assert budget.take(10)
