"""What tracing needs beside the file: the extra `otel`, and variables that can be used."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

from aiproxy.exporting import read

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiproxy.config.document import Document, Mistake

_NEEDED = ("opentelemetry.sdk", "opentelemetry.proto", "openinference.semconv")


def check_collector(document: Document, environ: Mapping[str, str]) -> Iterator[Mistake]:
    """Yield a mistake for what `tracing` needs beside the file."""
    for steps, _ in document.find("tracing"):
        if not all(map(_is_installed, _NEEDED)):
            what = "needs the extra otel: python3 -m pip install 'aiproxy[otel]'"
            yield document.mistake(steps, what, at_key=True)
            continue
        try:
            read(environ)
        except ValueError as error:
            yield document.mistake(steps, f"cannot be used: {error}", at_key=True)


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it is in
        return False
