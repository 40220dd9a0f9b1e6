"""What systemd is told and what it passes: by real datagrams, sockets and processes.

With systemd's own programs: `test_systemd_programs`.
"""

import asyncio
import fcntl
import json
import os
import re
import signal
import socket
import struct
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import pytest

from aiproxy import systemd
from aiproxy.config import Loaded
from aiproxy.systemd import Notifier, inherited_sockets
from client import Answer, RawClient
from conftest import BlockingCalls
from faults import events_of
from invariants import eventually
from rig import ABSENT, CREDENTIAL, TEAM_A, Proxy, config_text, prompt
from upstream import Chunk, EndChunks, Headers, ScriptedUpstream, Wait

ROOT = Path(__file__).resolve().parent.parent
CHUNKED = (("content-type", "text/event-stream"), ("transfer-encoding", "chunked"))
PERIOD = 0.2  # seconds of a watchdog here
SERVING = "Serving 3 routes to 1 upstreams for 2 keys"
FAILED = re.escape(SERVING) + r"; the reload of \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC failed"
HIGH = 100  # descriptors from here on are free, in a test too

Message = dict[str, str]
Start = Callable[..., Awaitable[Proxy]]


class Manager:
    """A service manager's end: a datagram socket that keeps what it was told.

    Attributes:
        senders: the process ids that spoke.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.senders: set[int] = set()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.socket.close()

    def take(self) -> Message | None:
        """Return the next message that is there already."""
        try:
            data, extra, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(12))
        except BlockingIOError:
            return None
        self.senders.add(struct.unpack("3i", extra[0][2])[0])
        pairs = [line.partition("=") for line in data.decode().split("\n")]
        assert all(name and equals for name, equals, _ in pairs), data
        return {name: value for name, _, value in pairs}

    def take_all(self) -> list[Message]:
        """Return every message that is there already."""
        return list(iter(self.take, None))

    async def next(self, *, watchdog: bool = False) -> Message:
        """Wait for the next message; signs of life are passed over, unless those are wanted."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(20):
            while True:
                message = self.take()
                if message is None:
                    readable = asyncio.Event()
                    loop.add_reader(self.socket.fileno(), readable.set)
                    try:
                        await readable.wait()
                    finally:
                        loop.remove_reader(self.socket.fileno())
                elif watchdog == (message == {"WATCHDOG": "1"}):
                    return message


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    """Listen as a service manager does, in the file system and outside of it."""
    path = str(tmp_path / "notify")
    with Manager(path if request.param == "path" else f"@aiproxy-test{path}") as one:
        yield one


@pytest.fixture
def one_manager(tmp_path: Path) -> Iterator[Manager]:
    """Listen as a service manager does."""
    with Manager(str(tmp_path / "notify")) as one:
        yield one


def notifier(manager: Manager, **environ: str) -> Notifier:
    """Return what speaks to it."""
    return Notifier({"NOTIFY_SOCKET": manager.address, **environ})


def watched(manager: Manager) -> Notifier:
    """Return the same, with a watchdog."""
    return notifier(manager, WATCHDOG_USEC=str(int(PERIOD * 1e6)))


def monotonic() -> int:
    """Return the clock of RELOADING, in its unit."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


@pytest.fixture
async def start(upstream: ScriptedUpstream) -> AsyncIterator[Start]:
    """Start the real daemon with a notifier; it is ended after the test."""
    proxies: list[Proxy] = []

    async def begin(speaker: Notifier, **changes: Any) -> Proxy:
        proxy = Proxy(config_text(upstream.url, **changes), notifier=speaker)
        proxies.append(proxy)
        await proxy.daemon.start()
        return proxy

    yield begin
    for proxy in proxies:
        await proxy.stop()


# Readiness


async def test_ready_comes_when_the_ports_accept(
    upstream: ScriptedUpstream, blocking_calls: BlockingCalls
) -> None:
    """At the moment of READY=1, not a step earlier, both ports take a connection."""
    blocking_calls.allow("tests/test_systemd.py", {"_send"})
    told: list[str] = []

    class Probe(Notifier):
        def _send(self, *lines: str) -> bool:
            told.extend(lines)
            for entrance in (proxy.daemon.clients, proxy.daemon.operators):
                socket.create_connection(("127.0.0.1", entrance.port)).close()
            return True

    proxy = Proxy(config_text(upstream.url), notifier=Probe({"NOTIFY_SOCKET": "@unused"}))
    assert told == []
    await proxy.daemon.start()
    assert told == ["READY=1", f"STATUS={SERVING}"]
    proxy.daemon._notifier = Notifier({})  # the ports are closed at the end
    await proxy.stop()


async def test_a_start_that_fails_is_not_ready(
    upstream: ScriptedUpstream, one_manager: Manager
) -> None:
    """Where a port is taken nothing is said at all."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = config_text(upstream.url, listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(OSError, match="in use"):
            await Proxy.start(text, notifier=watched(one_manager))
    assert one_manager.take_all() == []


# Reload


def crash() -> Loaded:
    """Fail as a bug does."""
    raise RuntimeError("a bug")


ONE_ROUTE = [{"model": "*", "upstreams": ["scripted"]}]


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (config_text, re.escape(SERVING)),
        (lambda url: config_text(url, routes=ONE_ROUTE), "Serving 1 routes to .*"),
        (lambda url: config_text(url, routes=ONE_ROUTE * 2), ".* 2 routes .* 2 keys"),
        (lambda url: config_text(url, lisen="x"), FAILED),
        (lambda url: config_text(url, upstreams=ABSENT), FAILED),
        (lambda _url: "a: [", FAILED),
        (lambda _url: "", FAILED),
    ],
    ids=["same", "one route", "a warning", "unknown key", "no upstreams", "no YAML", "empty"],
)
async def test_a_reload(
    start: Start,
    upstream: ScriptedUpstream,
    one_manager: Manager,
    text: Callable[[str], str],
    status: str,
) -> None:
    """A reload, asked for either way, is told with its time, and its end whatever came of it."""
    proxy = await start(notifier(one_manager))
    assert await one_manager.next() == {"READY": "1", "STATUS": SERVING}
    proxy.text = text(upstream.url)
    for reload in (proxy.daemon.reload, partial(proxy.admin, "/-/reload", "POST")):
        before = monotonic()
        await reload()
        after = monotonic()
        begun, ended = one_manager.take_all()
        assert begun.keys() == {"RELOADING", "MONOTONIC_USEC"}
        assert begun["RELOADING"] == "1"
        assert before <= int(begun["MONOTONIC_USEC"]) <= after
        assert ended.keys() == {"READY", "STATUS"}
        assert ended["READY"] == "1"
        assert re.fullmatch(status, ended["STATUS"])


async def test_a_reload_that_mends_takes_the_failure_back(
    start: Start, one_manager: Manager
) -> None:
    """After a good reload the status says no more that one failed; every RELOADING has a READY."""
    proxy = await start(notifier(one_manager))
    good = proxy.text
    for text in ("bad", good, "bad", good):
        proxy.text = text
        await proxy.daemon.reload()
    told = one_manager.take_all()
    assert [next(iter(message)) for message in told] == ["READY"] + ["RELOADING", "READY"] * 4
    failed = ["failed" in message["STATUS"] for message in told if "READY" in message]
    assert failed == [False, True, False, True, False]


async def test_reloads_at_once_are_told_one_by_one(start: Start, one_manager: Manager) -> None:
    """Reloads asked for together never overlap in what is told."""
    proxy = await start(notifier(one_manager))
    await asyncio.gather(*(proxy.daemon.reload() for _ in range(3)))
    told = [next(iter(message)) for message in one_manager.take_all()]
    assert told == ["READY"] + ["RELOADING", "READY"] * 3


async def test_a_reload_that_crashes_ends_too(start: Start, one_manager: Manager) -> None:
    """A bug in a reload leaves no service that seems to reload for ever."""
    proxy = await start(notifier(one_manager))
    proxy.daemon._reloader._source = crash
    await proxy.daemon.reload()
    assert [next(iter(message)) for message in one_manager.take_all()] == [
        "READY",
        "RELOADING",
        "READY",
    ]


# The end


async def test_stopping_comes_as_the_drain_begins(
    start: Start, upstream: ScriptedUpstream, one_manager: Manager
) -> None:
    """STOPPING=1 comes once, while a stream is still in flight, and says how many are."""
    proxy = await start(watched(one_manager))
    assert "READY" in await one_manager.next()
    go_on = asyncio.Event()
    frames = events_of("responses")
    upstream.script(Headers(200, CHUNKED), *map(Chunk, frames[:5]), Wait(go_on),
                    *map(Chunk, frames[5:]), EndChunks())  # fmt: skip
    client = await proxy.send(body=prompt(stream=True))
    await client.read_head()
    begun = await client.read_until(frames[4])
    drain = asyncio.create_task(proxy.daemon.drain())
    status = "Draining: 1 of 1 requests left, at most 5s more"
    assert await one_manager.next() == {"STOPPING": "1", "STATUS": status}
    assert await one_manager.next() == {"EXTEND_TIMEOUT_USEC": "60000000", "STATUS": status}
    assert await one_manager.next(watchdog=True)  # a drain is watched, too
    assert not drain.done()
    go_on.set()
    assert begun + await client.read_body() == b"".join(frames)
    async with asyncio.timeout(10):
        await drain
    assert all(message == {"WATCHDOG": "1"} for message in one_manager.take_all())
    assert proxy.daemon._pulse._timers["watchdog"].cancelled()
    await proxy.stop()
    assert one_manager.take_all() == []


# The watchdog


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 30.0),
        ({"WATCHDOG_USEC": "1"}, 1e-6),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "own"}, 30.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": ""}, None),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "x"}, None),
        ({"WATCHDOG_PID": "own"}, None),
        ({"WATCHDOG_USEC": ""}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-1"}, None),
        ({"WATCHDOG_USEC": "1.5"}, None),
        ({"WATCHDOG_USEC": "1e6"}, None),
        ({"WATCHDOG_USEC": "30s"}, None),
        ({"WATCHDOG_USEC": "²"}, None),
        ({"WATCHDOG_USEC": "30000000", "NOTIFY_SOCKET": ""}, None),
    ],
    ids=str,
)
async def test_who_is_watched(
    start: Start,
    one_manager: Manager,
    environ: Mapping[str, str],
    seconds: float | None,
) -> None:
    """Signs of life, one per half of the time, come from the process that is watched alone."""
    given = {name: str(os.getpid()) if v == "own" else v for name, v in environ.items()}
    speaker = Notifier({"NOTIFY_SOCKET": one_manager.address, **given})
    assert speaker.watchdog == seconds
    if seconds == 1e-6:
        return  # nobody could read as fast
    proxy = await start(speaker)
    told = one_manager.take_all()
    assert ({"WATCHDOG": "1"} in told) == (seconds is not None)
    timer = proxy.daemon._pulse._timers.get("watchdog")
    assert (timer is None) == (seconds is None)
    if timer is not None and seconds is not None:
        due = timer.when() - asyncio.get_running_loop().time()
        assert due <= seconds / 2 + 1e-6  # of floats


async def test_signs_of_life_come_again_and_again(start: Start, one_manager: Manager) -> None:
    """Each sign of life sets the timer of the next to half the watchdog's time."""
    loop = asyncio.get_running_loop()
    proxy = await start(watched(one_manager))
    seen = set()
    for _ in range(6):
        assert await one_manager.next(watchdog=True)
        timer = proxy.daemon._pulse._timers["watchdog"]
        assert timer.when() <= loop.time() + PERIOD / 2 + 0.001  # the loop counts in these
        seen.add(timer)
    assert len(seen) > 1


async def test_a_stuck_loop_gives_no_sign_of_life(start: Start, one_manager: Manager) -> None:
    """Nothing but the loop feeds the watchdog: while it is blocked, none comes; then they do."""
    await start(watched(one_manager))
    assert await one_manager.next(watchdog=True)
    one_manager.take_all()
    time.sleep(PERIOD * 2)  # noqa: ASYNC251 - the loop is to be stuck
    assert one_manager.take_all() == []
    assert await one_manager.next(watchdog=True)


# Managers that do not listen


def test_without_a_manager_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without NOTIFY_SOCKET not even a socket is made, and nobody is watched."""
    speaker = Notifier({"WATCHDOG_USEC": "1000000"})
    assert speaker.watchdog is None
    monkeypatch.setattr(systemd, "socket", None)
    speaker.ready("x")
    speaker.reloading()
    speaker.status("x")
    speaker.alive()
    speaker.stopping("x")


def test_a_status_is_one_line(one_manager: Manager) -> None:
    """No text becomes an assignment of its own."""
    speaker = notifier(one_manager)
    speaker.status("one\nREADY=1\r\n  two\x0bMAINPID=1")
    speaker.ready("\nSTOPPING=1")
    assert one_manager.take_all() == [
        {"STATUS": "one READY=1 two MAINPID=1"},
        {"READY": "1", "STATUS": "STOPPING=1"},
    ]


def fill(manager: Manager) -> str:
    """Send to a manager until no more goes in."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock,
        suppress(BlockingIOError),
    ):
        while True:
            sock.sendto(b"X=1", manager.address)
    return manager.address


def leave(manager: Manager) -> str:
    """Close a manager; its file stays."""
    manager.socket.close()
    return manager.address


@pytest.mark.parametrize(
    "address",
    [
        fill,
        leave,
        lambda manager: f"{manager.address}-of-nobody",
        lambda _manager: "@aiproxy-test-nobody",
        lambda _manager: "/" + "x" * 200,
        lambda _manager: "vsock:2:1234",
    ],
    ids=["full", "gone", "no file", "no abstract name", "too long", "not supported"],
)
async def test_a_manager_that_does_not_read_stops_nothing(
    start: Start,
    one_manager: Manager,
    address: Callable[[Manager], str],
) -> None:
    """Start, service, signs of life, reload and drain go on as if it read; no call blocks."""
    speaker = Notifier({"NOTIFY_SOCKET": address(one_manager), "WATCHDOG_USEC": "2000"})
    async with asyncio.timeout(20):
        proxy = await start(speaker)
        assert (await proxy.post()).status == 200
        first = proxy.daemon._pulse._timers["watchdog"]

        async def fed() -> None:
            assert proxy.daemon._pulse._timers["watchdog"] is not first

        await eventually(fed, 20)
        assert (await proxy.admin("/-/reload", "POST")).status == 200
        await proxy.daemon.drain()
        await proxy.stop()
    assert "bug" not in [line["event"] for line in proxy.logs()]


async def test_a_full_manager_is_told_again_once_it_reads(
    start: Start, one_manager: Manager
) -> None:
    """Signs of life that found no room are not made up for, and later ones come."""
    fill(one_manager)
    await start(watched(one_manager))
    one_manager.take_all()
    assert await one_manager.next(watchdog=True)


# Sockets that were passed: what a process finds


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Put two listening sockets on descriptors that follow each other, for "the first" of them."""
    first = HIGH * 5
    monkeypatch.setattr(systemd, "FIRST_SOCKET", first)
    numbers = [first, first + 1]
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("::1", 0), family=socket.AF_INET6) as two,
    ):
        for sock, number in zip((one, two), numbers, strict=True):
            os.dup2(sock.fileno(), number, inheritable=True)
    yield numbers
    for number in numbers:
        with suppress(OSError):  # closed with its socket
            os.close(number)


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, ["http", "http"]),
        ({"LISTEN_FDS": "1"}, ["http"]),
        ({"LISTEN_FDS": "1", "LISTEN_FDNAMES": "http"}, ["http"]),
        ({"LISTEN_FDNAMES": "http:admin"}, ["http", "admin"]),
        ({"LISTEN_FDNAMES": "http:admin:more"}, ["http", "admin"]),
        ({"LISTEN_FDNAMES": "http"}, ["http", "unknown"]),
        ({"LISTEN_FDNAMES": None}, ["unknown", "unknown"]),
        ({"LISTEN_FDNAMES": ""}, ["unknown", "unknown"]),
        ({"LISTEN_PID": "1"}, []),
        ({"LISTEN_PID": None}, []),
        ({"LISTEN_PID": ""}, []),
        ({"LISTEN_PID": "x"}, []),
        ({"LISTEN_FDS": None}, []),
        ({"LISTEN_FDS": ""}, []),
        ({"LISTEN_FDS": "0"}, []),
        ({"LISTEN_FDS": "-1"}, []),
        ({"LISTEN_FDS": "two"}, []),
        ({"LISTEN_FDS": "²"}, []),
    ],
    ids=str,
)
def test_inherited_sockets(
    passed: list[int], environ: Mapping[str, str | None], names: list[str]
) -> None:
    """Those meant for this process, by name, in order; no child inherits them or the variables."""
    usual = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "2", "LISTEN_FDNAMES": "http:http"}
    changed = {"OTHER": "stays", **usual, **environ}
    variables = {name: value for name, value in changed.items() if value is not None}
    with ExitStack() as stack:
        found = inherited_sockets(variables)
        sockets = [stack.enter_context(sock) for many in found.values() for sock in many]
        assert variables == {"OTHER": "stays"}
        assert {name: len(many) for name, many in found.items()} == {
            name: names.count(name) for name in names
        }
        assert sorted(sock.fileno() for sock in sockets) == passed[: len(names)]
        assert not any(sock.get_inheritable() or sock.getblocking() for sock in sockets)
        for number, sock in zip(passed, sockets, strict=False):
            assert sock.fileno() == number
            assert sock.family == (socket.AF_INET if number == passed[0] else socket.AF_INET6)


# Sockets that were passed: a process that serves there

LAUNCH = """
import os, sys
pid, count, *command = sys.argv[1:]
for number in range(int(count)):
    os.dup2(int(command[number]), 3 + number)
for given in command[:int(count)]:
    os.close(int(given))
os.environ["LISTEN_PID"] = pid or str(os.getpid())
os.environ["LISTEN_FDS"] = count
os.execv(sys.executable, [sys.executable, *command[int(count):]])
"""


def high(stack: ExitStack, sock: socket.socket | int) -> int:
    """Duplicate a descriptor to one that is in nobody's way."""
    number = fcntl.fcntl(sock, fcntl.F_DUPFD, HIGH)
    stack.callback(os.close, number)
    return number


@asynccontextmanager
async def process(
    file: Path,
    *,
    sockets: Sequence[socket.socket | int] = (),
    names: str | None = "http",
    pid: str = "",
    environ: Mapping[str, str] | None = None,
) -> AsyncIterator[Process]:
    """Run `python -m aiproxy serve` with sockets from descriptor 3 on, as systemd does."""
    given = {"UPSTREAM_KEY": CREDENTIAL, **(environ or {})}
    if names is not None:
        given["LISTEN_FDNAMES"] = names
    command = ["-m", "aiproxy", "serve", "--config", str(file)]
    with ExitStack() as stack:
        numbers = [high(stack, sock) for sock in sockets]
        arguments = [pid, str(len(numbers)), *map(str, numbers), *command]
        running = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", LAUNCH, *arguments),
            cwd=ROOT,
            env={**os.environ, **given},
            stderr=PIPE,
            pass_fds=numbers,
        )
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


async def logged(running: Process, event: str) -> dict[str, Any]:
    """Read the log up to a line; return it."""
    assert running.stderr is not None
    seen = b""
    async with asyncio.timeout(20):
        while line := await running.stderr.readline():
            seen += line
            record: dict[str, Any] = json.loads(line)
            if record["event"] == event:
                return record
    raise AssertionError(seen.decode())


async def ended(running: Process) -> tuple[int | None, str]:
    """Return exit code and standard error at the end."""
    async with asyncio.timeout(20):
        _, err = await running.communicate()
    return running.returncode, err.decode()


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def config(tmp_path: Path, upstream: ScriptedUpstream) -> Callable[..., Path]:
    """Write a configuration; arguments as of `rig.config_text`."""

    def write(**changes: Any) -> Path:
        file = tmp_path / "aiproxy.yaml"
        file.write_text(config_text(upstream.url, **changes), encoding="utf-8")
        return file

    return write


def listening(stack: ExitStack, folder: Path, kind: str) -> socket.socket:
    """Listen as systemd does for a socket unit."""
    if kind == "unix":
        sock = stack.enter_context(socket.socket(socket.AF_UNIX))
        sock.bind(str(folder / "http.sock"))
        sock.listen()
        return sock
    host, family = {"IPv4": ("127.0.0.1", socket.AF_INET), "IPv6": ("::1", socket.AF_INET6)}[kind]
    return stack.enter_context(socket.create_server((host, 0), family=family))


async def connected(server: socket.socket) -> RawClient:
    """Connect to where a socket listens."""
    sock = socket.socket(server.family)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, server.getsockname())
    return RawClient(*await asyncio.open_connection(sock=sock))


async def send(client: RawClient, **fields: Any) -> None:
    """Ask for a response."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {TEAM_A}"}
    await client.request("POST", "/v1/responses", headers, json.dumps(prompt(**fields)).encode())


async def ask(server: socket.socket) -> Answer:
    """Ask where a socket listens."""
    async with await connected(server) as client:
        await send(client)
        return await client.answer()


PLACES = {"IPv4": r"127\.0\.0\.1:\d+", "IPv6": r"\[::1\]:\d+", "unix": r"(unix:)?/.+/http\.sock"}


@pytest.mark.parametrize(
    "kinds",
    [["IPv4"], ["IPv6"], ["unix"], ["IPv4", "IPv6"], ["unix", "IPv4", "IPv6"]],
    ids=" and ".join,
)
async def test_a_process_serves_where_it_was_passed(
    config: Callable[..., Path], tmp_path: Path, kinds: list[str]
) -> None:
    """Every socket that was passed answers, the log names each, and `listen` is not opened."""
    port = free_port()
    file = config(listen=f"127.0.0.1:{port}")
    with ExitStack() as stack:
        servers = [listening(stack, tmp_path, kind) for kind in kinds]
        names = ":".join(["http"] * len(servers))
        async with process(file, sockets=servers, names=names) as running:
            places = (await logged(running, "started"))["listen"].split(", ")
            assert len(places) == len(kinds)
            for place, kind in zip(places, kinds, strict=True):
                assert re.fullmatch(rf"{PLACES[kind]} \(passed\)", place)
            for server in servers:
                assert (await ask(server)).status == 200
            with pytest.raises(ConnectionRefusedError):
                await RawClient.connect(port)
            running.send_signal(signal.SIGTERM)
            assert (await ended(running))[0] == 0


@pytest.mark.parametrize("pid", ["1", "0", "x"])
async def test_sockets_for_another_process_are_not_used(
    config: Callable[..., Path], tmp_path: Path, pid: str
) -> None:
    """With the LISTEN_PID of another process it listens where its file says."""
    port = free_port()
    file = config(listen=f"127.0.0.1:{port}")
    with ExitStack() as stack:
        server = listening(stack, tmp_path, "IPv4")
        async with process(file, sockets=[server], pid=pid) as running:
            assert (await logged(running, "started"))["listen"] == f"127.0.0.1:{port}"
            async with await RawClient.connect(port) as client:
                await send(client)
                assert (await client.answer()).status == 200
            running.send_signal(signal.SIGTERM)
            assert (await ended(running))[0] == 0


def of_kind(stack: ExitStack, kind: str) -> socket.socket | int:
    """Make a descriptor that is, or is not, a listening stream socket."""
    match kind:
        case "listening":
            return stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        case "bound":
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            return sock
        case "datagrams":
            sock = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
            sock.bind(("127.0.0.1", 0))
            return sock
        case "packets":
            sock = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
            sock.bind("")
            sock.listen()
            return sock
        case "connected":
            one, other = socket.socketpair()
            stack.enter_context(other)
            return stack.enter_context(one)
        case _:
            ends = os.pipe()
            for end in ends:
                stack.callback(os.close, end)
            return ends[0]


NO_LISTENER = r"the socket 'http' that was passed does not listen for streams"


@pytest.mark.parametrize(
    ("kinds", "names", "sentence"),
    [
        (["listening"], "web", r"systemd passed sockets named 'web'; only 'http' has a use"),
        (["listening"], None, r"systemd passed sockets named 'unknown'; only 'http' has a use"),
        (["listening"] * 2, "http", r"named 'unknown'; only 'http' has a use"),
        (["listening"] * 3, "http:a:b", r"named 'a', 'b'; only 'http' has a use"),
        (["bound"], "http", NO_LISTENER),
        (["datagrams"], "http", NO_LISTENER),
        (["packets"], "http", NO_LISTENER),
        (["connected"], "http", NO_LISTENER),
        (["listening", "datagrams"], "http:http", NO_LISTENER),
        (["pipe"], "http", r"'http' that was passed"),
    ],
    ids=str,
)
async def test_a_socket_of_no_use_stops_the_start(
    config: Callable[..., Path],
    one_manager: Manager,
    kinds: list[str],
    names: str | None,
    sentence: str,
) -> None:
    """One sentence names the socket, the exit code is 1, and nobody was told READY."""
    with ExitStack() as stack:
        sockets = [of_kind(stack, kind) for kind in kinds]
        environ = {"NOTIFY_SOCKET": one_manager.address}
        async with process(config(), sockets=sockets, names=names, environ=environ) as running:
            code, err = await ended(running)
    assert code == 1
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    said = json.loads(last)["error"] if last.startswith("{") else last
    assert re.search(sentence, said)
    assert one_manager.take_all() == []


# A restart


async def lets_go(running: Process, server: socket.socket) -> None:
    """Wait until a process has closed a socket that it shares."""
    inode, folder = os.fstat(server.fileno()).st_ino, f"/proc/{running.pid}/fd"

    async def closed() -> None:
        held = []
        for number in os.listdir(folder):  # noqa: PTH208 - names are enough
            with suppress(FileNotFoundError):  # closed since
                held.append(os.readlink(f"{folder}/{number}"))  # noqa: PTH115 - /proc is memory
        assert f"socket:[{inode}]" not in held

    await eventually(closed, 20)


@pytest.mark.parametrize("kind", ["IPv4", "unix"])
@pytest.mark.parametrize("when", ["in the drain", "after the end"])
async def test_a_restart_refuses_nobody(
    config: Callable[..., Path], upstream: ScriptedUpstream, tmp_path: Path, kind: str, when: str
) -> None:
    """A client that connects while nobody accepts waits, and the next process answers it.

    What was in flight in the first goes on to its end.
    """
    go_on = asyncio.Event()
    frames = events_of("responses")
    upstream.script(Headers(200, CHUNKED), *map(Chunk, frames[:5]), Wait(go_on),
                    *map(Chunk, frames[5:]), EndChunks())  # fmt: skip
    with ExitStack() as stack:
        server = listening(stack, tmp_path, kind)
        async with process(config(), sockets=[server]) as first:
            await logged(first, "started")
            async with await connected(server) as old:
                await send(old, stream=True)
                await old.read_head()
                begun = await old.read_until(frames[4])
                first.send_signal(signal.SIGTERM)
                await lets_go(first, server)
                if when == "after the end":
                    go_on.set()
                    assert begun + await old.read_body() == b"".join(frames)
                    assert (await ended(first))[0] == 0
                waiting = [await connected(server) for _ in range(5)]
                for client in waiting:
                    await send(client)
                async with process(config(), sockets=[server]) as second:
                    await logged(second, "started")
                    for client in waiting:
                        assert (await client.answer()).status == 200
                        await client.close()
                    if when == "in the drain":
                        assert first.returncode is None
                        go_on.set()
                        assert begun + await old.read_body() == b"".join(frames)
                        assert (await ended(first))[0] == 0
                    assert (await ask(server)).status == 200
                    second.send_signal(signal.SIGTERM)
                    assert (await ended(second))[0] == 0
        async with await connected(server) as client:  # and still it is open
            assert not client.reader.at_eof()


# The whole life of a process


async def test_the_life_of_a_service(config: Callable[..., Path], manager: Manager) -> None:
    """Start, reload, a refused reload, signs of life and end, all told by the process itself."""
    port = free_port()
    file = config(listen=f"127.0.0.1:{port}")
    environ = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": str(int(PERIOD * 1e6))}
    async with process(file, names=None, environ=environ) as running:
        assert await manager.next() == {"READY": "1", "STATUS": SERVING}
        async with await RawClient.connect(port) as client:
            await send(client)
            assert (await client.answer()).status == 200
        assert await manager.next(watchdog=True)

        config(listen=f"127.0.0.1:{port}", routes=[{"model": "*", "upstreams": ["scripted"]}])
        before = monotonic()
        running.send_signal(signal.SIGHUP)
        begun, done = await manager.next(), await manager.next()
        assert begun["RELOADING"] == "1"
        assert before <= int(begun["MONOTONIC_USEC"]) <= monotonic()
        status = SERVING.replace("3 routes", "1 routes")
        assert done == {"READY": "1", "STATUS": status}

        config(upstreams=ABSENT)
        running.send_signal(signal.SIGHUP)
        assert "RELOADING" in await manager.next()
        refused = await manager.next()
        assert refused["READY"] == "1"
        assert refused["STATUS"].startswith(f"{status}; the reload of ")

        running.send_signal(signal.SIGTERM)
        draining = "Draining: 0 of 0 requests left, at most 5s more"
        assert await manager.next() == {"STOPPING": "1", "STATUS": draining}
        assert await manager.next() == {"EXTEND_TIMEOUT_USEC": "60000000", "STATUS": draining}
        assert (await ended(running))[0] == 0
        assert manager.senders == {running.pid}
