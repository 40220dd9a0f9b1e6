"""What is allowed but doubtful: the warnings of a configuration that can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiproxy.config.globs import glob_covers, globs_overlap, is_glob
from aiproxy.config.units import format_size, is_loopback, shown

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from aiproxy.config.document import Document, Mistake
    from aiproxy.config.model import Config, Key, Limits


def warnings(config: Config, document: Document, now: datetime) -> Iterator[Mistake]:
    """Yield the warnings of a configuration, with their places in its file."""
    yield from _listeners(config, document)
    yield from _upstreams(config, document)
    yield from _routes(config, document)
    yield from _sessions(config, document)
    if not config.keys:
        yield document.mistake(("keys",), "there is no key, so no client can call")
    for key in config.keys.values():
        yield from _key(key, config, document, now)


def _listeners(config: Config, document: Document) -> Iterator[Mistake]:
    if not config.listen.is_loopback:
        yield document.mistake(
            ("listen",),
            "is beyond loopback, and aiproxy ends no TLS: put HAProxy, Caddy or nginx before it",
        )
    if not config.admin.is_loopback:
        yield document.mistake(
            ("admin",), "is beyond loopback: whoever reaches it can read the metrics"
        )
    if config.max_buffered < config.max_body:
        what = f"is less than max_body, {format_size(config.max_body)}: larger bodies get 503"
        yield document.mistake(("max_buffered",), what)


def _sessions(config: Config, document: Document) -> Iterator[Mistake]:
    sessions = config.sessions
    if sessions.max_bytes < sessions.max_replay:
        what = (
            f"is less than max_replay, {format_size(sessions.max_replay)}: a conversation that"
            " outgrows it cannot be kept"
        )
        yield document.mistake(("sessions", "max_bytes"), what)


def _upstreams(config: Config, document: Document) -> Iterator[Mistake]:
    for name, upstream in config.upstreams.items():
        url = urlsplit(upstream.url)
        if upstream.credential and url.scheme == "http" and not is_loopback(url.hostname or ""):
            what = "the credential crosses the network in clear: use https"
            yield document.mistake(("upstreams", name, "url"), what)


def _routes(config: Config, document: Document) -> Iterator[Mistake]:
    first: dict[str, int] = {}
    globs: list[str] = []
    for index, route in enumerate(config.routes):
        covering = [glob for glob in globs if glob_covers(glob, route.model)]
        if other := route.model if route.model in first else next(iter(covering), None):
            what = f"never used: routes[{first[other]}], {shown(other)}, always matches first"
            yield document.mistake(("routes", index, "model"), what)
        first.setdefault(route.model, index)
        if route.is_glob:
            globs.append(route.model)


def _key(key: Key, config: Config, document: Document, now: datetime) -> Iterator[Mistake]:
    steps = ("keys", key.name)
    for index, model in enumerate(key.models or ()):
        if is_glob(model) and not any(globs_overlap(model, r.model) for r in config.routes):
            yield document.mistake((*steps, "models", index), "matches no route")
    if key.expires is not None and key.expires <= now:
        yield document.mistake((*steps, "expires"), "is past: this key is refused")
    limits = key.limits or config.keys_default.limits
    if not key.disabled and not _limits_something(limits):
        yield document.mistake(steps, "has no limit", at_key=True)


def _limits_something(limits: Limits | None) -> bool:
    return limits is not None and bool(limits.requests or limits.tokens or limits.concurrent)
