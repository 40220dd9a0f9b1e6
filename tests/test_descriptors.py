"""File descriptors bound how many clients are let in."""

import resource
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import pytest

from aiproxy import descriptors
from invariants import eventually
from rig import Proxy, config_text
from upstream import ScriptedUpstream

Serve = Callable[..., Awaitable[Proxy]]


@pytest.fixture
async def serve(upstream: ScriptedUpstream) -> AsyncIterator[Serve]:
    """Start daemons that may have so many descriptors."""
    proxies: list[Proxy] = []

    async def start(may_have: int, **changes: Any) -> Proxy:
        proxies.append(
            await Proxy.start(config_text(upstream.url, **changes), descriptors=may_have)
        )
        return proxies[-1]

    yield start
    for proxy in proxies:
        await proxy.stop()


@pytest.mark.parametrize(
    ("most", "may_have", "connections"),
    [
        (4096, 65536, 4096),
        (4096, 2 * 4096 + 64, 4096),
        (4096, 2 * 4096 + 63, 4095),
        (4096, 1024, 480),
        (4096, 64, 8),
        (4, 64, 4),
        (1, 1, 1),
    ],
)
def test_two_for_each_client(most: int, may_have: int, connections: int) -> None:
    """Each client may need one for itself and one for its upstream, and 64 are for the rest."""
    assert descriptors.connections(most, may_have) == connections


def test_the_limit_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process takes all that it may have; one that may not raise it goes on with what it has."""
    limits = [(1024, 4096)]

    def allowed(_: int, asked: tuple[int, int]) -> None:
        limits.append(asked)

    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", allowed)
    assert descriptors.raise_limit() == 4096
    assert limits == [(1024, 4096), (4096, 4096)]

    def refused(_: int, asked: tuple[int, int]) -> None:
        raise ValueError("not allowed to raise maximum limit")

    limits[:] = [(1024, 4096)]
    monkeypatch.setattr(resource, "setrlimit", refused)
    assert descriptors.raise_limit() == 1024


async def warned(proxy: Proxy) -> None:
    """Assert that the log says once what was lowered, and why."""
    lines = [line for line in proxy.logs() if line["event"] == "max_connections lowered"]
    assert [(line["configured"], line["connections"]) for line in lines] == [(4096, 8)]
    assert "80 file descriptors (LimitNOFILE)" in lines[0]["reason"]


async def test_no_more_clients_than_descriptors(serve: Serve) -> None:
    """The one too many is 503, at the start and after a reload; the log and the status say so."""
    proxy = await serve(80)
    await eventually(partial(warned, proxy))
    assert (await proxy.admin("/-/status")).json()["max_connections"] == 8
    kept = [await proxy.client() for _ in range(8)]
    for client in kept:
        await client.request("GET", "/")
        assert (await client.answer()).status == 200
    answer = await (await proxy.client()).answer()
    assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
    await proxy.daemon.reload()
    answer = await (await proxy.client()).answer()
    assert answer.status == 503
    await kept[0].close()


async def test_enough_descriptors_are_not_spoken_of(serve: Serve) -> None:
    """Where there are enough, the configuration's own bound holds, without a word."""
    proxy = await serve(80, max_connections=8)
    assert "max_connections lowered" not in [line["event"] for line in proxy.logs()]
