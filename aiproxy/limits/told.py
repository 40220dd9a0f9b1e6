"""How limits are told to clients: the headers of every answer, and durations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiproxy.limits.bucket import Level

_MILLISECOND = 1_000_000  # nanoseconds


def go_duration(nanoseconds: int) -> str:
    """A duration as Go prints it (package time, Duration.String): `20ms`, `1.5s`, `6m0s`.

    In whole milliseconds, rounded up: who waits for so long has waited long enough.
    """
    milliseconds = -(-nanoseconds // _MILLISECOND)
    if milliseconds < 1000:  # noqa: PLR2004 - a second
        return f"{milliseconds}ms" if milliseconds else "0s"
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{seconds}.{rest:03d}".rstrip("0") if rest else str(seconds)
    if hours:
        return f"{hours}h{minutes}m{text}s"
    return f"{minutes}m{text}s" if minutes else f"{text}s"


def tightest(levels: Iterable[Level]) -> Mapping[str, Level]:
    """Of each kind the limit that leaves the least; of two alike the one that is full later."""
    found: dict[str, Level] = {}
    for level in levels:
        known = found.get(level.kind)
        if known is None or (level.remaining, -level.reset) < (known.remaining, -known.reset):
            found[level.kind] = level
    return found


def ratelimit_headers(levels: Iterable[Level]) -> list[tuple[str, str]]:
    """`x-ratelimit-*` of the tightest windows (API reference, "Rate limits in headers")."""
    found = []
    for kind, level in tightest(levels).items():
        if kind != "concurrent":
            found += [
                (f"x-ratelimit-limit-{kind}", str(level.capacity)),
                (f"x-ratelimit-remaining-{kind}", str(max(0, level.remaining))),
                (f"x-ratelimit-reset-{kind}", go_duration(level.reset)),
            ]
    return found
