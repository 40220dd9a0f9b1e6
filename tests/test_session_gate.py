"""The door to the store of sessions: when the store is away, and that what is due goes on."""

import asyncio
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import pytest

from aiproxy import session_gate
from aiproxy.config import Sessions
from aiproxy.errors import ProxyError
from aiproxy.session_gate import SessionGate
from aiproxy.sessions import StoreError, Turn
from aiproxy.stores.memory_sessions import MemorySessions
from turns import turn


@pytest.fixture
def gate() -> SessionGate:
    """Return a door to a store in memory."""
    return SessionGate(Sessions(), metrics=Mock(), log=Mock())


def test_its_bounds_are_the_configured_ones_from_the_beginning() -> None:
    """What is kept before the first reload is bounded by what the daemon began with."""
    bounds = Sessions(max_turns=7)
    gate = SessionGate(bounds, metrics=Mock(), log=Mock())
    assert gate.bounds is bounds
    assert gate._store._max_bytes == bounds.max_bytes  # type: ignore[attr-defined] # in memory


@pytest.mark.parametrize("kind", ["memory", "sqlite"])
def test_metrics_name_the_kind_of_the_store(kind: str) -> None:
    """Not where it is."""
    config = Sessions.model_validate({"store": "sqlite:/x.db" if kind == "sqlite" else "memory:"})
    assert SessionGate(config, metrics=Mock(), log=Mock()).name == kind


def test_what_nobody_waits_for_is_told(tmp_path: Path) -> None:
    """What a store does in the background counts when it fails, and shows that the store is ill."""
    metrics, log = Mock(), Mock()
    config = Sessions.model_validate({"store": f"sqlite:{tmp_path}/sessions.db"})
    gate = SessionGate(config, metrics=metrics, log=log)
    gate.open()

    def fails(_book: object) -> None:
        raise StoreError("disk is full")

    async def run() -> None:
        with suppress(StoreError):
            await gate._store._tell("tend", fails)  # type: ignore[attr-defined] # as `tend` does
        await gate.stop()

    asyncio.run(run())
    metrics.store_failed.assert_called_once_with("sqlite", "tend")
    assert log.warning.call_args.args == ("sessions failed",)


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


class Store(MemorySessions):
    """A store that fails as it is told."""

    fails = False

    async def put(self, turn: Turn) -> None:
        """Fail, or not."""
        await asyncio.sleep(0.01)
        if self.fails:
            raise StoreError("database is locked")

    async def check(self) -> None:
        """Fail, or not."""
        await self.put(turn("any"))


@pytest.fixture
def store(gate: SessionGate) -> Store:
    """Put a store behind the door that fails."""
    made = Store()
    gate._store = made
    return made


async def put(gate: SessionGate) -> int:
    """Put a turn, and return what the client is told."""
    try:
        await gate.put(turn("a"))
    except ProxyError as error:
        return error.status
    return 200


def away(gate: SessionGate) -> bool:
    """Say whether the store counts as away now."""
    return gate.away


async def test_l11_one_failure_is_not_away(gate: SessionGate, store: Store) -> None:
    """What fails at one time is one failure: we stay ready, and look before the next turn."""
    store.fails = True
    assert await asyncio.gather(*(put(gate) for _ in range(5))) == [503] * 5
    assert not away(gate)
    store.fails = False
    await gate.ready()
    store.fails = True
    assert await put(gate) == 503
    assert not away(gate)


@pytest.mark.parametrize("how", ["request", "turn", "told"])
async def test_l11_a_failure_in_doubt_is_away(gate: SessionGate, store: Store, how: str) -> None:
    """A second failure after the first is told at once, and no answer is made to be lost."""
    store.fails = True
    assert await put(gate) == 503
    if how == "request":
        with pytest.raises(ProxyError):
            await gate.ready()
    elif how == "turn":
        assert await put(gate) == 503
    else:
        gate._told("renew", StoreError("of before"))
        assert not away(gate)
        gate._told("check", StoreError("database is locked"))
    assert away(gate)
    log: Mock = gate._log  # type: ignore[assignment]
    assert [call.args for call in log.warning.call_args_list] == [("sessions failed",)]
    assert [call.args for call in log.error.call_args_list] == [("sessions not available",)]
    with pytest.raises(ProxyError):
        await gate.ready()
    store.fails = False
    gate._told("check", None)
    assert not away(gate)
    await gate.ready()


async def test_l11_a_failure_in_the_moment_of_the_first(
    gate: SessionGate, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What began when the store was in doubt counts, however coarse the clock is."""
    monkeypatch.setattr("aiproxy.session_gate.time.monotonic", lambda: 5.0)
    store.fails = True
    assert await put(gate) == 503
    assert not away(gate)
    assert await put(gate) == 503
    assert away(gate)


async def test_l11_a_read_is_no_proof(gate: SessionGate, store: Store) -> None:
    """A store that can be read alone is still in doubt."""
    store.fails = True
    assert await put(gate) == 503
    gate._done("load")
    assert await put(gate) == 503
    assert away(gate)
    gate._done("load")
    assert away(gate)
