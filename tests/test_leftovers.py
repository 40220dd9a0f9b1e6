"""What a request leaves behind: nothing, not even for the garbage collector."""

import gc
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest

from responses import responses_events
from rig import Proxy, prompt
from upstream import ScriptedUpstream, stream

Serve = Callable[..., Awaitable[Proxy]]
REQUESTS = 20


@pytest.mark.parametrize("streamed", [False, True])
async def test_no_reference_cycles(
    serve: Serve, upstream: ScriptedUpstream, *, streamed: bool
) -> None:
    """A request's objects are freed when it ends: a cycle per request keeps the collector busy."""
    proxy = await serve()

    async def ask() -> None:
        if streamed:
            upstream.script(stream(responses_events("Hello")))
        answer = await proxy.post("/v1/responses", prompt("/v1/responses", stream=streamed))
        assert answer.status == 200

    for _ in range(3):
        await ask()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(REQUESTS):
            await ask()
        gc.collect()
        left = Counter(
            f"{type(thing).__module__}.{type(thing).__qualname__}"
            for thing in gc.garbage
            if type(thing).__module__.startswith("aiproxy.")
        )
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not [name for name, count in left.items() if count >= REQUESTS], left
