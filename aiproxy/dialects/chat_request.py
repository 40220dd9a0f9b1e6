"""A request of the Responses API as one of Chat Completions (API references of both)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from aiproxy import errors
from aiproxy.dialects.bridge_request import LOGPROBS, OUTPUTS, TEXTS
from aiproxy.dialects.responses_parts import CALLS

if TYPE_CHECKING:
    from aiproxy.dialects.bridge_request import Request, Tool, ToolChoice

# Fields that go as they are.
_SAME = (
    "temperature", "top_p", "presence_penalty", "frequency_penalty", "service_tier", "user",
    "safety_identifier", "metadata", "prompt_cache_key", "prompt_cache_retention",
)  # fmt: skip


def chat_request(request: Request, *, send_reasoning: bool) -> dict[str, Any]:
    """The body that asks a chat upstream for the same.

    Raises:
        ProxyError: something cannot be expressed, or is malformed.
    """
    request.refuse_fields()
    body: dict[str, Any] = {
        "model": request.get("model"),
        "messages": _Messages(request, send_reasoning=send_reasoning).all(),
    }
    body.update((name, value) for name in _SAME if (value := request.get(name)) is not None)
    _options(request, body)
    choice, tools = request.choice(request.tools())
    if tools:
        body["tools"] = [_tool(tool) for tool in tools]
        if choice is not None:
            body["tool_choice"] = _choice(choice)
        if (parallel := request.get("parallel_tool_calls")) is not None:
            body["parallel_tool_calls"] = parallel
    body.update(request.others(*_SAME))
    body["stream"] = stream = bool(request.get("stream"))
    if stream:
        body["stream_options"] = {"include_usage": True}
    return body


def _options(request: Request, body: dict[str, Any]) -> None:
    if (most := request.get("max_output_tokens")) is not None:
        body["max_tokens"] = most  # every server knows this name, few the newer one
    if (effort := request.object("reasoning").get("effort")) is not None:
        body["reasoning_effort"] = effort
    asked = request.object("text")
    if (verbosity := asked.get("verbosity")) is not None:
        body["verbosity"] = verbosity
    form = request.format(asked)
    kind = form.get("type")
    if kind == "json_schema":
        nested = {name: form[name] for name in ("name", "description", "schema", "strict")
                  if form.get(name) is not None}  # fmt: skip
        body["response_format"] = {"type": kind, kind: nested}
    elif kind == "json_object":
        body["response_format"] = {"type": kind}
    elif kind != "text":
        raise request.unsupported("text.format", f"'text.format' of type {errors.shown(str(kind))}")
    top = request.get("top_logprobs")
    if top or LOGPROBS in request.included():
        body["logprobs"] = True
    if top:
        body["top_logprobs"] = top


def _tool(tool: Tool) -> dict[str, Any]:
    described = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
    function = {name: value for name, value in described.items() if value is not None}
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> object:
    if choice.name is None:
        return choice.mode
    return {"type": "function", "function": {"name": choice.name}}


def custom_arguments(text: str) -> str:
    """The input of a custom tool as arguments of the function that stands for it."""
    return json.dumps({"input": text}, ensure_ascii=False, separators=(",", ":"))


class _Messages:
    """Items of an input -> messages of a chat."""

    def __init__(self, request: Request, *, send_reasoning: bool) -> None:
        self._request = request
        self._send_reasoning = send_reasoning
        self._messages: list[dict[str, Any]] = []
        self._leading: list[str] = []  # texts of the system, before all else
        self._thought: list[str] = []  # reasoning that the next message of the assistant is told
        self._media: list[dict[str, Any]] = []  # of tools' outputs, which can be text alone

    def all(self) -> list[dict[str, Any]]:
        """All of them."""
        request = self._request
        if (instructions := request.get("instructions")) is not None:
            self._leading.append(request.text("instructions", instructions))
        for place, kind, item in request.items():
            if kind not in OUTPUTS:
                self._show_media()
            if kind == "message":
                self._message(place, item)
            elif kind in CALLS:
                self._call(place, kind, item)
            elif kind in OUTPUTS:
                self._output(place, item)
            elif kind == "reasoning":
                self._thought += _reasoning(item) if self._send_reasoning else ()
            elif kind != "item_reference":  # for which an item is put before anything is sent
                raise request.unsupported(place, f"An item of type '{errors.shown(kind)}'")
        self._show_media()
        if self._leading:
            system = {"role": "system", "content": "\n\n".join(self._leading)}
            self._messages.insert(0, system)
        return self._messages

    def _message(self, place: str, item: dict[str, Any]) -> None:
        role = item.get("role")
        content = item.get("content")
        at = f"{place}.content"
        if role in ("system", "developer"):
            texts = self._request.only_texts(at, content)
            if self._messages:  # few templates know a developer, and many a system
                self._messages.append({"role": "system", "content": _joined(_text_parts(texts))})
            else:
                self._leading += texts
        elif role == "user":
            self._thought = []  # nothing of the assistant's followed it
            parts = [
                self._user_part(at, kind, part)
                for at, kind, part in self._request.parts(at, content)
            ]
            self._messages.append({"role": "user", "content": _joined(parts)})
        elif role == "assistant":
            self._assistant(self._spoken(at, content))
        else:
            raise errors.invalid_value(
                f"{place}.role", f"'{place}.role' must be user, assistant, system or developer."
            )

    def _user_part(self, at: str, kind: str, part: dict[str, Any]) -> dict[str, Any]:
        request = self._request
        if kind in TEXTS:
            return {"type": "text", "text": request.text(f"{at}.text", part.get("text"))}
        if kind == "input_image" and part.get("image_url") is not None:
            image = {"url": request.text(f"{at}.image_url", part["image_url"])}
            if part.get("detail") is not None:
                image["detail"] = part["detail"]
            return {"type": "image_url", "image_url": image}
        if kind == "input_file" and part.get("file_url") is None:
            known = ("file_id", "file_data", "filename")
            file = {name: part[name] for name in known if part.get(name) is not None}
            return {"type": "file", "file": file}
        if kind == "input_audio":
            return {"type": "input_audio", "input_audio": part.get("input_audio")}
        raise request.unsupported(
            at, f"A part of type '{errors.shown(kind)}' with what it refers to"
        )

    def _spoken(self, at: str, content: Any) -> dict[str, Any]:
        """A message of the assistant's own."""
        request = self._request
        parts: list[dict[str, Any]] = []
        for each, kind, part in request.parts(at, content):
            if kind in TEXTS:
                text = request.text(f"{each}.text", part.get("text"))
                parts.append({"type": "text", "text": text})
            elif kind == "refusal":
                text = request.text(f"{each}.refusal", part.get("refusal"))
                parts.append({"type": "refusal", "refusal": text})
            else:
                raise request.unsupported(each, f"A part of type '{errors.shown(kind)}' here")
        if len(parts) == 1 and parts[0]["type"] == "refusal":
            return {"role": "assistant", "content": None, "refusal": parts[0]["refusal"]}
        return {"role": "assistant", "content": _joined(parts)}

    def _assistant(self, message: dict[str, Any]) -> None:
        last = self._messages[-1] if self._messages else message
        if last.get("tool_calls"):
            # The results must follow the calls at once: what was said after these goes with them.
            said = [*_parts_of(last["content"]), *_parts_of(message["content"])]
            last["content"] = _joined(said) if said else None
            message = last
        else:
            self._messages.append(message)
        self._tell_thought(message)

    def _tell_thought(self, message: dict[str, Any]) -> None:
        if self._thought:
            before = message.get("reasoning_content")
            told = self._thought if before is None else [before, *self._thought]
            message["reasoning_content"] = "\n\n".join(told)
            self._thought = []

    def _call(self, place: str, kind: str, item: dict[str, Any]) -> None:
        request = self._request
        if kind == "custom_tool_call":
            arguments = custom_arguments(request.text(f"{place}.input", item.get("input")))
        else:
            arguments = request.text(f"{place}.arguments", item.get("arguments"))
        call = {
            "id": request.text(f"{place}.call_id", item.get("call_id")),
            "type": "function",
            "function": {
                "name": request.text(f"{place}.name", item.get("name")),
                "arguments": arguments,
            },
        }
        last = self._messages[-1] if self._messages else None
        if last is None or last["role"] != "assistant":
            last = {"role": "assistant", "content": None}
            self._messages.append(last)
        self._tell_thought(last)
        last.setdefault("tool_calls", []).append(call)

    def _output(self, place: str, item: dict[str, Any]) -> None:
        request = self._request
        at = f"{place}.output"
        texts: list[str] = []
        call_id = request.text(f"{place}.call_id", item.get("call_id"))
        for each, kind, part in request.parts(at, item.get("output")):
            if kind in TEXTS:
                texts.append(request.text(f"{each}.text", part.get("text")))
            else:
                self._media.append(self._user_part(each, kind, part))
        content = _joined(_text_parts(texts)) if texts else ""
        self._messages.append({"role": "tool", "tool_call_id": call_id, "content": content})

    def _show_media(self) -> None:
        """What tools gave besides text: the user shows it, once all of them have answered."""
        if self._media:
            self._messages.append({"role": "user", "content": self._media})
            self._media = []


def _text_parts(texts: list[str]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


def _parts_of(content: Any) -> list[dict[str, Any]]:
    """The parts that `_joined` joined."""
    if content is None:
        return []
    return _text_parts([content]) if isinstance(content, str) else content


def _joined(parts: list[dict[str, Any]]) -> Any:
    """A content: one text as it is, which every server takes; else the parts."""
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return parts


def _reasoning(item: dict[str, Any]) -> list[str]:
    """What is shown of it: the thoughts themselves, else their summary."""
    for name in ("content", "summary"):
        given = item.get(name)
        texts = [
            part["text"]
            for part in (given if isinstance(given, list) else ())
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        ]
        if texts:
            return texts
    return []
