"""Everything that is told to a client: status, type, code, sentence.

One exception, `ProxyError`, carries an answer that is not the upstream's: raised anywhere on the
way of a request, rendered once where the request ends. The functions below are the whole table;
nobody else makes up a status or a code. Messages never contain a key, a credential or a body.

Shapes: OpenAI's error object (API reference, "Error codes") and, on `/v1/messages`, Anthropic's
(API reference, "Errors").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

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

    def __repr__(self) -> str:
        return f"<ProxyError {self.status} {self.code} {self.message!r}>"

    def render(self, shape: Shape) -> bytes:
        """The JSON body of the answer."""
        if self.body is not None:
            return self.body
        return msgspec.json.encode(self.frame(shape))

    def frame(self, shape: Shape) -> dict[str, object]:
        """The error object as it stands in an answer or in a stream's terminal frame."""
        if shape == "anthropic":
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
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
        return {"code": code, "message": f"[{self.code or self.kind}] {self.message}"}


def shown(text: str) -> str:
    """A caller-made string that is safe to repeat: cut, control characters escaped, encodable."""
    cut = text[:SHOWN]
    if cut.isascii() and cut.isprintable():
        return cut
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in cut
    )[: 4 * SHOWN]


# -- who is calling, and what for


def invalid_api_key() -> ProxyError:
    """No key, an unknown, an expired, a disabled one: indistinguishable on purpose."""
    return ProxyError(
        401,
        INVALID,
        "invalid_api_key",
        "Incorrect API key provided. Send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
        outcome="rejected_auth",
        close=True,
    )


def unknown_url(method: str, path: str) -> ProxyError:
    """A path that is not served."""
    return ProxyError(
        404, INVALID, "unknown_url", f"Unknown request URL: {shown(method)} {shown(path)}."
    )


def method_not_allowed(method: str, allow: str) -> ProxyError:
    """A known path with another method."""
    return ProxyError(
        405,
        INVALID,
        "method_not_allowed",
        f"Method {shown(method)} is not allowed here; allowed: {allow}.",
        headers=(("Allow", allow),),
    )


def upgrade_not_supported() -> ProxyError:
    """426 makes coding agents fall back to server-sent events at once; 404 or 405 do not."""
    return ProxyError(
        426,
        INVALID,
        "upgrade_not_supported",
        "WebSocket is not supported here; use POST with server-sent events.",
        headers=(("Upgrade", "HTTP/1.1"),),
        close=True,
    )


# -- HTTP and the body


def invalid_http(message: str, status: int = 400) -> ProxyError:
    """Malformed or ambiguous HTTP; what follows on the connection cannot be trusted."""
    return ProxyError(status, INVALID, "invalid_http", message, close=True)


def unknown_expectation() -> ProxyError:
    """An `Expect` other than `100-continue`."""
    return ProxyError(
        417, INVALID, "invalid_http", "Only 'Expect: 100-continue' is supported.", close=True
    )


def request_timeout(seconds: float) -> ProxyError:
    """The body did not come in time."""
    return ProxyError(
        408,
        INVALID,
        "request_timeout",
        f"The request body did not arrive within {seconds:g} s.",
        close=True,
    )


def request_too_large(limit: int) -> ProxyError:
    """A body over `max_body`."""
    return ProxyError(
        413,
        INVALID,
        "request_too_large",
        f"The request body is larger than {limit} bytes.",
        close=True,
    )


def unsupported_content_encoding(encoding: str) -> ProxyError:
    """Something other than one of gzip, deflate, br, zstd."""
    return ProxyError(
        415,
        INVALID,
        "unsupported_content_encoding",
        f"Content-Encoding {shown(encoding)!r} is not supported; use one of gzip, deflate, br,"
        " zstd.",
        headers=(("Accept-Encoding", "gzip, deflate, br, zstd"),),
        close=True,
    )


def undecodable_body(encoding: str) -> ProxyError:
    """A body that is not what its Content-Encoding says."""
    return ProxyError(
        400, INVALID, "invalid_json", f"The request body does not decode as {encoding}."
    )


def invalid_json(message: str) -> ProxyError:
    """The body is not one JSON object."""
    return ProxyError(400, INVALID, "invalid_json", message)


def invalid_type(param: str, expected: str) -> ProxyError:
    """A field that is read has a wrong type."""
    return ProxyError(
        400, INVALID, "invalid_type", f"Invalid type for '{param}': expected {expected}.",
        param=param,
    )  # fmt: skip


def invalid_value(param: str, message: str) -> ProxyError:
    """A field of the right type with a value out of bounds."""
    return ProxyError(400, INVALID, "invalid_value", message, param=param)


def missing_model() -> ProxyError:
    """No `model`."""
    return ProxyError(
        400,
        INVALID,
        "missing_required_parameter",
        "Missing required parameter: 'model'.",
        param="model",
    )


def model_not_found(model: str) -> ProxyError:
    """Unknown, or not allowed to this key: indistinguishable on purpose."""
    return ProxyError(
        404,
        INVALID,
        "model_not_found",
        f"The model `{shown(model)}` does not exist or you do not have access to it.",
        param="model",
    )


def unsupported_parameter(param: str, message: str) -> ProxyError:
    """Something that this route, its upstream or this key cannot do."""
    return ProxyError(400, INVALID, "unsupported_parameter", message, param=param)


def response_not_found(response_id: str) -> ProxyError:
    """A stored response that is not there, or not this key's."""
    return ProxyError(404, INVALID, None, f"Response with id '{shown(response_id)}' not found.")


def item_not_found() -> ProxyError:
    """An `item_reference` that is not this key's own."""
    return ProxyError(
        404, INVALID, None, "An item that 'input' references was not found.", param="input"
    )


# -- the upstream


def upstream_error(message: str, outcome: Outcome = "upstream_error") -> ProxyError:
    """The upstream refused, broke off, or answered with what is no answer."""
    return ProxyError(502, SERVER, "upstream_error", message, outcome=outcome)


def upstream_credential() -> ProxyError:
    """The upstream refused our credential: the client's own key is good, retrying is futile."""
    return ProxyError(
        502,
        SERVER,
        "upstream_credential",
        "The upstream refused this proxy's credential; tell its operator.",
        headers=(("x-should-retry", "false"),),
        outcome="upstream_error",
    )


def upstream_overloaded(retry_after: str, headers: tuple[tuple[str, str], ...] = ()) -> ProxyError:
    """The upstream said 503 or 529; `headers` say when to try again, more exactly."""
    named = any(name.lower() == "retry-after" for name, _ in headers)
    extra = headers if named else (("Retry-After", retry_after), *headers)
    return ProxyError(
        503,
        SERVER,
        "upstream_overloaded",
        "The upstream is overloaded; try again later.",
        headers=extra,
        outcome="upstream_error",
    )


def upstream_timeout(what: str) -> ProxyError:
    """No answer in time. The upstream may have acted, so the SDKs are told not to try again."""
    return ProxyError(
        504,
        SERVER,
        "upstream_timeout",
        f"The upstream did not answer in time ({what}).",
        headers=(("x-should-retry", "false"),),
        outcome="upstream_timeout",
    )


# -- operators


def forbidden(why: str) -> ProxyError:
    """The admin listener does not do this for everybody."""
    return ProxyError(403, INVALID, "forbidden", why)


def invalid_configuration(mistakes: Sequence[str]) -> ProxyError:
    """A reload found mistakes in the file; the configuration in force stays."""
    return ProxyError(400, INVALID, "invalid_configuration", "\n".join(mistakes))


# -- this process


def overloaded(what: str) -> ProxyError:
    """Over `max_connections` or `max_buffered`."""
    return ProxyError(
        503,
        SERVER,
        "overloaded",
        f"This proxy is overloaded ({what}); try again later.",
        headers=(("Retry-After", "1"),),
        outcome="rejected_overload",
        close=True,
    )


def shutting_down() -> ProxyError:
    """Draining."""
    return ProxyError(
        503,
        SERVER,
        "shutting_down",
        "This proxy is shutting down; try again.",
        headers=(("Retry-After", "1"),),
        outcome="drained",
        close=True,
    )


def internal_error(request_id: str) -> ProxyError:
    """A bug of ours. The traceback is in the log under this id, never in the answer."""
    return ProxyError(
        500,
        SERVER,
        "internal_error",
        f"Internal error of this proxy; its operator finds it under request id {request_id}.",
        outcome="internal_error",
    )
