"""Everything that is told to a client: status, type, code, sentence.

One exception, `ProxyError`, carries an answer that is not the upstream's: raised anywhere on the
way of a request, rendered once where the request ends. The functions below are the whole table;
nobody else makes up a status or a code. Messages never contain a key, a credential or a body.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from aiproxy.errors.answer import INVALID, SERVER, SHOWN, Outcome, ProxyError, Shape, shown

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["INVALID", "SERVER", "SHOWN", "Outcome", "ProxyError", "Shape", "shown"]


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


def denied_parameter(param: str) -> ProxyError:
    """A field that the configuration denies to this key."""
    return unsupported_parameter(param, f"'{shown(param)}' is not allowed to this key.")


def unsupported_parameter(param: str, message: str) -> ProxyError:
    """Something that this route, its upstream or this key cannot do."""
    return ProxyError(400, INVALID, "unsupported_parameter", message, param=param)


def response_not_found(response_id: str) -> ProxyError:
    """A stored response that is not there, or not this key's."""
    return ProxyError(404, INVALID, None, f"Response with id '{shown(response_id)}' not found.")


def previous_response_not_found(response_id: str) -> ProxyError:
    """Unknown, another key's, expired, deleted, unfinished: indistinguishable on purpose."""
    return ProxyError(
        400,
        INVALID,
        "previous_response_not_found",
        f"Previous response with id '{shown(response_id)}' not found.",
        param="previous_response_id",
    )


def conversation_too_long(what: str, param: str = "previous_response_id") -> ProxyError:
    """A conversation over `max_turns` or `max_replay`."""
    return ProxyError(400, INVALID, "context_length_exceeded", what, param=param)


def not_cancellable() -> ProxyError:
    """A stored response is finished: those that go on in the background are not made here."""
    return ProxyError(400, INVALID, None, "Cannot cancel a synchronous response.")


def item_not_found() -> ProxyError:
    """An `item_reference` that is not this key's own."""
    return ProxyError(
        404, INVALID, None, "An item that 'input' references was not found.", param="input"
    )


# -- limits


def rate_limit_exceeded(kind: str, message: str, wait: int) -> ProxyError:
    """A rate or a number of requests at the same time is exceeded.

    Args:
        kind: requests, tokens or concurrent.
        message: which limit, and how it stands.
        wait: nanoseconds after which it is worth trying again.
    """
    milliseconds = max(1, -(-wait // 1_000_000))
    return ProxyError(
        429,
        kind,
        "rate_limit_exceeded",
        message,
        headers=(
            ("Retry-After", str(-(-milliseconds // 1000))),
            ("retry-after-ms", str(milliseconds)),
        ),
        outcome="rejected_limit",
    )


def input_too_large(message: str) -> ProxyError:
    """An input that no wait lets through: it is larger than the bucket."""
    return ProxyError(
        429,
        "tokens",
        "request_too_large",
        message,
        headers=(("x-should-retry", "false"),),
        outcome="rejected_limit",
    )


# -- the upstream


def upstream_error(message: str, outcome: Outcome = "upstream_error") -> ProxyError:
    """The upstream refused, broke off, or answered with what is no answer."""
    return ProxyError(502, SERVER, "upstream_error", message, outcome=outcome)


def declared_failure(message: str) -> ProxyError:
    """The upstream itself says, before any output, that it has failed."""
    error = upstream_error(message, outcome="failed")
    error.declared = True
    return error


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


def upstream_unavailable(wait: float) -> ProxyError:
    """Every target is full, or left alone for a while; `wait`: seconds until one may be tried."""
    return ProxyError(
        503,
        SERVER,
        "upstream_overloaded",
        "No upstream of this model takes requests now; try again later.",
        headers=(("Retry-After", str(max(1, math.ceil(wait)))),),
        outcome="upstream_error",
    )


def upstream_timeout(what: str, *, again: bool = False) -> ProxyError:
    """No answer in time. The upstream may have acted, so the SDKs are told not to try again.

    Args:
        what: was waited for.
        again: the route allows to try again all the same.
    """
    return ProxyError(
        504,
        SERVER,
        "upstream_timeout",
        f"The upstream did not answer in time ({what}).",
        headers=() if again else (("x-should-retry", "false"),),
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


def store_unavailable() -> ProxyError:
    """A store cannot be read or written; never told as "not found"."""
    return ProxyError(
        503,
        SERVER,
        "store_unavailable",
        "The store of conversations is not available; try again later.",
        headers=(("Retry-After", "1"),),
        outcome="store_error",
    )


def not_erased() -> ProxyError:
    """A turn that was deleted, whose content is on the disk yet."""
    return ProxyError(
        503,
        SERVER,
        "store_unavailable",
        "The response is deleted, but its content is not off the disk yet; try again later.",
        headers=(("Retry-After", "1"),),
        outcome="store_error",
    )


def no_room(what: str) -> ProxyError:
    """A turn that does not fit into the store, however often it is tried."""
    return ProxyError(
        503,
        SERVER,
        "store_unavailable",
        f"The turn cannot be kept: {what}; ask with 'store': false, or begin a new conversation.",
        headers=(("Retry-After", "60"), ("x-should-retry", "false")),
        outcome="store_error",
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
