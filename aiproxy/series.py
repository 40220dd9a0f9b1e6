"""Series of metrics, by the values of their labels, and their lines in the text formats.

The library's own objects take a lock and several calls for each number, and walk through all series
of a metric at once when they are read. These are plain dictionaries, written by the event loop
alone, and are read piece by piece: between two pieces a loop may do something else.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Literal

from prometheus_client import utils

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Labels = tuple[str, ...]  # values, in the order of their names
Kind = Literal["counter", "gauge", "histogram"]

EXEMPLAR_LABEL = "request_id"
# OpenMetrics allows an exemplar 128 characters, names and values of its labels together.
LONGEST_EXEMPLAR = 128 - len(EXEMPLAR_LABEL)
_go_number: Callable[[float], str] = utils.floatToGoString
_PLAIN = 1e6  # from here on the format writes numbers in another way than Python


class Family:
    """What all series of one metric have in common.

    Args:
        kind: its type.
        name: without the suffixes of its samples, `_total` of a counter.
        documentation: one sentence without quotes, backslashes and line ends.
        labels: the names of its labels, in alphabetical order.
    """

    def __init__(self, kind: Kind, name: str, documentation: str, labels: Labels = ()) -> None:
        self.name = name
        self._kind = kind
        self._labels = labels
        self._sample = f"{name}_total" if kind == "counter" else name
        self._documentation = documentation

    def pieces(self, *, openmetrics: bool) -> Iterator[str]:
        """Its lines, in pieces that take a few microseconds each.

        Series may come and go meanwhile; each piece is of its own moment.
        """
        name = self.name if openmetrics else self._sample
        yield f"# HELP {name} {self._documentation}\n# TYPE {name} {self._kind}\n"

    def _line(self, suffix: str = "", **more: str) -> str:
        """A line's beginning, as a template that takes the values of the labels."""
        given = dict.fromkeys(self._labels, "%s") | more
        pairs = ",".join(f'{label}="{given[label]}"' for label in sorted(given))
        return f"{self._sample}{suffix}{{{pairs}}} " if pairs else f"{self._sample}{suffix} "


class Numbers(Family, dict[Labels, float]):
    """Counters or gauges: `numbers[labels] += 1`. Without labels there is one, at 0."""

    def __init__(self, kind: Kind, name: str, documentation: str, labels: Labels = ()) -> None:
        super().__init__(kind, name, documentation, labels)
        self._template = self._line()
        if not labels:
            self[()] = 0

    def __missing__(self, labels: Labels) -> float:
        return 0

    def pieces(self, *, openmetrics: bool) -> Iterator[str]:
        """See `Family`."""
        yield from super().pieces(openmetrics=openmetrics)
        for labels in list(self):
            value = self.get(labels)
            if value is not None:
                yield f"{self._template % _escaped(labels)}{_number(value)}\n"


class Watched(Family):
    """Counters or gauges that are kept elsewhere.

    Args:
        read: they, as they are at the time; it is read piece by piece, too.
    """

    def __init__(
        self,
        kind: Kind,
        name: str,
        documentation: str,
        labels: Labels = (),
        *,
        read: Callable[[], Iterable[tuple[Labels, float]]],
    ) -> None:
        super().__init__(kind, name, documentation, labels)
        self._template = self._line()
        self._read = read

    def pieces(self, *, openmetrics: bool) -> Iterator[str]:
        """See `Family`."""
        yield from super().pieces(openmetrics=openmetrics)
        for labels, value in self._read():
            yield f"{self._template % _escaped(labels)}{_number(value)}\n"


class Buckets:
    """One series of a histogram.

    Args:
        bounds: the upper bounds of its buckets but the last, which is infinite.
    """

    __slots__ = ("_bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        # In each bucket the last: id, value, seconds since the epoch.
        self.exemplars: list[tuple[str, float, float] | None] = [None] * len(self.counts)

    def observe(self, value: float, example: str = "", now: float = 0.0) -> None:
        """Count a value.

        Args:
            value: what was measured.
            example: the id of the request that it is of, at most `LONGEST_EXEMPLAR` characters;
                empty: it has none to be found by.
            now: seconds since the epoch.
        """
        place = bisect_left(self._bounds, value)
        self.counts[place] += 1
        self.total += value
        if example:
            self.exemplars[place] = (example, value, now)


class Histograms(Family, dict[Labels, Buckets]):
    """Histograms: `histograms[labels].observe(value)`."""

    def __init__(
        self, name: str, documentation: str, labels: Labels, *, buckets: Sequence[float]
    ) -> None:
        super().__init__("histogram", name, documentation, labels)
        self._bounds = tuple(buckets)
        ends = [*map(_go_number, buckets), "+Inf"]
        self._templates = [self._line("_bucket", le=end) for end in ends]
        self._count, self._sum = self._line("_count"), self._line("_sum")

    def __missing__(self, labels: Labels) -> Buckets:
        made = self[labels] = Buckets(self._bounds)
        return made

    def pieces(self, *, openmetrics: bool) -> Iterator[str]:
        """See `Family`; a piece is a histogram, so that its lines agree."""
        yield from super().pieces(openmetrics=openmetrics)
        for labels, series in list(self.items()):
            values = _escaped(labels)
            lines = []
            count = 0
            for template, here, exemplar in zip(
                self._templates, series.counts, series.exemplars, strict=True
            ):
                count += here
                example = "" if exemplar is None or not openmetrics else _exemplar(*exemplar)
                lines.append(f"{template % values}{_number(count)}{example}\n")
            lines.append(f"{self._count % values}{_number(count)}\n")
            lines.append(f"{self._sum % values}{_number(series.total)}\n")
            yield "".join(lines)


def _exemplar(request_id: str, value: float, now: float) -> str:
    return f' # {{{EXEMPLAR_LABEL}="{_escape(request_id)}"}} {_number(value)} {now:.3f}'


def _number(value: float) -> str:
    return repr(float(value)) if -_PLAIN < value < _PLAIN else _go_number(value)


class _Escaped(dict[str, str]):
    """Values of labels as they are written. There are as many as the configuration has names."""

    def __missing__(self, value: str) -> str:
        escaped = self[value] = _escape(value)
        return escaped


_known = _Escaped()


def _escaped(labels: Labels) -> Labels:
    return tuple([_known[value] for value in labels])


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
