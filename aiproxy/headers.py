"""Which headers cross, in both directions: allow-lists, never deny-lists.

What is not named here does not cross, so neither hop-by-hop fields (RFC 9110 section 7.6.1), nor a
client's credentials, nor a look-alike with underscores can.
"""

from __future__ import annotations

import re
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

REQUEST_ID = "x-request-id"
DROPPED_TOOLS = "x-aiproxy-dropped-tools"

_UPSTREAM = frozenset(
    {
        "content-type",
        "accept",
        "user-agent",
        "openai-beta",
        "anthropic-version",
        "anthropic-beta",
        "session-id",
        "session_id",
        "thread-id",
        "originator",
        "x-client-request-id",
    }
)
_UPSTREAM_PREFIXES = ("x-stainless-", "x-codex-")

_CLIENT = frozenset(
    {
        "content-type",
        "retry-after",
        "retry-after-ms",
        "x-should-retry",
        "openai-processing-ms",
        "openai-version",
    }
)
_CLIENT_PREFIXES = ("x-codex-",)

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}", re.ASCII)
_ODD = re.compile(r"[^A-Za-z0-9_.:-]", re.ASCII)
_LONGEST_NAME, _LONGEST_LIST = 128, 2000
_UNSAFE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


def request_id(given: str | None) -> str | None:
    """The caller's request id where it is one that may be repeated everywhere, else None."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given
    return None


_IDS_AT_ONCE = 64
_id_block: list[str] = []


def new_request_id() -> str:
    """A fresh id. Randomness is drawn in blocks: a system call for each is felt."""
    if not _id_block:
        block = secrets.token_hex(16 * _IDS_AT_ONCE)
        _id_block.extend(block[i : i + 32] for i in range(0, len(block), 32))
    return f"req_{_id_block.pop()}"


def to_upstream(
    received: Iterable[tuple[str, str]], extra: frozenset[str] = frozenset()
) -> list[tuple[str, str]]:
    """The client's headers that go upstream; `extra` are further lower-case names."""
    crossing: list[tuple[str, str]] = []
    received = list(received)
    hop_by_hop = _named_by_connection(received)
    for name, value in received:
        lower = name.lower()
        if lower in hop_by_hop:
            continue
        if lower in _UPSTREAM or lower.startswith(_UPSTREAM_PREFIXES) or lower in extra:
            # Bytes that are no UTF-8 came as surrogates, which cannot be written again.
            text = value if value.isascii() else value.encode("utf-8", "replace").decode()
            crossing.append((name, text))
    return crossing


def _named_by_connection(received: list[tuple[str, str]]) -> frozenset[str]:
    """The fields that a sender's Connection says are for the next hop only."""
    values = [value for name, value in received if name.lower() == "connection"]
    if not values:
        return frozenset()
    return frozenset(token.strip().lower() for token in ",".join(values).split(","))


def to_client(received: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The upstream's headers that come back; a value with control characters does not."""
    return [
        (name, value)
        for name, value in received
        if ((lower := name.lower()) in _CLIENT or lower.startswith(_CLIENT_PREFIXES))
        and value.isascii()
        and not _UNSAFE.search(value)
    ]


def listed(names: Iterable[str]) -> str:
    """Caller-made names as one field value: odd characters as `_`, no longer than clients take."""
    safe = [_ODD.sub("_", name[:_LONGEST_NAME]) for name in names]
    value = ", ".join(safe)
    return value if len(value) <= _LONGEST_LIST else f"{value[:_LONGEST_LIST]}..."


def credential(auth: str, api: str, secret: str) -> tuple[str, str] | None:
    """The header that carries an upstream's credential; None for `auth: none`.

    Args:
        auth: auto, bearer, x-api-key, api-key or none.
        api: what is asked for; `auto` means Bearer, but x-api-key on messages.
        secret: the credential.
    """
    if auth == "auto":
        auth = "x-api-key" if api == "messages" else "bearer"
    if auth == "bearer":
        return ("Authorization", f"Bearer {secret}")
    if auth in ("x-api-key", "api-key"):
        return (auth, secret)
    return None


def media_type(content_type: str) -> str:
    """The type/subtype of a Content-Type, lower-case, without parameters."""
    return content_type.partition(";")[0].strip().lower()
