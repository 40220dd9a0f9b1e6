"""The connections to one upstream, and what every request to it begins with."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from yarl import URL

from aiproxy import headers
from aiproxy.trace import TRACEPARENT, TRACESTATE
from aiproxy.upstream_pool import Pool, tls

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiproxy.config import Upstream
    from aiproxy.trace import Trace

ANTHROPIC_VERSION = "2023-06-01"  # where the client names none (API reference, "Versions")

_TRACE = frozenset({TRACEPARENT, TRACESTATE})


class Client:
    """To one upstream, as one configuration has it."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.timeouts = upstream.timeouts
        base = URL(upstream.url, encoded=True)
        self.pool = Pool(
            base.raw_host or "",
            base.port or 0,
            tls(upstream.ca_file) if base.scheme == "https" else None,
            upstream.idle_connections,
        )
        self._base = base
        # What a client cannot set, whatever `header_allow` says.
        self._own = frozenset({headers.REQUEST_ID, *(name.lower() for name in upstream.headers)})
        allowed = upstream.header_allow
        if upstream.propagate_trace:  # without tracing here the client's own context passes
            allowed |= _TRACE
        self._allowed, self._allowed_traced = allowed, allowed - _TRACE
        self._fixed: dict[str, str] = {}  # by API: there are four

    def request_head(
        self,
        api: str,
        target: str,
        received: Iterable[tuple[str, str]],
        *,
        request_id: str,
        size: int,
        method: str = "POST",
        trace: Trace | None = None,
    ) -> bytes:
        """The head of a request: the client's headers that may pass, the upstream's own, our own.

        Args:
            api: what is asked for.
            target: of the request (RFC 9112 section 3.2.1), by `target`.
            received: the client's headers.
            request_id: of this request.
            size: bytes of its body.
            method: of the request.
            trace: of the client's request.
        """
        fixed = self._fixed.get(api)
        if fixed is None:
            fixed = self._fixed[api] = self._fixed_headers(api)
        own, allowed = self._own, self._allowed
        context: Iterable[tuple[str, str]] = ()
        if trace is not None and self.upstream.propagate_trace:
            context, allowed = trace.told(), self._allowed_traced
        lines = [f"{method} {target} HTTP/1.1"]
        typed = versioned = False
        for name, value in headers.to_upstream(received, allowed):
            lower = name.lower()
            if lower in own:
                continue
            typed = typed or lower == "content-type"
            versioned = versioned or lower == "anthropic-version"
            lines.append(f"{name}: {value}")
        if not typed and "content-type" not in own and method == "POST":
            lines.append("Content-Type: application/json")
        if api == "messages" and not versioned and "anthropic-version" not in own:
            lines.append(f"anthropic-version: {ANTHROPIC_VERSION}")
        lines += [f"{name}: {value}" for name, value in context]
        lines.append(f"{headers.REQUEST_ID}: {request_id}")
        if method == "POST":
            lines.append(f"Content-Length: {size}")
        lines.append(fixed)
        return "\r\n".join(lines).encode()

    def _fixed_headers(self, api: str) -> str:
        own = [("Host", self._base.host_port_subcomponent or ""), *self.upstream.headers.items()]
        secret = self.upstream.credential
        if secret is not None:
            carried = headers.credential(self.upstream.auth, api, secret.get_secret_value())
            if carried is not None:
                own.append(carried)
        own.append(("Accept-Encoding", "identity"))  # a stream that is compressed is not live
        return "".join(f"{name}: {value}\r\n" for name, value in own) + "\r\n"

    def target(self, path: str, query: Iterable[tuple[str, str]] = ()) -> str:
        """What to ask for: `path` after the base, whose query is kept; `query` is added to it.

        A base without any path is one that the user took for the host: its API is below /v1.
        """
        base = self._base.raw_path.rstrip("/") or "/v1"
        parts = [self._base.raw_query_string] if self._base.raw_query_string else []
        parts += [f"{name}={quote(value, safe='')}" for name, value in query]
        return f"{base}{path}?{'&'.join(parts)}" if parts else f"{base}{path}"

    @property
    def origin(self) -> str:
        """Scheme, host and port."""
        return str(self._base.origin())

    def retire(self) -> None:
        """Keep no connection from now on; those in use go on."""
        self.pool.retire()

    def close(self) -> None:
        """Close all connections."""
        self.pool.close()
