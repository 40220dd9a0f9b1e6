"""What clients do in the table of faults, and what else is true of a row."""

import asyncio
import ctypes
import json
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from client import Answer, IncompleteBody, RawClient
from faults import FIRST_DELTA, HEARTBEAT, PATHS, Api, Script, asked, events_of
from rig import Proxy, prompt
from upstream import Recorded, ScriptedUpstream

SEEN_WITHIN = 0.5  # s: 100 ms are promised; the rest is for a machine that others use, too
BUFFERS = 8 * 2**20  # bytes that the kernel keeps for the upstream, and ours


@dataclass
class Ran:
    """One request of a row: how it is asked, and what became of it."""

    proxy: Proxy
    upstream: ScriptedUpstream
    api: Api
    streamed: bool
    model: str
    script: Script
    request_id: str
    before: int  # requests that the upstream had
    sent: bytes = b""  # the request's body
    client: RawClient | None = None
    answer: Answer | None = None  # as far as it came
    gone_at: float = 0.0  # when the client left, on the loop's clock
    line: dict[str, Any] = field(default_factory=dict)

    async def send(self, **options: Any) -> RawClient:
        """Send the request."""
        wide = {"max_tokens": 1_000_000} if self.api == "messages" else {}  # what it may be charged
        body = asked(self.api, streamed=self.streamed, model=self.model, **wide)
        self.sent = json.dumps(body).encode()
        fields = {"x-request-id": self.request_id}
        self.client = await self.proxy.send(PATHS[self.api], self.sent, fields, **options)
        return self.client

    async def reached(self) -> Recorded:
        """Wait for it at the upstream."""
        return await self.upstream.wait_request(self.before + 1)

    @property
    def requests(self) -> list[Recorded]:
        """Return what the upstream got of it."""
        return self.upstream.requests[self.before :]

    @property
    def body(self) -> bytes:
        """Return what the client has got, without heartbeats and comments."""
        body = b"" if self.answer is None else self.answer.body
        return body.replace(HEARTBEAT, b"").replace(b": drip\n\n", b"")

    async def read_until(self, client: RawClient, needle: bytes) -> None:
        """Read the head and the body up to some bytes."""
        head = await client.read_head()
        fields = {name.lower(): value for name, value in head.headers}
        self.answer = Answer(head.status, fields, await client.read_until(needle))


# Clients

Client = Callable[[Ran], Awaitable[None]]
Check = Callable[[Ran], Awaitable[None]]


def _now() -> float:
    return asyncio.get_running_loop().time()


async def reads(ran: Ran) -> None:
    """Read all of the answer."""
    client = await ran.send(limit=2**20)
    async with asyncio.timeout(30):
        ran.answer = await client.answer()


async def reads_slowly(ran: Ran) -> None:
    """Read nothing until the upstream, too, has come to a stop; then all."""
    client = await ran.send(rcvbuf=2**16, limit=2**16)
    client.pause()
    request = await ran.reached()
    sent = -1
    while sent != request.sent:
        sent = request.sent
        await asyncio.sleep(0.05)
    assert 0 < sent < BUFFERS
    assert not request.completed
    ran.answer = await client.answer()


async def stops_reading(ran: Ran) -> None:
    """Read up to the first text, and nothing more until the connection is cut."""
    client = await ran.send(rcvbuf=4096, limit=1024)
    await ran.read_until(client, b"Hello")
    client.pause()
    ran.gone_at = _now()
    async with asyncio.timeout(10):
        await (await ran.reached()).closed.wait()
    with pytest.raises((IncompleteBody, ConnectionError)):
        await client.read_body()


async def leaves_at_once(ran: Ran) -> None:
    """Leave without any of the answer."""
    client = await ran.send()
    await ran.reached()
    await asyncio.sleep(0.05)
    ran.gone_at = _now()
    client.abort()


async def leaves_after_text(ran: Ran) -> None:
    """Read up to the first text, and leave."""
    client = await ran.send()
    await ran.read_until(client, b"Hello")
    ran.gone_at = _now()
    client.abort()


async def leaves_after_all(ran: Ran) -> None:
    """Read all that the upstream sends before it is silent, and leave."""
    client = await ran.send()
    last = next(step.data for step in reversed(ran.script) if hasattr(step, "data"))
    await ran.read_until(client, last[:24] if b"response." in last else last[-24:])
    ran.gone_at = _now()
    client.abort()


async def is_cut_off(ran: Ran) -> None:
    """Read up to the first text; from then on all packets to it are dropped, and it sends none."""
    client = await ran.send()
    if ran.streamed:
        await ran.read_until(client, b"Hello")
    await ran.reached()
    drop_packets(client.writer.get_extra_info("socket"))
    ran.gone_at = _now()


def drop_packets(sock: socket.socket) -> None:
    """Have the kernel drop what comes for a socket before TCP sees it: none is acknowledged."""
    attach_filter = 26  # SO_ATTACH_FILTER, which Python does not name
    code = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # return 0: keep nothing
    program = struct.pack("HL", 1, ctypes.addressof(code))
    sock.setsockopt(socket.SOL_SOCKET, attach_filter, program)


# Before the request


async def pooled_connections_are_closed(ran: Ran) -> None:
    """Let a connection be pooled, and the upstream close it."""
    assert (await ran.proxy.post(PATHS[ran.api], prompt(PATHS[ran.api], ran.model))).status == 200
    assert ran.upstream.connections > 0
    for link in list(ran.upstream._links):
        link.hang_up()
    ran.before += 1


async def a_connection_is_pooled(ran: Ran) -> None:
    """Let a connection be pooled, which the request will use."""
    assert (await ran.proxy.post(PATHS[ran.api], prompt(PATHS[ran.api], ran.model))).status == 200
    ran.before += 1


# Meanwhile


async def slot_is_held(ran: Ran) -> None:
    """The only slot of the key is taken as long as the request is under way."""
    await ran.reached()
    refused = await ran.proxy.post()
    assert (refused.status, refused.json()["error"]["type"]) == (429, "concurrent")


# Afterwards


async def upstream_is_let_go(ran: Ran) -> None:
    """The upstream sees the close as soon as the client has left."""
    request = ran.requests[0]
    assert request.closed_at is not None
    assert 0 <= request.closed_at - ran.gone_at < SEEN_WITHIN


async def slot_is_free_a_second_after(ran: Ran) -> None:
    """The request has ended within a second after its bound."""
    assert _now() - ran.gone_at < 0.4 + 1.0


async def it_beats(ran: Ran) -> None:
    """There were heartbeats, none of them inside an event."""
    assert ran.answer is not None
    places = [found.start() for found in re.finditer(re.escape(HEARTBEAT), ran.answer.body)]
    assert places
    for at in places:
        assert at == 0 or ran.answer.body[:at].endswith(b"\n\n")


async def asked_once(ran: Ran) -> None:
    """The upstream got it once."""
    assert len(ran.requests) == 1


async def asked_twice(ran: Ran) -> None:
    """The upstream got the same twice."""
    first, second = ran.requests
    assert first.body == second.body


async def within_connect(ran: Ran) -> None:
    """It did not take longer than to connect may."""
    assert ran.line["duration_s"] < 0.3 + 1.0


async def patience_is_passed_on(ran: Ran) -> None:
    """The upstream's Retry-After came along."""
    assert ran.answer is not None
    assert ran.answer.headers["retry-after"] == "17"


def first_text(api: Api) -> bytes:
    """Return the events of a stream up to its first text."""
    return b"".join(events_of(api)[: FIRST_DELTA[api]])
