"""The daemon that the soak watches, in a process of its own, so that its memory is its own.

    python tests/soaked.py FILE [LEAK]

It serves the configuration FILE until standard input ends, then ends as SIGTERM does. It prints its
ports, a line of JSON, and for each line that it is given another: what it holds, from within.

LEAK plants one real leak around functions of the product, to show that the soak sees it.
"""

import asyncio
import ctypes
import gc
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import uvloop

from aiproxy.call import Call
from aiproxy.config import load
from aiproxy.daemon import SWITCH_INTERVAL, Daemon
from aiproxy.limits import Reservation
from aiproxy.metrics import Metrics
from aiproxy.stores.level_file import state_directory

if TYPE_CHECKING:
    from aiproxy.exchange import Exchange

EVERY = 50  # requests: of what is not leaked by each of them
_GAUGE = "aiproxy_requests_in_flight{"
_REQUEST = re.compile(rb'"event":"request"')


# What it holds


class Held(NamedTuple):
    """What the daemon holds. All but the first four are as they were once it is at rest.

    Attributes:
        requests: that have ended, ever.
        logged: lines of requests in the log, ever.
        memory: bytes that are allocated, by Python and by every library in C.
        resident: bytes that the system has given to the process.
        series: of the metrics, by name and labels; the process's own are left out.
        in_flight: as the gauge has it.
        calls: requests that the daemon itself has in hand.
        set_aside: of limits, tokens that open requests may use.
        buffered: bytes of request bodies.
        pinned: conversations in which a turn is being made.
        clients: their connections.
        upstreams: connections to these.
    """

    requests: int
    logged: int
    memory: int
    resident: int
    descriptors: int
    tasks: int
    series: list[str]
    slots: int
    in_flight: int
    calls: int
    set_aside: int
    buffered: int
    pinned: int
    clients: int
    upstreams: int


class _Mallinfo2(ctypes.Structure):
    """What mallinfo2(3) returns."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


_C = ctypes.CDLL(None)
_C.mallinfo2.restype = _Mallinfo2


def memory() -> int:
    """Bytes that are allocated and not freed, to the byte.

    With PYTHONMALLOC=malloc each object of Python is a block of the C library, as all that its
    extensions allocate is; without caches of freed blocks per thread (the tunable of `soak`) what
    is in use is exact, whatever is free in between.
    """
    while gc.collect():
        pass
    found = _C.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def resident() -> int:
    """Bytes in memory, once what is free at the heap's end and in whole pages was given back."""
    _C.malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Sieve:
    """Where the log goes: lines of requests are counted, all others printed."""

    def __init__(self) -> None:
        self.requests = 0

    def write(self, data: memoryview) -> int:
        """Take some whole lines: the writer hands over no others, and all of it is taken."""
        text = bytes(data)
        found = len(_REQUEST.findall(text))
        self.requests += found
        if found != text.count(b"\n"):
            for line in text.splitlines():
                if not _REQUEST.search(line):
                    os.write(2, line + b"\n")
        return len(text)

    def flush(self) -> None:
        """Do nothing: nothing waits."""


class Soaked(Daemon):
    """A daemon that tells its ports once it listens, and what it holds when it is asked."""

    def __init__(self, path: Path) -> None:
        source = partial(load, path, environ=os.environ)
        self.sieve = Sieve()
        super().__init__(
            source().config,
            path=str(path),
            source=source,
            state=state_directory(os.environ),
            log_stream=self.sieve,
        )
        self._obeying: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start, then obey standard input."""
        await super().start()
        self._obeying = asyncio.create_task(self._obey())
        say({"port": self.clients.port, "admin": self.operators.port})

    async def _obey(self) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        while await reader.readline():
            say(self.held()._asdict())
        transport.close()
        os.kill(os.getpid(), signal.SIGTERM)

    def held(self) -> Held:
        """Count what is held now."""
        used = memory()
        proxy, sessions = self._proxy, cast("Any", self._sessions)
        upstreams = proxy.snapshot.config.upstreams.values()
        buckets = [
            bucket
            for accounts in self._limits._books.values()
            for account in accounts.values()
            for bucket in account.tokens
        ]
        samples = self._samples()
        return Held(
            requests=sum(self._lately.requests().values()),
            logged=self.sieve.requests,
            memory=used,
            resident=resident(),
            descriptors=len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - names are enough
            tasks=len(asyncio.all_tasks()),
            series=list(samples),
            slots=self._limits.held + sum(proxy.standings.of(each).in_flight for each in upstreams),
            in_flight=int(sum(v for k, v in samples.items() if k.startswith(_GAUGE))),
            calls=len(proxy.live),
            set_aside=sum(bucket.far + abs(bucket.exposed) for bucket in buckets),
            buffered=proxy.held,
            pinned=len(sessions._store.pins._counts),
            clients=self.clients.listener.count,
            upstreams=sum(each.pool.count()[0] for each in proxy.snapshot.clients.values()),
        )

    def _samples(self) -> dict[str, float]:
        """The metrics, by name and labels, without the process's own."""
        lines = self._metrics.exposition().decode().splitlines()
        parted = [line.rpartition(" ") for line in lines if not line.startswith(("#", "process_"))]
        return {name: float(value) for name, _, value in parted}


def say(document: object) -> None:
    """Print one line of JSON."""
    os.write(1, json.dumps(document).encode() + b"\n")


# Leaks


kept: list[object] = []  # what leaks


def _leak(owner: Any, name: str, leaking: Callable[..., None], every: int = EVERY) -> None:
    """Let a method of the product do something else each so many calls: `leaking(method, *its)`."""
    method, numbers = getattr(owner, name), itertools.count(1)

    @wraps(method)
    def instead(*its: Any) -> Any:
        return (partial(leaking, method) if next(numbers) % every == 0 else method)(*its)

    setattr(owner, name, instead)


def _bytes(finish: Callable[..., None], call: Call, outcome: object) -> None:
    kept.append(bytes(200))
    finish(call, outcome)


def _descriptor(finish: Callable[..., None], call: Call, outcome: object) -> None:
    kept.append(os.open(os.devnull, os.O_RDONLY))
    finish(call, outcome)


def _task(finish: Callable[..., None], call: Call, outcome: object) -> None:
    kept.append(asyncio.ensure_future(asyncio.Event().wait()))
    finish(call, outcome)


def _slot(_settle: Callable[..., None], held: Reservation, _tokens: int) -> None:
    kept.append(held)


def _series(record: Callable[..., None], metrics: Metrics, exchange: "Exchange") -> None:
    exchange.route = f"{exchange.route}-{exchange.request_id}"  # what a caller sent, as a label
    record(metrics, exchange)


def _careless(finish: Callable[..., None], call: Call, outcome: object) -> None:
    _ = asyncio.sleep(0)
    socket.socket()
    finish(call, outcome)


LEAKS: dict[str, Callable[[], None]] = {
    "bytes": partial(_leak, Call, "finish", _bytes, 1),
    "descriptor": partial(_leak, Call, "finish", _descriptor),
    "task": partial(_leak, Call, "finish", _task),
    "slot": partial(_leak, Reservation, "settle", _slot),
    "series": partial(_leak, Metrics, "record", _series),
    "careless": partial(_leak, Call, "finish", _careless),
}


def main(path: str, leak: str = "") -> None:
    """Serve until standard input ends."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    if leak:
        LEAKS[leak]()
    daemon = Soaked(Path(path))
    logging.getLogger().addHandler(daemon.library_handler())
    uvloop.run(daemon.run())


if __name__ == "__main__":
    main(*sys.argv[1:])
