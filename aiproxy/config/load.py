"""A file -> a configuration, or every mistake in it at once.

The passes, in order: YAML (`document`), grammar (`model`), rules that join stanzas and what this
version does not do yet (`rules`), secrets and certificates (`credentials`), what tracing needs
(`collector`); then, if nothing is wrong, the warnings (`advice`). A pass says nothing of what an
earlier one has already refused.
"""

from __future__ import annotations

import codecs
import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from pydantic import SecretStr, ValidationError

from aiproxy.config import advice, collector, credentials, rules, sentences
from aiproxy.config.document import (
    MAX_BYTES,
    TOO_LARGE,
    ConfigError,
    Document,
    Mistake,
    dotted,
    parse,
)
from aiproxy.config.model import Config

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path


class Loaded(NamedTuple):
    """A configuration that can be used, and what is doubtful in it."""

    config: Config
    warnings: list[Mistake]


def load(path: Path, *, environ: Mapping[str, str]) -> Loaded:
    """Read the file, the secrets it refers to and the certificates.

    Args:
        path: Of the file, UTF-8, at most 1 MiB.
        environ: For `credential: {env: NAME}` and `$CREDENTIALS_DIRECTORY`.

    Raises:
        ConfigError: The file cannot be read or used.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        code = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(code) if code else "the path is wrong"
        raise ConfigError([Mistake(1, 1, "", f"cannot be read: {reason}")], path) from None
    if len(data) > MAX_BYTES:
        raise ConfigError([Mistake(1, 1, "", TOO_LARGE)], path)
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode()
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigError([Mistake(line, column, "", "is not UTF-8")], path) from None
    return loads(text, path=path, environ=environ)


def loads(
    text: str, *, path: Path, environ: Mapping[str, str], now: datetime | None = None
) -> Loaded:
    """Read a text as `load` reads the file at `path`, which is named in the error.

    `now` is when keys are judged to have expired; default: at this moment.
    """
    document = parse(text)
    if not document.readable:
        raise ConfigError(_in_order(document.mistakes), path)
    if document.tree is None and not document.mistakes:
        document.tree = {}
    if isinstance(document.tree, dict) and document.tree.get("keys", ...) is None:
        document.tree["keys"] = {}  # `keys:` with nothing below it yet
    secrets, mistakes = credentials.read_credentials(document, environ)
    mistakes += credentials.check_authorities(document)
    mistakes += collector.check_collector(document, environ)
    config, wrong = _check(document, secrets, mistakes)
    if config is None or wrong:
        raise ConfigError(_in_order(wrong), path)
    return Loaded(config, _in_order(advice.warnings(config, document, now or datetime.now(UTC))))


def _check(
    document: Document, secrets: Mapping[str, SecretStr], outside: list[Mistake]
) -> tuple[Config | None, list[Mistake]]:
    """Return the configuration, if the grammar makes one, and all mistakes but consequences."""
    empty = [
        document.mistake(steps, "has no value: give it one, or leave it out")
        for steps in document.empty()
        if dotted(steps) not in document.unread
    ]
    refused = document.unread | {mistake.where for mistake in empty}
    config, grammar = _validate(document, secrets)
    grammar = [mistake for mistake in grammar if not _within(mistake.where, refused)]
    refused |= {mistake.where for mistake in grammar}
    later = [
        mistake
        for mistake in (*rules.references(document), *outside)
        if not _within(mistake.where, refused)
    ]
    # A stanza that is not supported yet says so once its grammar is right, all below it included.
    unsupported = [
        mistake
        for mistake in rules.not_yet(document)
        if not _within(mistake.where, refused)
        and not any(_within(where, {mistake.where}) for where in refused)
    ]
    return config, [*document.mistakes, *empty, *grammar, *later, *unsupported]


def _validate(
    document: Document, secrets: Mapping[str, SecretStr]
) -> tuple[Config | None, list[Mistake]]:
    try:
        return Config.model_validate(document.tree, context=secrets), []
    except ValidationError as error:
        return None, sentences.mistakes(error, document)


def _within(where: str, roots: Iterable[str]) -> bool:
    """Whether a dotted path is one of the roots or below one."""
    return any(
        not root or where == root or where.startswith((f"{root}.", f"{root}[")) for root in roots
    )


def _in_order(mistakes: Iterable[Mistake]) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: (mistake.line, mistake.column))
