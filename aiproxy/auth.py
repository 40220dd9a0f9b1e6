"""Who is calling.

Keys are kept as SHA-256 only. A look-up by hash takes the same time for every wrong key, and the
answer to all of them is the same.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from aiproxy import errors

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from aiproxy.config import Key


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
