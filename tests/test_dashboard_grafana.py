"""The dashboard against Grafana's own types, which its makers publish as a package."""

import copy
import enum
import json
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import prometheus, units
from grafana_foundation_sdk.models.dashboard import Dashboard, Panel

from queries import Json, dashboard, panels

# What Grafana's Prometheus source reads, though the type of an annotation does not have it.
UNTYPED = {"$.annotations.list[0].titleFormat", "$.annotations.list[1].titleFormat"}
UNITS = {value for name, value in vars(units).items() if isinstance(value, str) and name[0] != "_"}


def lost(before: Any, after: Any, path: str = "$") -> Iterator[str]:
    """Yield where something that is in `before` is not in `after`, or is something else."""
    match before, after:
        case dict(), dict():
            for name, value in before.items():
                yield from lost(value, after.get(name), f"{path}.{name}")
        case list(), list() if len(before) == len(after):
            for at, value in enumerate(before):
                yield from lost(value, after[at], f"{path}[{at}]")
        case _ if before != after:
            yield path


def misfits(value: Any, hints: Iterable[Any], path: str = "$") -> Iterator[str]:
    """Yield where a value is of none of these types; Grafana's own objects are looked into."""
    arms = [arm for hint in hints for arm in (typing.get_args(hint) if _union(hint) else (hint,))]
    known = [arm for arm in arms if hasattr(arm, "from_json")]
    if isinstance(value, dict) and len(known) == 1:  # some are left as they came
        given, value = value, known[0].from_json(value)
        yield from lost(given, value.to_json(), path)
    if not any(_fits(value, arm) for arm in arms):
        yield f"{path}: {value!r}"
    elif hasattr(value, "to_json"):
        for name, declared in typing.get_type_hints(type(value)).items():
            yield from misfits(getattr(value, name), (declared,), f"{path}.{name}")
    elif isinstance(value, list | dict):
        inner = [typing.get_args(arm)[-1] for arm in arms if typing.get_args(arm)] or [object]
        for at, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from misfits(each, inner, f"{path}.{at}")


def _union(hint: Any) -> bool:
    return typing.get_origin(hint) in {typing.Union, types.UnionType}


def _fits(value: Any, arm: Any) -> bool:
    """Tell whether a value is of one type, what is in it left aside."""
    origin = typing.get_origin(arm)
    if arm in {object, Any}:
        return True
    if origin is typing.Literal:
        return value in typing.get_args(arm)
    if origin is not None:
        return isinstance(value, origin)
    if issubclass(arm, enum.Enum):
        return value in [each.value for each in arm]
    if isinstance(value, bool):
        return arm is bool
    return isinstance(value, (int, float) if arm is float else arm)


def read(page: Json) -> tuple[Dashboard, list[str]]:
    """Read a page as Grafana's types have it; what is lost thereby, and what does not fit."""
    register_default_plugins()
    model = Dashboard.from_json(page)
    written = json.loads(json.dumps(model, cls=JSONEncoder))
    gone = [path for path in lost(page, written) if path not in UNTYPED]
    return model, gone + list(misfits(model, (Dashboard,)))


def test_the_page_is_one_of_grafanas() -> None:
    """Grafana's types know every field of the page, and every value is one that they allow."""
    model, wrong = read(dashboard())
    assert wrong == []
    shown = [panel for panel in model.panels or [] if isinstance(panel, Panel)]
    assert len(shown) == len(panels())
    for panel in shown:  # each kind of panel is known, with its own options
        assert type(panel.options).__module__.startswith("grafana_foundation_sdk."), panel.title
        assert all(isinstance(each, prometheus.Dataquery) for each in panel.targets or []), panel


def test_units_are_grafanas() -> None:
    """Each panel's unit is one that Grafana has."""
    used = {panel["fieldConfig"]["defaults"]["unit"] for panel in panels()}
    assert used <= UNITS


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ((), "titel", "x"),
        ((), "schemaVersion", "39"),
        (("panels", 1), "descripton", "x"),
        (("panels", 1, "options"), "graphMode", "lines"),
        (("panels", 1, "gridPos"), "w", "3"),
        (("panels", 1, "targets", 0), "legend", "x"),
        (("panels", 10, "fieldConfig", "defaults", "custom"), "drawStyle", "pencil"),
        (("panels", 31, "transformations", 0), "idd", "x"),
        (("templating", "list", 1), "sort", "up"),
    ],
)
def test_a_mistake_is_seen(place: tuple[Any, ...], name: str, value: object) -> None:
    """A name or a value that Grafana does not know is found, wherever it is."""
    page = copy.deepcopy(dashboard())
    node: Any = page
    for step in place:
        node = node[step]
    node[name] = value
    assert read(page)[1] != []
