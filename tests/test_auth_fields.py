"""Which fields a key may use."""

import json
from typing import Any

import pytest

from aiproxy import auth
from aiproxy.config import Key
from aiproxy.envelope import Envelope
from aiproxy.errors import ProxyError

REFUSED = "400 unsupported_parameter"


def permit(deny: list[str], body: bytes) -> str | None:
    """What a body is refused for: status, code and field; None: it is not."""
    key = Key.model_validate({"sha256": "0" * 64, "deny": deny})
    try:
        auth.permit(key, Envelope.parse(body))
    except ProxyError as error:
        return f"{error.status} {error.code} {error.param}"
    return None


def tools(*given: Any) -> dict[str, Any]:
    """A body with these tools."""
    return {"tools": list(given)}


NESTED = {"type": "namespace", "name": "n", "tools": [{"type": "web_search"}]}


@pytest.mark.parametrize(
    ("denied", "fields", "refused"),
    [
        ("service_tier", {"service_tier": "auto"}, True),
        ("service_tier", {"service_tier": None}, False),
        ("service_tier", {"metadata": {"service_tier": "x"}}, False),
        ("store", {"store": False}, True),
        ("tools.web_search", tools({"type": "web_search"}), True),
        ("tools.web_search", tools({"type": "function"}, {"type": "web_search"}), True),
        ("tools.web_search", tools({"type": "web_search_preview"}), True),
        ("tools.web_search", tools({"type": "web_search_2025_08_26"}), True),
        ("tools.web_search", tools({"type": "web_searcher"}), False),
        ("tools.web_search", tools({"type": "function", "name": "web_search"}), False),
        ("tools.web_search", tools(NESTED), True),
        ("tools.web_search", tools({**NESTED, "tools": [NESTED]}), True),
        ("tools.web_search", tools({**NESTED, "type": "function"}), True),
        ("tools.web_search", {"tools": {"web_search": {}}}, True),
        ("tools.web_search", {"tools": "web_search"}, False),
        ("tools.web_search", tools(5, None, "web_search_x", [], {"type": 7}), False),
        ("reasoning.effort", {"reasoning": {"effort": "high"}}, True),
        ("reasoning.effort", {"reasoning": {"effort": None}}, False),
        ("reasoning.effort", {"reasoning": {"summary": "auto"}}, False),
        ("text.format.schema", {"text": {"format": {"schema": {}}}}, True),
        ("text.format.schema", {"text": {"format": {"type": "text"}}}, False),
        ("include.file_search_call.results", {"include": ["file_search_call.results"]}, True),
        ("include.file_search_call.results", {"include": ["file_search_call"]}, False),
    ],
)
def test_what_is_denied(denied: str, fields: dict[str, Any], refused: bool) -> None:  # noqa: FBT001
    """A field, a member of an object, a text or a type in a list: where it is, it is refused."""
    body = json.dumps({"model": "m", "input": "x", **fields}).encode()
    assert permit(["other", denied], body) == (f"{REFUSED} {denied}" if refused else None)


@pytest.mark.parametrize(
    "body",
    [
        rb'{"tools": [{"type": "web\u005fsearch"}]}',
        rb'{"t\u006fols": [{"typ\u0065": "web_search"}]}',
        rb'{"tools": [{"type": "web_search", "type": "function"}]}',
        rb'{"tools": [{"type": "function", "type": "web_search"}]}',
        b'{"tools": [ \n{ "type"\t:\r"web_search" } ]}',
    ],
)
def test_no_spelling_gets_through(body: bytes) -> None:
    """Escapes, white space and keys given twice hide nothing from whoever reads it upstream."""
    assert permit(["tools.web_search"], body) == f"{REFUSED} tools.web_search"


def test_of_a_key_given_twice_the_sent_one_counts() -> None:
    """At the top level only the last goes upstream, so only that is judged."""
    body = b'{"service_tier": "auto", "service_tier": null}'
    assert permit(["service_tier"], body) is None
