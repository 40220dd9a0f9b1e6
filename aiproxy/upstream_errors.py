"""What went wrong upstream: exceptions and refusals -> a result, and what the client is told."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
from aiohttp import http_exceptions

from aiproxy import errors

if TYPE_CHECKING:
    from aiproxy.errors import ProxyError, Shape
    from aiproxy.exchange import AttemptResult


def passed_on(
    status: int, body: bytes, back: tuple[tuple[str, str], ...], shape: Shape
) -> ProxyError:
    """An upstream's own refusal: its body as it is where it has our shape, else its message."""
    kind = "requests" if status == 429 else errors.INVALID  # noqa: PLR2004
    error = errors.ProxyError(
        status,
        kind,
        None,
        f"The upstream refused the request with status {status}.",
        headers=back,
        outcome="upstream_rejected",
    )
    try:
        document: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):  # ValueError: not UTF-8
        return error
    inner = document.get("error") if isinstance(document, dict) else None
    if isinstance(inner, dict) and isinstance(inner.get("message"), str):
        if _has_shape(document, inner, shape):
            error.body = body
        error.message = inner["message"]
        error.kind = inner["type"] if isinstance(inner.get("type"), str) else kind
        error.param = inner["param"] if isinstance(inner.get("param"), str) else None
        code = inner.get("code")
        error.code = None if code is None else str(code)
    elif isinstance(document, dict) and isinstance(document.get("detail"), str):
        error.message = document["detail"]  # FastAPI's
    return error


def _has_shape(document: dict[str, Any], inner: dict[str, Any], shape: Shape) -> bool:
    if shape == "anthropic":
        return document.get("type") == "error" and isinstance(inner.get("type"), str)
    return (
        isinstance(inner.get("type"), str)
        and all(name in inner for name in ("param", "code"))
        and all(isinstance(inner[name], (str, type(None))) for name in ("param", "code"))
    )


def classify(error: BaseException) -> tuple[AttemptResult, ProxyError]:
    """The result of an attempt, and what the client is told. No address, no detail of ours."""
    if isinstance(error, errors.ProxyError):
        return "protocol", error
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "connect", errors.upstream_error("The upstream's name could not be resolved.")
    if isinstance(
        error, (aiohttp.ClientConnectorCertificateError, aiohttp.ClientSSLError, ssl.SSLError)
    ):
        return "connect", errors.upstream_error("The upstream's TLS certificate was refused.")
    if isinstance(error, aiohttp.ClientConnectorError):
        return "connect", errors.upstream_error("The upstream could not be connected to.")
    if isinstance(error, (aiohttp.ClientResponseError, http_exceptions.HttpProcessingError)):
        return "protocol", errors.upstream_error("The upstream's answer is not well-formed HTTP.")
    if isinstance(error, aiohttp.ClientPayloadError):
        cause = error.__cause__
        framing = isinstance(
            cause,
            (http_exceptions.TransferEncodingError, http_exceptions.ContentLengthError),
        )
        if cause is None or framing:
            return "reset", errors.upstream_error("The upstream's answer broke off.")
        return "protocol", errors.upstream_error("The upstream's answer does not decode.")
    return "reset", errors.upstream_error("The upstream closed the connection.")
