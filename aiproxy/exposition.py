"""What a scrape gets: the text format of Prometheus, or OpenMetrics, which has exemplars.

It is made in the event loop, in slices: after each the loop does what else is to be done. A thread
would hold the interpreter's lock instead, and the loop would wait for it again at every turn.
"""

from __future__ import annotations

import asyncio
import time
from itertools import chain
from typing import TYPE_CHECKING, Literal

from prometheus_client.exposition import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client import CollectorRegistry

    from aiproxy.series import Family

Format = Literal["text", "openmetrics"]
CONTENT_TYPES: dict[Format, str] = {
    "text": "text/plain; version=0.0.4; charset=utf-8",
    "openmetrics": "application/openmetrics-text; version=1.0.0; charset=utf-8",
}
_LIBRARY: dict[Format, Callable[[CollectorRegistry], bytes]] = {
    "text": generate_latest,
    "openmetrics": generate_openmetrics,
}
# Media types and versions by which each can be asked for; no version means any.
_OPENMETRICS = ("application/openmetrics-text", ("", "1.0.0"))
_TEXT = ("text/plain", ("", "0.0.4", "1.0.0"))
_ANY = ("text/*", "*/*")  # what is not named gets the format that everybody reads

SLICE = 0.0005  # seconds that the event loop may stop for a scrape at a time


def negotiate(accepts: Iterable[str]) -> Format:
    """The format that a client prefers: OpenMetrics only if it is named, else text.

    Args:
        accepts: the values of its Accept fields (RFC 9110, section 12.5.1).
    """
    openmetrics = text = 0.0
    for asked in ",".join(accepts).split(","):
        media_type, version, quality = _media_range(asked)
        if media_type == _OPENMETRICS[0] and version in _OPENMETRICS[1]:
            openmetrics = max(openmetrics, quality)
        elif media_type in _ANY or (media_type == _TEXT[0] and version in _TEXT[1]):
            text = max(text, quality)
    return "openmetrics" if openmetrics and openmetrics >= text else "text"


def _media_range(asked: str) -> tuple[str, str, float]:
    """Media type, version and quality of one that is asked for; what is malformed has quality 0."""
    media_type, *parameters = (part.strip().lower() for part in asked.split(";"))
    known = {"version": "", "q": "1"}
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        known[name.strip()] = value.strip().strip('"')
    try:
        quality = float(known["q"])
    except ValueError:
        quality = 0.0
    return media_type, known["version"], quality if 0 <= quality <= 1 else 0.0


class Exposition:
    """Renders metrics.

    Args:
        families: our own.
        registry: collectors of all else, which are read in a thread: they may read files.
        clock: by which slices are measured, seconds.
    """

    def __init__(
        self,
        families: Iterable[Family],
        registry: CollectorRegistry,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._families = families
        self._registry = registry
        self._clock = clock
        self._turn = asyncio.Lock()  # of several scrapes one has a slice at each turn of the loop

    def whole(self, form: Format) -> bytes:
        """All at once. May take tens of milliseconds."""
        return b"".join([*map(str.encode, self._pieces(form)), self._foreign(form)])

    async def scrape(self, form: Format) -> list[bytes]:
        """All, in parts that are to be joined; see above how it is made."""
        foreign = asyncio.get_running_loop().run_in_executor(None, self._foreign, form)
        pieces = self._pieces(form)
        parts: list[bytes] = []
        while True:
            async with self._turn:
                part = self._slice(pieces)
                await asyncio.sleep(0)
            if not part:
                return [*parts, await foreign]
            parts.append(part)

    def _slice(self, pieces: Iterator[str]) -> bytes:
        ends = self._clock() + SLICE
        lines = []
        for piece in pieces:
            lines.append(piece)
            if self._clock() >= ends:
                break
        return "".join(lines).encode()

    def _pieces(self, form: Format) -> Iterator[str]:
        openmetrics = form == "openmetrics"
        return chain.from_iterable(
            family.pieces(openmetrics=openmetrics) for family in tuple(self._families)
        )

    def _foreign(self, form: Format) -> bytes:
        """What the library's collectors have to say, and the end, which OpenMetrics marks."""
        return _LIBRARY[form](self._registry)
