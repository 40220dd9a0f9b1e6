"""What a relayed request costs, beside others: `python tests/bench/relay.py`, in 2 minutes.

In microseconds of CPU, which tell relays apart on a machine that does other things, too. An
upstream, a load and each relay are processes of their own on loopback: the relays on one core, the
rest on another. Rounds go from relay to relay and begin again, so that what else the machine does
meets all of them; the medians are printed, and their ratios. An event has its share of its stream's
request in it.

aiproxy runs with keys, limits, metrics and its log on. The others are nginx, where it is installed
(it relays and does nothing else), and a relay of 20 lines on aiohttp (it checks a key and relays).

`--short` makes one small round, which shows that it works.
"""
# ruff: noqa: T201 - a program for a terminal prints

import argparse
import hashlib
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import uvloop
from relay_parts import EVENTS, KEY, Load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PATIENCE = 20.0  # seconds for a process to listen

_NGINX = """\
daemon off; worker_processes 1; pid {directory}/nginx.pid; error_log /dev/null crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 100000000; tcp_nodelay on;
  client_body_temp_path {directory}/b; proxy_temp_path {directory}/p;
  fastcgi_temp_path {directory}/f; uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;
  upstream up {{ server 127.0.0.1:{upstream}; keepalive 1024; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://up; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off; proxy_request_buffering off;
    }}
  }}
}}
"""
_AIPROXY = """\
listen: 127.0.0.1:{port}
admin: 127.0.0.1:{admin}
upstreams:
  up: {{url: "http://127.0.0.1:{upstream}/v1", apis: [responses]}}
routes:
  - {{model: m, upstreams: [up]}}
keys:
  bench:
    sha256: {digest}
    limits: {{requests: 900000000/min, tokens: 900000000000/min, concurrent: 100000}}
drain: {{delay: 0s}}
log: {{format: json}}
"""


@dataclass
class Relay:
    """One of those that are compared: its process, and what it cost in each round."""

    name: str
    port: int
    pid: int
    request: list[float] = field(default_factory=list)
    event: list[float] = field(default_factory=list)


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def running(command: list[str], port: int, core: int | None, log: Path) -> Iterator[int]:
    """Run a program on one core until the block ends; yield its process id once it listens."""
    if core is not None and (taskset := shutil.which("taskset")):
        command = [taskset, "-c", str(core), *command]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environ)  # noqa: S603 - ours
    try:
        deadline = time.monotonic() + PATIENCE
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command} does not listen:\n{log.read_text()}")
            time.sleep(0.02)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def listens(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def cpu(pid: int) -> float:
    """Return the seconds of CPU that a process and its children have had."""
    seconds, found = 0.0, [pid]
    while found:
        pid = found.pop()
        seconds += time.clock_gettime(~pid << 3 | 2)  # what clock_getcpuclockid(3) returns
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return seconds


def relays(stack: ExitStack, directory: Path, core: int | None) -> list[Relay]:
    """Start all that there are, each with an upstream of its own on the other core."""
    other = None if core is None else 0
    upstream = free_port()
    python = [sys.executable, str(HERE / "relay_parts.py")]
    beside = running([*python, "upstream", str(upstream)], upstream, other, directory / "upstream")
    stack.enter_context(beside)
    found = []

    def start(name: str, port: int, command: list[str]) -> None:
        log = directory / f"{name}.log"
        pid = stack.enter_context(running(command, port, core, log))
        found.append(Relay(name, port, pid))

    if nginx := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin"):
        port = free_port()
        config = directory / "nginx.conf"
        config.write_text(_NGINX.format(directory=directory, upstream=upstream, port=port))
        start("nginx", port, [nginx, "-c", str(config), "-p", str(directory)])
    port = free_port()
    start("aiohttp, 20 lines", port, [*python, "naive", str(port), f"http://127.0.0.1:{upstream}"])
    port = free_port()
    config = directory / "aiproxy.yaml"
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    config.write_text(
        _AIPROXY.format(port=port, admin=free_port(), upstream=upstream, digest=digest)
    )
    start(
        "aiproxy",
        port,
        [sys.executable, "-m", "aiproxy", "serve", "--config", str(config)],
    )
    return found


def measure(relay: Relay, load: Load) -> float:
    """Put a load on a relay; return the microseconds of CPU for a request, or for an event."""
    before = cpu(relay.pid)
    answered = uvloop.run(load.put_on(relay.port))
    used = cpu(relay.pid) - before
    if answered != load.requests:
        raise SystemExit(f"{relay.name} answered {answered} of {load.requests}")
    return used * 1e6 / (load.requests * (EVENTS if load.stream else 1))


def main() -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(description="what a relayed request costs, beside others")
    parser.add_argument("--short", action="store_true", help="one small round: does it work")
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    rounds = 1 if given.short else given.rounds
    requests, streams = (64, 8) if given.short else (8000, 200)
    whole, streamed = Load(32, requests, stream=False), Load(streams, streams, stream=True)
    core = 1 if (os.cpu_count() or 1) > 1 else None
    if core is not None:
        os.sched_setaffinity(0, {0})

    with tempfile.TemporaryDirectory(prefix="aiproxy-bench-") as directory, ExitStack() as stack:
        found = relays(stack, Path(directory), core)
        for number in range(rounds if given.short else rounds + 1):
            for relay in found:
                request, event = measure(relay, whole), measure(relay, streamed)
                if number or given.short:  # the first warms up
                    relay.request.append(request)
                    relay.event.append(event)
    report(found, rounds)
    return 0


def report(found: list[Relay], rounds: int) -> None:
    """Print the table: each relay's medians, and how many times another's they are."""
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {_processor()},"
        f" Python {platform.python_version()}, aiohttp {version('aiohttp')}, uvloop"
        f" {version('uvloop')}; medians of {rounds} rounds\n"
    )
    others = "".join(f"{f'of {other.name}':>22}" for other in found[:-1])
    print(f"{'us of CPU':<20}{'a request':>12}{'an event':>12}{others}")
    medians = [(statistics.median(one.request), statistics.median(one.event)) for one in found]
    for relay, (request, event) in zip(found, medians, strict=True):
        times = [f"{request / other:.1f} and {event / and_:.1f}" for other, and_ in medians[:-1]]
        ratios = "".join(f"{ratio:>22}" for ratio in times)
        print(f"{relay.name:<20}{request:>12.1f}{event:>12.1f}{ratios}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
