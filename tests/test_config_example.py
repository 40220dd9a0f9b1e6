"""The reference file, the JSON Schema and what is not supported yet, against the grammar."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aiproxy.config import Config, json_schema, load, loads
from aiproxy.config.rules import NOT_YET

EXAMPLE = Path(__file__).parent.parent / "etc" / "aiproxy.yaml"
MINIMAL = "upstreams: {u: {url: http://h, apis: [chat]}}\nroutes: [{model: m, upstreams: [u]}]\n"


def stanzas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the schemas of all mappings with known keys."""
    yield from (node for node in (schema, *schema["$defs"].values()) if "properties" in node)


def at(schema: dict[str, Any], pattern: str) -> dict[str, Any]:
    """Return the schema of the key at a dotted pattern, in which * is any name or item."""
    node = schema
    for step in pattern.split("."):
        for _ in range(2):
            node = next((n for n in node.get("anyOf", []) if "$ref" in n), node)
            if "$ref" in node:
                node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if step == "*":
            (node,) = [node["items"]] if "items" in node else node["patternProperties"].values()
        else:
            node = node["properties"][step]
    return node


def test_the_example_passes() -> None:
    """The reference file can be used as it is, without a key, and says the defaults."""
    config, warnings = load(EXAMPLE, environ={})
    default = loads(MINIMAL, path=EXAMPLE, environ={}).config

    assert [warning.what for warning in warnings] == ["there is no key, so no client can call"]
    for name in Config.model_fields.keys() - {"upstreams", "routes"}:
        assert getattr(config, name) == getattr(default, name)
    own, plain = config.upstreams["local"], default.upstreams["u"]
    for name in type(own).model_fields.keys() - {"url"}:
        assert getattr(own, name) == getattr(plain, name)


def test_the_example_has_every_key() -> None:
    """Every key of the grammar is in the reference file, in force or in a comment."""
    text = EXAMPLE.read_text()
    for stanza in stanzas(json_schema()):
        for key in stanza["properties"]:
            assert f"{key}:" in text or f"{key} (" in text or f", {key}," in text, key


def test_every_stanza_is_closed() -> None:
    """An editor is told of unknown keys, of what each key means, and never offers null."""
    schema = json_schema()

    for stanza in stanzas(schema):
        assert stanza["additionalProperties"] is False
        assert stanza["description"]
        for key, described in stanza["properties"].items():
            assert "description" in described or "$ref" in described, key
            assert {"type": "null"} not in described.get("anyOf", [])
            assert described.get("default", "") is not None


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("client_keepalive", {"type": "string", "default": "75s"}),
        ("max_body", {"type": "string", "default": "32MiB"}),
        ("listen", {"type": "string", "default": "127.0.0.1:8080"}),
        ("max_connections", {"type": "integer", "default": 4096, "minimum": 1}),
        ("keys", {"type": ["object", "null"]}),
        ("upstreams.*.timeouts.idle", {"type": "string"}),
        ("upstreams.*.url", {"type": "string"}),
        ("routes.*.list", {"type": "array"}),
    ],
)
def test_the_schema_is_of_the_file(pattern: str, expected: dict[str, Any]) -> None:
    """The schema describes what is written, defaults included, and not the values made of it."""
    assert expected.items() <= at(json_schema(), pattern).items()


@pytest.mark.parametrize("pattern", NOT_YET)
def test_what_is_not_supported_yet_has_its_default(pattern: str) -> None:
    """Each line of the table is a key of the grammar, with the grammar's own default."""
    assert at(json_schema(), pattern).get("default") == NOT_YET[pattern]
