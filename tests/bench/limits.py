"""What limits cost a request, in microseconds of CPU: `python tests/bench/limits.py`.

Each figure is the median of many short rounds, so that what else the machine does counts little.
"""
# ruff: noqa: T201 - a program for a terminal prints

import statistics
import time
from collections.abc import Callable

from aiproxy.config import Limits
from aiproxy.limits import Account, Clock, Combined, Demand, Refusal, ratelimit_headers
from aiproxy.prompt_size import measure
from aiproxy.recent import Recent

ROUNDS, CALLS = 201, 1000
MUCH = "900000000000/min"  # so that nothing is refused


def microseconds(work: Callable[[], object]) -> tuple[float, float]:
    """The median and the least of the rounds, for one call."""
    found = []
    for _ in range(ROUNDS):
        begin = time.process_time_ns()
        for _ in range(CALLS):
            work()
        found.append((time.process_time_ns() - begin) / CALLS / 1000)
    return statistics.median(found), min(found)


def combined(*limits: Limits) -> Combined:
    """The limits of so many owners, together."""
    clock = Clock(time.monotonic_ns)
    accounts = [Account(f"owner {number}") for number in range(len(limits))]
    for account, its in zip(accounts, limits, strict=True):
        account.resize(its, clock.now())
    return Combined(accounts, clock)


def admitted(
    limits: Combined, given: int, output: int, largest: int | None = None
) -> Callable[[], None]:
    """Admit and settle one request."""

    def work() -> None:
        held = limits.admit(Demand(given, output, largest))
        if isinstance(held, Refusal):
            raise TypeError(held.message)
        held.settle(7)

    return work


def main() -> None:
    """Print a table."""
    one = combined(Limits.model_validate({"requests": MUCH, "tokens": MUCH, "concurrent": 16}))
    two = combined(
        Limits.model_validate({"requests": MUCH, "tokens": [MUCH, "900000000000/day"]}),
        Limits.model_validate({"concurrent": 64}),
    )
    recent, body = Recent(), b'{"model":"m","input":"' + b"word " * 400 + b'"}'
    size = measure(body)

    def estimated() -> None:
        recent.estimate("k", "r", size, declared=None, most=None, many=1)
        recent.outputs.observe("k", "r", 7)

    rows: list[tuple[str, Callable[[], object]]] = [
        ("admit + settle: requests, tokens, concurrent; reserve max", admitted(one, 300, 500)),
        ("the same; reserve p90", admitted(one, 300, 500, 4096)),
        ("two windows of tokens, and a route's concurrent; p90", admitted(two, 300, 500, 4096)),
        ("estimate, and remember an output", estimated),
        ("size of a body of 2 kB", lambda: measure(body)),
        ("levels and headers of an answer", lambda: ratelimit_headers(one.levels())),
    ]
    print(f"{'us of CPU per request':<60} median    least")
    for name, work in rows:
        median, least = microseconds(work)
        print(f"{name:<60} {median:6.2f}   {least:6.2f}")


if __name__ == "__main__":
    main()
