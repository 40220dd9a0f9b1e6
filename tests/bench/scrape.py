"""What a scrape of a large daemon costs its requests: `python tests/bench/scrape.py [ROUNDS]`.

A daemon with 200 keys, ten models and four upstreams, all of whose series are there (33,000 lines),
serves 100 requests a second, alone and while it is scraped ten times a second. It prints how late
the event loop ran a timer of one millisecond, and how long requests and scrapes took: the median of
the rounds. The upstream, the clients and the scraper are another process.
"""
# ruff: noqa: T201 - a program for a terminal prints

import asyncio
import gc
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, cast

import aiohttp
import uvloop
from aiohttp import web

from aiproxy.config import loads
from aiproxy.daemon import GC_THRESHOLDS, SWITCH_INTERVAL, Daemon
from aiproxy.exchange import Endpoint, Exchange
from aiproxy.metrics import Metrics
from aiproxy.usage import Usage

KEYS, ROUTES, UPSTREAMS = 200, 10, 4
ENDPOINTS: tuple[Endpoint, ...] = ("responses", "chat", "messages")
OUTCOMES = ("completed", "upstream_error", "rejected_limit", "client_disconnected")
PHASES = {
    "alone": None,
    "text": "text/plain;version=0.0.4",
    "OpenMetrics": "application/openmetrics-text;version=1.0.0",
}
ROUND = 3.0  # seconds of one phase
PER_SECOND, SCRAPES = 100, 10
TICK = 0.001


class Sink:
    """Takes what the daemon logs."""

    def write(self, data: bytes | memoryview, /) -> int:
        """Drop it."""
        return len(data)

    def flush(self) -> None:
        """Do nothing."""


def key_of(number: int) -> str:
    """Return a client key."""
    return f"sk-aip-bench-{number:04d}-aaaaaaaaaaaaaaaa"


def config(upstream: int) -> str:
    """Return the configuration, which is YAML as well."""
    limits = {"requests": "900000000/min", "tokens": "900000000000/min", "concurrent": 1000}
    whole = {
        "listen": "127.0.0.1:0",
        "admin": "127.0.0.1:0",
        "upstreams": {
            f"up-{n}": {"url": f"http://127.0.0.1:{upstream}/v1", "apis": ["chat"]}
            for n in range(UPSTREAMS)
        },
        "routes": [
            {"model": f"model-{n}", "upstreams": [f"up-{n % UPSTREAMS}"]} for n in range(ROUTES)
        ],
        "keys": {
            f"key-{n}": {
                "sha256": hashlib.sha256(key_of(n).encode()).hexdigest(),
                "limits": limits,
            }
            for n in range(KEYS)
        },
        "drain": {"delay": "0s"},
    }
    return json.dumps(whole)


def fill(metrics: Metrics) -> None:
    """Let every series be there."""
    for key, route, endpoint, outcome in product(range(KEYS), range(ROUTES), ENDPOINTS, OUTCOMES):
        upstream = f"up-{route % UPSTREAMS}"
        ended = Exchange("filled", endpoint, metrics, time.monotonic, 0.0)
        ended.key, ended.route, ended.upstream = f"key-{key}", f"model-{route}", upstream
        ended.first_asked, ended.first_token, ended.ended = 0.001, 0.3, 2.0 + key / 100
        ended.results = [(upstream, "ok")]
        ended.usage = Usage(input=100, output=50)
        ended.limit = "tokens" if outcome == "rejected_limit" else ""
        ended.finish(cast("Any", outcome))


class Prober:
    """How late the loop runs a timer, in seconds."""

    def __init__(self) -> None:
        self.late: list[float] = []
        self._due = 0.0

    def start(self) -> None:
        """Measure for ever."""
        loop = asyncio.get_running_loop()
        self._due = time.perf_counter() + TICK
        loop.call_later(TICK, self._ring)

    def _ring(self) -> None:
        self.late.append(max(0.0, time.perf_counter() - self._due))
        self.start()


async def measure(rounds: int) -> None:
    """Run daemon and peer; print the table."""
    peer = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "peer", str(rounds),
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=2**24,
    )  # fmt: skip
    assert peer.stdin is not None
    assert peer.stdout is not None
    loaded = loads(config(int(await peer.stdout.readline())), path=Path("b.yaml"), environ={})
    daemon = Daemon(loaded.config, path="b.yaml", source=lambda: loaded, log_stream=Sink())
    await daemon.start()
    fill(daemon._metrics)
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    prober = Prober()
    prober.start()
    peer.stdin.write(b"%d %d\n" % (daemon.clients.port, daemon.operators.port))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in PHASES}
    prober.late.clear()
    while line := await peer.stdout.readline():
        said = json.loads(line)
        if "begins" in said:
            prober.late.clear()
        else:
            late = sorted(prober.late)
            said["stop worst"], said["stop p99"] = late[-1] * 1e3, _part(late, 0.99) * 1e3
            found[said.pop("phase")].append(said)
            prober.late.clear()
    await peer.wait()
    await daemon.stop()
    names = [name for name in found["text"][0] if name != "lines"]
    print(f"{found['text'][0]['lines']:.0f} lines, {rounds} rounds; milliseconds, medians")
    print(f"{'':<16}", *(f"{name:>14}" for name in names))
    for phase, results in found.items():
        cells = (statistics.median(result[name] for result in results) for name in names)
        print(f"{phase:<16}", *(f"{cell:14.2f}" for cell in cells))


def _part(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def be_peer(rounds: int) -> None:
    """Be upstream, clients and scraper; say when a phase begins and what it found."""

    async def answer(_request: web.Request) -> web.Response:
        message = {"role": "assistant", "content": "x"}
        body = {
            "id": "x", "object": "chat.completion", "created": 1, "model": "m",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        }  # fmt: skip
        return web.json_response(body)

    app = web.Application()
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    line = await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    clients, admin = (f"http://127.0.0.1:{port}" for port in line.split())
    async with aiohttp.ClientSession() as session:
        await phase(session, clients, admin, None)  # to warm up
        for _ in range(rounds):
            for name, accept in PHASES.items():
                print(json.dumps({"begins": name}), flush=True)
                found = await phase(session, clients, admin, accept)
                print(json.dumps({"phase": name, **found}), flush=True)
    await runner.cleanup()


async def phase(
    session: aiohttp.ClientSession, clients: str, admin: str, accept: str | None
) -> dict[str, float]:
    """Send requests, and scrape with this Accept; return what they took, in milliseconds."""
    took: list[float] = []
    scraped: list[float] = [0.0]
    lines = 0
    ends = time.perf_counter() + ROUND

    async def ask(number: int) -> None:
        began = time.perf_counter()
        body = {
            "model": f"model-{number % ROUTES}",
            "messages": [{"role": "user", "content": "x"}],
        }
        fields = {"authorization": f"Bearer {key_of(number % KEYS)}"}
        async with session.post(
            f"{clients}/v1/chat/completions", json=body, headers=fields
        ) as answer:
            await answer.read()
            assert answer.status == 200, await answer.text()
        took.append((time.perf_counter() - began) * 1e3)

    async def scrape() -> None:
        nonlocal lines
        while accept is not None and time.perf_counter() < ends:
            began = time.perf_counter()
            async with session.get(f"{admin}/metrics", headers={"accept": accept}) as answer:
                lines = (await answer.read()).count(b"\n")
            scraped.append((time.perf_counter() - began) * 1e3)
            await asyncio.sleep(1 / SCRAPES)

    async with asyncio.TaskGroup() as group:
        group.create_task(scrape())
        for number in _ticks(ends):
            group.create_task(ask(number))
            await asyncio.sleep(1 / PER_SECOND)
    took.sort()
    return {
        "lines": lines,
        "request p50": _part(took, 0.5),
        "request p99": _part(took, 0.99),
        "request worst": took[-1],
        "scrape": statistics.median(scraped[1:] or scraped),
    }


def _ticks(ends: float) -> Iterator[int]:
    number = 0
    while time.perf_counter() < ends:
        yield number
        number += 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["peer"]:
        asyncio.run(be_peer(int(sys.argv[2])))
    else:
        sys.setswitchinterval(SWITCH_INTERVAL)
        uvloop.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 5))
