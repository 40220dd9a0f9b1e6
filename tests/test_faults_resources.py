"""Faults F21 and F22: too few descriptors, too little memory. F40 is in `test_hostile_load`."""

import asyncio
import json
import resource
import socket
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pytest

from child_rig import MIB, Child, child
from client import Answer, RawClient
from faults import asked, events_of, json_of
from hostile import HOST, KEY, C, R, chunked, chunks, dial, head, length
from invariants import check_terminal, eventually
from refusals import Refusal
from rig import prompt, totals
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait, json_answer

CHUNKED = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
OVERLOADED = Refusal(503, "overloaded", kind="server_error", headers={"retry-after": None})
TOO_LARGE = Refusal(413, "request_too_large")


# F21

LOOK = 0.5  # seconds
CLIENTS = 100


class Plain:
    """A client that keeps whatever came, also where its own sending failed or the end is a reset.

    Who is refused may still be sending: a stream of asyncio would then lose what it was told.
    """

    def __init__(self) -> None:
        self.received = b""

    async def talk(self, port: int, request: bytes) -> None:
        """Send a request, and read until the end of the connection."""
        loop = asyncio.get_running_loop()
        with socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", port))
            try:
                await loop.sock_sendall(sock, request)
            except ConnectionError:
                pass
            try:
                while data := await loop.sock_recv(sock, 2**16):
                    self.received += data
            except ConnectionError:
                pass

    @property
    def begun(self) -> bool:
        """Whether it was served so far."""
        return self.received.startswith(b"HTTP/1.1 200 ")

    async def answer(self) -> Answer:
        """Read what came as one whole answer, strictly."""
        reader = asyncio.StreamReader()
        reader.feed_data(self.received)
        reader.feed_eof()
        return await RawClient(reader, cast("Any", None)).answer()


async def check_no_spinning(daemon: Child) -> None:
    """Assert that it hardly computes while nothing happens."""

    async def rests() -> None:
        before = daemon.cpu()
        await asyncio.sleep(LOOK)
        assert daemon.cpu() - before < LOOK / 5

    await eventually(rests, 5)


@pytest.mark.timeout(60)  # a process starts, and a hundred clients
async def test_f21_few_descriptors(upstream: ScriptedUpstream, tmp_path: Path) -> None:
    """Of 100 clients with 64 descriptors each is served in whole, waits, or gets its 503.

    Meanwhile the daemon neither spins nor is deaf to its operator, and then all is as before.
    """
    go_on = asyncio.Event()
    frames = events_of("responses")
    upstream.default = [Headers(200, CHUNKED), Chunk(frames[0]), Wait(go_on),
                        *map(Chunk, frames[1:]), EndChunks()]  # fmt: skip
    body = json.dumps(asked("responses", streamed=True)).encode()
    request = head(HOST, KEY, "connection: close", length(body), target=R) + body
    async with child(upstream, tmp_path, ulimit="-n 64") as daemon:
        rest = daemon.descriptors()
        clients = [Plain() for _ in range(CLIENTS)]
        async with asyncio.TaskGroup() as talks:
            for client in clients:
                talks.create_task(client.talk(daemon.port, request))
            await check_no_spinning(daemon)  # and all that is decided is so by then
            begun = [client.begun for client in clients]
            assert sum(begun) >= 8
            assert (await daemon.admin("/-/ready")).status == 200
            assert daemon.descriptors() < 64
            go_on.set()
        ends = Counter([await ending(client) for client in clients])
        assert sum(ends.values()) == CLIENTS
        assert ends["whole"] >= sum(begun)
        upstream.heal()
        for _ in range(20):
            assert (await daemon.post()).status == 200
        await daemon.check(rest)


async def ending(client: Plain) -> str:
    """Return what a client got: an answer that is whole, or a refusal."""
    answer = await client.answer()
    if answer.status == 200:
        check_terminal(answer.body, completed=True)
        return "whole"
    OVERLOADED.check(answer)
    return "refused"


# F22

BODIES = 200
BUFFERED = 64 * MIB
ROOM = 1024 * MIB  # of address space, beyond what the daemon has at its start


@pytest.mark.timeout(120)  # 1.6 GB go through the loopback
async def test_f22_many_large_bodies_under_a_memory_bound(
    upstream: ScriptedUpstream, tmp_path: Path
) -> None:
    """200 bodies of 8 MB, a fifth of which fits: 503 for most, 413 where longer; no end by it."""
    go_on = asyncio.Event()
    upstream.default = [Wait(go_on), *json_answer(json_of("chat"))]
    bounds = {"max_body": "8MiB", "max_buffered": f"{BUFFERED // MIB}MiB"}
    async with child(upstream, tmp_path, **bounds) as daemon:
        assert (await daemon.get("/v1/models")).status == 200
        rest, before = daemon.descriptors(), daemon.memory("VmHWM")
        most = daemon.memory("VmSize") + ROOM
        resource.prlimit(daemon.process.pid, resource.RLIMIT_AS, (most, most))
        body = json.dumps(prompt(C, x="y" * 8_000_000)).encode()
        request = head(HOST, KEY, "connection: close", length(body)) + body
        wires = [await dial(daemon.port) for _ in range(BODIES)]
        for wire in wires:
            wire.transport.write(request)
        large = [await dial(daemon.port) for _ in range(20)]
        for wire in large:
            wire.transport.write(chunked(chunks(b"[", *[b" " * MIB] * 9), "connection: close"))

        async def decided() -> None:
            refused = sum(bool(wire.received) for wire in wires)
            assert refused + len(upstream.requests) == BODIES

        await eventually(decided, 60)
        assert (await daemon.admin("/-/ready")).status == 200
        go_on.set()
        statuses = []
        for wire in wires:
            (answer,), rest_of_it = await wire.until_closed()
            assert rest_of_it == b""
            if answer.status != 200:
                OVERLOADED.check(answer)
            statuses.append(answer.status)
        assert 1 <= statuses.count(200) <= 8
        for wire in large:
            (answer,), _ = await wire.until_closed()
            (OVERLOADED if answer.status == 503 else TOO_LARGE).check(answer)
        # A body that is received, read and sent on is there a few times.
        assert daemon.memory("VmHWM") - before < 5 * BUFFERED
        upstream.heal()
        counted = totals(await daemon.metrics(), "aiproxy_tokens_total", "type")
        assert sum(counted.values()) == statuses.count(200) * 18
        assert (await daemon.post(C, body)).status == 200
        await daemon.check(rest)
