"""The real daemon as a process of its own, for faults that would hit the test, too."""

import asyncio
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from client import Answer, RawClient
from invariants import check_conservation, check_healthy, check_secrets, check_tokens, eventually
from rig import CREDENTIAL, LogTap, Proxy, config_text, totals
from upstream import ScriptedUpstream

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT = 30.0  # seconds for a program to be ready
MIB = 2**20


class _FileTap(LogTap):
    """A log that another process writes to a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @property
    def raw(self) -> bytes:  # type: ignore[override] # it is read only here
        """Return what is in the file."""
        return self._file.read_bytes()


class Child(Proxy):
    """Talks to a daemon in another process as to one in this."""

    def __init__(
        self, process: asyncio.subprocess.Process, ports: tuple[int, int], log: Path
    ) -> None:
        self.process = process
        self.ports = ports
        self.tap = _FileTap(log)
        self._clients: list[RawClient] = []

    @property
    def port(self) -> int:
        """The port of the client listener."""
        return self.ports[0]

    async def admin(self, path: str, method: str = "GET", body: bytes | None = None) -> Answer:
        """Ask the admin listener."""
        async with await RawClient.connect(self.ports[1]) as client:
            await client.request(method, path, (), body)
            return await client.answer()

    def descriptors(self) -> int:
        """Count its file descriptors."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))  # noqa: PTH208 - names are enough

    def memory(self, name: str) -> int:
        """Return bytes of its memory, as /proc/PID/status names them."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
        return int(line.split()[1]) * 1024

    def cpu(self) -> float:
        """Return the seconds that it has computed."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="ascii")
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    async def check(self, descriptors: int) -> None:
        """Assert I1 to I5 and I8 as far as they are seen from outside."""
        await self.close_clients()
        await check_healthy(self)
        await check_conservation(self)
        await check_tokens(self)
        await check_secrets(self)

        async def at_rest() -> None:
            assert self.descriptors() <= descriptors
            left = totals(await self.metrics(), "aiproxy_limit_remaining", "limit")
            assert left["concurrent"] == CONCURRENT

        await eventually(at_rest)


CONCURRENT = 1000  # of team-a in a child


def free_ports() -> tuple[int, int]:
    """Return two ports that were free."""
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        return one.getsockname()[1], other.getsockname()[1]


@asynccontextmanager
async def child(
    upstream: ScriptedUpstream | str, folder: Path, *, ulimit: str = "", **changes: Any
) -> AsyncIterator[Child]:
    """Run `aiproxy serve` under what the shell's `ulimit` says, such as `-n 64`."""
    url = upstream if isinstance(upstream, str) else upstream.url
    ports = free_ports()
    listen = {"listen": f"127.0.0.1:{ports[0]}", "admin": f"127.0.0.1:{ports[1]}"}
    keys = {"team-a": {"limits": {"concurrent": CONCURRENT}}}
    file, log = folder / "aiproxy.yaml", folder / "log"
    text = config_text(url, **{**listen, "keys": keys, **changes})
    file.write_text(text, encoding="utf-8")
    command = [sys.executable, "-m", "aiproxy", "serve", "--config", str(file)]
    if ulimit:
        command = ["/bin/sh", "-c", f'ulimit {ulimit} && exec "$0" "$@"', *command]
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=ROOT,
            # One arena: its address space then says how much memory it asks for.
            env={**os.environ, "UPSTREAM_KEY": CREDENTIAL, "MALLOC_ARENA_MAX": "1"},
            stdin=asyncio.subprocess.DEVNULL,
            stderr=output,
        )
    running = Child(process, ports, log)
    try:
        async with asyncio.timeout(START_LIMIT):
            while b'"started"' not in log.read_bytes():
                assert process.returncode is None, log.read_text()
                await asyncio.sleep(0.02)
        yield running
    finally:
        await running.close_clients()
        if process.returncode is None:
            process.kill()
        await process.wait()
