"""Streams that are told anew: whatever an upstream sends, its client gets the writer's events.

For the upstreams of bridges, which speak another API, and for servers of the Responses API that
leave out what it requires.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from aiproxy import errors, sse
from aiproxy.dialects import Answer, Asked, Stream
from aiproxy.dialects.responses_parts import decode, encode
from aiproxy.dialects.responses_writer import Writer
from aiproxy.usage import estimate_output

if TYPE_CHECKING:
    from aiproxy.dialects.responses_writer import Beside
    from aiproxy.errors import Outcome, ProxyError
    from aiproxy.usage import Reason, Usage


class Alike:
    """Frames that differ in their text alone: most of a stream, and cheap to read for it."""

    __slots__ = ("_head", "_tail")

    def __init__(self) -> None:
        self._head = b""
        self._tail = b""

    def text_of(self, raw: bytes) -> str | None:
        """The text of a frame like the one before; None where that is not sure at a glance."""
        head, tail = self._head, self._tail
        if not head or not raw.startswith(head) or not raw.endswith(tail):
            return None
        inner = raw[len(head) : -len(tail)]
        if b'"' in inner or b"\\" in inner or len(head) + len(tail) >= len(raw):
            return None
        try:
            text = inner.decode()
        except UnicodeDecodeError:
            return None
        return text if text.isprintable() else None

    def learn(self, raw: bytes, text: str) -> None:
        """This frame says this text, and nothing else."""
        self._head = b""
        inner = text.encode("utf-8", "replace")
        at = raw.find(b'"%b"' % inner)
        if at >= 0 and raw.find(b'"%b"' % inner, at + 1) < 0:
            self._head, self._tail = raw[: at + 1], raw[at + 1 + len(inner) :]

    def forget(self) -> None:
        """Something else came."""
        self._head = b""


class ToldStream(Stream):
    """See `Stream`. Every event is the writer's; none of the upstream's bytes pass.

    Attributes:
        events: whether events are made; else only the object.
        raw: the frame that is read.
        only: the text of a frame that said nothing else, as `read` found it.
    """

    def __init__(self, asked: Asked) -> None:
        super().__init__(asked)
        self.events = True
        self.raw = b""
        self.only: str | None = None
        self._alike = Alike()
        self._writer: Writer | None = None
        self._ready = b""  # what may go before the terminal event
        self._held = b""  # the terminal event

    @property
    def writer(self) -> Writer:
        """Made when it is needed first: until then it is not known what in the object is ours."""
        if self._writer is None:
            self._writer = Writer(self.asked, events=self.events)
            self.asked.echo = None  # the writer has it
        return self._writer

    @property
    def begun(self) -> bool:
        """See `Stream`."""
        return self._writer is not None and bool(self._writer.output)

    def feed(self, raw: bytes) -> bytes:
        """See `Stream`."""
        if self.over:
            return b""
        try:
            if (text := self._alike.text_of(raw)) is not None:
                self.writer.text(text)
                return self.writer.take()
            name, data = sse.parse(raw)
            if data is None:
                return sse.COMMENT if raw.startswith(b":") else b""
            self.raw, self.only = raw, None
            self.read(name, data)
        except errors.ProxyError as error:
            if self.owes:  # the answer is whole: what else comes cannot undo it
                return self.close()
            self.error = error
        if self.only is None:
            self._alike.forget()
        else:
            self._alike.learn(raw, self.only)
        return self._taken()

    def spill(self, part: bytes, *, ends: bool) -> bytes:  # noqa: ARG002 - what cannot be read cannot be told
        """See `Stream`."""
        if not self.over:
            self.error = errors.upstream_error("The upstream sent an event that is too large.")
        return b""

    def told(self, body: bytes) -> Answer:
        """A JSON answer, told as a response object.

        Raises:
            ProxyError: it is none, or the upstream failed.
        """
        self.events = False
        document = self.document(body)
        if document is None:
            raise errors.upstream_error("The upstream's answer is not a JSON object.")
        self.read_answer(document)
        writer = self.writer
        kept = writer.produced() if self.asked.keep and self.outcome != "failed" else None
        body = encode(writer.object())
        return Answer(body, self.outcome, self.usage, self.reason, kept, self.delivered())

    @abstractmethod
    def read_answer(self, document: dict[str, Any]) -> None:
        """Tell the writer a whole answer, its end included."""

    @abstractmethod
    def read(self, name: bytes, data: bytes) -> None:
        """Tell the writer what an event says.

        Raises:
            ProxyError: the upstream failed, or what it says is malformed.
        """

    @staticmethod
    def document(data: bytes) -> dict[str, Any] | None:
        """An object; None for anything else."""
        try:
            value = decode(data)
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None

    def count(self, usage: Usage | None, reason: Reason | None, written: int = 0) -> None:
        """Take the usage, if it is good.

        Args:
            usage: as it is accounted.
            reason: why there is none.
            written: input tokens that were written to a cache, which are among the input.
        """
        self.usage, self.reason = usage, reason
        if usage is None:
            self.writer.usage = None
            return
        self.writer.usage = {
            "input_tokens": usage.total_input,
            "input_tokens_details": {
                "cached_tokens": usage.input_cached,
                "cache_write_tokens": written,
            },
            "output_tokens": usage.total_output,
            "output_tokens_details": {"reasoning_tokens": usage.output_reasoning},
            "total_tokens": usage.total,
        }

    def conclude(self, outcome: Outcome, why: str = "", beside: Beside = None) -> None:
        """The answer is whole.

        Args:
            outcome: completed, incomplete or failed.
            why: it is incomplete.
            beside: what else its terminal event says.
        """
        writer = self.writer
        self.outcome = outcome
        self.owes = 0.0
        writer.settle(outcome, why)
        self._ready = writer.take()
        writer.terminal(beside)
        self._held = writer.take()
        if self.asked.keep and self.events and outcome != "failed":
            self.produced = writer.produced()

    def end(self) -> bytes:
        """See `Stream`."""
        held, self._held = self._held, b""
        self.produced = None
        self.over = self.whole = True
        return held

    def _taken(self) -> bytes:
        writer = self._writer
        if writer is None:
            return b""
        if writer.deltas:
            self.output_started = True
        ready, self._ready = self._ready, b""
        out = ready + writer.take()
        return out + self.end() if self._held and self.produced is None else out

    def delivered(self) -> int:
        """See `Stream`."""
        writer = self._writer
        return 0 if writer is None else estimate_output(writer.deltas, writer.size)

    def fail(self, error: ProxyError, now: int) -> bytes:  # noqa: ARG002 - the writer knows the time
        """See `Stream`: `response.failed`, after a `response.created` if nothing went before."""
        if self._held:
            self._held = b""
            self.writer.unsay()
        self.writer.fail(error)
        self.over = True
        return self.writer.take()


def declared(error: Any) -> ProxyError:
    """What an upstream said went wrong, in the middle of an answer.

    Args:
        error: its account: an object with a message, or a text.
    """
    given = error if isinstance(error, dict) else {"message": error}
    message = given.get("message")
    text = message if isinstance(message, str) and message else "The upstream reported an error."
    said = {str(given.get(name)) for name in ("code", "type", "status")}
    if said & _CREDENTIAL:  # our own: what it says of it is not for the client
        return errors.upstream_credential()
    if said & _OVERLOADED:
        return errors.ProxyError(429, "requests", "rate_limit_exceeded", text, outcome="failed")
    return errors.upstream_error(text, outcome="failed")


_CREDENTIAL = frozenset(
    {"401", "403", "invalid_api_key", "authentication_error", "permission_error"}
)
_OVERLOADED = frozenset({"429", "rate_limit_exceeded", "rate_limit_error"})
