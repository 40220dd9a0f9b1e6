"""The JSON Schema of the file: what editors complete and check, and what a misspelt key meant."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import GenerateJsonSchema

from aiproxy.config.model import Config

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from pydantic.json_schema import JsonSchemaValue
    from pydantic_core import core_schema


class _OfTheFile(GenerateJsonSchema):
    """A key that may be left out may not be null: pydantic's None is the absence of the key."""

    def nullable_schema(self, schema: core_schema.NullableSchema) -> JsonSchemaValue:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
        described = super().default_schema(schema)
        if described.get("default", ...) is None:
            del described["default"]
        return described


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of the file, defaults as the file has them."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Config.model_json_schema(by_alias=True, schema_generator=_OfTheFile),
    }


def keys_at(steps: Sequence[str | int]) -> list[str]:
    """Return the keys that a mapping at these steps may have; none if it is no stanza."""
    nodes = [_schema()]
    for step in steps:
        nodes = [child for node in nodes for child in _children(node, step)]
    return [key for node in nodes for key in node.get("properties", {})]


@cache
def _schema() -> dict[str, Any]:
    return json_schema()


def _children(node: dict[str, Any], step: str | int) -> Iterator[dict[str, Any]]:
    if isinstance(step, int):
        found = [node["items"]] if "items" in node else []
    elif step in (known := node.get("properties", {})):
        found = [known[step]]
    else:
        found = list(node.get("patternProperties", {}).values())
    for child in found:
        yield from _alternatives(child)


def _alternatives(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a schema with its references followed, or each of those it is any of."""
    if "$ref" in node:
        yield _schema()["$defs"][node["$ref"].rpartition("/")[2]]
    elif "anyOf" in node:
        for one in node["anyOf"]:
            yield from _alternatives(one)
    else:
        yield node
