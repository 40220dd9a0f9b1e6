"""The end of a daemon, in order: nothing that was begun is lost, nobody is refused before time.

Serve for `drain.delay`, while balancers see that this one is not ready; accept no more; serve what
is connected and was not read yet; refuse what comes after that; let what is in flight end; at
`drain.timeout` cut what is left, each with its terminal event. A second signal skips the waiting.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiproxy.config import format_duration
from aiproxy.first import first

if TYPE_CHECKING:
    from collections.abc import Callable

    from structlog.typing import FilteringBoundLogger

    from aiproxy.call import Call
    from aiproxy.config import Drain as Bounds
    from aiproxy.proxy import Proxy
    from aiproxy.sockets import Entrance
    from aiproxy.systemd import Notifier

UNREAD = 1.0  # seconds for the first request of connections that were accepted at the very end
LOOK = 0.02  # seconds between looks at what is left
LAST_BYTES = 0.5  # seconds for clients that are behind to take their terminal event
LAST_WORDS = 5.0  # seconds for what was cut to send its terminal event
REPORT = 5.0  # seconds between reports to the service manager
EXTENSION = 60.0  # seconds that it is asked to wait for the next one
_NEVER = float("inf")


class Drain:
    """Of one daemon.

    Args:
        proxy: whose requests end.
        clients: where they come in.
        notifier: tells systemd how it goes, and that it goes on.
        log: says how it began, and how it ended.
    """

    def __init__(
        self, proxy: Proxy, clients: Entrance, notifier: Notifier, log: FilteringBoundLogger
    ) -> None:
        self._proxy = proxy
        self._clients = clients
        self._notifier = notifier
        self._log = log
        self._hurry = asyncio.Event()  # binds to no loop before it is awaited
        self._seen: set[Call] = set()  # what was in flight at the beginning and after the delay
        self._ends = _NEVER  # when what is left is cut, on the loop's clock
        self._report: asyncio.TimerHandle | None = None

    def hurry(self) -> None:
        """The second signal: end at once, in order."""
        self._hurry.set()

    async def run(self, bounds: Bounds) -> None:
        """All of it, but for closing what is left open."""
        proxy = self._proxy
        self._seen = set(proxy.live)
        proxy.drain()
        self._log.info("draining", in_flight=len(self._seen))
        if bounds.timeout:
            self._ends = self._now() + bounds.delay + bounds.timeout
        self._notifier.stopping(self._status())
        self._tell()
        try:
            await self._wait(self._now() + bounds.delay)
            self._seen |= proxy.live
            await self._stop_accepting()
            self._seen |= proxy.live
            self._ends = self._now() + (bounds.timeout or _NEVER)
            await self._until(self._is_idle, self._ends)
            cut = set(proxy.live)
            for call in cut:
                call.watch.interrupt("shutting_down")
            self._hurry.clear()
            await self._until(lambda: not proxy.live, self._now() + LAST_WORDS)
            await self._until(self._is_idle, self._now() + LAST_BYTES)
        finally:
            if self._report is not None:
                self._report.cancel()
        self._log.info("drained %d, cut %d", len(self._seen - cut), len(cut))

    async def _stop_accepting(self) -> None:
        """Nobody is refused by it: an inherited socket stays open for the next process."""
        await self._clients.stop()
        listener = self._clients.listener
        # What was sent by now is read, however late this loop is: it came in time.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        listener.serves = "first"
        await self._until(lambda: not listener.unread(), self._now() + UNREAD)
        listener.serves = "none"

    def _is_idle(self) -> bool:
        """Whether no request is in flight, and clients have taken their answers."""
        listener = self._clients.listener
        return not (self._proxy.live or listener.busy() or listener.unsent())

    # -- waiting

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _wait(self, deadline: float) -> None:
        await first(self._hurry.wait(), deadline=deadline)

    async def _until(self, holds: Callable[[], bool], deadline: float) -> None:
        """Until something holds, or `deadline`, or a second signal."""
        while not holds() and self._now() < deadline and not self._hurry.is_set():
            await self._wait(min(deadline, self._now() + LOOK))

    # -- telling

    def _status(self) -> str:
        left = len(self._proxy.live)
        status = f"Draining: {left} of {len(self._seen | self._proxy.live)} requests left"
        if self._ends == _NEVER:
            return status
        seconds = max(0.0, round(self._ends - self._now()))
        return f"{status}, at most {format_duration(seconds)} more"

    def _tell(self) -> None:
        """Ask the service manager to wait, again and again: a drain may be longer than it would."""
        self._notifier.extend(self._status(), EXTENSION)
        self._report = asyncio.get_running_loop().call_later(REPORT, self._tell)
