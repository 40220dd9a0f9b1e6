"""Rules that join several stanzas, and what this version does not do yet.

They look at the tree, not at the model made of it, so that a file is told all its mistakes at once:
what is not of the right kind is passed over here, for the grammar refuses it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiproxy.config import texts
from aiproxy.config.globs import glob_covers, is_glob
from aiproxy.config.sentences import did_you_mean
from aiproxy.config.units import parse_address, parse_duration, parse_size, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from aiproxy.config.document import Document, Mistake, Steps

NOT_YET: Mapping[str, str | int | bool] = {
    "limiter.store": "memory:",
    "limiter.on_error": "degrade",
    "streams.on_disconnect": "cancel",
}
"""Keys whose function comes in a later version, with the only value they may have until then, their
default. A version that brings a function drops its line."""


def not_yet(document: Document) -> Iterator[Mistake]:
    """Yield a mistake for each key that asks for what this version does not do."""
    for pattern, default in NOT_YET.items():
        for steps, value in document.find(pattern):
            if not _same(value, default):
                text = str(default).lower() if isinstance(default, bool) else default
                yield document.mistake(
                    steps, f"not supported yet: only the default, {text}, is accepted"
                )

    for steps, store in _texts(document, "sessions.store"):
        if store.startswith("redis"):
            yield document.mistake(steps, "redis is not supported yet: use memory: or sqlite:PATH")


def _same(value: object, default: object) -> bool:
    """Whether the file says the default, perhaps in another unit."""
    if type(value) is type(default) and value == default:
        return True
    for parse in (parse_duration, parse_size):
        try:
            return parse(value) == parse(default)
        except ValueError:
            continue
    return False


def references(document: Document) -> Iterator[Mistake]:
    """Yield a mistake for each stanza that does not fit with another one."""
    yield from _targets(document)
    yield from _lists(document)
    yield from _models_of_keys(document)
    yield from _hashes(document)
    yield from _authentication(document)
    yield from _addresses(document)


def _texts(document: Document, *patterns: str) -> list[tuple[Steps, str]]:
    return [
        (steps, value)
        for pattern in patterns
        for steps, value in document.find(pattern)
        if isinstance(value, str)
    ]


def _targets(document: Document) -> Iterator[Mistake]:
    names = {str(steps[-1]): None for steps, _ in document.find("upstreams.*")}
    if not names:
        return  # said already, once
    for steps, name in _texts(document, "routes.*.upstreams.*", "routes.*.upstreams.*.name"):
        if name not in names:
            hint = did_you_mean(name, names)
            yield document.mistake(steps, f"no upstream {shown(name)}{hint}")


def _lists(document: Document) -> Iterator[Mistake]:
    models = {steps[:2]: model for steps, model in _texts(document, "routes.*.model")}
    for steps, _ in document.find("routes.*.list"):
        if steps[:2] in models and not is_glob(models[steps[:2]]):
            what = "only a glob has a list: the model of this route is one name"
            yield document.mistake(steps, what, at_key=True)
    for steps, name in _texts(document, "routes.*.list.*"):
        glob = models.get(steps[:2], "")
        if is_glob(name):
            yield document.mistake(steps, f"must be a name, not the glob {shown(name)}")
        elif is_glob(glob) and not glob_covers(glob, name):
            yield document.mistake(steps, f"{shown(name)} does not match {shown(glob)}")


def _models_of_keys(document: Document) -> Iterator[Mistake]:
    models = [model for _, model in _texts(document, "routes.*.model")]
    if not models:
        return  # said already, once
    names, globs = set(models), [model for model in models if is_glob(model)]
    for steps, name in _texts(document, "keys.*.models.*"):
        if is_glob(name) or name in names:
            continue
        if not any(glob_covers(glob, name) for glob in globs):
            yield document.mistake(steps, f"matches no route{did_you_mean(name, models)}")


def _hashes(document: Document) -> Iterator[Mistake]:
    owners: dict[str, str] = {}
    for steps, digest in _texts(document, "keys.*.sha256", "keys.*.sha256.*"):
        name = str(steps[1])
        owner = owners.setdefault(digest.lower(), name)
        if owner != name:
            what = f"the same hash as that of key {shown(owner)}: who calls would be ambiguous"
            yield document.mistake(steps, what)


def _authentication(document: Document) -> Iterator[Mistake]:
    schemes = {steps[:2]: auth for steps, auth in _texts(document, "upstreams.*.auth")}
    for steps, _ in document.find("upstreams.*.credential"):
        if schemes.get(steps[:2]) == "none":
            yield document.mistake((*steps[:2], "auth"), "is none, but there is a credential")
    seen: dict[tuple[Steps, str], str] = {}
    for steps, _ in document.find("upstreams.*.headers.*"):
        name, upstream = str(steps[-1]), steps[:2]
        auth = schemes.get(upstream, "auto")
        if name.lower() in texts.AUTH_HEADERS.get(auth, ()):
            what = f"with auth: {auth} this header carries the credential"
            yield document.mistake(steps, what, at_key=True)
        first = seen.setdefault((upstream, name.lower()), name)
        if first != name:
            what = f"the same header as {shown(first)}: case makes no difference"
            yield document.mistake(steps, what, at_key=True)


def _addresses(document: Document) -> Iterator[Mistake]:
    written = dict(document.find("listen")) | dict(document.find("admin"))
    try:
        listen = parse_address(written.get(("listen",), "127.0.0.1:8080"))
        admin = parse_address(written.get(("admin",), "127.0.0.1:9090"))
    except ValueError:
        return  # the grammar says which
    if admin.clashes(listen):
        if ("admin",) in written:
            yield document.mistake(("admin",), f"clashes with listen, {listen}")
        else:
            yield document.mistake(("listen",), f"clashes with admin, {admin}")
