"""The Responses API over an upstream that speaks Chat Completions.

A chat answer has one text, one reasoning and calls by index; a stream's frames are read like parts
of one message, and a JSON answer like a stream of one frame. Where servers differ (calls without an
index, or all with the same one; arguments that are no text; content as a list) each is read as it
is meant.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

from aiproxy import errors, usage
from aiproxy.dialects.bridge import Bridge
from aiproxy.dialects.chat_request import chat_request
from aiproxy.dialects.responses_parts import encode, objects
from aiproxy.dialects.responses_writer import ITEM
from aiproxy.dialects.told_stream import ToldStream, declared

if TYPE_CHECKING:
    from aiproxy.config import Upstream
    from aiproxy.dialects import Asked
    from aiproxy.dialects.bridge_request import Request
    from aiproxy.dialects.responses_parts import Item

# Finish reasons that say more than that the answer is whole.
_INCOMPLETE = {
    "length": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "content_filter": "content_filter",
}
FOR_USAGE, FOR_END = 5.0, 0.5  # seconds that are waited for these after the finish reason
_FAILED = frozenset({"error", "insufficient_system_resource"})


class ChatBridge(Bridge):
    """See `Bridge`."""

    api = "chat"
    path = "/chat/completions"

    def translate(self, request: Request, upstream: Upstream) -> dict[str, Any]:
        """See `Bridge`."""
        return chat_request(request, send_reasoning=upstream.reasoning_content == "send")

    def stream(self, asked: Asked) -> ChatBridgeStream:
        """See `Dialect`."""
        return ChatBridgeStream(asked)


class _Call:
    """A call that is open; told once its tool is known, a custom tool's once it is whole."""

    __slots__ = ("call_id", "custom", "index", "item", "pieces")

    def __init__(self, index: object, call_id: str) -> None:
        self.index = index
        self.call_id = call_id
        self.item: Item | None = None
        self.custom = False
        self.pieces: list[str] = []  # of arguments that are not told yet


class ChatBridgeStream(ToldStream):
    """See `ToldStream`. Whole with a finish reason; the usage may follow it."""

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._by_id: dict[str, _Call] = {}
        self._finish: str | None = None

    def read(self, name: bytes, data: bytes) -> None:
        """See `ToldStream`."""
        if data == b"[DONE]":
            if self._finish is not None:
                self._conclude()
            return
        if not data.strip():
            return  # some keep the connection alive by it
        chunk = self.document(data)
        if chunk is None:
            if name == b"error":
                raise errors.upstream_error("The upstream sent an error event that is not JSON.")
            raise errors.upstream_error("The upstream sent an event that is not JSON.")
        if chunk.get("error") is not None:
            raise declared(chunk["error"])
        self.writer.begin()
        self._chunk(chunk)

    def read_answer(self, document: dict[str, Any]) -> None:
        """See `ToldStream`."""
        if document.get("error") is not None and not document.get("choices"):
            raise declared(document["error"])
        if not _has_message(document.get("choices")):
            raise errors.upstream_error("The upstream's answer is not a chat completion.")
        self.count(None, "missing")
        self._chunk(document)
        self._conclude()

    def _chunk(self, chunk: dict[str, Any]) -> None:
        given = chunk.get("usage")
        if given is not None:
            counted = usage.from_chat(given)
            self.count(counted, None if counted is not None else "bad", _written(given))
        if isinstance(tier := chunk.get("service_tier"), str):
            self.writer.response["service_tier"] = tier
        given = chunk.get("choices")
        choices: list[Any] = given if isinstance(given, list) else []
        for choice in choices:
            if isinstance(choice, dict) and choice.get("index") in (0, None):
                self._choice(choice, chunk)
                if len(choices) > 1 or "usage" in chunk:
                    self.only = None
        if self.owes and self.usage is not None:
            self.owes = FOR_END  # the usage may be said once more: the last one counts

    def _choice(self, choice: dict[str, Any], chunk: dict[str, Any]) -> None:
        said = choice.get("delta")
        if said is None:
            said = choice.get("message")
        if isinstance(said, dict):
            self._message(said, choice.get("logprobs"))
            self.only = _plain(said, choice) if len(said) == 1 else None
        if isinstance(finish := choice.get("finish_reason"), str) and finish:
            self._finish = finish
            if finish in _FAILED:
                raise declared(choice.get("error") or chunk.get("error"))
            self.owes = FOR_USAGE

    def close(self) -> bytes:
        """See `Stream`."""
        if self.owes:
            self._conclude()
        return self._taken()

    def _conclude(self) -> None:
        for call in self._calls:
            self._tell(call)
        why = _INCOMPLETE.get(self._finish or "")
        self.conclude("completed" if why is None else "incomplete", why or "")

    # -- what a message says

    def _message(self, said: dict[str, Any], logprobs: Any) -> None:
        writer = self.writer
        thought = said.get("reasoning_content")
        if not thought:
            thought = said.get("reasoning")
        if isinstance(thought, str) and thought:
            writer.think(thought)
        if content := said.get("content"):
            self._content(content, logprobs)
        refusal = said.get("refusal")
        if isinstance(refusal, str) and refusal:
            writer.refuse(refusal)
        for each in objects(said.get("annotations")):
            if (citation := _citation(each)) is not None:
                writer.cite(citation)
        for call in objects(said.get("tool_calls")):
            self._call(call)
        if isinstance(function := said.get("function_call"), dict):  # of older servers
            self._call({"index": -1, "function": function})

    def _content(self, content: Any, logprobs: Any) -> None:
        """A text; or a list of texts, and of thoughts that are lists again."""
        if isinstance(content, str):
            odds = logprobs.get("content") if isinstance(logprobs, dict) else None
            self.writer.text(content, _logprobs(odds) if odds else None)
        for part in objects(content):
            if part.get("type") == "thinking":
                thoughts = part.get("thinking")
                for each in thoughts if isinstance(thoughts, list) else [{"text": thoughts}]:
                    if isinstance(each, dict) and isinstance(each.get("text"), str):
                        self.writer.think(each["text"])
            elif isinstance(part.get("text"), str) and part["text"]:
                self.writer.text(part["text"])

    def _call(self, said: dict[str, Any]) -> None:
        function = said.get("function")
        if not isinstance(function, dict):
            function = {}
        name = function.get("name")
        name = name if isinstance(name, str) else ""
        call = self._known(said.get("index"), said.get("id"), name)
        if call is None:
            call = self._begin(said.get("index"), said.get("id"))
        if name and call.item is None:
            self._name(call, name)
        arguments = function.get("arguments")
        if isinstance(arguments, dict | list):  # some servers send the value itself
            arguments = encode(arguments).decode("utf-8", "surrogatepass")
        if not isinstance(arguments, str) or not arguments:
            return
        if call.item is None or call.custom:
            self.writer.grow(len(arguments))
            call.pieces.append(arguments)
        else:
            self.writer.delta(call.item.sinks[0], arguments)

    def _begin(self, index: object, call_id: object) -> _Call:
        if not isinstance(call_id, str) or not call_id:
            call_id = f"call_{secrets.token_urlsafe(18)}"
        self.writer.grow(ITEM)
        call = _Call(index, call_id)
        self._calls.append(call)
        self._by_id[call_id] = call
        if type(index) is int:
            self._by_index[index] = call
        return call

    def _name(self, call: _Call, name: str) -> None:
        """It is known which tool is called."""
        call.custom = name in self.asked.custom
        kind = "custom_tool_call" if call.custom else "function_call"
        call.item = self.writer.call(kind, name, call.call_id)
        if call.pieces and not call.custom:
            self.writer.delta(call.item.sinks[0], "".join(call.pieces))

    def _known(self, index: object, call_id: object, name: str) -> _Call | None:
        """The open call that is meant; None: it is a new one.

        Some servers leave the index out, some give all calls the same one, some repeat the id or
        leave it empty after the first piece.
        """
        named = self._by_id.get(call_id) if isinstance(call_id, str) and call_id else None
        if type(index) is not int:
            if call_id or name or not self._calls:
                return named
            return self._calls[-1]
        if named is not None and named.index == index:
            return named
        call = self._by_index.get(index)
        other = isinstance(call_id, str) and call_id != "" and name != ""
        return None if other else call

    def _tell(self, call: _Call) -> None:
        """What of a call is told at the end alone.

        The input of a custom tool is known once the arguments that hold it are whole.
        """
        if call.item is None:
            self._name(call, "")
        if call.item is None or not call.custom:
            return
        arguments = "".join(call.pieces)
        document = self.document(arguments.encode("utf-8", "surrogatepass"))
        given = None if document is None else document.get("input")
        self.writer.delta(call.item.sinks[0], given if isinstance(given, str) else arguments)


def _plain(said: dict[str, Any], choice: dict[str, Any]) -> str | None:
    """The text of a choice that says nothing else."""
    text = said.get("content")
    if not isinstance(text, str) or choice.get("logprobs") or choice.get("finish_reason"):
        return None
    return text or None


def _place(value: Any) -> int:
    return value if type(value) is int else 0


def _has_message(choices: Any) -> bool:
    first = choices[0] if isinstance(choices, list) and choices else None
    return isinstance(first, dict) and isinstance(first.get("message"), dict)


def _written(given: Any) -> int:
    """Input tokens that were written to a cache."""
    details = given.get("prompt_tokens_details") if isinstance(given, dict) else None
    written = details.get("cache_write_tokens") if isinstance(details, dict) else 0
    return written if type(written) is int and written >= 0 else 0


def _logprobs(given: Any) -> list[dict[str, Any]]:
    return [
        {**_odds(each), "top_logprobs": [_odds(top) for top in objects(each.get("top_logprobs"))]}
        for each in objects(given)
    ]


def _odds(each: dict[str, Any]) -> dict[str, Any]:
    token = str(each.get("token", ""))
    odds, known = each.get("logprob"), each.get("bytes")
    return {
        "token": token,
        "logprob": odds if isinstance(odds, int | float) else 0.0,
        "bytes": known if isinstance(known, list) else list(token.encode("utf-8", "replace")),
    }


def _citation(each: dict[str, Any]) -> dict[str, Any] | None:
    """An annotation of a chat message, as the Responses API has it."""
    cited = each.get("url_citation")
    if not isinstance(cited, dict):
        return None
    return {
        "type": "url_citation",
        "url": str(cited.get("url", "")),
        "title": str(cited.get("title", "")),
        "start_index": _place(cited.get("start_index")),
        "end_index": _place(cited.get("end_index")),
    }
