"""How limits are told to clients: the headers of every answer, and durations."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiproxy.limits.bucket import Kind, Level

_MILLISECOND = 1_000_000  # nanoseconds


def go_duration(nanoseconds: int) -> str:
    """A duration as Go prints it (package time, Duration.String): `20ms`, `1.5s`, `6m0s`.

    In whole milliseconds, rounded up: who waits for so long has waited long enough.
    """
    milliseconds = -(-nanoseconds // _MILLISECOND)
    if not milliseconds:
        return "0s"
    if milliseconds < 1000:  # noqa: PLR2004 - a second
        return f"{milliseconds}ms"
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{seconds}.{rest:03d}".rstrip("0") if rest else str(seconds)
    if hours:
        return f"{hours}h{minutes}m{text}s"
    return f"{minutes}m{text}s" if minutes else f"{text}s"


def tightest(levels: Iterable[Level]) -> dict[Kind, Level]:
    """Of each kind the limit that leaves the least."""
    found: dict[Kind, Level] = {}
    for level in levels:
        known = found.get(level.kind)
        if known is None or level.left < known.left:
            found[level.kind] = level
    return found


_NAMES = {
    kind: tuple(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset"))
    for kind in ("requests", "tokens")
}


def ratelimit_headers(levels: Iterable[Level]) -> list[tuple[str, str]]:
    """`x-ratelimit-*` of these windows (API reference, "Rate limits in headers")."""
    found = []
    for kind, _, capacity, remaining, reset in levels:
        limit_name, remaining_name, reset_name = _NAMES[kind]
        found += [
            (limit_name, str(capacity)),
            (remaining_name, str(max(0, remaining))),
            (reset_name, go_duration(reset)),
        ]
    return found
