"""The spans of a request that ended: its own (server), and one for each attempt (client).

They are made in the exporter's thread, straight as OTLP has them: by the SDK's spans and encoder
the same costs several times as much. Attributes: OpenTelemetry's for HTTP and for generative AI
(`gen_ai.*`), OpenInference's, and `aiproxy.*` for what is only ours. Tokens and messages are on the
request's span alone, so that nobody adds them up twice.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from openinference.semconv.trace import OpenInferenceSpanKindValues, SpanAttributes
from yarl import URL

import aiproxy
from aiproxy.openinference import attributes as openinference
from aiproxy.otlp import Payload
from aiproxy.otlp_wire import (
    CLIENT,
    FAILED,
    SERVER,
    ExportRequest,
    attribute,
    attributes,
    event,
    span,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aiproxy.exchange import Endpoint, Exchange
    from aiproxy.kept import Kept
    from aiproxy.otlp_wire import Value
    from aiproxy.trace import Attempt, Trace

    Attributes = dict[str, Value]

FIRST_TOKEN = "First Token Stream Event"  # noqa: S105 - as OpenInference's instrumentations call it
MOST_BODY = 4 * 1024 * 1024  # bytes of one body, but for a span that is larger alone
_MOST_KNOWN = 4096  # encoded attributes that are remembered

_log = logging.getLogger(__name__)

_PATHS: Mapping[Endpoint, str] = {
    "responses": "/v1/responses",
    "chat": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
    "messages": "/v1/messages",
    "response": "/v1/responses/{id}",
    "input_tokens": "/v1/responses/input_tokens",
    "count_tokens": "/v1/messages/count_tokens",
    "models": "/v1/models",
}
# OpenTelemetry, "Semantic conventions for generative AI": what is asked for.
_OPERATIONS: Mapping[str, str] = {
    "responses": "chat",
    "chat": "chat",
    "messages": "chat",
    "embeddings": "embeddings",
}
_ANSWERED = frozenset({"completed", "incomplete"})
_FAILURES = frozenset(
    {"failed", "upstream_error", "upstream_timeout", "store_error", "drained", "internal_error"}
)
_SERVER_ERROR = 500
_MOST_TEXT = 128  # characters of what a caller or an upstream has made, as in the log


class Encoder:
    """Makes bodies of OTLP out of exchanges.

    Args:
        resource: who exports them, as attributes.
    """

    def __init__(self, resource: Mapping[str, Value]) -> None:
        self._request_of = ExportRequest(resource, ("aiproxy", aiproxy.__version__))
        self._known: dict[tuple[Value, ...], bytes] = {}

    def __call__(self, exchanges: Sequence[Exchange], /) -> Iterator[Payload]:
        """See `otlp.Encode`."""
        spans: list[bytes] = []
        size = 0
        for exchange in exchanges:
            try:
                made = self.spans(exchange)
            except Exception:  # noqa: BLE001 - a bug of ours costs one request's spans, not a batch
                _log.exception("spans of a request cannot be made")
                yield Payload(b"", 1)
                continue
            new = sum(map(len, made))
            if spans and size + new > MOST_BODY:
                yield Payload(self._request_of.body(spans), len(spans))
                spans, size = [], 0
            spans += made
            size += new
        if spans:
            yield Payload(self._request_of.body(spans), len(spans))

    def spans(self, exchange: Exchange) -> list[bytes]:
        """All of a request, its own first."""
        trace = exchange.trace
        if trace is None or trace.kept is None:
            return []
        made = [self._request(exchange, trace, trace.kept)]
        for number, attempt in enumerate(trace.attempts, 1):
            made.append(self._attempt(exchange, trace, number, attempt))
        return made

    # -- the request's own

    def _request(self, exchange: Exchange, trace: Trace, kept: Kept) -> bytes:
        path = _PATHS.get(exchange.endpoint)
        told: Attributes = {"aiproxy.request_id": exchange.request_id}
        if exchange.client:
            told["client.address"] = exchange.client
        _usage(told, exchange)
        told.update(openinference(kept, answered=exchange.outcome in _ANSWERED))
        first, offset = exchange.first_token, trace.offset
        if first:
            told["gen_ai.response.time_to_first_chunk"] = first - exchange.started
        return span(
            trace_id=trace.trace_id,
            span_id=trace.span_id,
            parent_id=0 if trace.parent is None else trace.parent.span_id,
            remote=trace.parent is not None,
            state=trace.state,
            name=trace.method if path is None else f"{trace.method} {path}",
            times=(_nanoseconds(exchange.started, offset), _nanoseconds(exchange.ended, offset)),
            rest=b"%b%b%b"
            % (
                self._of_request(exchange, trace, path or ""),
                attributes(told),
                event(FIRST_TOKEN, _nanoseconds(first, offset)) if first else b"",
            ),
        )

    def _of_request(self, exchange: Exchange, trace: Trace, path: str) -> bytes:
        """What many requests have in common, encoded."""
        facts = (
            trace.method, exchange.endpoint, exchange.status, exchange.key, exchange.route,
            exchange.model[:_MOST_TEXT], exchange.upstream, exchange.outcome or "",
            exchange.error_code[:_MOST_TEXT], exchange.attempts, exchange.replayed_turns,
        )  # fmt: skip
        known = self._known.get(facts)
        if known is not None:
            return known
        told: Attributes = {
            "http.request.method": trace.method,
            "http.route": path,
            "http.response.status_code": exchange.status,
            "aiproxy.endpoint": exchange.endpoint,
            "aiproxy.key": exchange.key,
            "aiproxy.route": exchange.route,
            "aiproxy.upstream": exchange.upstream,
            "aiproxy.outcome": exchange.outcome or "",
            "aiproxy.attempts": exchange.attempts,
            "error.type": exchange.error_code[:_MOST_TEXT],
        }
        operation = _OPERATIONS.get(exchange.endpoint)
        if operation is not None:
            kinds = OpenInferenceSpanKindValues
            embeds = operation == "embeddings"
            named = SpanAttributes.EMBEDDING_MODEL_NAME if embeds else SpanAttributes.LLM_MODEL_NAME
            told |= {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": _provider(exchange.endpoint),
                "gen_ai.request.model": exchange.model[:_MOST_TEXT],
                named: exchange.model[:_MOST_TEXT],
                SpanAttributes.LLM_SYSTEM: _provider(exchange.endpoint),
                SpanAttributes.OPENINFERENCE_SPAN_KIND: (
                    kinds.EMBEDDING if embeds else kinds.LLM
                ).value,
            }
        if exchange.replayed_turns:
            told["aiproxy.replayed_turns"] = exchange.replayed_turns
        failed = exchange.outcome in _FAILURES or exchange.status >= _SERVER_ERROR
        return self._remember(facts, SERVER, told, failed=failed)

    def _remember(
        self, facts: tuple[Value, ...], kind: bytes, told: Attributes, *, failed: bool
    ) -> bytes:
        given = {key: value for key, value in told.items() if value != ""}
        encoded = kind + attributes(given) + (FAILED if failed else b"")
        if len(self._known) >= _MOST_KNOWN:  # models and error codes are the callers'
            self._known.clear()
        self._known[facts] = encoded
        return encoded

    # -- an attempt's

    def _attempt(self, exchange: Exchange, trace: Trace, number: int, attempt: Attempt) -> bytes:
        operation = _OPERATIONS.get(exchange.endpoint)
        rest = self._of_attempt(trace.method, number, attempt, operation or "")
        if attempt.request_id:
            told = attempt.request_id[:_MOST_TEXT]
            rest += attribute("aiproxy.upstream_request_id", told)
        began, ended, offset = attempt.began, attempt.ended or exchange.ended, trace.offset
        return span(
            trace_id=trace.trace_id,
            span_id=attempt.span_id,
            parent_id=trace.span_id,
            remote=False,
            state=trace.state,
            name=f"{operation or exchange.endpoint} {attempt.model}".rstrip(),
            times=(_nanoseconds(began, offset), _nanoseconds(ended, offset)),
            rest=rest,
        )

    def _of_attempt(self, method: str, number: int, attempt: Attempt, operation: str) -> bytes:
        facts = (
            method, number, attempt.upstream, attempt.origin, attempt.api, attempt.model,
            attempt.result, attempt.status, operation,
        )  # fmt: skip
        known = self._known.get(facts)
        if known is not None:
            return known
        origin = URL(attempt.origin)
        told: Attributes = {
            "http.request.method": method,
            "server.address": origin.host or "",
            "server.port": origin.port or 0,
            "aiproxy.upstream": attempt.upstream,
            "aiproxy.attempt": number,
            "aiproxy.result": attempt.result or "left",  # nobody waited for its end any more
        }
        if attempt.status:
            told["http.response.status_code"] = attempt.status
        failed = attempt.result not in ("ok", "")
        if failed:
            told["error.type"] = attempt.result
        if operation:
            told["gen_ai.operation.name"] = operation
            told["gen_ai.provider.name"] = _provider(attempt.api)
            told["gen_ai.request.model"] = attempt.model
            # Else readers take it for another call of a model, and count it twice.
            told[SpanAttributes.OPENINFERENCE_SPAN_KIND] = OpenInferenceSpanKindValues.CHAIN.value
        return self._remember(facts, CLIENT, told, failed=failed)


def _provider(api: str) -> str:
    """Whose API is spoken; whose model answers is not known."""
    return "anthropic" if api == "messages" else "openai"


def _usage(told: Attributes, exchange: Exchange) -> None:
    usage = exchange.usage
    if usage is None:
        return
    given, made = usage.total_input, usage.total_output
    told["gen_ai.usage.input_tokens"] = told[SpanAttributes.LLM_TOKEN_COUNT_PROMPT] = given
    told["gen_ai.usage.output_tokens"] = told[SpanAttributes.LLM_TOKEN_COUNT_COMPLETION] = made
    told[SpanAttributes.LLM_TOKEN_COUNT_TOTAL] = given + made
    if cached := usage.input_cached:
        told["gen_ai.usage.cache_read.input_tokens"] = cached
        told[SpanAttributes.LLM_TOKEN_COUNT_PROMPT_DETAILS_CACHE_READ] = cached
    if thought := usage.output_reasoning:
        told["gen_ai.usage.reasoning.output_tokens"] = thought
        told[SpanAttributes.LLM_TOKEN_COUNT_COMPLETION_DETAILS_REASONING] = thought
    if exchange.estimated is not None:
        told["aiproxy.usage.estimated"] = exchange.estimated


def _nanoseconds(moment: float, offset: float) -> int:
    return int((moment + offset) * 1e9)
