"""The daemon's pulse: how late its event loop is, and a sign of life for systemd's watchdog."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiproxy.metrics import Metrics
    from aiproxy.systemd import Notifier

LAG_PERIOD = 0.5  # seconds between two measurements of the event loop's lag


class Pulse:
    """Two timers, from `start` to `stop`."""

    def __init__(self, metrics: Metrics, notifier: Notifier) -> None:
        self._metrics = metrics
        self._notifier = notifier
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def start(self) -> None:
        """Begin; the event loop runs."""
        self._measure_lag(None)
        self._feed_watchdog()

    def stop(self) -> None:
        """End."""
        for timer in self._timers.values():
            timer.cancel()

    def _measure_lag(self, due: float | None) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if due is not None:
            self._metrics.loop_lag.observe(max(0.0, now - due))
        then = now + LAG_PERIOD
        self._timers["lag"] = loop.call_at(then, self._measure_lag, then)

    def _feed_watchdog(self) -> None:
        """A sign of life from the event loop: one that is stuck gives none, and is restarted."""
        if self._notifier.watchdog is not None:
            self._notifier.alive()
            loop = asyncio.get_running_loop()
            period = self._notifier.watchdog / 2  # sd_watchdog_enabled(3)
            self._timers["watchdog"] = loop.call_later(period, self._feed_watchdog)
