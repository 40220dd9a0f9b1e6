"""Who is calling, and which fields they may use.

Keys are kept as SHA-256 only. A look-up by hash takes the same time for every wrong key, and the
answer to all of them is the same.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from aiproxy import errors, jsontext

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from aiproxy.config import Key
    from aiproxy.envelope import Envelope


def presented(authorization: list[str], api_key: list[str]) -> str:
    """The one key that a request's headers present.

    Raises:
        ProxyError: none, or two different ones (a proxy before this one may have checked the
            other).
    """
    found = {value.strip() for value in api_key}
    for value in authorization:
        scheme, _, token = value.strip().partition(" ")
        if scheme.lower() != "bearer":
            raise errors.invalid_api_key()
        found.add(token.strip())
    if len(found) != 1 or "" in found:
        raise errors.invalid_api_key()
    return found.pop()


class Keyring:
    """The configured keys by hash."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = {digest: key for key in keys for digest in key.sha256}

    def authenticate(self, secret: str, now: datetime) -> Key:
        """The key whose hash is this secret's.

        Raises:
            ProxyError: unknown, disabled, or expired at `now`.
        """
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        key = self._keys.get(digest)
        if key is None or key.disabled or (key.expires is not None and now >= key.expires):
            raise errors.invalid_api_key()
        return key


def permit(key: Key, envelope: Envelope) -> None:
    """Refuse the fields that are denied to a key.

    `field` denies a field that is given at all; `field.name` a member of an object, or among the
    elements of a list a text `name` or an object of that type. A type is denied with its versions:
    `tools.web_search` is `web_search_preview` and `web_search_2025_08_26`, too.

    Raises:
        ProxyError: `unsupported_parameter`, with the denied field as `param`.
    """
    for denied in key.deny:
        field, _, name = denied.partition(".")
        value = envelope.raw(field)
        if value is not None and (not name or _has(value, name)):
            raise errors.denied_parameter(denied)


def _has(value: bytes, name: str) -> bool:
    if value[:1] == b"[":
        return any(_is(element, name) for element in jsontext.elements(value))
    first, _, rest = name.partition(".")
    return any(
        jsontext.key_text(key) == first
        and (inner := value[start:end].strip()) != b"null"
        and (not rest or _has(inner, rest))
        for key, start, end in jsontext.members(value)
    )


def _is(element: bytes, name: str) -> bool:
    """Whether an element is, or has within it, what `name` means."""
    if element[:1] == b'"':
        return jsontext.key_text(element) == name
    for key, start, end in jsontext.members(element):
        field, value = jsontext.key_text(key), element[start:end].strip()
        if field == "type" and value[:1] == b'"':  # of two types each counts: readers differ
            kind = jsontext.key_text(value)
            if kind == name or kind.startswith(f"{name}_"):
                return True
        elif field == "tools" and value[:1] == b"[" and _has(value, name):  # of a namespace
            return True
    return False
