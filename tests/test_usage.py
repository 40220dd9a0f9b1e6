"""Tokens: how each API counts them, what is charged, and how fast a target is."""

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiproxy.errors import Outcome
from aiproxy.usage import (
    MAX_TOKENS,
    Reason,
    Usage,
    charge,
    estimate_output,
    from_chat,
    from_messages,
    from_responses,
)
from answers import Usage as Told

READERS = {"responses": from_responses, "chat": from_chat, "messages": from_messages}
Api = Literal["responses", "chat", "messages"]
APIS: list[Api] = ["responses", "chat", "messages"]
BAD = [-1, MAX_TOKENS + 1, 10**30, 1.0, 1.5, "1", True, [1], {"n": 1}, float("inf")]


def told(api: Api, usage: Told) -> dict[str, Any]:
    """A usage as an API tells it."""
    tellers = {"responses": usage.responses, "chat": usage.chat, "messages": usage.messages}
    return tellers[api]()


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (Told(11, 0, 7, 0), Usage(11, 0, 7, 0)),
        (Told(11, 3, 7, 2), Usage(8, 3, 5, 2)),
        (Told(11, 3, 7, 2, cache_write=4), Usage(8, 3, 5, 2)),
        (Told(11, 11, 7, 7), Usage(0, 11, 0, 7)),
        (Told(0, 0, 0, 0), Usage()),
        (Told(MAX_TOKENS, 0, MAX_TOKENS, 0), Usage(MAX_TOKENS, 0, MAX_TOKENS, 0)),
    ],
)
def test_usage_is_disjoint(api: Api, usage: Told, expected: Usage) -> None:
    """Cached and reasoning tokens are counted once; cache writes are input (contract, 9)."""
    assert READERS[api](told(api, usage)) == expected


@pytest.mark.parametrize("api", APIS)
@given(
    st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000), st.integers(0, 1000)
)  # fmt: skip
def test_the_types_add_up(api: Api, cached: int, fresh: int, text: int, reasoning: int) -> None:
    """Whatever the parts, input types add up to the input and output types to the output."""
    given_usage = Told(fresh + cached, cached, text + reasoning, reasoning)
    usage = READERS[api](told(api, given_usage))
    assert usage is not None
    assert usage.input + usage.input_cached == fresh + cached
    assert usage.output + usage.output_reasoning == usage.total_output == text + reasoning


FIELDS: dict[Api, tuple[str, str]] = {
    "responses": ("input_tokens", "output_tokens"),
    "chat": ("prompt_tokens", "completion_tokens"),
    "messages": ("input_tokens", "output_tokens"),
}


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("value", [*BAD, None], ids=repr)
def test_a_bad_count_is_not_believed(api: Api, place: int, value: object) -> None:
    """A count that is no integer from 0 to 100,000,000 makes the whole usage bad."""
    assert READERS[api](told(api, Told()) | {FIELDS[api][place]: value}) is None


@pytest.mark.parametrize("api", ["responses", "messages"])
@pytest.mark.parametrize("place", [0, 1])
def test_a_missing_count_is_not_believed(api: Api, place: int) -> None:
    """A usage without one of its two counts says too little."""
    usage = told(api, Told())
    del usage[FIELDS[api][place]]
    assert READERS[api](usage) is None


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("value", [None, [], 5, "x", True, {}], ids=repr)
def test_what_is_no_usage(api: Api, value: object) -> None:
    """Anything but an object with counts is no usage."""
    assert READERS[api](value) is None


DETAILS = [
    ("responses", "input_tokens_details", "cached_tokens"),
    ("responses", "output_tokens_details", "reasoning_tokens"),
    ("chat", "prompt_tokens_details", "cached_tokens"),
    ("chat", "completion_tokens_details", "reasoning_tokens"),
]


@pytest.mark.parametrize(("api", "group", "name"), DETAILS)
@pytest.mark.parametrize("details", [None, {}, {"x": 1}], ids=repr)
def test_details_may_be_missing(api: Api, group: str, name: str, details: object) -> None:
    """A server that gives no details gives none of that type (llama.cpp)."""
    usage = READERS[api](told(api, Told()) | {group: details})
    assert usage is not None
    assert (usage.input + usage.input_cached, usage.total_output) == (11, 7)
    assert (usage.input_cached if "cached" in name else usage.output_reasoning) == 0
    assert READERS[api](told(api, Told()) | {group: {name: None}}) == usage


@pytest.mark.parametrize(("api", "group", "name"), DETAILS)
def test_a_bad_detail_is_not_believed(api: Api, group: str, name: str) -> None:
    """A bad count among the details makes the usage bad too: the estimate stands."""
    for value in BAD:
        assert READERS[api](told(api, Told()) | {group: {name: value}}) is None, value


@pytest.mark.parametrize("name", ["cache_creation_input_tokens", "cache_read_input_tokens"])
@pytest.mark.parametrize("value", BAD, ids=repr)
def test_a_bad_cache_count_of_messages(name: str, value: object) -> None:
    """The cache fields of messages are counts like the others."""
    assert from_messages(told("messages", Told()) | {name: value}) is None


@pytest.mark.parametrize("name", ["cache_creation_input_tokens", "cache_read_input_tokens"])
def test_an_empty_cache_count_of_messages(name: str) -> None:
    """What is empty but not null is no count either."""
    empty: list[object] = [False, "", [], {}]
    for value in empty:
        assert from_messages(told("messages", Told()) | {name: value}) is None, value


@pytest.mark.parametrize(("api", "group", "name"), DETAILS)
def test_a_detail_larger_than_its_whole(api: Api, group: str, name: str) -> None:
    """Parts never exceed the whole, so that no type is negative."""
    usage = READERS[api](told(api, Told()) | {group: {name: 5000}})
    if usage is not None:
        assert min(usage.input, usage.input_cached, usage.output, usage.output_reasoning) >= 0
        assert (usage.input + usage.input_cached, usage.total_output) == (11, 7)


def test_embeddings_have_input_alone() -> None:
    """The usage of embeddings has no completion tokens: the output is nothing."""
    assert from_chat(Told(11, 0).embeddings()) == Usage(input=11)


# Estimates


@pytest.mark.parametrize(
    ("deltas", "size", "tokens"), [(0, 0, 0), (3, 3, 3), (1, 400, 100), (0, 5, 2), (7, 0, 7)]
)
def test_estimated_output(deltas: int, size: int, tokens: int) -> None:
    """A delta is a token at least, and four bytes are one."""
    assert estimate_output(deltas, size) == tokens


COUNTED = Usage(8, 3, 5, 2)
GIVEN = 25


def firm(largest: int) -> dict[str, Any]:
    """The largest output, as the request declares it."""
    return {"largest": largest, "firm": True}


@pytest.mark.parametrize(
    ("outcome", "changes", "usage", "reason"),
    [
        # Counted by the upstream: that stands, however it ended.
        ("completed", {"counted": COUNTED}, COUNTED, None),
        ("incomplete", {"counted": COUNTED}, COUNTED, None),
        ("failed", {"counted": COUNTED}, COUNTED, None),
        ("client_disconnected", {"counted": COUNTED}, COUNTED, None),
        # Not counted: estimated, and flagged.
        ("completed", {}, Usage(GIVEN, 0, 10, 0), "missing"),
        ("incomplete", {}, Usage(GIVEN, 0, 10, 0), "missing"),
        ("failed", {}, Usage(GIVEN, 0, 10, 0), "missing"),
        ("completed", {"reason": "bad"}, Usage(GIVEN, 0, 10, 0), "bad"),
        ("upstream_error", {}, Usage(GIVEN, 0, 10, 0), "cut"),
        ("upstream_timeout", {}, Usage(GIVEN, 0, 10, 0), "cut"),
        ("drained", {}, Usage(GIVEN, 0, 10, 0), "cut"),
        # The client left: the larger of what it got and what was made meanwhile.
        ("client_disconnected", {"paced": 50}, Usage(GIVEN, 0, 50, 0), "disconnected"),
        ("client_disconnected", {"paced": 5}, Usage(GIVEN, 0, 10, 0), "disconnected"),
        ("client_disconnected", {"paced": 50, **firm(20)}, Usage(GIVEN, 0, 20, 0), "disconnected"),
        ("client_disconnected", {"paced": 50, **firm(0)}, Usage(GIVEN, 0, 0, 0), "disconnected"),
        # A maximum that is only assumed bounds what nobody saw, not what was delivered.
        (
            "client_disconnected",
            {"paced": 50, "largest": 7},
            Usage(GIVEN, 0, 10, 0),
            "disconnected",
        ),
        (
            "client_disconnected",
            {"paced": 50, "largest": 20},
            Usage(GIVEN, 0, 20, 0),
            "disconnected",
        ),
        # Nothing was made: nothing is charged.
        ("upstream_error", {"answered": False}, None, None),
        ("upstream_error", {"streamed": False}, None, None),
        ("upstream_rejected", {"answered": False}, None, None),
        ("rejected_invalid", {"answered": False}, None, None),
        ("rejected_auth", {"answered": False}, None, None),
        ("rejected_limit", {"answered": False}, None, None),
        ("internal_error", {"answered": False}, None, None),
    ],
)
def test_charge(
    outcome: Outcome, changes: dict[str, Any], usage: Usage | None, reason: Reason | None
) -> None:
    """Who is charged what, and why it is an estimate (contract, 6 and 8)."""
    facts: dict[str, Any] = {
        "counted": None,
        "reason": None,
        "answered": True,
        "streamed": True,
        "given": GIVEN,
        "delivered": 10,
        "paced": 0,
        "largest": 16384,
        "firm": False,
    }
    assert charge(outcome, **{**facts, **changes}) == (usage, reason)
