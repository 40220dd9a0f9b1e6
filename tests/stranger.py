"""Somebody who has the source and a shell: types commands, writes files, opens terminals."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Self

PATIENCE = 20.0  # seconds for a command, or until a port listens
PATIENCE_FRESH = 600.0  # the same where packages are fetched
PORTS = (8080, 9090, 8001)  # that README uses
END = "\x1e"  # what the shell prints behind each command
# Not copied: it is made here, and may be large.
NOT_SOURCE = (".git", ".venv", "build", "*.egg-info", "node_modules", "__pycache__", ".*_cache")
# What a stranger has not set.
UNSET = [
    "PYTHONPATH",
    "VIRTUAL_ENV",
    "OPENAI_API_KEY",
    "ANTHROPIC_API_KEY",
    "CREDENTIALS_DIRECTORY",
    "AIPROXY_ADMIN",
    "STATE_DIRECTORY",
    "NOTIFY_SOCKET",
    "LISTEN_FDS",
    "AIPROXY_KEY",
]


class StrangerError(Exception):
    """A command failed; the message has what it said."""


class Stranger:
    """A shell in a directory of its own: `with Stranger(root, directory, fresh=True) as stranger`.

    Args:
        root: the source.
        directory: an empty one, where all happens.
        fresh: on a copy of the source, where README's own commands install it. Else in an empty
            directory, whose environment is this interpreter with the source itself.
    """

    def __init__(self, root: Path, directory: Path, *, fresh: bool) -> None:
        self.fresh = fresh
        self._patience = PATIENCE_FRESH if fresh else PATIENCE
        self._directory = directory / "aiproxy"
        others = dict(zip(PORTS, _free(len(PORTS)), strict=True))
        self._ports = {port: port if fresh and _is_free(port) else others[port] for port in PORTS}
        self._environ = {name: os.environ[name] for name in os.environ.keys() - set(UNSET)}
        self._terminals: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        if fresh:
            shutil.copytree(
                root, self._directory, ignore=shutil.ignore_patterns(*NOT_SOURCE), symlinks=True
            )
        else:
            self._directory.mkdir()
            _borrow(root, self._directory / ".venv" / "bin")
        self._shell = self._bash("--norc", "--noprofile", stdin=subprocess.PIPE)
        self._type("set -euo pipefail")
        if not fresh:
            self.run(". .venv/bin/activate\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close every terminal: what runs in one is told as by Ctrl-C, then ended."""
        for process, _ in [*self._terminals, (self._shell, None)]:
            _end(process)
        for _, output in self._terminals:
            output.close()
        for pipe in (self._shell.stdin, self._shell.stdout):
            if pipe:
                pipe.close()

    def write(self, name: str, text: str) -> None:
        """Write a file."""
        (self._directory / name).write_text(self._here(text))

    def run(self, text: str) -> str:
        """Type a command; return what it says, with the ports as README has them.

        Raises:
            StrangerError: it failed, or did not end in time.
        """
        typed = self._directory.parent / "typed.sh"
        typed.write_text(self._here(text))
        self._type(f". '{typed}' </dev/null; printf '{END}\\n'")
        end = (self._shell.pid, signal.SIGKILL)
        watch = threading.Timer(self._patience, os.killpg, end)
        watch.start()
        try:
            said = self._read()
        finally:
            watch.cancel()
        if not said.endswith(f"{END}\n"):
            raise StrangerError(f"this failed:\n{text}{said}{self._heard()}")
        return self._there(said.removesuffix(f"{END}\n"))

    def open_terminal(self, text: str, port: int) -> None:
        """Run a command in a terminal of its own until a port listens; it stays open.

        Raises:
            StrangerError: it ended before, or did not listen in time.
        """
        output = (self._directory.parent / f"terminal-{port}").open("w+b")
        command = ("--norc", "--noprofile", "-euo", "pipefail", "-c", self._here(text))
        process = self._bash(*command, stdin=subprocess.DEVNULL, stdout=output)
        self._terminals.append((process, output))
        deadline = time.monotonic() + self._patience
        while _is_free(self._ports[port]):
            if process.poll() is not None or time.monotonic() > deadline:
                raise StrangerError(f"nothing listens on {port}:\n{text}{self._heard()}")
            time.sleep(0.02)

    def _bash(
        self, *arguments: str, stdin: int, stdout: int | IO[bytes] = subprocess.PIPE
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(  # noqa: S603 - README's commands are ours
            [shutil.which("bash") or "bash", *arguments],
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            cwd=self._directory,
            env=self._environ,
            start_new_session=True,
        )

    def _type(self, line: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(f"{line}\n".encode())
        self._shell.stdin.flush()

    def _read(self) -> str:
        assert self._shell.stdout is not None
        said = b""
        while not said.endswith(f"{END}\n".encode()):
            if not (line := self._shell.stdout.readline()):
                break
            said += line
        return said.decode()

    def _heard(self) -> str:
        """What the other terminals say."""
        said = ""
        for _, output in self._terminals:
            output.seek(0)
            said += f"\n-- {Path(output.name).name}\n{output.read().decode()}"
        return said

    def _here(self, text: str) -> str:
        return re.sub(
            rf"\b({'|'.join(map(str, PORTS))})\b",
            lambda found: str(self._ports[int(found[0])]),
            text,
        )

    def _there(self, text: str) -> str:
        for port, here in self._ports.items():
            text = re.sub(rf"\b{here}\b", str(port), text)
        return text


def _borrow(root: Path, directory: Path) -> None:
    """Make what looks like a virtual environment out of this interpreter and the source."""
    directory.mkdir(parents=True)
    programs = {"python3": "", "aiproxy": "-m aiproxy"}
    for name, arguments in programs.items():
        program = directory / name
        program.write_text(
            f"#!/bin/sh\nPYTHONPATH='{root}' exec '{sys.executable}' {arguments} \"$@\"\n"
        )
        program.chmod(0o755)
    (directory / "activate").write_text(f"PATH='{directory}':$PATH\n")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a terminal with all that runs in it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(1)  # a second signal ends a drain
        except subprocess.TimeoutExpired:
            continue


def _free(many: int) -> list[int]:
    """So many ports that are free at this moment."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(many)]
        return [int(server.getsockname()[1]) for server in servers]


def _is_free(port: int) -> bool:
    """Whether nothing listens on a port of loopback."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0
