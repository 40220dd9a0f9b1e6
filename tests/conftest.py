"""What every test stands on: uvloop, no blocking call in the loop, and the rig."""

import gc
import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blockbuster.blockbuster
import pytest
import uvloop
from blockbuster import BlockBuster, BlockBusterFunction, BlockingError
from hypothesis import settings

from upstream import ScriptedUpstream

if TYPE_CHECKING:
    import asyncio

    from rig import Proxy

PACKAGE = str(Path(__file__).resolve().parent.parent / "aiproxy")

# Where code of aiproxy is on the stack and yet may block.
ALLOWED = (
    ("tests/rig.py", {"load", "start"}),  # a daemon may block before it serves
    ("aiproxy/otlp.py", {"__init__", "stop"}),  # a thread is begun
    ("aiproxy/logs.py", {"close"}),  # the last lines, after all is served
    ("prometheus_client/process_collector.py", {"collect"}),  # /proc is memory
)

settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True, database=None)
settings.register_profile("long", deadline=None, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is there now stays: a million objects that the collector need not look at again."""
    gc.collect()
    gc.freeze()


def pytest_asyncio_loop_factories() -> "dict[str, Callable[[], asyncio.AbstractEventLoop]]":
    """Run every async test on the event loop that the daemon runs on."""
    return {"uvloop": uvloop.new_event_loop}


@dataclass
class BlockingCalls:
    """The guard of one test: what it saw, and `functions` by name to allow some in a place."""

    seen: list[str]
    functions: dict[str, BlockBusterFunction]

    def allow(self, file: str, names: set[str]) -> None:
        """Let functions of these names block in files whose path ends so."""
        for function in self.functions.values():
            function.can_block_in(file, names)


def _place() -> str:
    frame = inspect.currentframe()
    while frame and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "somewhere"


@pytest.fixture(autouse=True)
def blocking_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[BlockingCalls]:
    """Fail a test in which code of aiproxy blocks the loop, even if it caught the error."""
    seen: list[str] = []

    class SeenError(BlockingError):
        def __init__(self, func: str) -> None:
            super().__init__(func)
            seen.append(f"{func} at {_place()}")

    monkeypatch.setattr(blockbuster.blockbuster, "BlockingError", SeenError)
    guard = BlockBuster(["aiproxy"])
    calls = BlockingCalls(seen, guard.functions)
    for file, names in ALLOWED:
        calls.allow(file, names)
    guard.activate()
    try:
        yield calls
    finally:
        guard.deactivate()
    if seen:
        pytest.fail("blocking calls in the event loop:\n" + "\n".join(seen), pytrace=False)


@pytest.fixture
async def upstream() -> AsyncIterator[ScriptedUpstream]:
    """Run a scripted upstream, healthy until told otherwise."""
    async with ScriptedUpstream() as server:
        yield server


@pytest.fixture
def holder(request: pytest.FixtureRequest) -> str:
    """Say who holds conversations where a test does not: a module's HOLDER.

    By default it is the upstream, since then all bytes pass as they are.
    """
    return str(getattr(request.module, "HOLDER", "upstream"))


@pytest.fixture
async def serve(
    upstream: ScriptedUpstream, holder: str
) -> AsyncIterator[Callable[..., Awaitable["Proxy"]]]:
    """Start the real daemon before the scripted upstream; arguments as of `rig.config_text`."""
    from rig import Proxy, config_text  # noqa: PLC0415 - unit tests do not import the daemon

    proxies: list[Proxy] = []

    async def start(environ: dict[str, str] | None = None, **changes: Any) -> Proxy:
        proxy = await Proxy.start(config_text(upstream.url, holder, **changes), environ)
        proxies.append(proxy)
        return proxy

    yield start
    for proxy in proxies:
        await proxy.stop()
