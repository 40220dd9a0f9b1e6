"""One POST after another to a collector, each with an end.

By http.client, which follows nothing and knows no proxies: spans may hold prompts, and go where the
configuration says. A connection is closed at its deadline from another thread, however slowly the
other side goes on sending.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import aiproxy

if TYPE_CHECKING:
    from aiproxy.exporting import Exporting

MOST_ANSWER = 64 * 1024  # bytes of an answer that are read
MOST_AFTER = 3600.0  # seconds that a collector may ask for


class NotSentError(Exception):
    """Why; never with an address, which may hold a secret."""


class Answer(NamedTuple):
    """What a collector says.

    Attributes:
        status: of HTTP.
        body: its beginning.
        retry_after: seconds; 0: it does not say.
    """

    status: int
    body: bytes
    retry_after: float


class Poster:
    """To one URL, on one connection that is kept."""

    def __init__(self, url: str, how: Exporting) -> None:
        parts = urlsplit(url)
        self._target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        self._headers = {
            "User-Agent": f"aiproxy/{aiproxy.__version__}",
            "Content-Type": "application/x-protobuf",
            **({"Content-Encoding": "gzip"} if how.gzip else {}),
            **how.headers,
        }
        host, port = parts.hostname or "", parts.port
        if parts.scheme == "https":
            context = ssl.create_default_context(cafile=how.certificate)
            self._connection: HTTPConnection = HTTPSConnection(host, port, context=context)
        else:
            self._connection = HTTPConnection(host, port)

    def post(self, body: bytes, until: float) -> Answer:
        """Send a body; what comes back.

        Args:
            body: of the request.
            until: when it is over, on the monotonic clock.

        Raises:
            NotSentError: nothing came back by then.
        """
        fresh = self._connection.sock is None
        try:
            return self._once(body, until)
        except (OSError, HTTPException, ValueError) as error:
            if fresh:
                raise NotSentError(type(error).__name__) from None
        try:  # the collector may just have closed a connection that was kept
            return self._once(body, until)
        except (OSError, HTTPException, ValueError) as error:
            raise NotSentError(type(error).__name__) from None

    def _once(self, body: bytes, until: float) -> Answer:
        connection = self._connection
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        connection.timeout = left
        watchdog = threading.Timer(left, self._cut)
        watchdog.daemon = True
        watchdog.start()
        try:
            connection.request("POST", self._target, body, self._headers)
            answer = connection.getresponse()
            read = answer.read(MOST_ANSWER)
            if not answer.isclosed():  # there is more
                connection.close()
            return Answer(answer.status, read, _seconds(answer.getheader("Retry-After", "")))
        except BaseException:
            connection.close()
            raise
        finally:
            watchdog.cancel()

    def _cut(self) -> None:
        """Whoever reads or writes now is told that the connection is over."""
        sock = self._connection.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _seconds(text: str) -> float:
    """What a Retry-After says, if in seconds."""
    return min(float(text), MOST_AFTER) if text.isdecimal() and len(text) < 10 else 0.0  # noqa: PLR2004 - digits
