"""A request of the Responses API as one of Anthropic's Messages (API references of both)."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, Any

from aiproxy import errors
from aiproxy.dialects.bridge_request import LOGPROBS, OUTPUTS, TEXTS
from aiproxy.dialects.responses_parts import CALLS, decode

if TYPE_CHECKING:
    from aiproxy.dialects.bridge_request import Request, Tool, ToolChoice

REDACTED = "redacted_thinking:"
"""Begins the encrypted content of reasoning that its maker does not show: else it is a signature,
which is base64."""

_SAME = ("temperature", "top_p")
_ZERO = ("presence_penalty", "frequency_penalty", "top_logprobs")  # what else they say is refused
_HINTS = ("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user")
_TIERS = {"auto": "auto", "default": "standard_only"}
_EFFORTS = {"minimal": "low"}  # the others have the same names
_MODES = {"auto": "auto", "none": "none", "required": "any"}
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w=.+-]+)*?;base64,", re.ASCII)


def messages_request(request: Request) -> dict[str, Any]:
    """The body that asks a messages upstream for the same.

    Raises:
        ProxyError: something cannot be expressed, or is malformed.
    """
    request.refuse_fields()
    system, messages = _Messages(request).all()
    body: dict[str, Any] = {
        "model": request.get("model"),
        "max_tokens": request.get("max_output_tokens"),
        "messages": messages,
        "stream": bool(request.get("stream")),
    }
    if system:
        body["system"] = "\n\n".join(system)
    body.update((name, value) for name in _SAME if (value := request.get(name)) is not None)
    _options(request, body)
    choice, tools = request.choice(request.tools())
    if tools:
        body["tools"] = [_tool(tool) for tool in tools]
        chosen = _choice(choice, parallel=request.get("parallel_tool_calls"))
        if chosen is not None:
            body["tool_choice"] = chosen
    body.update(request.others(*_SAME, *_ZERO, *_HINTS, "service_tier"))
    return body


def _options(request: Request, body: dict[str, Any]) -> None:
    for name in _ZERO:
        if request.get(name):
            raise request.unsupported(name, f"'{name}'")
    included = request.included()
    if LOGPROBS in included:
        raise request.unsupported(f"include[{included.index(LOGPROBS)}]", f"'{LOGPROBS}'")
    if (tier := request.get("service_tier")) is not None:
        if request.text("service_tier", tier) not in _TIERS:
            raise request.unsupported("service_tier", f"'service_tier' {errors.shown(str(tier))!r}")
        body["service_tier"] = _TIERS[tier]
    user = request.get("safety_identifier") or request.get("user")
    if user is not None:
        body["metadata"] = {"user_id": user}
    effort = request.object("reasoning").get("effort")
    if effort == "none":
        body["thinking"] = {"type": "disabled"}
    elif effort is not None:
        effort = request.text("reasoning.effort", effort)
        body["thinking"] = {"type": "adaptive", "display": "summarized"}
        body["output_config"] = {"effort": _EFFORTS.get(effort, effort)}
    if effort is not None and request.get("thinking") is not None:
        raise request.unsupported("thinking", "'thinking' beside 'reasoning.effort'")
    _text(request, body)


def _text(request: Request, body: dict[str, Any]) -> None:
    asked = request.object("text")
    if asked.get("verbosity") not in (None, "medium"):
        raise request.unsupported("text.verbosity", "'text.verbosity' other than 'medium'")
    form = request.format(asked)
    kind = form.get("type")
    if kind == "json_schema":
        written = {"type": kind, "schema": form.get("schema")}
        body["output_config"] = {**body.get("output_config", {}), "format": written}
    elif kind != "text":
        raise request.unsupported("text.format", f"'text.format' of type {errors.shown(str(kind))}")


def _tool(tool: Tool) -> dict[str, Any]:
    described: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        described["description"] = tool.description
    described["input_schema"] = tool.parameters or {"type": "object", "properties": {}}
    if tool.strict is not None:
        described["strict"] = tool.strict
    return described


def _choice(choice: ToolChoice | None, *, parallel: object) -> dict[str, Any] | None:
    if choice is None and parallel is not False:
        return None
    if choice is not None and choice.name is not None:
        chosen: dict[str, Any] = {"type": "tool", "name": choice.name}
    else:
        chosen = {"type": _MODES["auto" if choice is None else choice.mode]}
    if parallel is False and chosen["type"] != "none":
        chosen["disable_parallel_tool_use"] = True
    return chosen


class _Messages:
    """Items of an input -> the system's text, and messages of user and assistant by turns."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._system: list[str] = []
        self._messages: list[dict[str, Any]] = []

    def all(self) -> tuple[list[str], list[dict[str, Any]]]:
        """All of them."""
        request = self._request
        if (instructions := request.get("instructions")) is not None:
            self._system.append(request.text("instructions", instructions))
        for place, kind, item in request.items():
            if kind == "message":
                self._message(place, item)
            elif kind in CALLS:
                self._add("assistant", self._call(place, kind, item))
            elif kind in OUTPUTS:
                self._add("user", self._result(place, item))
            elif kind == "reasoning":
                if (thought := _thinking(item)) is not None:
                    self._add("assistant", thought)
            elif kind != "item_reference":  # for which an item is put before anything is sent
                raise request.unsupported(place, f"An item of type '{errors.shown(kind)}'")
        return self._system, self._messages

    def _add(self, role: str, block: dict[str, Any]) -> None:
        """A block of the one whose turn it is."""
        if not self._messages or self._messages[-1]["role"] != role:
            self._messages.append({"role": role, "content": []})
        self._messages[-1]["content"].append(block)

    def _message(self, place: str, item: dict[str, Any]) -> None:
        role, at = item.get("role"), f"{place}.content"
        if role in ("system", "developer"):
            self._system += self._request.only_texts(at, item.get("content"))
        elif role in ("user", "assistant"):
            for each, kind, part in self._request.parts(at, item.get("content")):
                if (block := self._block(each, kind, part, role)) is not None:
                    self._add(role, block)
        else:
            raise errors.invalid_value(
                f"{place}.role", f"'{place}.role' must be user, assistant, system or developer."
            )

    def _block(self, at: str, kind: str, part: dict[str, Any], role: str) -> dict[str, Any] | None:
        """A part of a message or of a tool's output; None for an empty text, which is refused."""
        request = self._request
        if kind in TEXTS or kind == "refusal":
            name = "refusal" if kind == "refusal" else "text"
            text = request.text(f"{at}.{name}", part.get(name))
            return {"type": "text", "text": text} if text else None
        if role == "user" and kind == "input_image" and part.get("image_url") is not None:
            url = request.text(f"{at}.image_url", part["image_url"])
            return {"type": "image", "source": self._source(at, url)}
        if role == "user" and kind == "input_file" and part.get("file_id") is None:
            return self._document(at, part)
        raise request.unsupported(
            at, f"A part of type '{errors.shown(kind)}' with what it refers to"
        )

    def _source(self, at: str, url: str) -> dict[str, Any]:
        if not url.startswith("data:"):
            return {"type": "url", "url": url}
        begin = _DATA_URL.match(url)
        if begin is None:
            raise errors.invalid_value(at, f"'{at}' must be a URL, or a data URL in base64.")
        return {"type": "base64", "media_type": begin.group(1), "data": url[begin.end() :]}

    def _document(self, at: str, part: dict[str, Any]) -> dict[str, Any]:
        request = self._request
        if (url := part.get("file_url")) is not None:
            source = self._source(at, request.text(f"{at}.file_url", url))
        else:
            data = request.text(f"{at}.file_data", part.get("file_data"))
            if not data.startswith("data:"):
                raise errors.invalid_value(at, f"'{at}.file_data' must be a data URL in base64.")
            source = self._source(at, data)
        kind = source.get("media_type")
        if kind == "text/plain":
            source = {"type": "text", "media_type": kind, "data": _plain_text(at, source["data"])}
        elif kind not in (None, "application/pdf"):
            raise request.unsupported(at, f"A file of type '{errors.shown(str(kind))}'")
        document: dict[str, Any] = {"type": "document", "source": source}
        if isinstance(part.get("filename"), str):
            document["title"] = part["filename"]
        return document

    def _call(self, place: str, kind: str, item: dict[str, Any]) -> dict[str, Any]:
        request = self._request
        if kind == "custom_tool_call":
            given: Any = {"input": request.text(f"{place}.input", item.get("input"))}
        else:
            given = _arguments(request.text(f"{place}.arguments", item.get("arguments")))
        return {
            "type": "tool_use",
            "id": request.text(f"{place}.call_id", item.get("call_id")),
            "name": request.text(f"{place}.name", item.get("name")),
            "input": given,
        }

    def _result(self, place: str, item: dict[str, Any]) -> dict[str, Any]:
        request = self._request
        output = item.get("output")
        content: Any = output
        if not isinstance(output, str):
            blocks = (
                self._block(at, kind, part, "user")
                for at, kind, part in request.parts(f"{place}.output", output)
            )
            content = [block for block in blocks if block is not None]
        call_id = request.text(f"{place}.call_id", item.get("call_id"))
        return {"type": "tool_result", "tool_use_id": call_id, "content": content}


def _plain_text(at: str, data: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode()
    except (binascii.Error, ValueError):
        raise errors.invalid_value(at, f"'{at}' is not UTF-8 text in base64.") from None


def _arguments(text: str) -> Any:
    """The arguments of a call, which a model may have written wrong: they are kept as text then."""
    if not text.strip():
        return {}
    try:
        found = decode(text.encode("utf-8", "surrogatepass"))
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": text}


def _thinking(item: dict[str, Any]) -> dict[str, Any] | None:
    """Reasoning as its maker gave it; None without what shows that it is the maker's."""
    encrypted = item.get("encrypted_content")
    if not isinstance(encrypted, str) or not encrypted:
        return None
    if encrypted.startswith(REDACTED):
        return {"type": "redacted_thinking", "data": encrypted.removeprefix(REDACTED)}
    summary = item.get("summary")
    texts = [
        part["text"]
        for part in (summary if isinstance(summary, list) else ())
        if isinstance(part, dict) and isinstance(part.get("text"), str)
    ]
    return {"type": "thinking", "thinking": "\n\n".join(texts), "signature": encrypted}
