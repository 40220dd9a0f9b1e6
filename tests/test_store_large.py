"""Stores of conversations with many items, turns, bytes and owners: what a step of them costs."""

import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from aiproxy.aside import LARGE
from aiproxy.sessions import Content, items
from turns import ALICE, KINDS, World, array, message, world


@pytest.fixture(params=KINDS)
async def here(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    """Open an empty store of each kind."""
    async with world(request.param, tmp_path) as opened:
        yield opened


# Items that are referred to


@pytest.mark.parametrize("large", [False, True])
async def test_h2_an_array_is_cut_once(
    here: World, monkeypatch: pytest.MonkeyPatch, *, large: bool
) -> None:
    """However many items of a turn are referred to; and not in the event loop if it is large."""
    padding = "x" * (LARGE // 100 if large else 1)
    made = [message(padding, f"i{n}") for n in range(200)]
    given = [message(padding, f"j{n}") for n in range(3)]
    await here.put("a", content=Content(array(*given), array(*made), b"", b""))
    await here.put("b", ids=["k"])
    cut: list[threading.Thread] = []
    elements = items.elements

    def counted(text: bytes) -> list[bytes]:
        cut.append(threading.current_thread())
        return elements(text)

    for module in ("aiproxy.sessions.items", "aiproxy.stores.memory_sessions"):
        monkeypatch.setattr(f"{module}.elements", counted, raising=False)
    names = [*(f"i{n}" for n in range(200)), "j1", "k"]
    found = await here.store.find(ALICE, names)
    got = await here.store.items(ALICE, [found[name] for name in names])
    assert got == [*made, given[1], message("b of alice says k", "k")]
    assert len(cut) == 3
    if large:
        assert threading.current_thread() not in cut
