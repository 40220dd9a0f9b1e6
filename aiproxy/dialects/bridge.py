"""A bridge: a client of the Responses API, an upstream that speaks something else.

What the bridges share: when a request is translated. How an answer is told is in `told_stream`.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from aiproxy.dialects.bridge_request import Request, sort_tools
from aiproxy.dialects.responses import Responses
from aiproxy.dialects.responses_object import repeated
from aiproxy.dialects.responses_parts import encode

if TYPE_CHECKING:
    from aiproxy.config import Route, Upstream
    from aiproxy.dialects import Answer, Asked
    from aiproxy.dialects.told_stream import ToldStream
    from aiproxy.envelope import Envelope


class Bridge(Responses):
    """See `Dialect`: to its client it is the Responses API, to its upstream another one."""

    translates = True

    def check(self, envelope: Envelope, asked: Asked, route: Route, upstream: Upstream) -> None:
        """See `Dialect`."""
        self.adapt(envelope, asked, route)
        self._translated(envelope, upstream, recalled=False)

    def adapt(self, envelope: Envelope, asked: Asked, route: Route) -> None:
        """See `Dialect`. Tools that are to be left out are out of the envelope afterwards."""
        asked.dropped, asked.custom = sort_tools(
            envelope, self.api, drop=route.unsupported_tools == "drop"
        )
        self.bound(envelope, asked, route)
        asked.envelope, asked.echo = None, repeated(envelope)

    def bound(self, envelope: Envelope, asked: Asked, route: Route) -> None:
        """Declare an output maximum where the upstream wants one."""

    def encode(self, envelope: Envelope, asked: Asked, upstream: Upstream) -> bytes:
        """See `Dialect`."""
        return encode(self._translated(envelope, upstream, recalled=asked.previous is not None))

    def _translated(
        self, envelope: Envelope, upstream: Upstream, *, recalled: bool
    ) -> dict[str, Any]:
        return self.translate(Request(envelope, self.api, recalled=recalled), upstream)

    @abstractmethod
    def translate(self, request: Request, upstream: Upstream) -> dict[str, Any]:
        """The body that asks the upstream for the same.

        Raises:
            ProxyError: something cannot be expressed, or is malformed.
        """

    @abstractmethod
    def stream(self, asked: Asked) -> ToldStream:
        """See `Dialect`."""

    def answer(self, body: bytes, asked: Asked) -> Answer:
        """See `Dialect`: as a stream of one frame."""
        return self.stream(asked).told(body)
