"""YAML text -> a tree of plain values, with the line and the column of every key and value.

The scalars are those of YAML 1.2's core schema, less its octal, hexadecimal, infinite and
not-a-number forms: `true`/`false`, decimal numbers, null; all else is text, so `yes`, `0x10`,
`1_000`, `1:30` and dates are text. The keys of a mapping are always text, as they are written.

Duplicate keys, aliases, anchors, tags and merge keys are mistakes: each makes a file mean something
else than it shows. `parse` never raises: whatever is wrong is in `Document.mistakes`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import yaml

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

Tree: TypeAlias = "str | int | float | bool | list[Tree] | dict[str, Tree] | None"
Steps: TypeAlias = "tuple[str | int, ...]"
"""The way from the root to a node: names in mappings, indexes in lists."""

MAX_BYTES = 1024 * 1024
"""The largest file that is read; one of 10,000 keys is smaller."""
TOO_LARGE = f"is larger than {MAX_BYTES // 1024} KiB"
MAX_DEPTH = 64
_MAX_SHOWN = 64
"""Characters of a caller-made name in a message."""

_INTEGER = re.compile(r"[-+]?[0-9]{1,300}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]{1,300}|[0-9]{1,300}(\.[0-9]{0,300})?)([eE][-+]?[0-9]{1,300})?")
_WORDS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# What YAML 1.2 (section 5.1, c-printable) forbids; lone surrogates are in the gap before U+E000.
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

_ALIAS = 'an unquoted * begins a YAML alias, which is not allowed: quote the glob, as in "*"'
_ANCHOR = "an unquoted & begins a YAML anchor, which is not allowed: quote the text"
# The parser's words for the commonest slips, in those of someone who does not know its grammar.
_PLAIN_WORDS = {
    "mapping values are not allowed in this context": (
        "a ':' where none can be: check the indentation, or quote the text"
    ),
    "found character that cannot start any token": (
        "a tab, or one of @ ` %, where a value begins: indent with spaces, or quote the text"
    ),
    "found a tab character that violates indentation": "a tab: indent with spaces",
    "found unexpected end of stream": "a quote that is never closed",
    "could not find expected ':'": "a key without ':'",
    "did not find expected key": "this line does not line up with the keys above it",
    "did not find expected '-' indicator": "this line does not line up with the list above it",
    "did not find expected ',' or ']'": "a '[' that is never closed, or a comma missing",
    "did not find expected ',' or '}'": "a '{' that is never closed, or a comma missing",
    "block sequence entries are not allowed in this context": "a '- ' where no list can begin",
    "did not find expected node content": "a value is missing, or needs quotes",
}


@dataclass(frozen=True, slots=True)
class Mistake:
    """One thing that is wrong (or, as a warning, doubtful), and where.

    Attributes:
        line: From 1.
        column: From 1, in characters.
        where: Dotted path of the key, such as `routes[0].model`; empty for the file as a whole.
        what: What is wrong, without the file's name or the place.
    """

    line: int
    column: int
    where: str
    what: str

    def text(self, path: Path | str) -> str:
        """Return the mistake as one line: `FILE:LINE:COL: path.to.key: what is wrong`."""
        where = f"{self.where}: " if self.where else ""
        return f"{path}:{self.line}:{self.column}: {where}{self.what}"


class ConfigError(Exception):
    """A configuration that cannot be used; `mistakes` has all of them, in the file's order."""

    def __init__(self, mistakes: Sequence[Mistake], path: Path | str = "configuration") -> None:
        super().__init__(mistakes, path)
        self.mistakes = list(mistakes)
        self.path = path

    def __str__(self) -> str:
        return "\n".join(mistake.text(self.path) for mistake in self.mistakes)


class Place(NamedTuple):
    """Line and column, both from 1."""

    line: int
    column: int


def dotted(steps: Steps) -> str:
    """Return steps as `routes[0].model`; names are cut and their control characters escaped."""
    text = ""
    for step in steps:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            name = step if step.isprintable() else repr(step)[1:-1]
            name = name if len(name) <= _MAX_SHOWN else name[:_MAX_SHOWN] + "…"
            text += f".{name}" if text else name
    return text


@dataclass(slots=True)
class Document:
    """A file as it was read: its tree, the place of every node, and what YAML itself forbids.

    `unread` names the nodes whose value could not be taken (an alias, a tag): what is missing or
    wrong there, or below, is a consequence and no mistake of its own. `readable` is False when the
    text is not YAML at all: then the tree is empty and `mistakes` ends with the reason.
    """

    tree: Tree = None
    mistakes: list[Mistake] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    readable: bool = True
    keys: dict[Steps, Place] = field(default_factory=dict)
    values: dict[Steps, Place] = field(default_factory=dict)

    def mistake(self, steps: Steps, what: str, *, at_key: bool = False) -> Mistake:
        """Make a mistake at a node's value (or its key), else at its nearest ancestor's key."""
        place = None if at_key else self.values.get(steps)
        near = steps
        while place is None and near:
            place = self.keys.get(near) or self.values.get(near)
            near = near[:-1]
        line, column = place or Place(1, 1)
        return Mistake(line, column, dotted(steps), what)

    def find(self, pattern: str) -> Iterator[tuple[Steps, Tree]]:
        """Yield the nodes at a dotted pattern in which `*` is every name or every list item."""
        return _find(self.tree, pattern.split("."), ())

    def empty(self) -> Iterator[Steps]:
        """Yield the steps of every node below the root that is null."""
        pending: list[tuple[Steps, Tree]] = [((), self.tree)]
        while pending:
            steps, node = pending.pop()
            if node is None and steps:
                yield steps
            elif isinstance(node, dict):
                pending.extend(((*steps, name), child) for name, child in node.items())
            elif isinstance(node, list):
                pending.extend(((*steps, index), child) for index, child in enumerate(node))


def _find(tree: Tree, names: list[str], steps: Steps) -> Iterator[tuple[Steps, Tree]]:
    if not names:
        yield steps, tree
        return
    name, rest = names[0], names[1:]
    if isinstance(tree, dict):
        for key, child in tree.items():
            if name in ("*", key):
                yield from _find(child, rest, (*steps, key))
    elif isinstance(tree, list) and name == "*":
        for index, child in enumerate(tree):
            yield from _find(child, rest, (*steps, index))


def parse(text: str) -> Document:
    """Read a YAML text of at most 1 MiB and 64 levels; what is wrong is in the result."""
    document = Document()
    try:
        _check_characters(text)
        _Reader(text, document).document()
    except _StopReadingError as stop:
        document.mistakes.append(stop.mistake)
        document.readable = False
    return document


class _StopReadingError(Exception):
    """The rest of the text has no meaning, or is not worth reading."""

    def __init__(self, line: int, column: int, what: str) -> None:
        super().__init__(what)
        self.mistake = Mistake(line, column, "", what)


def _check_characters(text: str) -> None:
    if len(text) > MAX_BYTES:
        raise _StopReadingError(1, 1, TOO_LARGE)
    if found := _UNPRINTABLE.search(text):
        before = text[: found.start()]
        line, column = before.count("\n") + 1, found.start() - before.rfind("\n")
        code = f"U+{ord(found[0]):04X}"
        raise _StopReadingError(line, column, f"not valid YAML: the control character {code}")


def _in_plain_words(error: yaml.MarkedYAMLError) -> _StopReadingError:
    if error.context in ("while scanning an alias", "while scanning an anchor"):
        mark = error.context_mark or error.problem_mark
        what = _ALIAS if error.context.endswith("alias") else _ANCHOR
    else:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "it cannot be read"
        what = f"not valid YAML: {_PLAIN_WORDS.get(problem, problem)}"
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    return _StopReadingError(line, column, what)


class _Reader:
    """Builds the tree from the parser's events; recursion is bounded by MAX_DEPTH."""

    def __init__(self, text: str, document: Document) -> None:
        self._events = self._parse(text)
        self._into = document

    @staticmethod
    def _parse(text: str) -> Iterator[yaml.Event]:
        try:
            yield from yaml.parse(text, Loader=yaml.CLoader)
        except yaml.MarkedYAMLError as error:
            raise _in_plain_words(error) from None
        except yaml.YAMLError:
            raise _StopReadingError(1, 1, "not valid YAML: it cannot be read") from None

    def document(self) -> None:
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if self._into.values:
                    place = _place(event)
                    raise _StopReadingError(*place, "more than one document: keep only one")
                self._into.tree = self._node(next(self._events), ())

    def _node(self, event: yaml.Event, steps: Steps) -> Tree:
        """Read one node, the event that begins it in hand, up to its end."""
        place = _place(event)
        self._into.values[steps] = place
        if len(steps) > MAX_DEPTH:
            raise _StopReadingError(*place, f"nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            self._unread(place, steps, _ALIAS)
            return None
        if getattr(event, "anchor", None) is not None:
            self._mistake(place, steps, "an anchor is not allowed: write the value where it counts")
        node: Tree
        if isinstance(event, yaml.MappingStartEvent):
            node = self._mapping(steps)
        elif isinstance(event, yaml.SequenceStartEvent):
            node = self._sequence(steps)
        else:
            assert isinstance(event, yaml.ScalarEvent)  # noqa: S101 - the only other node
            node = _scalar(event)
        if getattr(event, "tag", None) is not None:
            self._unread(place, steps, "a tag is not allowed: a value is what it looks like")
            return None
        return node

    def _sequence(self, steps: Steps) -> list[Tree]:
        items: list[Tree] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            items.append(self._node(event, (*steps, len(items))))
        return items

    def _mapping(self, steps: Steps) -> dict[str, Tree]:
        found: dict[str, Tree] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            place = _place(event)
            if (name := self._key(event, steps)) is None:
                self._skip(next(self._events))
            elif (first := self._into.keys.get((*steps, name))) is not None:
                what = f"this key is already on line {first.line}"
                self._mistake(place, (*steps, name), what)
                self._skip(next(self._events))
            else:
                self._into.keys[*steps, name] = place
                found[name] = self._node(next(self._events), (*steps, name))
        return found

    def _key(self, event: yaml.Event, steps: Steps) -> str | None:
        """Return a key's text; None, after noting why, if it is none."""
        place = _place(event)
        if isinstance(event, yaml.AliasEvent):
            self._mistake(place, steps, _ALIAS)
            return None
        if not isinstance(event, yaml.ScalarEvent):
            self._skip(event)
            self._mistake(place, steps, "a key must be text, on one line")
            return None
        name: str = event.value
        if event.tag is not None or event.anchor is not None:
            self._mistake(place, (*steps, name), "a key can have neither a tag nor an anchor")
        elif name == "<<" and event.implicit[0]:
            what = "a merge key is not allowed: write the keys where they count"
            self._mistake(place, (*steps, name), what)
        else:
            return name
        return None

    def _skip(self, event: yaml.Event) -> None:
        """Pass over one node and all that is in it."""
        depth = 0
        while True:
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            if depth == 0:
                return
            event = next(self._events)

    def _unread(self, place: Place, steps: Steps, what: str) -> None:
        self._mistake(place, steps, what)
        self._into.unread.add(dotted(steps))

    def _mistake(self, place: Place, steps: Steps, what: str) -> None:
        self._into.mistakes.append(Mistake(*place, dotted(steps), what))


def _place(event: yaml.Event) -> Place:
    mark = event.start_mark
    return Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1)


def _scalar(event: yaml.ScalarEvent) -> Tree:
    text: str = event.value
    if not event.implicit[0]:  # quoted, or a block: always text
        return text
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
