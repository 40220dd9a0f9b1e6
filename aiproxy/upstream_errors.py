"""What went wrong upstream: a result, and what the client is told: no address, no detail."""

from __future__ import annotations

import math
import time
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec

from aiproxy import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiproxy.errors import ProxyError, Shape
    from aiproxy.exchange import AttemptResult


NO_NAME = "The upstream's name could not be resolved."
UNTRUSTED = "The upstream's TLS certificate was refused."
REFUSED = "The upstream could not be connected to."
CLOSED = "The upstream closed the connection."
BROKE_OFF = "The upstream's answer broke off."
MALFORMED = "The upstream's answer is not well-formed HTTP."
UNDECODABLE = "The upstream's answer does not decode."


class Failure(Exception):  # noqa: N818 - it is an event, which `Ask` makes an error of
    """An attempt failed: its result, and the sentence for the client."""

    def __init__(self, result: AttemptResult, message: str) -> None:
        super().__init__(result, message)
        self.result: AttemptResult = result
        self.message = message


def passed_on(
    status: int, body: bytes, back: tuple[tuple[str, str], ...], shape: Shape
) -> ProxyError:
    """An upstream's own refusal: its body as it is where it has our shape, else its message."""
    kind = "requests" if status == HTTPStatus.TOO_MANY_REQUESTS else errors.INVALID
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


def asked_for(field: Callable[[str], str]) -> float:
    """Seconds that an answer asks to be left alone, by its `Retry-After`; 0 where it does not say.

    Args:
        field: the value of a header field of the answer, or nothing.
    """
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        given = field(name)
        try:
            seconds = float(given[:12]) / unit
        except ValueError:
            continue
        if 0.0 <= seconds < math.inf:
            return seconds
    try:  # the other form that HTTP has for it (RFC 9110 section 10.2.3)
        until = parsedate_to_datetime(field("retry-after")).timestamp()
    except (ValueError, OverflowError):
        return 0.0
    return max(0.0, until - time.time())


def whole_seconds(milliseconds: str) -> str:
    """What Retry-After says of an upstream that gives its time in milliseconds alone."""
    known = milliseconds.isascii() and milliseconds.isdigit()
    return str(max(1, math.ceil(int(milliseconds[:9]) / 1000))) if known else "1"
