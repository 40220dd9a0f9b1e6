"""How spans are sent, by OpenTelemetry's own variables of the environment.

OTEL_EXPORTER_OTLP_HEADERS (a collector's credential), _TIMEOUT, _COMPRESSION, _CERTIFICATE, each
also as OTEL_EXPORTER_OTLP_TRACES_..., which wins (OpenTelemetry, "OTLP Exporter Configuration").
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Mapping

TIMEOUT = 10.0  # seconds; OpenTelemetry's own default

_PREFIX = "OTEL_EXPORTER_OTLP_"


class Exporting(NamedTuple):
    """How a collector is asked.

    Attributes:
        headers: of each request.
        timeout: seconds for one batch, its repetitions included.
        gzip: whether bodies are compressed.
        certificate: file of the authorities that it is checked against; None: the usual ones.
    """

    headers: dict[str, str]
    timeout: float
    gzip: bool
    certificate: str | None


def read(environ: Mapping[str, str]) -> Exporting:
    """Read them.

    Raises:
        ValueError: one of them is wrong; it is named, never its value, which may be a secret.
    """
    headers: dict[str, str] = {}
    for pair in filter(None, map(str.strip, _given(environ, "HEADERS").split(","))):
        name, equals, value = map(str.strip, map(unquote, pair.partition("=")))
        if not equals or not name.isascii() or not f"{name}{value}".isprintable() or not name:
            raise ValueError(f"{_PREFIX}HEADERS must be NAME=VALUE,NAME=VALUE,...")
        headers[name] = value
    text = _given(environ, "TIMEOUT")
    try:
        timeout = float(text) if text else TIMEOUT
    except ValueError:
        timeout = 0.0
    if not 0.0 < timeout < float("inf"):
        raise ValueError(f"{_PREFIX}TIMEOUT must be a number of seconds above 0")
    compression = _given(environ, "COMPRESSION") or "none"
    if compression not in ("none", "gzip"):
        raise ValueError(f"{_PREFIX}COMPRESSION must be gzip or none")
    certificate = _given(environ, "CERTIFICATE") or None
    if certificate is not None and not Path(certificate).is_file():
        raise ValueError(f"{_PREFIX}CERTIFICATE names no file")
    return Exporting(headers, timeout, compression == "gzip", certificate)


def _given(environ: Mapping[str, str], name: str) -> str:
    return environ.get(f"{_PREFIX}TRACES_{name}") or environ.get(f"{_PREFIX}{name}") or ""
