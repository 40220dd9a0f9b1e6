"""Objects of the upstream's account that a request names: files, vector stores, stored prompts.

All keys share the account, so whoever knows the id of such an object gets at it. A route can refuse
them (`account_objects: refuse`). What is looked at is what any reader could read: of a name that is
given twice both values count.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from aiproxy import errors

if TYPE_CHECKING:
    from collections.abc import Iterator

# By these names the APIs take ids (API references, "Create a response", "Create chat completion",
# "Create a message").
_IDS = frozenset(
    {"file_id", "file_ids", "vector_store_id", "vector_store_ids", "container_id", "skill_id"}
)
# What is the client's own data, whatever its names are: schemas, arguments, notes.
_OPAQUE = frozenset({"parameters", "input_schema", "output_schema", "schema", "metadata"})
_NAMES = "|".join(sorted(_IDS | {"container", "prompt"}))
_MARK = re.compile(rf'"(?:{_NAMES})"|\\u00[2-7]'.encode())


class _Object(list[tuple[str, Any]]):
    """The members of an object, in order; one given twice is there twice."""


_read = json.JSONDecoder(object_pairs_hook=_Object, parse_int=len, parse_float=len).decode


def marked(body: bytes) -> bool:
    """Whether a body may name any, at a glance."""
    return _MARK.search(body) is not None


def refuse(body: bytes) -> None:
    """Refuse a body, a valid JSON object, that names any.

    Raises:
        ProxyError: `unsupported_parameter`, with its place as `param`.
    """
    for place in _places(_read(body.decode("utf-8", "surrogatepass")), ""):
        raise errors.unsupported_parameter(
            place,
            f"'{errors.shown(place)}' names an object of the upstream's account, which this model"
            " does not take here.",
        )


def _places(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, _Object):
        for name, inner in value:
            here = f"{place}.{name}" if place else name
            if _names_one(name, inner, top=not place):
                yield here
            elif name not in _OPAQUE and not (name == "input" and _is_call(value)):
                yield from _places(inner, here)
    elif isinstance(value, list):
        for position, inner in enumerate(value):
            yield from _places(inner, f"{place}[{position}]")


def _names_one(name: str, value: Any, *, top: bool) -> bool:
    if name in _IDS:
        return bool(value)
    if name == "container":  # an object says how to make one
        return isinstance(value, str) and bool(value)
    if name == "prompt" and top:
        return isinstance(value, _Object) and any(each == "id" and bool(of) for each, of in value)
    return False


def _is_call(item: _Object) -> bool:
    """Whether its `input` is what a model gave to a tool."""
    return any(
        name == "type" and isinstance(kind, str) and kind.endswith(("tool_use", "tool_call"))
        for name, kind in item
    )
