"""README.md as a stranger reads it: its code blocks, and a command that runs them top to bottom.

    python tests/readme.py [FILE]     with the aiproxy of this interpreter, as the suite does
    python tests/readme.py --fresh    with a copy of the tree and an environment of its own

Every block has a language, and directly before it a comment, which no page shows, that says what
becomes of it:

    <!-- run -->                            a command that must succeed
    <!-- run: on a fresh machine -->        the same with --fresh alone: it installs something
    <!-- run: on a fresh machine, the first N lines -->
    <!-- terminal: until PORT listens -->   in a terminal of its own, which stays open
    <!-- file: NAME -->                     is written to this file
    <!-- output -->                         is said by the command before, ... being any text
    <!-- part of a configuration -->        passes `aiproxy check`, with what it leaves to others
    <!-- against a scripted upstream -->    a program, which test_readme runs so
    <!-- not run: REASON -->
"""
# ruff: noqa: T201 - a program for a terminal prints

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stranger import Stranger, StrangerError

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

KINDS = {
    "run": r"run",
    "fresh": r"run: on a fresh machine(?:, the first (?P<lines>\d+) lines)?",
    "terminal": r"terminal: until (?P<port>\d+) listens",
    "file": r"file: (?P<name>[\w.-]+)",
    "output": r"output",
    "configuration": r"part of a configuration",
    "scripted": r"against a scripted upstream",
    "shown": r"not run: (?P<reason>\w.*)",
}
LANGUAGES = {
    "run": {"sh"},
    "fresh": {"sh"},
    "terminal": {"sh"},
    "file": {"yaml", "python"},
    "output": {"text"},
    "configuration": {"yaml"},
    "scripted": {"python"},
    "shown": {"sh", "toml", "text", "yaml", "python", "json"},
}


class ReadmeError(Exception):
    """A block cannot be used; the message begins with its place."""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        line: of its fence, from 1.
        kind: what becomes of it, a key of `KINDS`.
        given: what the comment says besides: `lines`, `port`, `name` or `reason`.
    """

    line: int
    language: str
    kind: str
    given: dict[str, str]
    text: str


def blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a document in Markdown.

    Raises:
        ReadmeError: one has no language, no comment or a wrong one, or no end.
    """
    found: list[Block] = []
    lines = enumerate(text.splitlines(), start=1)
    before = ""
    for number, line in lines:
        if line.lstrip().startswith(("```", "~~~")):
            language = line.removeprefix("```")
            kind, given = _kind(number, language, before)
            inside = list(_until_fence(number, lines))
            found.append(Block(number, language, kind, given, "".join(inside)))
        before = line
    return found


def _kind(number: int, language: str, comment: str) -> tuple[str, dict[str, str]]:
    if not re.fullmatch("[a-z]+", language):
        raise ReadmeError(f"{number}: the block has no language")
    for kind, pattern in KINDS.items():
        if said := re.fullmatch(f"<!-- {pattern} -->", comment):
            if language not in LANGUAGES[kind]:
                raise ReadmeError(f"{number}: {language} cannot be {comment}")
            return kind, {name: value for name, value in said.groupdict().items() if value}
    raise ReadmeError(f"{number}: no comment before the block says what becomes of it")


def _until_fence(number: int, lines: Iterator[tuple[int, str]]) -> Iterator[str]:
    for _, line in lines:
        if line == "```":
            return
        yield f"{line}\n"
    raise ReadmeError(f"{number}: the block has no end")


# A part of a configuration, and what it leaves to others

_REST: dict[str, Any] = {"url": "http://127.0.0.1:8001/v1", "apis": ["chat"]}


def completed(part: str) -> str:
    """Return a part of a configuration as a whole one: upstreams that it names, and a route.

    Raises:
        TypeError: it is no mapping.
    """
    given = yaml.safe_load(part)
    if not isinstance(given, dict):
        raise TypeError("no mapping")
    upstreams = dict(given.get("upstreams", {}))
    routes = list(given.get("routes", ()))
    targets = [target for route in routes for target in route["upstreams"]]
    for target in targets or ["other"]:
        name = target["name"] if isinstance(target, dict) else target
        upstreams.setdefault(name, _REST)
    routes = routes or [{"model": "other", "upstreams": [next(iter(upstreams))]}]
    whole = {**given, "upstreams": upstreams, "routes": routes}
    return yaml.dump(whole, Dumper=_Plain, sort_keys=False)


class _Plain(yaml.SafeDumper):
    """Writes everything in full: the configuration refuses anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


# From top to bottom


def follow(stranger: Stranger, given: list[Block]) -> Iterator[tuple[Block, str]]:
    """Do with each block what its comment says; yield those that were run, and what they said.

    Raises:
        ReadmeError: something did not go as README says.
    """
    said = ""
    for block in given:
        try:
            match block.kind:
                case "run":
                    said = stranger.run(block.text)
                case "fresh" if stranger.fresh:
                    lines = block.text.splitlines(keepends=True)
                    said = stranger.run("".join(lines[: int(block.given.get("lines", len(lines)))]))
                case "terminal":
                    stranger.open_terminal(block.text, int(block.given["port"]))
                case "file":
                    stranger.write(block.given["name"], block.text)
                case "output":
                    _compare(block.text, said)
                case _:
                    continue
        except (StrangerError, ValueError) as error:
            raise ReadmeError(f"{block.line}: {error}") from error
        yield block, said


def _compare(wanted: str, said: str) -> None:
    """Find the lines of an output in order, the same or with ... for what differs each time."""
    rest = said
    for line in wanted.splitlines():
        pattern = ".*".join(map(re.escape, line.split("...")))
        found = re.search(f"^{pattern}$", rest, re.MULTILINE)
        if not found:
            raise ValueError(f"the command did not say {line!r}, but\n{said}")
        rest = rest[found.end() :]


def main() -> int:
    """Follow README, or another file; return the exit code."""
    parser = argparse.ArgumentParser(description="run the code blocks of README.md")
    parser.add_argument("--fresh", action="store_true", help="in an environment of its own")
    parser.add_argument("file", type=Path, nargs="?", default=README, metavar="FILE")
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="aiproxy-readme-") as directory,
        Stranger(ROOT, Path(directory), fresh=given.fresh) as stranger,
    ):
        try:
            for block, _ in follow(stranger, blocks(given.file.read_text())):
                print(f"{given.file.name}:{block.line}: {block.kind}: ok", flush=True)
        except ReadmeError as error:
            print(f"{given.file.name}:{error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
