"""With systemd's own programs: a socket that it opened, and what it thinks of the units."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from client import RawClient
from rig import CREDENTIAL, TEAM_A, config_text, prompt
from upstream import ScriptedUpstream

pytestmark = pytest.mark.systemd

ROOT = Path(__file__).resolve().parent.parent
UNITS = ("aiproxy.service", "aiproxy.socket", "aiproxy@.service")
NAMED = ("--fdname=http",)


@asynccontextmanager
async def activated(
    file: Path, addresses: list[str], options: tuple[str, ...]
) -> AsyncIterator[Process]:
    """Run `systemd-socket-activate`, which runs the daemon when a client comes."""
    command = ["systemd-socket-activate", *options, f"--setenv=UPSTREAM_KEY={CREDENTIAL}"]
    command += [f"--listen={address}" for address in addresses]
    command += [sys.executable, "-m", "aiproxy", "serve", "--config", str(file)]
    running = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stderr=PIPE)
    try:
        assert running.stderr is not None
        async with asyncio.timeout(20):
            for _ in addresses:
                line = await running.stderr.readline()
                assert line.startswith(b"Listening on "), line
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


@pytest.fixture
def config(tmp_path: Path, upstream: ScriptedUpstream) -> Path:
    """Write a configuration whose `listen` cannot be bound, so that it is not."""
    file = tmp_path / "aiproxy.yaml"
    text = config_text(upstream.url, listen=f"unix:{tmp_path}/not-there/http")
    file.write_text(text, encoding="utf-8")
    return file


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def connected(address: str) -> RawClient:
    """Connect to an address as systemd writes it."""
    if address.startswith("/"):
        return RawClient(*await asyncio.open_unix_connection(address))
    host, port = address.rsplit(":", 1)
    return RawClient(*await asyncio.open_connection(host.strip("[]"), int(port)))


async def ask(address: str) -> int:
    """Ask for a response; return the status."""
    headers = {"content-type": "application/json", "authorization": f"Bearer {TEAM_A}"}
    async with await connected(address) as client:
        await client.request("POST", "/v1/responses", headers, json.dumps(prompt()).encode())
        return (await client.answer()).status


async def ended(running: Process) -> tuple[int | None, str]:
    """Return exit code and the rest of standard error at the end."""
    async with asyncio.timeout(20):
        _, err = await running.communicate()
    return running.returncode, err.decode()


@pytest.mark.parametrize(
    "kinds", [["IPv4"], ["IPv6"], ["unix"], ["IPv4", "IPv6", "unix"]], ids=" and ".join
)
async def test_a_client_starts_the_service(config: Path, tmp_path: Path, kinds: list[str]) -> None:
    """The client whose connection started the daemon is answered, and so is every other."""
    places = {
        "IPv4": f"127.0.0.1:{free_port()}",
        "IPv6": f"[::1]:{free_port()}",
        "unix": str(tmp_path / "http.sock"),
    }
    addresses = [places[kind] for kind in kinds]
    names = f"--fdname={':'.join(['http'] * len(kinds))}"
    async with activated(config, addresses, (names,)) as running:
        async with asyncio.timeout(20):
            assert [await ask(address) for address in [*addresses, *addresses]] == [200] * (
                2 * len(kinds)
            )
        running.send_signal(signal.SIGTERM)
        assert (await ended(running))[0] == 0


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "systemd passed sockets named 'unknown'; only 'http' has a use"),
        (("--fdname=web",), "systemd passed sockets named 'web'; only 'http' has a use"),
        ((*NAMED, "--datagram"), "the socket 'http' that was passed does not listen for streams"),
        ((*NAMED, "--seqpacket"), "the socket 'http' that was passed does not listen for streams"),
    ],
    ids=["no name", "another name", "datagrams", "packets"],
)
async def test_a_socket_of_no_use_is_told(
    config: Path, tmp_path: Path, options: tuple[str, ...], sentence: str
) -> None:
    """A socket with another name or of another type stops the start with one sentence and 1."""
    path = str(tmp_path / "http.sock")
    kinds = {"--datagram": socket.SOCK_DGRAM, "--seqpacket": socket.SOCK_SEQPACKET}
    kind = next((kinds[option] for option in options if option in kinds), socket.SOCK_STREAM)
    async with activated(config, [path], options) as running:
        with socket.socket(socket.AF_UNIX, kind) as client:
            client.connect(path)
            client.send(b"GET / HTTP/1.1\r\n\r\n")
            code, err = await ended(running)
    assert code == 1
    assert "Traceback" not in err
    last = err.splitlines()[-1]
    said = json.loads(last)["error"] if last.startswith("{") else last.removeprefix("aiproxy: ")
    assert said == sentence


# The units


@pytest.fixture
def units(tmp_path: Path) -> list[Path]:
    """Copy the units; the program and the file that they name are there."""
    places = {
        "/opt/aiproxy/bin/aiproxy": f"{sys.executable} -m aiproxy",
        "/opt/aiproxy-%i/bin/aiproxy": f"{sys.executable} -m aiproxy",
        "/etc/aiproxy/aiproxy.yaml": str(ROOT / "etc" / "aiproxy.yaml"),
    }
    for name in UNITS:
        text = (ROOT / "systemd" / name).read_text(encoding="utf-8")
        for old, new in places.items():
            text = text.replace(old, new)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return [tmp_path / name for name in UNITS]


def verify(units: list[Path]) -> str:
    """Return what systemd says of units; its exit code is 0 for an unknown key, too."""
    program = shutil.which("systemd-analyze")
    assert program is not None
    # A template is looked at by an instance of it.
    command = [program, "verify", *(str(unit).replace("@.", "@blue.") for unit in units)]
    environ = {**os.environ, "SYSTEMD_COLORS": "0"}
    done = subprocess.run(  # noqa: S603 - its arguments are of this test
        command, check=False, capture_output=True, text=True, timeout=30, env=environ
    )
    return done.stdout + done.stderr


def test_systemd_has_nothing_to_say_of_the_units(units: list[Path]) -> None:
    """Every key and value of both units is one that systemd knows."""
    assert verify(units) == ""


@pytest.mark.parametrize(
    ("unit", "old", "new", "said"),
    [
        (0, "WatchdogSec=", "WatchdogSecs=", "WatchdogSecs"),
        (0, "ProtectSystem=strict", "ProtectSystem=strictly", "strictly"),
        (0, "@resources", "@resource", "@resource"),
        (0, "TimeoutStopSec=90s", "TimeoutStopSec=90 secs.", "90 secs."),
        (0, "ExecStart=", "ExecStart=/nowhere", "/nowhere"),
        (1, "FileDescriptorName=", "FileDescriptorNames=", "FileDescriptorNames"),
        (1, "127.0.0.1:8080", "127.0.0.1:http", "127.0.0.1:http"),
        (2, "Sockets=aiproxy.socket", "Socket=aiproxy.socket", "'Socket'"),
        (2, "EnvironmentFile=/etc/aiproxy/%i.env", "EnvironmentFile=%i.env", "blue.env"),
    ],
)
def test_systemd_sees_a_mistake(
    units: list[Path], unit: int, old: str, new: str, said: str
) -> None:
    """The check can fail: one mistake in a copy is named."""
    text = units[unit].read_text(encoding="utf-8")
    assert old in text
    units[unit].write_text(text.replace(old, new), encoding="utf-8")
    assert re.search(re.escape(said), verify(units))


def test_the_two_services_are_one() -> None:
    """The template is the service, but for what makes two of it: a new key is in both."""
    plain, template = (
        [line for line in (ROOT / "systemd" / name).read_text().splitlines() if line[:1] != "#"]
        for name in ("aiproxy.service", "aiproxy@.service")
    )
    own = {
        "Description=aiproxy, a reverse proxy for LLM APIs (%i)",
        "Sockets=aiproxy.socket",
        "EnvironmentFile=/etc/aiproxy/%i.env",
    }
    assert own < set(template)
    shared = [line.removesuffix(" (%i)").replace("-%i/", "/") for line in template]
    assert [line for line in shared if line not in own] == plain
