"""When an upstream that fails is left alone, and for how long.

Closed: requests go to it. After so many failures in a row it is open: none do, until its cooldown
has passed; then one goes, the probe. If that succeeds it is closed again, else it is open for twice
as long, up to a maximum. A refused credential opens it at once: no request would fare better. What
an upstream says itself (`Retry-After`) lengthens the wait.

Pure: the caller brings the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

State = Literal["closed", "open", "half-open"]
Reason = Literal["", "failures", "credential"]  # why it opened


class Breaker:
    """Of one upstream. Times are of one monotonic clock, in seconds.

    Args:
        failures: in a row that open it.
        cooldown: seconds, the first time.
        max_cooldown: seconds at most, as it doubles.
        told: called with each new state, why it opened, and the seconds until the next probe.
    """

    def __init__(
        self,
        failures: int,
        cooldown: float,
        max_cooldown: float,
        told: Callable[[State, Reason, float], None],
    ) -> None:
        self.configure(failures, cooldown, max_cooldown)
        self._told = told
        self.state: State = "closed"
        self._row = 0  # failures since the last success
        self._times = 0  # that it opened since it was closed
        self._until = 0.0

    def configure(self, failures: int, cooldown: float, max_cooldown: float) -> None:
        """Take another configuration; what happened so far stays."""
        self._failures = failures
        self._cooldown = cooldown
        self._max_cooldown = max(cooldown, max_cooldown)

    def admits(self, now: float) -> bool:
        """Whether a request may go; of an open one whose cooldown has passed one may, the probe.

        Whoever is admitted tells how it went: `succeeded`, `failed`, `refused` or `unknown`.
        """
        if self.state == "closed":
            return True
        if self.state == "half-open" or now < self._until:
            return False
        self._become("half-open")
        return True

    def wait(self, now: float) -> float:
        """Seconds until a request may go, as far as is known."""
        if self.state == "closed":
            return 0.0
        return max(0.0, self._until - now)

    def answered(self, *, probe: bool) -> None:
        """The upstream has begun to answer: others may go, too; how it ends is to be seen."""
        if probe:
            self._become("closed")

    def succeeded(self, *, probe: bool = False) -> None:
        """It has answered to the end, or with a refusal of its own.

        `probe`: the request is the one that tries an upstream that is left alone. One that began
        before says nothing about it now.
        """
        if probe or self.state == "closed":
            self._row = self._times = 0
            self._become("closed")

    def failed(self, now: float, retry_after: float = 0.0, *, probe: bool = False) -> None:
        """It has not, or said that it cannot; `retry_after`: seconds, as it asks for.

        One that began before it was left alone doubles nothing, however late it fails.
        """
        self._row += 1
        if probe if self.state == "half-open" else self._row >= self._failures:
            self._open(now, retry_after, "failures")

    def refused(self, now: float) -> None:
        """It does not take our credential."""
        self._row = max(self._row + 1, self._failures)
        self._open(now, 0.0, "credential")

    def unknown(self, *, probe: bool = False) -> None:
        """The request ended before anything was known: a probe leaves room for another."""
        if probe and self.state == "half-open":
            self._become("open", "failures")

    def _open(self, now: float, retry_after: float, reason: Reason) -> None:
        if self.state == "open":
            # Others that were under way failed, too: nothing new, but what it asks for.
            self._until = max(self._until, now + min(retry_after, self._max_cooldown))
            return
        cooldown = min(self._cooldown * 2.0 ** min(self._times, 32), self._max_cooldown)
        cooldown = max(cooldown, min(retry_after, self._max_cooldown))
        self._times += 1
        self._until = now + cooldown
        self._become("open", reason, cooldown)

    def _become(self, state: State, reason: Reason = "", seconds: float = 0.0) -> None:
        if state != self.state:
            self.state = state
            self._told(state, reason, seconds)
