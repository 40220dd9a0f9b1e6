"""What some work costs, as far as a busy machine can tell."""

import time
from collections.abc import Callable
from contextlib import suppress

from aiproxy.errors import ProxyError


def least(work: Callable[[], object]) -> float:
    """Return the CPU time of some work, the least of three."""
    took = []
    for _ in range(3):
        began = time.process_time()
        with suppress(ProxyError):  # refused: done as well
            work()
        took.append(time.process_time() - began)
    return min(took)
