"""What is known of one request: it becomes its log line, metrics and spans, once, when it ends.

`finish(outcome)` is the only end. It awaits nothing and may be called any number of times; the
first call counts. What it is written to is given by the one who makes the exchange.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiproxy.errors import Outcome
    from aiproxy.sessions import LoadResult
    from aiproxy.trace import Trace
    from aiproxy.usage import Reason, Usage

Endpoint = Literal[
    "responses", "chat", "embeddings", "messages", "response", "input_tokens", "count_tokens",
    "models", "none",
]  # fmt: skip
AttemptResult = Literal[
    "ok", "connect", "timeout", "reset", "protocol", "status_4xx", "status_429", "status_5xx"
]

NONE = "none"  # the label of what is not known, or not from the configuration


class Recorder(Protocol):
    """Where exchanges are written."""

    def begin(self, exchange: Exchange) -> None:
        """A request was received."""

    def record(self, exchange: Exchange) -> None:
        """It ended: `outcome` and all else is final."""


@dataclass(slots=True, eq=False)
class Exchange:
    """One request. Times are of one monotonic clock, in seconds; 0.0 means it did not happen."""

    request_id: str
    endpoint: Endpoint
    recorder: Recorder
    clock: Callable[[], float]
    started: float
    client: str = ""  # address, behind trusted proxies the one they name
    key: str = NONE
    route: str = NONE  # as the configuration has it
    model: str = ""  # as the client wrote it
    upstream: str = ""
    attempts: int = 0
    # Of the attempts that ended: whom they asked, and how they ended.
    results: list[tuple[str, AttemptResult]] = field(default_factory=list)
    status: int = 0
    outcome: Outcome | None = None
    error_code: str = ""
    limit: str = ""  # that refused it: requests, tokens, concurrent
    upstream_request_id: str = ""
    waited: float = 0.0  # for the client's body
    first_asked: float = 0.0  # when the first upstream request was made
    asked: float = 0.0  # when the last one was
    answered: float = 0.0  # when the head of a good answer came
    first_token: float = 0.0
    ended: float = 0.0
    usage: Usage | None = None
    estimated: Reason | None = None
    replayed_turns: int = 0
    loads: list[LoadResult] = field(default_factory=list)  # look-ups of stored turns and items
    reasoning_left_out: int = 0  # items that another upstream encrypted
    bytes_in: int = 0
    bytes_out: int = 0
    streaming: bool = False  # the client has got the head of a stream
    trace: Trace | None = None

    def __post_init__(self) -> None:
        """Count the request as begun."""
        self.recorder.begin(self)

    def finish(self, outcome: Outcome) -> None:
        """End the request; later calls change nothing."""
        if self.outcome is not None:
            return
        self.outcome = outcome
        self.ended = self.clock()
        self.recorder.record(self)

    @property
    def duration(self) -> float:
        """Seconds from the request's head to its end."""
        return self.ended - self.started

    @property
    def overhead(self) -> float | None:
        """Own seconds before the upstream was asked; None if it was not."""
        return self.first_asked - self.started - self.waited if self.first_asked else None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds to the first event that carried output; None without one."""
        return self.first_token - self.started if self.first_token else None

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds per output token after the first; None without at least two counted ones."""
        if not self.first_token or self.usage is None or self.estimated is not None:
            return None
        tokens = self.usage.total_output
        return (self.ended - self.first_token) / (tokens - 1) if tokens > 1 else None
