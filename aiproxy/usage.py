"""Tokens counted in an answer, and estimates where the upstream counted none.

The four kinds are disjoint and add up: input (cache writes included), input_cached (read from a
cache), output, output_reasoning. A count that is not an integer from 0 to MAX_TOKENS is bad: then
nothing of that usage is believed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from aiproxy.errors import Outcome

MAX_TOKENS = 100_000_000
BYTES_PER_TOKEN = 4  # of English text in the common tokenizers; an estimate says that it is one

# Why a usage is an estimate. A label of a metric, hence a closed list.
Reason = Literal["missing", "bad", "cut", "disconnected"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer; disjoint kinds."""

    input: int = 0
    input_cached: int = 0
    output: int = 0
    output_reasoning: int = 0

    @property
    def total(self) -> int:
        """All tokens."""
        return self.input + self.input_cached + self.output + self.output_reasoning

    @property
    def total_input(self) -> int:
        """Input tokens, cached ones included."""
        return self.input + self.input_cached

    @property
    def total_output(self) -> int:
        """Output tokens, reasoning included."""
        return self.output + self.output_reasoning


def _count(value: object) -> int | None:
    if type(value) is int and 0 <= value <= MAX_TOKENS:
        return value
    return None


def _details(usage: dict[str, Any], group: str, name: str) -> object:
    """A count among the details, which may be missing: then it is 0."""
    details = usage.get(group)
    return _optional(details, name) if isinstance(details, dict) else 0


def _build(prompt: object, cached: object, generated: object, reasoning: object) -> Usage | None:
    given, made, read, thought = map(_count, (prompt, generated, cached, reasoning))
    if given is None or made is None or read is None or thought is None:
        return None
    read, thought = min(read, given), min(thought, made)
    return Usage(given - read, read, made - thought, thought)


def from_responses(usage: object) -> Usage | None:
    """`usage` of a Responses object (API reference, "The response object"); None when bad."""
    if not isinstance(usage, dict):
        return None
    return _build(
        usage.get("input_tokens"),
        _details(usage, "input_tokens_details", "cached_tokens"),
        usage.get("output_tokens"),
        _details(usage, "output_tokens_details", "reasoning_tokens"),
    )


def from_chat(usage: object) -> Usage | None:
    """`usage` of a chat completion or of embeddings, which have no completion tokens."""
    if not isinstance(usage, dict):
        return None
    return _build(
        usage.get("prompt_tokens"),
        _details(usage, "prompt_tokens_details", "cached_tokens"),
        usage.get("completion_tokens", 0),
        _details(usage, "completion_tokens_details", "reasoning_tokens"),
    )


def from_messages(usage: object) -> Usage | None:
    """`usage` of a message: `input_tokens` is what neither read from nor wrote to the cache."""
    if not isinstance(usage, dict):
        return None
    given = _count(usage.get("input_tokens"))
    written = _count(_optional(usage, "cache_creation_input_tokens"))
    cached = _count(_optional(usage, "cache_read_input_tokens"))
    if given is None or written is None or cached is None:
        return None
    return _build(
        given + written + cached,
        cached,
        usage.get("output_tokens"),
        _details(usage, "output_tokens_details", "thinking_tokens"),
    )


def _optional(usage: dict[str, Any], name: str) -> object:
    """A count that may be missing: then it is 0."""
    count = usage.get(name)
    return 0 if count is None else count


def estimate_output(deltas: int, size: int) -> int:
    """Tokens of `deltas` text deltas of `size` bytes in all: a delta holds at least one."""
    return max(deltas, -(-size // BYTES_PER_TOKEN))


def charge(
    outcome: Outcome,
    *,
    counted: Usage | None,
    reason: Reason | None,
    answered: bool,
    streamed: bool,
    given: int,
    delivered: int,
    paced: int,
    largest: int,
    firm: bool,
) -> tuple[Usage | None, Reason | None]:
    """What a request that was sent upstream is charged, and why if that is an estimate.

    Args:
        outcome: how it ended.
        counted: the upstream's own usage, if it was read and is good.
        reason: why there is none.
        answered: a success status came.
        streamed: a stream was asked for.
        given: estimated input tokens.
        delivered: estimated output tokens that reached the client.
        paced: output tokens that the target makes in the time that it had.
        largest: the largest output that the answer can have.
        firm: whether the request or its route says so; else what was delivered may be more.
    """
    if counted is not None:
        return counted, None
    match outcome:
        case "client_disconnected":
            # The upstream went on working for a client that does not wait: it pays for the larger.
            made = max(delivered, min(paced, largest))
            made = min(made, largest) if firm else made
            return Usage(input=given, output=made), "disconnected"
        case "completed" | "incomplete" | "failed":
            return Usage(input=given, output=delivered), reason or "missing"
        case "upstream_timeout" | "drained":
            return Usage(input=given, output=delivered), "cut"
        case "store_error" if answered:
            return Usage(input=given, output=delivered), "cut"
        case "upstream_error" | "internal_error" if answered and streamed:
            return Usage(input=given, output=delivered), "cut"
        case _:
            return None, None
