"""File descriptors: as many as this process may have, and how many connections these allow.

A process without descriptors cannot accept, nor connect, nor write its state: it dies late. So no
more clients are let in than there are descriptors for, one for each and one for its upstream.
"""

from __future__ import annotations

import resource
from contextlib import suppress

RESERVED = 64  # for listeners, stores, the log, the runtime, and clients that are turned away
LEAST = 8  # clients, whatever there is


def raise_limit() -> int:
    """Take as many as the service manager allows (getrlimit(2)); how many these are."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def connections(most: int, descriptors: int) -> int:
    """How many clients may be connected, of `most` that are configured."""
    return min(most, max(LEAST, (descriptors - RESERVED) // 2))
