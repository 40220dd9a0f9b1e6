"""The daemon of the soak, in a process of its own: it tells what it holds, and can be made to leak.

    python tests/soaked.py CONFIG [LEAK ...]

Prints its port, and for each line on standard input one line of JSON. Its memory is that of all of
the process, counted by the C library: with `PYTHONMALLOC=malloc` Python's own objects are in it,
and without the library's cache per thread (`GLIBC_TUNABLES`) the count is exact.
"""
# ruff: noqa: T201 - it talks to the soak by standard output

import asyncio
import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from aiproxy.call import Call
from aiproxy.config import Loaded, loads
from aiproxy.daemon import Daemon
from aiproxy.descriptors import raise_limit

EVERY = 50  # requests between two leaks of what is not bytes
LEAKED = 300  # bytes of each request


class _Mallinfo2(ctypes.Structure):
    """What mallinfo2(3) tells."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


_libc = ctypes.CDLL("libc.so.6")
_libc.mallinfo2.restype = _Mallinfo2


def held(daemon: Daemon) -> dict[str, Any]:
    """Return what the process holds at rest, in numbers, and the names of its series."""
    gc.collect()
    memory = _libc.mallinfo2()
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - it costs nothing else
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    limits = daemon._limits
    exposed = daemon._metrics.exposition().decode().splitlines()
    names = [line.rpartition(" ")[0] for line in exposed if not line.startswith("#")]
    return {
        "memory": memory.uordblks + memory.hblkhd,
        "resident": resident,
        "descriptors": len(os.listdir("/proc/self/fd")) - 1,  # noqa: PTH208 - as above
        "tasks": len(asyncio.all_tasks()),
        "slots": sum(a.slots.held for book in limits._books.values() for a in book.values()),
        "series": len(names),
        "names": names,
        "in flight": len(daemon._proxy.live),
        "bodies": daemon._proxy.held,
        "attempts": sum(each.in_flight for _, each in daemon._proxy.standings._known.values()),
    }


def leak_bytes(_: Call, kept: list[Any]) -> None:
    """Keep some bytes of each request."""
    kept.append(bytes(LEAKED))


def leak_descriptor(_: Call, kept: list[Any]) -> None:
    """Leave a file open, now and then."""
    if _now_and_then(kept):
        os.open(os.devnull, os.O_RDONLY)


def leak_task(_: Call, kept: list[Any]) -> None:
    """Leave a task waiting, now and then."""
    if _now_and_then(kept):
        kept.append(asyncio.get_running_loop().create_task(asyncio.Event().wait()))


def leak_slot(call: Call, kept: list[Any]) -> None:
    """Forget what a request has taken of its limits, now and then."""
    if call.held is not None and _now_and_then(kept):
        call.held = None


def leak_series(call: Call, kept: list[Any]) -> None:
    """Make a label of what a caller says, now and then."""
    if _now_and_then(kept):
        call.exchange.route = f"route-{kept[0]}"


def _now_and_then(kept: list[Any]) -> bool:
    if not kept:
        kept.append(0)
    kept[0] += 1
    return bool(kept[0] % EVERY == 0)


LEAKS: dict[str, Callable[[Call, list[Any]], None]] = {
    "bytes": leak_bytes,
    "descriptor": leak_descriptor,
    "task": leak_task,
    "slot": leak_slot,
    "series": leak_series,
}


def plant(leak: str) -> None:
    """Make every request leak at its end."""
    kept: list[Any] = []
    finish, leaks = Call.finish, LEAKS[leak]

    def leaking(self: Call, outcome: Any) -> None:
        if self.exchange.outcome is None:
            leaks(self, kept)
        finish(self, outcome)

    Call.finish = leaking  # type: ignore[method-assign] # the leak is the purpose


async def main(path: str) -> None:
    """Run the daemon until standard input ends."""

    def source() -> Loaded:
        return loads(Path(path).read_text(encoding="utf-8"), path=Path(path), environ=os.environ)

    daemon = Daemon(source().config, path=path, source=source, descriptors=raise_limit())
    await daemon.start()
    print(daemon.clients.port, flush=True)
    loop, ended = asyncio.get_running_loop(), asyncio.Event()

    def asked() -> None:
        if os.read(0, 4096):
            print(json.dumps(held(daemon)), flush=True)
        else:
            loop.remove_reader(0)
            ended.set()

    loop.add_reader(0, asked)
    await ended.wait()
    await daemon.stop()


if __name__ == "__main__":
    for leak in sys.argv[2:]:
        plant(leak)
    uvloop.run(main(sys.argv[1]))
