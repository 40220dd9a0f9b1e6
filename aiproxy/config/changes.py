"""What a reload changes: names, never values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from aiproxy.config.fields import Stanza

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aiproxy.config.model import Config

RESTART = ("listen", "admin", "sessions.store", "limiter.store")
"""Keys whose values are taken at the start alone."""

_NAMED = frozenset({"upstreams", "routes", "keys"})


@dataclass(frozen=True, slots=True)
class Names:
    """Stanzas by name."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """The difference between two configurations.

    Attributes:
        upstreams, keys: by name; a new credential is a change of its upstream.
        routes: by model.
        settings: other keys of the file; `routes order` where only that is another.
        restart: keys that are another in the file, and stay as they are until a restart.
    """

    upstreams: Names = Names()
    routes: Names = Names()
    keys: Names = Names()
    settings: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)

    def fields(self) -> dict[str, list[str]]:
        """What there is of it, flat, for a log line: `keys_added` and so on."""
        flat: dict[str, Any] = {}
        for name, value in self.document().items():
            if isinstance(value, dict):
                flat |= {f"{name}_{kind}": names for kind, names in value.items()}
            else:
                flat[name] = value
        return {name: list(names) for name, names in flat.items() if names}


def changes(old: Config, new: Config) -> Changes:
    """Return what is another in `new`. Takes a millisecond for a few stanzas, in all."""
    restart = tuple(key for key in RESTART if _at(old, key) != _at(new, key))
    was, is_now = _own(old), _own(new)
    settings = [
        name
        for name in type(new).model_fields
        if name not in _NAMED and _but(was, name, restart) != _but(is_now, name, restart)
    ]
    before, after = ([route.model for route in config.routes] for config in (old, new))
    if before != after and sorted(before) == sorted(after):
        settings.append("routes order")
    return Changes(
        _names(_upstreams(old), _upstreams(new)),
        _names(_routes(old), _routes(new)),
        _names(was["keys"], is_now["keys"]),
        tuple(settings),
        restart,
    )


def pinned(old: Config, new: Config) -> Config:
    """Return `new` with the values that need a restart as they are in `old`."""
    update: dict[str, Any] = {}
    for key in RESTART:
        name, _, inner = key.partition(".")
        value = getattr(old, name)
        if inner:
            value = getattr(new, name).model_copy(update={inner: getattr(value, inner)})
        update[name] = value
    return new.model_copy(update=update)


def _at(config: Config, key: str) -> object:
    value: object = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _own(value: Any) -> Any:
    """What a stanza says itself, as plain data: without what was bound to it from elsewhere."""
    if isinstance(value, Stanza):
        return {name: _own(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple):
        return tuple(map(_own, value))
    if isinstance(value, Mapping):
        return {name: _own(inner) for name, inner in value.items()}
    return value


def _but(whole: Mapping[str, Any], name: str, restart: Iterable[str]) -> Any:
    """A stanza without its keys that need a restart."""
    if name in restart:
        return None
    value = whole[name]
    if not isinstance(value, dict):
        return value
    return {inner: kept for inner, kept in value.items() if f"{name}.{inner}" not in restart}


def _upstreams(config: Config) -> dict[str, Any]:
    return {name: (_own(it), it.credential) for name, it in config.upstreams.items()}


def _routes(config: Config) -> dict[str, Any]:
    found: dict[str, list[Any]] = {}
    for route in config.routes:
        found.setdefault(route.model, []).append(_own(route))
    return found


def _names(old: Mapping[str, Any], new: Mapping[str, Any]) -> Names:
    return Names(
        tuple(name for name in new if name not in old),
        tuple(name for name in old if name not in new),
        tuple(name for name in new if name in old and new[name] != old[name]),
    )
