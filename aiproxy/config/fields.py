"""The kinds of values in the file, as pydantic types: read by `units` and `texts`.

Every type has its JSON Schema, for editors: that of the text in the file, not of the value made of
it. A dump in JSON mode gives the file's own spelling; secrets and hashes come out as HIDDEN.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    StringConstraints,
    WrapSerializer,
)

from aiproxy.config import texts, units

T = TypeVar("T")

HIDDEN = "**********"
"""Stands for a value that no dump, log line or status page shows."""


class Stanza(BaseModel):
    """A mapping of the file: frozen, and without keys that are not its own."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
        validate_default=True,
    )


def default(written: str) -> Any:
    """Give a field's default as the file would write it: it is read like a value of the file."""
    return Field(written)


def text_like(pattern: str, example: str) -> Any:
    """Return the type of a text in the file, for the JSON Schema of a value made from it."""
    return Annotated[str, Field(pattern=pattern, examples=[example])]


def one_or_many(value: object) -> object:
    """Make a list of a lone value."""
    return value if isinstance(value, list | tuple) else [value]


def _absolute(value: object) -> object:
    return texts.absolute(value) if isinstance(value, str) else value


def _dump_read_only(value: Any, handler: SerializerFunctionWrapHandler) -> Any:
    return handler(dict(value))


_as_text = PlainSerializer(str, return_type=str, when_used="json")
_without_password = PlainSerializer(
    lambda store: HIDDEN if "@" in store else store, return_type=str
)
_without_query = PlainSerializer(
    lambda url: f"{url.partition('?')[0]}?{HIDDEN}" if "?" in url else url, return_type=str
)
_hidden = PlainSerializer(lambda _: HIDDEN, return_type=str)

Duration = Annotated[
    float,
    PlainValidator(units.parse_duration, json_schema_input_type=text_like(units.DURATION, "30s")),
    PlainSerializer(units.format_duration, return_type=str, when_used="json"),
]
Size = Annotated[
    int,
    PlainValidator(units.parse_size, json_schema_input_type=text_like(units.SIZE, "32MiB")),
    PlainSerializer(units.format_size, return_type=str, when_used="json"),
]
Rate = Annotated[
    units.Rate,
    PlainValidator(units.parse_rate, json_schema_input_type=text_like(units.RATE, "600/min")),
    _as_text,
]
Address = Annotated[
    units.Address,
    PlainValidator(
        units.parse_address, json_schema_input_type=text_like(units.ADDRESS, "127.0.0.1:8080")
    ),
    _as_text,
]
Network = Annotated[
    IPv4Network | IPv6Network,
    PlainValidator(units.parse_network, json_schema_input_type=str),
    _as_text,
]
Expiry = Annotated[
    datetime,
    PlainValidator(
        units.parse_expiry, json_schema_input_type=text_like(units.EXPIRY, "2027-06-30")
    ),
    PlainSerializer(datetime.isoformat, return_type=str, when_used="json"),
]
Count = Annotated[int, Field(strict=True, ge=1, le=1_000_000_000)]
Name = Annotated[str, StringConstraints(pattern=texts.NAME)]
ModelName = Annotated[str, AfterValidator(texts.model)]
Url = Annotated[str, AfterValidator(texts.url), _without_query]
AbsolutePath = Annotated[Path, BeforeValidator(_absolute, json_schema_input_type=str)]
Variable = Annotated[
    str, AfterValidator(texts.variable), Field(json_schema_extra={"pattern": texts.VARIABLE})
]
Sha256 = Annotated[
    str,
    AfterValidator(texts.sha256),
    Field(json_schema_extra={"pattern": texts.SHA256}),
    _hidden,
]
Store = Annotated[
    str,
    AfterValidator(texts.store),
    Field(json_schema_extra={"pattern": texts.STORE}, repr=False),
    _without_password,
]
SharedStore = Annotated[
    str,
    AfterValidator(texts.shared_store),
    Field(json_schema_extra={"pattern": texts.SHARED_STORE}, repr=False),
    _without_password,
]
Named = Annotated[
    Mapping[Name, T],
    AfterValidator(MappingProxyType),
    WrapSerializer(_dump_read_only),
    Field(json_schema_extra={"additionalProperties": False}),
]
Headers = Annotated[
    Mapping[
        Annotated[str, AfterValidator(texts.header)],
        Annotated[str, AfterValidator(texts.header_value), _hidden],
    ],
    AfterValidator(MappingProxyType),
    WrapSerializer(_dump_read_only),
]
DeniedField = Annotated[
    str, AfterValidator(texts.denied_field), Field(json_schema_extra={"pattern": texts.FIELD})
]
AllowedHeader = Annotated[str, AfterValidator(texts.header_allowed)]
