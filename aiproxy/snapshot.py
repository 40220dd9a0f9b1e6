"""What follows from one configuration.

A request keeps the one it began with; a reload swaps one reference.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING

from aiproxy.auth import Keyring
from aiproxy.routes import Router
from aiproxy.upstream_client import Client

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.web_request import BaseRequest

    from aiproxy.config import Config, Upstream


class Snapshot:
    """A configuration in force, with its look-ups and its upstream connections.

    Args:
        config: what it follows from.
        before: the snapshot that this one takes the place of. Of an upstream that is the same in
            both the connections are kept.
    """

    def __init__(self, config: Config, before: Snapshot | None = None) -> None:
        self.config = config
        self.keyring = Keyring(config.keys.values())
        self.router = Router(config.routes, config.keys.values())
        known: Mapping[str, Client] = {} if before is None else before.clients
        self.clients: dict[str, Client] = {
            name: _client(upstream, known.get(name)) for name, upstream in config.upstreams.items()
        }

    def retire(self, after: Snapshot) -> None:
        """Another snapshot is in force: keep no connection that it has not taken over.

        Requests that are still under this one go on, and may even connect anew.
        """
        kept = set(map(id, after.clients.values()))
        for client in self.clients.values():
            if id(client) not in kept:
                client.retire()

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


def _client(upstream: Upstream, known: Client | None) -> Client:
    """What asks an upstream: the one that asked it before, if nothing of it is another.

    The file of its authorities may have another content under the same name, hence is read again.
    """
    if known is not None and known.upstream == upstream and upstream.ca_file is None:
        return known
    return Client(upstream)


def _is_address(text: str) -> bool:
    if "%" in text:
        return False  # a zone may be any text, and means nothing on another machine
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
