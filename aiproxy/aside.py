"""Work on documents that are too large for the event loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

LARGE = 1024 * 1024  # bytes of a document that is not read in the event loop


async def aside(work: Callable[[], T], size: int) -> T:
    """Do it here, or in a thread for a document that would hold up the event loop."""
    if size <= LARGE:
        return work()
    return await asyncio.get_running_loop().run_in_executor(None, work)
