"""One process: sockets, signals, readiness, drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import uvloop
from aiohttp import web

import aiproxy
from aiproxy.admin import Admin
from aiproxy.app import App
from aiproxy.listener import Handler, Listener, require_c_parser
from aiproxy.logs import LibraryHandler, Log, standard_error
from aiproxy.metrics import Metrics
from aiproxy.proxy import Proxy
from aiproxy.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from structlog.typing import FilteringBoundLogger

    from aiproxy.config import Address, Config
    from aiproxy.exchange import Exchange
    from aiproxy.logs import Stream

BACKLOG = 4096
LAG_PERIOD = 0.5  # seconds between two measurements of the event loop's lag
SWITCH_INTERVAL = 0.001  # seconds: a scrape in a thread may keep the event loop waiting this long
# A request makes a few hundred objects, nearly all freed by reference counting: with Python's own
# thresholds the collector runs every few requests to find nothing.
GC_THRESHOLDS = (10_000, 20, 20)
SENT_PERIOD = 0.02  # seconds between looks at what slow clients have not taken yet
LAST_BYTES = 0.5  # seconds for clients that are behind to take their terminal event
LAST_WORDS = 5.0  # seconds for what was cut to send its terminal event


class _Recorders:
    """Exchanges go to the metrics and to the log."""

    def __init__(self, metrics: Metrics, log: Log) -> None:
        self._metrics = metrics
        self._log = log

    def begin(self, exchange: Exchange) -> None:
        self._metrics.begin(exchange)

    def record(self, exchange: Exchange) -> None:
        self._metrics.record(exchange)
        self._log.record(exchange)


class Daemon:
    """A running aiproxy.

    `start`, then `drain` (what SIGTERM does) or `stop` (at once, in order); `run` does all of it.

    Attributes:
        listen_port, admin_port: where it listens, once started; 0 on a unix socket.
    """

    def __init__(self, config: Config, *, log_stream: Stream | None = None) -> None:
        require_c_parser()
        self._config = config
        stream, journal = standard_error() if log_stream is None else (log_stream, False)
        fmt = config.log.format
        if fmt == "auto":
            fmt = "console" if log_stream is None and sys.stderr.isatty() else "json"
        self._log = Log(stream, level=config.log.level, fmt=fmt, journal=journal)
        self._metrics = Metrics()
        self._metrics.watch_log(self._log.dropped)
        self.listen_port = 0
        self.admin_port = 0
        self._proxy: Proxy
        self._clients: Listener
        self._snapshot: Snapshot
        self._runners: list[web.BaseRunner] = []
        self._sites: list[web.BaseSite] = []
        self._admin_site: web.BaseSite | None = None  # stays up through the drain
        self._lag_timer: asyncio.TimerHandle | None = None
        self._ended = False
        self._hurry = asyncio.Event()  # binds to no loop before it is awaited

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: an address cannot be bound; nothing is left open.
        """
        config = self._config
        self._snapshot = Snapshot(config)
        recorders = _Recorders(self._metrics, self._log)
        self._proxy = Proxy(self._snapshot, recorders, self._log.process)
        self._clients = self._listener(App(self._proxy))
        clients = web.ServerRunner(self._clients)
        operators = web.ServerRunner(self._listener(Admin(self._metrics, self._proxy)))
        try:
            self.admin_port = await self._listen(operators, config.admin)
            self._admin_site = self._sites[-1]
            self.listen_port = await self._listen(clients, config.listen)
        except OSError:
            await self._close_sockets()
            raise
        self._metrics.configured(config.upstreams, time.time())
        self._measure_lag(None)
        self.log.info(
            "started",
            version=aiproxy.__version__,
            listen=str(self._bound(config.listen, self.listen_port)),
            admin=str(self._bound(config.admin, self.admin_port)),
            upstreams=len(config.upstreams),
            routes=len(config.routes),
            keys=len(config.keys),
        )

    @property
    def log(self) -> FilteringBoundLogger:
        """Lines about the process."""
        return self._log.process

    def library_handler(self) -> logging.Handler:
        """Takes what libraries log into this log."""
        return LibraryHandler(self._log)

    def close_log(self) -> None:
        """Write what waits; for an end that no drain precedes."""
        self._log.close()

    @staticmethod
    def _bound(address: Address, port: int) -> Address:
        """The address with the port that the kernel chose for port 0."""
        return replace(address, port=port)

    def _listener(self, handler: Handler) -> Listener:
        config = self._config
        return Listener(
            handler,
            self._proxy.refuse,
            self._proxy.turn_away,
            max_connections=config.max_connections,
            client_header=config.timeouts.client_header,
            client_write=config.timeouts.client_write,
            keepalive=config.client_keepalive,
        )

    async def _listen(self, runner: web.BaseRunner, address: Address) -> int:
        await runner.setup()
        self._runners.append(runner)
        site: web.BaseSite
        if address.path is not None:
            site = web.UnixSite(runner, address.path, backlog=BACKLOG)
        else:
            site = web.TCPSite(runner, address.host, address.port, backlog=BACKLOG)
        await site.start()
        self._sites.append(site)
        return int(site.port) if isinstance(site, web.TCPSite) else 0

    def _measure_lag(self, due: float | None) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if due is not None:
            self._metrics.loop_lag.observe(max(0.0, now - due))
        self._lag_timer = loop.call_at(now + LAG_PERIOD, self._measure_lag, now + LAG_PERIOD)

    # -- the end

    async def drain(self) -> None:
        """End as SIGTERM does.

        Serve for `drain.delay`, stop accepting, let requests finish until `drain.timeout`, then cut
        them with a terminal event.
        """
        if self._ended:
            return
        self._ended = True
        config, proxy = self._config.drain, self._proxy
        before = set(proxy.live)
        proxy.drain()
        self.log.info("draining", in_flight=len(before))
        await self._first(self._hurry.wait(), deadline=self._now() + config.delay)
        before |= proxy.live
        proxy.refusing = True
        for site in self._sites:
            if site is not self._admin_site:
                await site.stop()
        deadline = self._now() + (config.timeout or float("inf"))
        await self._until_idle(deadline)
        await self._until_sent(deadline)
        cut = set(proxy.live)
        for call in cut:
            call.watch.interrupt("shutting_down")
        self._hurry.clear()
        await self._until_idle(self._now() + LAST_WORDS)
        await self._until_sent(self._now() + LAST_BYTES)
        self.log.info("drained %d, cut %d", len(before - cut), len(cut))
        await self._close()

    async def _until_idle(self, deadline: float) -> None:
        """Until no request is in flight, or `deadline`, or a second signal."""
        if self._proxy.live:
            self._proxy.idle.clear()
            await self._first(self._hurry.wait(), self._proxy.idle.wait(), deadline=deadline)

    async def _until_sent(self, deadline: float) -> None:
        """Answers that are complete may still wait for slow clients to take their last bytes."""
        while self._clients.unsent() and self._now() < deadline and not self._hurry.is_set():
            await self._first(self._hurry.wait(), deadline=self._now() + SENT_PERIOD)

    def hurry(self) -> None:
        """The second signal: end at once, in order."""
        self._hurry.set()

    async def stop(self) -> None:
        """End at once: what is in flight gets its terminal event."""
        self._hurry.set()
        await self.drain()

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _first(self, *waits: Coroutine[object, object, object], deadline: float) -> None:
        """Until one of these, or `deadline` on the loop's clock."""
        timeout = None if deadline == float("inf") else max(0.0, deadline - self._now())
        tasks = [asyncio.ensure_future(wait) for wait in waits]
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _close(self) -> None:
        if self._lag_timer is not None:
            self._lag_timer.cancel()
        await self._close_sockets()
        self.log.info("stopped")
        self._log.close()

    async def _close_sockets(self) -> None:
        for runner in reversed(self._runners):
            await runner.cleanup()
        self._runners.clear()
        self._snapshot.close()
        await asyncio.sleep(0)  # in which the event loop closes what was aborted

    # -- the whole life

    async def run(self) -> None:
        """Serve until a signal, then drain; a second signal ends at once."""
        loop = asyncio.get_running_loop()
        asked_to_end = asyncio.Event()

        def on_signal() -> None:
            if asked_to_end.is_set():
                self.hurry()
            asked_to_end.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await self.start()
        gc.collect()
        gc.freeze()  # what is there now stays: it need not be looked at again
        gc.set_threshold(*GC_THRESHOLDS)
        await asked_to_end.wait()
        await self.drain()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def serve(config: Config, warnings: Sequence[str]) -> int:
    """Run the daemon until it is told to end.

    Args:
        config: what to run.
        warnings: sentences to log at the start.

    Returns:
        The exit code: 0 after a clean end, 1 when it could not listen.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    daemon = Daemon(config)
    logging.getLogger().addHandler(daemon.library_handler())
    for warning in warnings:
        daemon.log.warning("configuration", warning=warning)
    try:
        uvloop.run(daemon.run())
    except OSError as error:
        daemon.log.error("cannot listen", error=str(error))  # noqa: TRY400 - no bug of ours
        daemon.close_log()
        return 1
    return 0
