"""The scripted upstream: an HTTP/1.1 server on loopback that plays one script per request.

It is no HTTP library on purpose, so that it can send anything. It reads all the time, hence
notices the peer's going at once; what it writes waits until the kernel took it, hence a test
sees backpressure in `Recorded.sent`.
"""

import asyncio
import json
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

from answers import TEXT, USAGE
from healthy import healthy_answer
from steps import (
    Chunk,
    EndChunks,
    Finish,
    Garbage,
    Headers,
    PausedRead,
    Repeat,
    Reset,
    Send,
    Sleep,
    Stall,
    Step,
    Wait,
    error_answer,
    json_answer,
    stream,
)

if TYPE_CHECKING:
    import ssl as tls

__all__ = [
    "Chunk",
    "EndChunks",
    "Finish",
    "Garbage",
    "Headers",
    "PausedRead",
    "Recorded",
    "Repeat",
    "Reset",
    "ScriptedUpstream",
    "Send",
    "Sleep",
    "Stall",
    "Wait",
    "error_answer",
    "json_answer",
    "stream",
]

_MOST_READ = 256 * 2**20
_LINGER_OFF = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class Recorded:
    """One request as it came, and what became of its connection."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    connection: int
    body: bytes = b""
    sent: int = 0  # bytes handed to the connection, and but for the last step to the kernel
    completed: bool = False  # the script was played to its end
    closed_at: float | None = None  # loop time
    done: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def path(self) -> str:
        """The target without its query."""
        return self.target.partition("?")[0]

    def header(self, name: str) -> str | None:
        """Return the first value of a field, None if it did not come."""
        return next((v for n, v in self.headers if n.lower() == name.lower()), None)

    def json(self) -> Any:
        """Return the body as JSON."""
        return json.loads(self.body)


Script = Sequence[Step]


class ScriptedUpstream:
    """The server. `default` answers whatever no queued script is left for.

    It is a script or a function of the request; at first `healthy`, which answers all four APIs
    with `text` and `usage`.
    """

    def __init__(self, ssl: "tls.SSLContext | None" = None) -> None:
        self.requests: list[Recorded] = []
        self.connections = 0  # open now
        self.accepted = 0  # ever
        self.text = TEXT
        self.usage = USAGE
        self.default: Script | Callable[[Recorded], Script] = self.healthy
        self._ssl = ssl
        self._queue: deque[Script] = deque()
        self._news = asyncio.Condition()
        self._links: set[_Connection] = set()
        self._players: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._bugs: list[Exception] = []
        self._alone = asyncio.Event()
        self._alone.set()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _Connection(self), "127.0.0.1", 0, ssl=self._ssl
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stop()

    @property
    def port(self) -> int:
        """The port that the kernel chose."""
        if self._server is None:
            raise RuntimeError("the upstream is not started")
        return cast("int", self._server.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        """The base URL of the API."""
        return f"{'https' if self._ssl else 'http'}://127.0.0.1:{self.port}/v1"

    @property
    def scripts_left(self) -> int:
        """The number of scripts that no request has taken yet."""
        return len(self._queue)

    def script(self, *steps: Step | Script) -> None:
        """Queue a script for one request; sequences of steps are taken apart."""
        flat: list[Step] = []
        for step in steps:
            flat.extend(step if isinstance(step, Sequence) else [step])
        self._queue.append(flat)

    def heal(self) -> None:
        """Forget every queued script and every other default: healthy from now on."""
        self._queue.clear()
        self.default = self.healthy

    async def wait_request(self, n: int = 1) -> Recorded:
        """Wait until `n` requests came in total, at most 5 s; return the n-th."""
        async with asyncio.timeout(5), self._news:
            await self._news.wait_for(lambda: len(self.requests) >= n)
        return self.requests[n - 1]

    async def stop(self) -> None:
        """Close the port and every connection; raise if a script itself was at fault."""
        if self._server is not None:
            self._server.close()
        for link in list(self._links):
            link.hang_up()
        for player in list(self._players):
            player.cancel()
        await asyncio.gather(*self._players, return_exceptions=True)
        async with asyncio.timeout(5):
            await self._alone.wait()
        if self._bugs:
            raise ExceptionGroup("a script or a request was no HTTP", self._bugs)

    def healthy(self, request: Recorded) -> Script:
        """Answer as the real API would, whole or streamed, with the model of the request."""
        return healthy_answer(request.path, request.body, self.text, self.usage)

    def connected(self, link: "_Connection") -> None:
        """Count a new connection and begin to serve it."""
        self.connections += 1
        self.accepted += 1
        self._links.add(link)
        self._alone.clear()
        player = asyncio.get_running_loop().create_task(link.serve())
        link.player = player
        self._players.add(player)
        player.add_done_callback(self._ended)

    def disconnected(self, link: "_Connection") -> None:
        """Count a connection that is gone."""
        self.connections -= 1
        self._links.discard(link)
        if not self._links:
            self._alone.set()

    def take(self) -> Script | None:
        """Return the next queued script."""
        return self._queue.popleft() if self._queue else None

    async def record(self, request: Recorded) -> None:
        """Keep a request and tell those who wait for it."""
        self.requests.append(request)
        async with self._news:
            self._news.notify_all()

    def script_for(self, request: Recorded) -> Script:
        """Return what answers a request that found no queued script."""
        return self.default(request) if callable(self.default) else self.default

    def _ended(self, player: asyncio.Task[None]) -> None:
        self._players.discard(player)
        error = None if player.cancelled() else player.exception()
        if isinstance(error, Exception):
            self._bugs.append(error)


class _Gone(Exception):  # noqa: N818 - no error: scripts end so
    """The script closed the connection."""


class _Connection(asyncio.Protocol):
    """One connection: reads requests one after another and plays a script for each."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.upstream = upstream
        self.player: asyncio.Task[None] | None = None
        self._reader = asyncio.StreamReader(limit=_MOST_READ)
        self._flushed = asyncio.Event()
        self._flushed.set()
        self._requests: list[Recorded] = []
        self._ours = False  # we closed it, so its end says nothing about the peer
        self._number = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=0)
        self.upstream.connected(self)
        self._number = self.upstream.accepted

    def data_received(self, data: bytes) -> None:
        self._reader.feed_data(data)

    def eof_received(self) -> None:
        self._lost()

    def connection_lost(self, exc: Exception | None) -> None:
        self.upstream.disconnected(self)
        self._lost()

    def pause_writing(self) -> None:
        self._flushed.clear()

    def resume_writing(self) -> None:
        self._flushed.set()

    def hang_up(self, *, reset: bool = False) -> None:
        """Close from our side and drop what is unsent: with RST, else with FIN."""
        self._ours = True
        if reset:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_OFF)
        self._transport.abort()

    def _lost(self) -> None:
        if not self._ours:
            now = asyncio.get_running_loop().time()
            for request in self._requests:
                if not request.closed.is_set():
                    request.closed_at = now
                    request.closed.set()
        if self.player is not None:
            self.player.cancel()

    async def serve(self) -> None:
        """Serve requests until the connection ends."""
        try:
            while True:
                request = await self._read_head()
                script = self.upstream.take()
                paused = bool(script and isinstance(script[0], PausedRead))
                if paused:
                    self._transport.pause_reading()
                else:
                    request.body = await self._read_body(request)
                self._requests.append(request)
                await self.upstream.record(request)
                await self._play(request, script)
                if paused:
                    self._transport.close()
                    return
        except _Gone:
            pass
        except Exception:
            self.hang_up()
            raise

    async def _read_head(self) -> Recorded:
        head = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = head[:-4].decode("latin-1").split("\r\n")
        method, target, _version = first.split(" ")
        pairs = [line.split(":", 1) for line in lines]
        headers = [(name, value.strip(" \t")) for name, value in pairs]
        return Recorded(method, target, headers, self._number)

    async def _read_body(self, request: Recorded) -> bytes:
        if (request.header("transfer-encoding") or "").lower() != "chunked":
            return await self._reader.readexactly(int(request.header("content-length") or 0))
        body = b""
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            body += await self._reader.readexactly(size)
            await self._reader.readuntil(b"\r\n")
        while await self._reader.readuntil(b"\r\n") != b"\r\n":
            pass  # a trailer field
        return body

    async def _play(self, request: Recorded, script: Script | None) -> None:
        try:
            for step in self.upstream.script_for(request) if script is None else script:
                await self._step(request, step)
            request.completed = True
        except _Gone:
            request.completed = True
            raise
        finally:
            request.done.set()

    async def _step(self, request: Recorded, step: Step) -> None:
        match step:
            case Send() | Headers() | Chunk() | EndChunks() | Garbage():
                await self._write(request, step.encode())
            case Sleep(seconds):
                await asyncio.sleep(seconds)
            case Wait(event):
                await event.wait()
            case Repeat(data, n, pause):
                for _ in range(n):
                    await self._write(request, Chunk(data).encode())
                    await asyncio.sleep(pause)
            case Stall():
                await asyncio.Future()  # until the peer's going cancels it
            case Reset():
                self.hang_up(reset=True)
                raise _Gone
            case Finish():
                self._ours = True
                self._transport.close()
                raise _Gone
            case PausedRead():
                pass  # acted on before the script began

    async def _write(self, request: Recorded, data: bytes) -> None:
        if data:
            self._transport.write(data)
            request.sent += len(data)
            await self._flushed.wait()
