"""A request of the Responses API, as a bridge reads it.

Nothing is dropped silently: what another API cannot express is refused by its place in the request,
or has a rule in the README's table, field by field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec import Raw

from aiproxy import errors
from aiproxy.dialects import members_of, value_of
from aiproxy.dialects.responses_parts import decode
from aiproxy.jsontext import elements

if TYPE_CHECKING:
    from collections.abc import Iterator

    from aiproxy.envelope import Envelope
    from aiproxy.errors import ProxyError

# Fields of the Responses API that ask for what only its own servers do.
_NOT_EXPRESSED = (
    "access_programs", "background_options", "context_management", "moderation", "prompt",
    "prompt_cache_options",
)  # fmt: skip
# Fields of other APIs that a bridge writes itself.
_WRITTEN = (
    "messages", "system", "n", "functions", "function_call", "response_format", "max_tokens",
    "max_completion_tokens", "logprobs", "reasoning_effort", "verbosity", "modalities", "audio",
    "output_config",
)  # fmt: skip
# Those that mean nothing to the upstream of a bridge (README, "Bridges").
WITHOUT_EFFECT = (
    "background", "client_metadata", "include", "max_tool_calls", "previous_response_id", "store",
    "stream_options", "truncation",
)  # fmt: skip

INPUT = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
"""The parameters of a custom tool that is sent as a function."""


class Tool(NamedTuple):
    """A tool that a bridge can express: a function, or a custom tool as one."""

    name: str
    description: str | None
    parameters: Any
    strict: bool | None


class ToolChoice(NamedTuple):
    """What is asked of the model: `mode` is auto, none or required, and `name` the one tool."""

    mode: str
    name: str | None = None


class Request:
    """A request of the Responses API, as a bridge reads it.

    Args:
        envelope: its body.
        api: what the upstream speaks.
        recalled: the input holds stored turns: a position in it means nothing to the client.
    """

    def __init__(self, envelope: Envelope, api: str, *, recalled: bool) -> None:
        self._envelope = envelope
        self._api = api
        self._recalled = recalled

    def get(self, name: str) -> Any:
        """A field, decoded; None where it is not given."""
        raw = self._envelope.raw(name)
        try:
            return None if raw is None else decode(raw)
        except (ValueError, RecursionError):
            raise errors.invalid_type(name, "values that can be read") from None

    def unsupported(self, place: str, what: str) -> ProxyError:
        """What this upstream cannot be asked for."""
        if self._recalled and place.startswith("input"):
            place = "previous_response_id"
        return errors.unsupported_parameter(
            place, f"{what} cannot be expressed to this model's upstream, which speaks {self._api}."
        )

    def wrong(self, place: str, expected: str) -> ProxyError:
        """A value of a wrong type."""
        if self._recalled and place.startswith("input"):
            place = "previous_response_id"
        return errors.invalid_type(place, expected)

    def text(self, place: str, value: Any) -> str:
        """A value that must be a string."""
        if not isinstance(value, str):
            raise self.wrong(place, "a string")
        return value

    def object(self, name: str) -> dict[str, Any]:
        """An object field; empty where it is not given."""
        value = self.get(name)
        if value is None:
            return {}
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return value

    def items(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Place, type and members of each item of the input."""
        given = self.get("input")
        if isinstance(given, str):
            yield "input", "message", {"role": "user", "content": given}
            return
        for position, item in enumerate(given or ()):
            place = f"input[{position}]"
            if not isinstance(item, dict):
                raise self.wrong(place, "an object")
            kind = item.get("type")
            if kind is None and "role" in item:
                kind = "message"
            elif kind is None and isinstance(item.get("id"), str):
                kind = "item_reference"
            yield place, self.text(f"{place}.type", kind), item

    def parts(self, place: str, content: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Place, type and members of each part of a content; a string is one text."""
        if isinstance(content, str):
            yield place, "input_text", {"text": content}
            return
        if not isinstance(content, list):
            raise self.wrong(place, "a string or an array")
        for position, part in enumerate(content):
            at = f"{place}[{position}]"
            if not isinstance(part, dict):
                raise self.wrong(at, "an object")
            yield at, str(part.get("type")), part

    def only_texts(self, place: str, content: Any) -> list[str]:
        """The texts of a content that has nothing else."""
        texts = []
        for at, kind, part in self.parts(place, content):
            if kind not in TEXTS:
                raise self.unsupported(at, f"A part of type '{errors.shown(kind)}' here")
            texts.append(self.text(f"{at}.text", part.get("text")))
        return texts

    def format(self, text: dict[str, Any]) -> dict[str, Any]:
        """The form of the answer that `text` asks for."""
        form = text.get("format")
        if form is not None and not isinstance(form, dict):
            raise self.wrong("text.format", "an object")
        return form or {"type": "text"}

    def included(self) -> list[Any]:
        """What is asked for besides."""
        value = self.get("include")
        if value is not None and not isinstance(value, list):
            raise self.wrong("include", "an array")
        return value or []

    def refuse_fields(self) -> None:
        """Refuse what no other API does, and what would contradict what is written here."""
        for name in (*_NOT_EXPRESSED, *_WRITTEN):
            if name in self._envelope:
                raise self.unsupported(name, f"'{name}'")
        if self.get("truncation") not in (None, "disabled"):
            raise self.unsupported("truncation", "'truncation' other than 'disabled'")

    def others(self, *known: str) -> Iterator[tuple[str, Raw]]:
        """The fields that are none of the Responses API's: the upstream's own, sent as they are."""
        ours = {*known, *WITHOUT_EFFECT, *_KNOWN}
        for name in self._envelope:
            if name not in ours and (raw := self._envelope.raw(name)) is not None:
                yield name, Raw(raw)

    # -- tools

    def tools(self) -> list[Tool]:
        """The tools; what cannot be expressed is not among them any more (see `Bridge.check`)."""
        found = []
        for position, tool in enumerate(self._listed("tools")):
            place = f"tools[{position}]"
            name = self.text(f"{place}.name", tool.get("name"))
            if tool.get("type") == "custom":
                found.append(Tool(name, tool.get("description"), INPUT, None))
            else:
                found.append(
                    Tool(name, tool.get("description"), tool.get("parameters"), tool.get("strict"))
                )
        return found

    def _listed(self, name: str) -> list[dict[str, Any]]:
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.wrong(name, "an array")
        for position, each in enumerate(value):
            if not isinstance(each, dict):
                raise self.wrong(f"{name}[{position}]", "an object")
        return value

    def choice(self, tools: list[Tool]) -> tuple[ToolChoice | None, list[Tool]]:
        """What is asked of the model, and the tools that it may use."""
        choice = self.get("tool_choice")
        named: str | None = None
        if isinstance(choice, dict):
            kind = choice.get("type")
            if kind == "allowed_tools":
                allowed = self._allowed(choice)
                tools = [tool for tool in tools if tool.name in allowed]
                if allowed and not tools:
                    raise _missing()
                choice = choice.get("mode", "auto")
            elif kind in ("function", "custom"):
                named = self.text("tool_choice.name", choice.get("name"))
                choice = "required"
            else:
                raise self.unsupported(
                    "tool_choice", f"'tool_choice' of type '{errors.shown(str(kind))}'"
                )
        if choice is None:
            return None, tools
        if choice not in ("auto", "none", "required"):
            raise errors.invalid_value("tool_choice", "'tool_choice' must be a known mode or tool.")
        missing = named is not None and named not in {tool.name for tool in tools}
        if missing or (choice == "required" and not tools):
            raise _missing()
        return (ToolChoice(choice, named) if tools else None), tools

    def _allowed(self, choice: dict[str, Any]) -> set[str]:
        given = choice.get("tools")
        if not isinstance(given, list):
            raise self.wrong("tool_choice.tools", "an array")
        return {str(each.get("name")) for each in given if isinstance(each, dict)}


def _missing() -> ProxyError:
    return errors.unsupported_parameter(
        "tool_choice", "'tool_choice' asks for a tool that is not among those sent."
    )


LOGPROBS = "message.output_text.logprobs"
OUTPUTS = ("function_call_output", "custom_tool_call_output")
TEXTS = frozenset({"input_text", "output_text", "text", "summary_text", "reasoning_text"})
_KNOWN = frozenset(
    {"input", "instructions", "model", "parallel_tool_calls", "reasoning", "stream", "text"}
    | {"tool_choice", "tools", "max_output_tokens", "top_logprobs", "prompt_cache_retention"}
)


def sort_tools(envelope: Envelope, api: str, *, drop: bool) -> tuple[list[str], frozenset[str]]:
    """Leave out of a request the tools that cannot be expressed, or refuse them.

    Returns:
        What was left out, by type and name; the names of custom tools.
    """
    raw = envelope.raw("tools")
    if raw is None:
        return [], frozenset()
    if raw[:1] != b"[":
        raise errors.invalid_type("tools", "an array")
    kept: list[bytes] = []
    dropped: list[str] = []
    custom: set[str] = set()
    for position, each in enumerate(elements(raw)):
        tool = members_of(each)
        if tool is None:
            raise errors.invalid_type(f"tools[{position}]", "an object")
        kind = value_of(tool.get("type"))
        form = value_of(tool.get("format"))
        if kind == "custom" and (
            form is None or (isinstance(form, dict) and form.get("type") == "text")
        ):
            custom.add(str(value_of(tool.get("name"))))
        elif kind != "function":
            if not drop:
                raise errors.unsupported_parameter(
                    f"tools[{position}]",
                    f"A tool of type '{errors.shown(str(kind))}'"
                    f"{' with a grammar' if kind == 'custom' else ''} cannot be expressed to this"
                    f" model's upstream, which speaks {api}.",
                )
            named = value_of(tool.get("name")) or value_of(tool.get("server_label"))
            dropped.append(f"{kind}:{named}" if isinstance(named, str) else str(kind))
            continue
        kept.append(each)
    if dropped:
        envelope.put_raw("tools", b"[%b]" % b",".join(kept))
    return dropped, frozenset(custom)
