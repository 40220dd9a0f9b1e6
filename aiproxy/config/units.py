"""Durations, sizes, rates, addresses, networks and days: what a file writes -> what a program uses.

Each `parse_*` takes any value of the file and either returns the parsed one or raises ValueError
with the sentence that the writer of the file gets. Each `format_*` is its inverse.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

_MAX_SHOWN = 40
"""Characters of a value in a message."""

_MILLISECONDS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_BYTES = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_SECONDS = {"s": 1, "min": 60, "h": 3600, "day": 86_400}

DURATION = r"^[0-9]{1,12}(ms|s|min|h|d)$"
SIZE = r"^[0-9]{1,12}(KiB|MiB|GiB)$"
RATE = r"^[0-9]{1,12}/(s|min|h|day)$"
ADDRESS = r"^(unix:.+|.+:[0-9]{1,5})$"
EXPIRY = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}"
    r"([Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2}))?$"
)

# Beyond ten years an event loop's timer overflows sooner than the time is up.
MAX_SECONDS = 3650 * 86_400.0
# Counters of bytes are 64 bits wide.
MAX_SIZE = (1 << 63) - 1
_MAX_PORT = 65_535
_MAX_UNIX_PATH = 107  # bytes: sun_path of unix(7), without its final NUL


def shown(value: object) -> str:
    """Return a value for a message: short, on one line, and never what looks like a secret."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        if value.startswith("sk-"):
            return "'sk-…'"
        return repr(value if len(value) <= _MAX_SHOWN else value[: _MAX_SHOWN - 1] + "…")
    if isinstance(value, int | float):
        text = str(value)
        return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 1] + "…"
    return kind(value)


def kind(value: object) -> str:
    """Return what sort of value it is, in YAML's words."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text"
    return "a list" if isinstance(value, list) else "a mapping"


def _split(value: object, pattern: str) -> tuple[int, str] | None:
    """Split `5min` or `600/min` into its number and its unit."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        return None
    number = re.match(r"[0-9]+", value)
    assert number is not None  # noqa: S101 - every pattern begins with a number
    return int(number[0]), value[number.end() :].lstrip("/")


def parse_duration(value: object) -> float:
    """Return seconds; `0s` (no such limit) is 0.0."""
    if (parts := _split(value, DURATION)) is None:
        raise ValueError(
            f"must be a duration such as 250ms, 5s, 2min, 1h or 30d, not {shown(value)}"
        )
    seconds = parts[0] * _MILLISECONDS[parts[1]] / 1000
    if seconds > MAX_SECONDS:
        raise ValueError(f"must be at most {format_duration(MAX_SECONDS)}, not {shown(value)}")
    return seconds


def format_duration(seconds: float) -> str:
    """Return whole milliseconds in the largest unit that shows them exactly."""
    milliseconds = round(seconds * 1000)
    if milliseconds == 0:
        return "0s"
    unit = next(u for u in ("d", "h", "min", "s", "ms") if milliseconds % _MILLISECONDS[u] == 0)
    return f"{milliseconds // _MILLISECONDS[unit]}{unit}"


def parse_size(value: object) -> int:
    """Return bytes, at least 1 KiB."""
    if (parts := _split(value, SIZE)) is None:
        raise ValueError(f"must be a size such as 64KiB, 32MiB or 1GiB, not {shown(value)}")
    size = parts[0] * _BYTES[parts[1]]
    if not 0 < size <= MAX_SIZE:
        bound = "more than 0" if size == 0 else "less than 8589934592GiB"
        raise ValueError(f"must be {bound}, not {shown(value)}")
    return size


def format_size(size: int) -> str:
    """Return bytes, a multiple of 1024, in the largest unit that shows them exactly."""
    unit = next(u for u in ("GiB", "MiB", "KiB") if size % _BYTES[u] == 0)
    return f"{size // _BYTES[unit]}{unit}"


@dataclass(frozen=True, slots=True)
class Rate:
    """So many (requests or tokens) per so many seconds."""

    amount: int
    seconds: int

    def __str__(self) -> str:
        unit = next(u for u, seconds in _SECONDS.items() if seconds == self.seconds)
        return f"{self.amount}/{unit}"


def parse_rate(value: object) -> Rate:
    """Return a rate of at least 1."""
    if (parts := _split(value, RATE)) is None or parts[0] == 0:
        raise ValueError(
            f"must be a rate such as 10/s, 600/min, 1000/h or 5000/day, not {shown(value)}"
        )
    return Rate(parts[0], _SECONDS[parts[1]])


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a host (an IPv6 one without brackets) and a port, or a unix socket's path.

    With a path the host is empty and the port 0. Port 0 without a path is any free port.
    """

    host: str
    port: int
    path: str | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it; so it is with a unix socket."""
        return self.path is not None or is_loopback(self.host)

    def clashes(self, other: Address) -> bool:
        """Whether the two cannot both be bound."""
        if self.path is not None or other.path is not None:
            return self.path == other.path
        if self.port == 0 or self.port != other.port:
            return False
        wildcards = {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
        return self.host == other.host or bool(wildcards & {self.host, other.host})


def is_loopback(host: str) -> bool:
    """Whether a host name or IP address is this machine's own loopback."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def parse_address(value: object) -> Address:
    """Return the address in `HOST:PORT`, `[IPV6]:PORT` or `unix:PATH`."""
    wrong = f"must be HOST:PORT or unix:PATH, not {shown(value)}"
    if not isinstance(value, str):
        raise ValueError(wrong)  # noqa: TRY004 - pydantic makes a mistake of ValueError only
    if value.startswith("unix:"):
        path = value.removeprefix("unix:")
        if not path or not path.isprintable():
            raise ValueError(wrong)
        if len(path.encode()) > _MAX_UNIX_PATH:
            raise ValueError(f"the path is longer than {_MAX_UNIX_PATH} bytes")
        return Address("", 0, path)
    host, colon, port = value.rpartition(":")
    if not colon or not re.fullmatch("[0-9]{1,5}", port) or int(port) > _MAX_PORT:
        raise ValueError(wrong)
    return Address(parse_host(host, wrong), int(port))


def parse_host(host: str, wrong: str) -> str:
    """Return a host name or IP address, an IPv6 one without its brackets; else raise `wrong`."""
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(IPv6Address(host[1:-1]))
        except ValueError:
            raise ValueError(wrong) from None
    if ":" in host:
        raise ValueError(f"{wrong}: an IPv6 address needs brackets, as in '[::1]:8080'")
    if not re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9._-]{0,252})", host):
        raise ValueError(wrong)
    if re.fullmatch(r"[0-9.]+", host):  # what looks like an IPv4 address must be one
        try:
            ip_address(host)
        except ValueError:
            raise ValueError(wrong) from None
    return host


def parse_network(value: object) -> IPv4Network | IPv6Network:
    """Return the network of a CIDR, such as 10.0.0.0/8 or fd00::/8, or of one address."""
    if not isinstance(value, str):
        raise ValueError(f"must be a CIDR such as 10.0.0.0/8, not {shown(value)}")  # noqa: TRY004 - as above
    try:
        network = ip_network(value, strict=False)
    except ValueError:
        raise ValueError(f"must be a CIDR such as 10.0.0.0/8, not {shown(value)}") from None
    if ip_address(value.partition("/")[0]) != network.network_address:
        raise ValueError(f"has bits set beyond its prefix: write {network}")
    return network


def parse_expiry(value: object) -> datetime:
    """Return the instant (UTC) from which something is no longer valid.

    A day is the last valid one, so the instant is the midnight after it; else the text is the
    instant itself, in the form of RFC 3339, section 5.6.
    """
    if not isinstance(value, str) or not re.fullmatch(EXPIRY, value):
        raise ValueError(
            "must be a day such as 2027-06-30 or an instant such as 2027-06-30T12:00:00Z, "
            f"not {shown(value)}"
        )
    try:
        if len(value) == len("2027-06-30"):
            day = date.fromisoformat(value) + timedelta(days=1)
            return datetime(day.year, day.month, day.day, tzinfo=UTC)
        return datetime.fromisoformat(value.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"there is no such time as {shown(value)}") from None
