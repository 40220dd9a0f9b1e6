"""A daemon that drains, step by step, and what its clients must be told."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from client import Answer, RawClient
from faults import PATHS, asked, check_error, events_of
from invariants import eventually
from rig import Proxy, config_text, prompt
from steps import SSE_HEADERS, Step
from test_systemd import Manager, notifier
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait

AGES = 60.0  # seconds: longer than any of these tests
FRAMES = events_of("responses")
BODY = json.dumps(prompt()).encode()

Begin = Callable[..., Awaitable[Proxy]]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    """Listen as a service manager does."""
    with Manager(str(tmp_path / "notify")) as one:
        yield one


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """Listen as systemd does for a socket unit."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as sock:
        yield sock


@pytest.fixture
async def begin(
    upstream: ScriptedUpstream, server: socket.socket, manager: Manager
) -> AsyncIterator[Begin]:
    """Give what starts daemons that share a socket; they end with it, if they have not before."""
    proxies: list[Proxy] = []

    async def start(**changes: Any) -> Proxy:
        proxy = Proxy(
            config_text(upstream.url, **changes),
            sockets={"http": [server.dup()]},
            notifier=notifier(manager),
        )
        proxies.append(proxy)
        await proxy.daemon.start()
        return proxy

    yield start
    for proxy in proxies:
        await proxy.stop()


def held_up(go_on: asyncio.Event, at: int = 5) -> list[Step]:
    """Return the script of a stream that goes on when it may."""
    first, rest = FRAMES[:at], FRAMES[at:]
    opened: list[Step] = [Headers(200, SSE_HEADERS), *map(Chunk, first)]
    return [*opened, Wait(go_on), *map(Chunk, rest), EndChunks()]


async def stream(proxy: Proxy, name: str = "stream") -> tuple[RawClient, bytes]:
    """Begin the stream whose script is queued; return what came, up to where it waits."""
    body = asked("responses", streamed=True)
    client = await proxy.send(PATHS["responses"], body, {"x-request-id": name})
    await client.read_head()
    return client, await client.read_until(FRAMES[4])


async def post(proxy: Proxy, client: RawClient, name: str = "post") -> None:
    """Ask on a connection."""
    fields = proxy.headers({"x-request-id": name})
    await client.request("POST", PATHS["responses"], fields, BODY)


async def used(proxy: Proxy) -> RawClient:
    """Return a connection that had an answer, and is kept."""
    client = await proxy.client()
    await post(proxy, client)
    answer = await client.answer()
    assert (answer.status, answer.headers.get("connection")) == (200, None)
    return client


def draining(proxy: Proxy) -> "asyncio.Task[None]":
    """Do what SIGTERM does."""
    return asyncio.create_task(proxy.daemon.drain())


async def serves(proxy: Proxy, whom: str) -> None:
    """Wait until the drain has come so far."""

    async def holds() -> None:
        assert proxy.daemon.clients.listener.serves == whom

    await eventually(holds, 10)


async def ended(task: "asyncio.Task[None]") -> None:
    """Wait for the end of a drain."""
    async with asyncio.timeout(10):
        await task


def counts(proxy: Proxy) -> str:
    """Return what the log says of the drain."""
    return next(str(x["event"]) for x in proxy.logs() if str(x["event"]).startswith("drained "))


def check_served(answer: Answer) -> None:
    """Assert that this is an answer, and the last one of its connection."""
    assert (answer.status, answer.headers["connection"]) == (200, "close")


def check_refused(answer: Answer) -> None:
    """Assert that this says that the daemon ends, and when to come again."""
    check_error(answer, 503, "shutting_down", "responses")
    assert (answer.headers["connection"], answer.headers["retry-after"]) == ("close", "1")
