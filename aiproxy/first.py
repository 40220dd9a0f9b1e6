"""Waiting for the first of several things, within a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine


async def first(*waits: Coroutine[object, object, object], deadline: float = float("inf")) -> None:
    """Until one of these, or `deadline` on the loop's clock; the others are cancelled."""
    timeout = None
    if deadline != float("inf"):
        timeout = max(0.0, deadline - asyncio.get_running_loop().time())
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
