"""Where a listener listens: an address of the configuration, or sockets that systemd opened."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from aiproxy.config import Address
    from aiproxy.listener import Listener

BACKLOG = 4096  # connections that wait in the kernel to be accepted


class Entrance:
    """A listener and its sockets.

    Attributes:
        port: where it listens, once opened; 0 on a unix socket.
        place: the same for people.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.port = 0
        self.place = ""
        self._runner = web.ServerRunner(listener)
        self._sites: list[web.BaseSite] = []

    async def open(self, address: Address, passed: Sequence[socket.socket] = ()) -> None:
        """Listen at `address`, or on the sockets that were passed instead.

        Raises:
            OSError: the address cannot be bound.
        """
        await self._runner.setup()
        if passed:
            for sock in passed:
                await self._begin(web.SockSite(self._runner, sock, backlog=BACKLOG))
            self.port = next(filter(None, map(_port, passed)), 0)
            self.place = ", ".join(map(_name, passed))
        elif address.path is not None:
            await self._begin(web.UnixSite(self._runner, address.path, backlog=BACKLOG))
            self.place = str(address)
        else:
            site = web.TCPSite(self._runner, address.host, address.port, backlog=BACKLOG)
            await self._begin(site)
            self.port = int(site.port)
            self.place = str(replace(address, port=self.port))  # the kernel's, for port 0

    async def _begin(self, site: web.BaseSite) -> None:
        await site.start()
        self._sites.append(site)

    async def stop(self) -> None:
        """Accept no more; what is connected stays."""
        for site in self._sites:
            await site.stop()

    async def close(self) -> None:
        """Close everything."""
        await self._runner.cleanup()


def _port(sock: socket.socket) -> int:
    name = sock.getsockname()
    return int(name[1]) if isinstance(name, tuple) else 0


def _name(sock: socket.socket) -> str:
    name = sock.getsockname()
    if not isinstance(name, tuple):
        return f"unix:{name} (passed)"
    host = f"[{name[0]}]" if ":" in name[0] else name[0]
    return f"{host}:{name[1]} (passed)"
