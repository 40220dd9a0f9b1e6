"""What follows from one configuration.

A request keeps the one it began with; a reload swaps one reference.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from aiproxy.auth import Keyring
from aiproxy.routes import Router
from aiproxy.upstream import Client

if TYPE_CHECKING:
    from aiohttp.web_request import BaseRequest

    from aiproxy.config import Config


class Snapshot:
    """A configuration in force, with its look-ups and its upstream connections."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.keyring = Keyring(config.keys.values())
        self.router = Router(config.routes, config.keys.values())
        self.clients = {name: Client(upstream) for name, upstream in config.upstreams.items()}

    def close(self) -> None:
        """Close all upstream connections."""
        for client in self.clients.values():
            client.close()

    def client_of(self, request: BaseRequest) -> str:
        """The client's address for the log.

        Behind trusted proxies it is the right-most address of X-Forwarded-For that is not one of
        theirs: everything left of it is the client's own claim.
        """
        peer = request._transport_peername  # noqa: SLF001 - `remote` loses the unix case
        # On a unix socket there is none: whoever may open it is trusted like a proxy.
        address = str(peer[0]) if isinstance(peer, (list, tuple)) else ""
        trusted = self.config.trusted_proxies
        if not trusted or not self._is_trusted(address):
            return address or "unix"
        hops = ",".join(request.headers.getall("X-Forwarded-For", [])).split(",")
        for hop in reversed([hop.strip() for hop in hops if hop.strip()]):
            if not _is_address(hop):
                break
            address = hop
            if not self._is_trusted(hop):
                break
        return address or "unix"

    def _is_trusted(self, address: str) -> bool:
        if not address:
            return True
        try:
            parsed = ip_address(address.partition("%")[0])  # a peer's own may name its interface
        except ValueError:
            return False
        return any(parsed in network for network in self.config.trusted_proxies)


def _is_address(text: str) -> bool:
    if "%" in text:
        return False  # a zone may be any text, and means nothing on another machine
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
