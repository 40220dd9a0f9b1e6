"""One process: sockets, signals, readiness, reload, drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import uvloop

import aiproxy
from aiproxy.admin import Admin
from aiproxy.app import App
from aiproxy.config import ConfigError
from aiproxy.descriptors import connections, raise_limit
from aiproxy.drain import Drain
from aiproxy.first import first
from aiproxy.lately import Lately
from aiproxy.levels import LevelKeeper
from aiproxy.listener import Handler, Listener, require_c_parser
from aiproxy.logs import LibraryHandler, Log, standard_error
from aiproxy.metrics import Metrics
from aiproxy.proxy import Proxy
from aiproxy.pulse import Pulse
from aiproxy.recorders import Recorders
from aiproxy.reload import Reloader
from aiproxy.session_gate import SessionGate
from aiproxy.sessions import StoreError
from aiproxy.snapshot import Snapshot
from aiproxy.sockets import Entrance
from aiproxy.standing import Standings
from aiproxy.status import Status
from aiproxy.stores.level_file import state_directory
from aiproxy.stores.memory import MemoryLimits
from aiproxy.systemd import Notifier, inherited_sockets
from aiproxy.tracing import Tracing

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from aiproxy.config import Config, Loaded
    from aiproxy.logs import Stream
    from aiproxy.reload import Source

LAST_SPANS = 5.0  # seconds for the spans that wait when the daemon ends
SWITCH_INTERVAL = 0.001  # seconds that work in a thread may keep the event loop waiting at a time
# A request makes a few hundred objects, nearly all freed by reference counting: with Python's own
# thresholds the collector runs every few requests to find nothing.
GC_THRESHOLDS = (10_000, 20, 20)


class Daemon:
    """A running aiproxy.

    `start`, then `drain` (what SIGTERM does) or `stop` (at once, in order); `run` does all of it.

    Args:
        config: what to run.
        path: of its file, as a reload's mistakes name it.
        source: reads the file again, for a reload.
        sockets: listening sockets that systemd passed, by name; `http` takes the place of `listen`.
        notifier: tells systemd how it goes.
        state: the state directory, if there is one.
        descriptors: how many this process may have; None: enough.
        log_stream: instead of standard error.

    Attributes:
        clients, operators: where it listens, once started.
    """

    def __init__(
        self,
        config: Config,
        *,
        path: str,
        source: Source,
        sockets: Mapping[str, Sequence[socket.socket]] | None = None,
        notifier: Notifier | None = None,
        state: Path | None = None,
        descriptors: int | None = None,
        log_stream: Stream | None = None,
    ) -> None:
        require_c_parser()
        stream, journal = standard_error() if log_stream is None else (log_stream, False)
        self._terminal = log_stream is None and sys.stderr.isatty()
        level, fmt = config.log.level, self._log_format(config)
        self._log = Log(stream, level=level, fmt=fmt, journal=journal)
        self._metrics = Metrics()
        self._metrics.watch_log(self._log.dropped)
        self._notifier = notifier or Notifier({})
        self._sockets = dict(sockets or {})
        self._descriptors = descriptors
        self._lowered = (0, 0)  # connections, from and to, as the log says
        self._snapshot = Snapshot(config)
        self._limits = MemoryLimits()
        self._metrics.watch_limits(partial(self._limits.each, "keys"))
        self._levels = LevelKeeper(
            self._limits, state, metrics=self._metrics, log=self._log.process
        )
        self._sessions = SessionGate(config.sessions, metrics=self._metrics, log=self._log.process)
        self._lately = Lately()
        self._tracing = Tracing()
        self._metrics.watch_spans(self._tracing.totals)
        recorders = Recorders(self._metrics, self._lately, self._log, self._tracing)
        self._proxy = Proxy(
            self._snapshot,
            self._limits,
            self._sessions,
            recorders,
            Standings(config, recorders.upstream),
            self._log.process,
            self._tracing,
        )
        self._reloader = Reloader(
            path,
            partial(self._read, source),
            self._put,
            metrics=self._metrics,
            log=self._log.process,
            notifier=self._notifier,
        )
        self.clients: Entrance
        self.operators: Entrance  # stays open through the drain
        self._pulse = Pulse(self._metrics, self._notifier)
        self._ended = False

    async def start(self) -> None:
        """Listen.

        Raises:
            OSError: an address cannot be bound, or a socket was passed that has no use; nothing is
                left open.
            StoreError: the store of sessions cannot be opened; the same.
        """
        config, proxy = self._snapshot.config, self._proxy
        self._sessions.open()
        self._bound = self._bounds(config)
        listener = self._listener(App(proxy, self._sessions), proxy)
        status = Status(
            proxy=proxy,
            reloader=self._reloader,
            limits=self._limits,
            sessions=self._sessions,
            clients=listener,
            metrics=self._metrics,
            lately=self._lately,
            dropped=self._log.dropped,
        )
        admin = Admin(
            metrics=self._metrics,
            proxy=proxy,
            sessions=self._sessions,
            reloader=self._reloader,
            status=status,
            host=config.admin.host,
            log=self.log,
        )
        self.clients, self.operators = Entrance(listener), Entrance(self._listener(admin, admin))
        self._drain = Drain(proxy, self.clients, self._notifier, self.log)
        self._levels.restore()
        self._reloader.begin(self._snapshot)
        try:
            await self._open_sockets(config)
        except OSError:
            await self._close_sockets()
            await self._sessions.stop()
            self._tracing.stop()
            raise
        self._levels.start()
        self._sessions.start()
        status.listen, status.admin = self.clients.place, self.operators.place
        self.log.info(
            "started",
            version=aiproxy.__version__,
            listen=status.listen,
            admin=status.admin,
            upstreams=len(config.upstreams),
            routes=len(config.routes),
            keys=len(config.keys),
        )
        self._notifier.ready(self._reloader.status)
        self._pulse.start()

    def _read(self, source: Source) -> Loaded:
        """What the file says. Beside the event loop, hence also what tracing takes its time for."""
        loaded = source()
        self._tracing.prepare(loaded.config.tracing)
        return loaded

    def _put(self, snapshot: Snapshot) -> None:
        """Put a configuration in force; awaits nothing."""
        self._snapshot = snapshot
        self._limits.configure(snapshot.config)
        self._sessions.configure(snapshot.config.sessions)
        self._tracing.configure(snapshot.config.tracing)
        self._proxy.put(snapshot)
        self._lately.configure(snapshot.config)
        config = snapshot.config
        self._log.configure(level=config.log.level, fmt=self._log_format(config))
        self._bound = self._bounds(config)
        for entrance in (self.clients, self.operators):
            entrance.listener.bound(**self._bound)

    def _bounds(self, config: Config) -> dict[str, Any]:
        """What a listener takes from a configuration."""
        most = config.max_connections
        if self._descriptors is not None:
            most = connections(most, self._descriptors)
        if self._lowered != (lowered := (config.max_connections, most)) and lowered[0] > most:
            self._lowered = lowered
            self.log.warning(
                "max_connections lowered",
                configured=config.max_connections,
                connections=most,
                reason=f"this process may have {self._descriptors} file descriptors (LimitNOFILE)",
            )
        return {
            "max_connections": most,
            "client_header": config.timeouts.client_header,
            "client_write": config.timeouts.client_write,
            "keepalive": config.client_keepalive,
        }

    def _log_format(self, config: Config) -> str:
        fmt = config.log.format
        return ("console" if self._terminal else "json") if fmt == "auto" else fmt

    async def reload(self) -> None:
        """Read the file again, as SIGHUP does; what comes of it is in the log."""
        try:
            await self._reloader.reload()
        except ConfigError:
            pass  # is in the log, each mistake; the configuration in force stays
        except Exception as error:
            self.log.error("bug", exc_info=error)  # noqa: TRY400 - the daemon goes on

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

    def _listener(self, handler: Handler, refusing: Proxy | Admin) -> Listener:
        return Listener(handler, refusing.refuse, refusing.turn_away, **self._bound)

    async def _open_sockets(self, config: Config) -> None:
        unknown = ", ".join(repr(name) for name in self._sockets if name != "http")
        if unknown:
            raise OSError(f"systemd passed sockets named {unknown}; only 'http' has a use")
        # In this order: who finds it ready by the admin listener finds the other open.
        await self.clients.open(config.listen, self._sockets.get("http", ()))
        await self.operators.open(config.admin)

    # -- the end

    async def drain(self) -> None:
        """End as SIGTERM does: see `Drain`; then close everything."""
        if self._ended:
            return
        self._ended = True
        await self._drain.run(self._snapshot.config.drain)
        await self._close()

    def hurry(self) -> None:
        """The second signal: end at once, in order."""
        self._drain.hurry()

    async def stop(self) -> None:
        """End at once: what is in flight gets its terminal event."""
        self.hurry()
        await self.drain()

    async def _close(self) -> None:
        await self._reloader.settle()
        await self._close_sockets()
        await self._levels.stop()
        await self._sessions.stop()
        await self._end_tracing()
        self._pulse.stop()
        self.log.info("stopped")
        self._log.close()

    async def _end_tracing(self) -> None:
        """Send the spans that wait; a collector that does not take them holds up no end."""
        self._tracing.stop()
        ended = partial(self._tracing.join, LAST_SPANS)
        if not await asyncio.get_running_loop().run_in_executor(None, ended):
            self.log.warning("spans lost", reason="the collector did not take them in time")

    async def _close_sockets(self) -> None:
        await self.clients.close()
        await self.operators.close()
        self._snapshot.close()
        await asyncio.sleep(0)  # in which the event loop closes what was aborted

    # -- the whole life

    async def run(self) -> None:
        """Serve until a signal, then drain; a second signal ends at once."""
        loop = asyncio.get_running_loop()
        asked_to_end, asked_to_reload = asyncio.Event(), asyncio.Event()

        def on_end() -> None:
            if asked_to_end.is_set():
                self.hurry()
            asked_to_end.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_end)
        loop.add_signal_handler(signal.SIGHUP, asked_to_reload.set)
        await self.start()
        gc.collect()
        gc.freeze()  # what is there now stays: it need not be looked at again
        gc.set_threshold(*GC_THRESHOLDS)
        while not asked_to_end.is_set():
            await first(asked_to_end.wait(), asked_to_reload.wait())
            if asked_to_reload.is_set() and not asked_to_end.is_set():
                asked_to_reload.clear()
                await self.reload()
        await self.drain()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # by default it would end what has drained


def serve(path: str, source: Source, loaded: Loaded) -> int:
    """Run the daemon until it is told to end.

    Args:
        path: of the file, as mistakes name it.
        source: reads it again, for a reload.
        loaded: what it said at first.

    Returns:
        The exit code: 0 after a clean end, 1 when it could not listen.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    notifier = Notifier(os.environ)
    try:
        sockets = inherited_sockets(os.environ)
    except OSError as error:
        sys.stderr.write(f"aiproxy: {error}\n")
        return 1
    daemon = Daemon(
        loaded.config,
        path=path,
        source=source,
        sockets=sockets,
        notifier=notifier,
        state=state_directory(os.environ),
        descriptors=raise_limit(),
    )
    logging.getLogger().addHandler(daemon.library_handler())
    for warning in loaded.warnings:
        daemon.log.warning("configuration", warning=warning.text(path))
    try:
        uvloop.run(daemon.run())
    except StoreError as error:
        daemon.log.error("cannot open sessions", error=str(error))  # noqa: TRY400 - no bug of ours
        daemon.close_log()
        return 1
    except OSError as error:
        daemon.log.error("cannot listen", error=str(error))  # noqa: TRY400 - no bug of ours
        daemon.close_log()
        return 1
    return 0
