"""How spans are sent, by OpenTelemetry's own variables of the environment.

OTEL_EXPORTER_OTLP_HEADERS (a collector's credential), _TIMEOUT (seconds, as its Python SDK reads
it), _COMPRESSION, _CERTIFICATE, each also as OTEL_EXPORTER_OTLP_TRACES_..., which wins
(OpenTelemetry, "OTLP Exporter Configuration"); OTEL_BSP_SCHEDULE_DELAY (milliseconds).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT, MOST_TIMEOUT = 10.0, 300.0  # seconds; the first is OpenTelemetry's own default
DELAY, MOST_DELAY = 5000.0, 60_000.0  # milliseconds; the same

_PREFIX = "OTEL_EXPORTER_OTLP_"
_DELAY = "OTEL_BSP_SCHEDULE_DELAY"
# RFC 9110, section 5.1 and 5.5, less what no credential needs.
_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")


class Exporting(NamedTuple):
    """How a collector is asked.

    Attributes:
        headers: of each request.
        timeout: seconds for one batch, its repetitions included.
        gzip: whether bodies are compressed.
        certificate: file of the authorities that it is checked against; None: the system's.
        delay: seconds from one batch to the next.
    """

    headers: dict[str, str]
    timeout: float
    gzip: bool
    certificate: str | None
    delay: float


def read(environ: Mapping[str, str]) -> Exporting:
    """Read them.

    Raises:
        ValueError: one of them is wrong; it is named, never its value, which may be a secret.
    """
    headers: dict[str, str] = {}
    for pair in filter(None, map(str.strip, _given(environ, "HEADERS").split(","))):
        name, equals, value = map(str.strip, map(unquote, pair.partition("=")))
        if not equals or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
            raise ValueError(f"{_PREFIX}HEADERS must be NAME=VALUE,NAME=VALUE,...")
        headers[name] = value
    timeout = _number(_given(environ, "TIMEOUT"), TIMEOUT, MOST_TIMEOUT)
    if timeout is None:
        what = f"must be a number of seconds above 0, at most {MOST_TIMEOUT:.0f}"
        raise ValueError(f"{_PREFIX}TIMEOUT {what}")
    delay = _number(environ.get(_DELAY, ""), DELAY, MOST_DELAY)
    if delay is None:
        what = f"must be a number of milliseconds above 0, at most {MOST_DELAY:.0f}"
        raise ValueError(f"{_DELAY} {what}")
    compression = _given(environ, "COMPRESSION") or "none"
    if compression not in ("none", "gzip"):
        raise ValueError(f"{_PREFIX}COMPRESSION must be gzip or none")
    certificate = _given(environ, "CERTIFICATE") or None
    if certificate is not None and not Path(certificate).is_file():
        raise ValueError(f"{_PREFIX}CERTIFICATE names no file")
    return Exporting(headers, timeout, compression == "gzip", certificate, delay / 1000)


def _number(text: str, usual: float, most: float) -> float | None:
    """A number above 0, at most `most`; None for anything else."""
    try:
        number = float(text) if text else usual
    except ValueError:
        return None
    return number if 0.0 < number <= most else None


def _given(environ: Mapping[str, str], name: str) -> str:
    return environ.get(f"{_PREFIX}TRACES_{name}") or environ.get(f"{_PREFIX}{name}") or ""
