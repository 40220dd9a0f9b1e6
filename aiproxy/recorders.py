"""Where what happens is written: metrics, what the status page remembers, log, traces."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiproxy.breaker import Reason, State
    from aiproxy.exchange import Exchange
    from aiproxy.lately import Lately
    from aiproxy.logs import Log
    from aiproxy.metrics import Metrics
    from aiproxy.tracing import Tracing


class Recorders:
    """See `exchange.Recorder`."""

    def __init__(self, metrics: Metrics, lately: Lately, log: Log, tracing: Tracing) -> None:
        self._metrics = metrics
        self._lately = lately
        self._log = log
        self._tracing = tracing

    def begin(self, exchange: Exchange) -> None:
        """A request was received."""
        self._metrics.begin(exchange)

    def record(self, exchange: Exchange) -> None:
        """It ended."""
        self._metrics.record(exchange)
        self._lately.record(exchange)
        self._log.record(exchange)
        self._tracing.record(exchange)

    def upstream(self, name: str, state: State, reason: Reason, seconds: float) -> None:
        """An upstream is left alone from now on, or takes requests again."""
        self._metrics.upstream_available(name, available=state == "closed")
        log = self._log.process
        if state == "closed":
            log.info("upstream available again", upstream=name)
        elif state == "half-open":
            log.info("upstream probed", upstream=name)
        elif reason == "credential":
            log.error(
                "upstream refuses our credential", upstream=name, retry_in_s=round(seconds, 3)
            )
        else:
            log.warning("upstream left alone", upstream=name, retry_in_s=round(seconds, 3))
