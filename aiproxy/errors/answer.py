"""An answer that is not the upstream's: its status, its headers, and its body in either shape.

Shapes: OpenAI's error object (API reference, "Error codes") and, on `/v1/messages`, Anthropic's
(API reference, "Errors").
"""

from __future__ import annotations

from typing import Literal

import msgspec

Outcome = Literal[
    "completed",
    "incomplete",
    "failed",
    "upstream_rejected",
    "upstream_error",
    "upstream_timeout",
    "client_disconnected",
    "rejected_auth",
    "rejected_invalid",
    "rejected_limit",
    "rejected_overload",
    "store_error",
    "drained",
    "internal_error",
]

Shape = Literal["openai", "anthropic"]

INVALID = "invalid_request_error"
SERVER = "server_error"

SHOWN = 128  # characters of a caller-made string that an answer or the log repeats

_ANTHROPIC_TYPES = {
    400: INVALID,
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ProxyError(Exception):
    """An answer of our own.

    Args:
        status: HTTP status.
        kind: the error's `type`.
        code: the error's `code`; None is sent as null.
        message: a sentence for the developer who reads it.
        param: the request field at fault, or None.
        headers: further response headers, e.g. `Retry-After`.
        outcome: how the request counts.
        close: whether the client's connection is closed after the answer.
        body: an upstream's own error body, passed on byte for byte instead of a rendered one.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        code: str | None,
        message: str,
        *,
        param: str | None = None,
        headers: tuple[tuple[str, str], ...] = (),
        outcome: Outcome = "rejected_invalid",
        close: bool = False,
        body: bytes | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.code = code
        self.message = message
        self.param = param
        self.headers = headers
        self.outcome = outcome
        self.close = close
        self.body = body
        self.declared = False  # by the upstream, before any output: another may be asked

    def __repr__(self) -> str:
        return f"<ProxyError {self.status} {self.code} {self.message!r}>"

    def render(self, shape: Shape) -> bytes:
        """The JSON body of the answer."""
        if self.body is not None:
            return self.body
        return msgspec.json.encode(self.frame(shape))

    def frame(self, shape: Shape) -> dict[str, object]:
        """The error object as it stands in an answer or in a stream's terminal frame."""
        message = _encodable(self.message)
        if shape == "anthropic":
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": message}}
        return {
            "error": {
                "message": message,
                "type": _encodable(self.kind),
                "param": None if self.param is None else _encodable(self.param),
                "code": None if self.code is None else _encodable(self.code),
            }
        }

    def response_error(self) -> dict[str, str]:
        """The `error` of a `response.failed` event.

        Its code is one of the API's closed list, which the SDKs check; ours stands in the message.
        """
        if self.status == 429:  # noqa: PLR2004 - HTTP's own number
            code = "rate_limit_exceeded"
        elif self.status < 500:  # noqa: PLR2004 - HTTP's own number
            code = "invalid_prompt"
        else:
            code = SERVER
        return {"code": code, "message": _encodable(f"[{self.code or self.kind}] {self.message}")}


def _encodable(text: str) -> str:
    """An upstream's text may hold half of a surrogate pair, which cannot be sent."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def shown(text: str) -> str:
    """A caller-made string that is safe to repeat: cut, control characters escaped, encodable."""
    cut = text[:SHOWN]
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut
    )[: 4 * SHOWN]
