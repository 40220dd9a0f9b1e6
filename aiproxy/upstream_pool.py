"""The connections to one upstream: kept while idle, and given out only when clean."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.resolver import ThreadedResolver

if TYPE_CHECKING:
    from aiohappyeyeballs import AddrInfoType
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.tracing import Trace

RECEIVE_BUFFER = 256 * 1024  # bytes in the kernel per upstream connection


def _socket(address: AddrInfoType) -> socket.socket:
    """A socket whose kernel buffer does not grow to megabytes while its client is slow."""
    family, kind, proto, *_ = address
    made = socket.socket(family, kind, proto)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    return made


class _Protocol(ResponseHandler):
    """Tells who reads an answer of its failure.

    aiohttp tells a broken chunk only to who waits for a head (3.14, `data_received`); a reader of
    the body would wait until `idle`.
    """

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        super().set_exception(exc, *cause)
        payload = self._payload
        if payload is not None and not payload.is_eof() and payload.exception() is None:
            payload.set_exception(exc, *cause)


class Pool(aiohttp.TCPConnector):
    """Gives out only connections on which nothing is left over.

    An upstream may answer before it has read the whole request, or say something unasked on an idle
    connection. The next request there would go out behind the rest of the last one, or be given an
    answer that is not its own: another client's.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            socket_factory=_socket,
            resolver=ThreadedResolver(),
            limit=0,  # with a limit, the request beyond it would wait for ever
            **options,
        )
        self._factory = cast("partial[ResponseHandler]", partial(_Protocol, loop=self._loop))

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        while (conn := await super()._get(key, traces)) is not None:
            protocol, transport = conn.protocol, conn.transport
            if protocol is not None and transport is not None:
                if not protocol.should_close and not transport.get_write_buffer_size():
                    return conn
                transport.abort()
            conn.close()
        return None
