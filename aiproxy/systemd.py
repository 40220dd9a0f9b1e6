"""What systemd and a service tell each other: readiness, its watchdog, sockets that it opened.

The protocols are plain (sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3)): a datagram with
lines of assignments, and file descriptors from 3 on. Without systemd all of it does nothing.
"""

from __future__ import annotations

import os
import socket
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping

FIRST_SOCKET = 3  # SD_LISTEN_FDS_START


class Notifier:
    """Tells the service manager how it goes.

    Attributes:
        watchdog: seconds within which it wants a sign of life; None: it does not.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        self.watchdog = _watchdog(environ) if self._address else None
        self._ending = False
        self._owed: tuple[str, ...] = ()

    def ready(self, status: str) -> None:
        """Started, or reloaded: it serves. Nothing once it ends."""
        if self._ending:
            return
        if not self._send("READY=1", _line(status)):
            self._owed = ("READY=1", _line(status))

    def reloading(self) -> None:
        """A reload begins; `ready` ends it, whatever came of it."""
        if self._ending:
            return
        self._owed = ()
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self._send("RELOADING=1", f"MONOTONIC_USEC={now}")

    def stopping(self, status: str) -> None:
        """It ends."""
        self._ending = True
        self._owed = ()
        self._send("STOPPING=1", _line(status))

    def extend(self, status: str, seconds: float) -> None:
        """It is still ending, and may take this long until it says so again."""
        self._send(f"EXTEND_TIMEOUT_USEC={int(seconds * 1_000_000)}", _line(status))

    def status(self, status: str) -> None:
        """One line for people, in `systemctl status`."""
        self._send(_line(status))

    def alive(self) -> None:
        """A sign of life, for the watchdog; and what the manager could not take before."""
        if self._owed and self._send(*self._owed):
            self._owed = ()
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> bool:
        if not self._address:
            return True
        address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto("\n".join(lines).encode(), address)
        except OSError:
            return False  # a manager that is gone or does not read must not keep us from serving
        return True


def _line(status: str) -> str:
    return f"STATUS={' '.join(status.split())}"


def _watchdog(environ: Mapping[str, str]) -> float | None:
    given = environ.get("WATCHDOG_USEC", "")
    if not _is_number(given) or not int(given):
        return None
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # it is another process that is watched
    return int(given) / 1_000_000


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def inherited_sockets(environ: MutableMapping[str, str]) -> dict[str, list[socket.socket]]:
    """The listening sockets that were passed to this process, by name; none without systemd.

    The variables are removed, so that no child takes them for its own.

    Raises:
        OSError: one is no listening stream socket.
    """
    given = {name: environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")}
    if given["LISTEN_PID"] != str(os.getpid()) or not _is_number(given["LISTEN_FDS"]):
        return {}
    count = int(given["LISTEN_FDS"])
    names = given["LISTEN_FDNAMES"].split(":") if given["LISTEN_FDNAMES"] else []
    found: dict[str, list[socket.socket]] = {}
    for number in range(count):
        name = names[number] if number < len(names) else "unknown"
        try:
            sock = socket.socket(fileno=FIRST_SOCKET + number)
            accepts = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError:  # it is none
            accepts = False
        if not accepts or sock.type != socket.SOCK_STREAM:
            raise OSError(f"the socket {name!r} that was passed does not listen for streams")
        sock.setblocking(False)
        sock.set_inheritable(False)
        found.setdefault(name, []).append(sock)
    return found
