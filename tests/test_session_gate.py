"""The door to the store of sessions: when the store is away, and that what is due goes on."""

import asyncio
from unittest.mock import Mock

import pytest

from aiproxy import session_gate
from aiproxy.config import Sessions
from aiproxy.session_gate import SessionGate


@pytest.fixture
def gate() -> SessionGate:
    """Return a door to a store in memory."""
    return SessionGate(Sessions(), metrics=Mock(), log=Mock())


async def test_l3_what_is_due_goes_on_after_a_fault(
    gate: SessionGate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that fails is not the last one: conversations expire for as long as we serve."""
    monkeypatch.setattr(session_gate, "PERIOD", 0.001)
    steps = asyncio.Semaphore(0)

    def fails(*, prove: bool) -> None:
        steps.release()
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(gate._store, "tend", fails)
    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    gate.start()
    async with asyncio.timeout(5):
        for _ in range(3):
            await steps.acquire()
    await gate.stop()
