"""What is kept of a request and its answer until its spans are made: bounded, for each and for all.

It is kept as it came, and read beside the event loop. Without contents only what says how an answer
is to be made is kept, and messages as far as they are few.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aiproxy.envelope import Envelope

MOST_CONTENT = 1024 * 1024  # bytes of a request, and of its answer
MOST_PLAIN = 16 * 1024  # bytes of a request without contents: enough for roles and names
MOST_FIELDS = 256  # of a body; no API has so many
MOST_NAME = 128  # characters of a field's name
_EACH = 100  # bytes that a field costs beside its own

MESSAGES = frozenset({"input", "instructions", "messages", "system", "tools"})
# What says how an answer is to be made, and is no text of the client's.
PARAMETERS = frozenset(
    {
        "background", "dimensions", "encoding_format", "frequency_penalty", "logprobs",
        "max_completion_tokens", "max_output_tokens", "max_tokens", "max_tool_calls", "n",
        "parallel_tool_calls", "presence_penalty", "prompt_cache_retention", "reasoning_effort",
        "seed", "service_tier", "store", "stream", "temperature", "top_k", "top_logprobs", "top_p",
        "truncation", "verbosity",
    }
)  # fmt: skip


class Budget:
    """Bytes that wait for their spans, of all requests together."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._returned: deque[int] = deque()

    def take(self, size: int) -> bool:
        """Take room; whether there was enough. Called in the event loop only."""
        while self._returned:
            self._left += self._returned.popleft()
        if size > self._left:
            return False
        self._left -= size
        return True

    def give_back(self, size: int) -> None:
        """Give room back, from any thread: the one that takes adds it up."""
        self._returned.append(size)


class Kept:
    """Of one request.

    Args:
        budget: of all requests.
        content: whether spans hold prompts and outputs.

    Attributes:
        api: that the client speaks; empty before its body was read.
        fields: of the request's body, by name, as JSON.
        said: what the client was told of the answer.
        streamed: whether that was told as events.
        cut: there was no room for all of it.
    """

    __slots__ = ("_budget", "_held", "_room", "api", "content", "cut", "fields", "said", "streamed")

    def __init__(self, budget: Budget, *, content: bool) -> None:
        self._budget = budget
        self._held = 0
        self._room = MOST_CONTENT  # for the rest of the answer
        self.content = content
        self.api = ""
        self.fields: dict[str, bytes] = {}
        self.said: list[bytes] = []
        self.streamed = False
        self.cut = False

    def request(self, api: str, envelope: Envelope) -> None:
        """Keep a request's body by its fields; those for which there is no room are left out."""
        self.api = api
        content = self.content
        room = MOST_CONTENT if content else MOST_PLAIN
        names = 0
        for name in islice(envelope, MOST_FIELDS):
            names += 1
            if not (name in PARAMETERS or name in MESSAGES or content) or name == "model":
                continue
            value = envelope.raw(name, room - _EACH) if len(name) <= MOST_NAME else None
            if value is None:
                self.cut = self.cut or name in envelope
                continue
            size = len(name) + len(value) + _EACH
            if self._take(size, room):
                room -= size
                self.fields[name] = value
        self.cut = self.cut or names == MOST_FIELDS

    def answer(self, data: bytes, *, streamed: bool) -> None:
        """Keep what the client is told, up to the first part for which there is no room."""
        if not self.content:
            return
        self.streamed = streamed
        if self._take(len(data), self._room):
            self._room -= len(data)
            self.said.append(data)
        else:
            self._room = 0

    def _take(self, size: int, room: int) -> bool:
        if size > room or not self._budget.take(size):
            self.cut = True
            return False
        self._held += size
        return True

    def release(self) -> None:
        """It is not needed any more; may be called again, from any thread."""
        held, self._held = self._held, 0
        self.fields, self.said = {}, []
        self._budget.give_back(held)
