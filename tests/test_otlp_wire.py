"""OTLP as aiproxy writes it, read by the classes that protobuf generates."""

from collections.abc import Mapping
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from aiproxy.otlp_wire import (
    CLIENT,
    FAILED,
    SERVER,
    ExportRequest,
    Value,
    attribute,
    attributes,
    event,
    span,
)
from collector import value_of

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)
VALUES = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=300),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
)
IDS = st.integers(1, 2**64 - 1)
TIMES = st.integers(0, 2**63)


def read(told: Span) -> dict[str, Value]:
    """Return a span's attributes."""
    return {each.key: value_of(each.value) for each in told.attributes}


def same(found: Mapping[str, Value], expected: Mapping[str, Value]) -> bool:
    """Tell whether they are equal, their types too: to Python True is 1."""
    return found == expected and [*map(type, found.values())] == [*map(type, expected.values())]


@given(st.dictionaries(KEYS, VALUES, max_size=8))
def test_attributes_come_back(told: dict[str, Value]) -> None:
    """Every value comes back as what it was, also the second time, when it is known."""
    for _ in range(2):
        assert same(read(Span.FromString(attributes(told))), told)


def test_what_is_remembered_has_its_type() -> None:
    """1, True and 1.0 are equal as keys of a dictionary, and are told apart."""
    for value in (1, True, 1.0, 0, False, 0.0):
        assert same(read(Span.FromString(attributes({"a": value}))), {"a": value})


def test_what_is_no_text_is_told_as_far_as_it_is() -> None:
    """Bytes of a header that are no UTF-8 cost their letters, not the span."""
    assert read(Span.FromString(attribute("a", "x\udcffy"))) == {"a": "x?y"}


SPANS = st.fixed_dictionaries(
    {
        "trace_id": st.integers(1, 2**128 - 1),
        "span_id": IDS,
        "parent_id": IDS | st.just(0),
        "remote": st.booleans(),
        "state": st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=512),
        "name": KEYS,
        "times": st.tuples(TIMES, TIMES),
    }
)
REST = st.tuples(
    st.booleans(), st.booleans(), st.dictionaries(KEYS, VALUES, max_size=4), TIMES
)  # a server's, failed, its attributes, its event


@given(SPANS, REST)
def test_a_span_comes_back(
    given_span: dict[str, Any], given_rest: tuple[bool, bool, dict[str, Value], int]
) -> None:
    """All of a body comes back: resource, scope, ids, kind, times, events, status, flags."""
    server, failed, told, first = given_rest
    rest = (SERVER if server else CLIENT) + attributes(told) + event("first", first)
    made = span(**given_span, rest=rest + (FAILED if failed else b""))
    body = ExportRequest({"service.name": "aiproxy", "n": 1}, ("scope", "2")).body([made, made])
    (group,) = ExportTraceServiceRequest.FromString(body).resource_spans
    resource = {each.key: value_of(each.value) for each in group.resource.attributes}
    assert resource == {"service.name": "aiproxy", "n": 1}
    (scoped,) = group.scope_spans
    assert (scoped.scope.name, scoped.scope.version) == ("scope", "2")
    for found in scoped.spans:
        assert int.from_bytes(found.trace_id, "big") == given_span["trace_id"]
        assert (len(found.trace_id), len(found.span_id)) == (16, 8)
        assert int.from_bytes(found.span_id, "big") == given_span["span_id"]
        assert int.from_bytes(found.parent_span_id, "big") == given_span["parent_id"]
        assert (found.trace_state, found.name) == (given_span["state"], given_span["name"])
        assert found.kind == (Span.SPAN_KIND_SERVER if server else Span.SPAN_KIND_CLIENT)
        assert (found.start_time_unix_nano, found.end_time_unix_nano) == given_span["times"]
        assert same(read(found), told)
        assert [(each.name, each.time_unix_nano) for each in found.events] == [("first", first)]
        code = Status.STATUS_CODE_ERROR if failed else Status.STATUS_CODE_UNSET
        assert found.status.code == code
        assert found.flags == 0x101 + (0x200 if given_span["remote"] else 0)
    assert len(scoped.spans) == 2
