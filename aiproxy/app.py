"""Paths -> what is done: the client listener's table.

Paths are compared as they came: nothing is decoded or normalised, so `%2F`, `..` and `//` never
name something else. No upstream path is ever built from them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from urllib.parse import unquote

import msgspec

from aiproxy import errors
from aiproxy.counting import Counting
from aiproxy.dialects.chat import Chat, Embeddings
from aiproxy.dialects.messages import CountTokens, Messages
from aiproxy.dialects.responses import InputTokens, Responses
from aiproxy.head import check_head
from aiproxy.proxy import shape_of
from aiproxy.stored import Stored, act

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.web_request import BaseRequest

    from aiproxy.call import Call
    from aiproxy.dialects import Dialect
    from aiproxy.errors import Outcome
    from aiproxy.exchange import Endpoint
    from aiproxy.proxy import Proxy
    from aiproxy.reply import Reply
    from aiproxy.session_gate import SessionGate

    Act = Callable[[Call], Awaitable[Outcome]]

_RELAYED: dict[str, tuple[Endpoint, Dialect]] = {
    "/v1/responses": ("responses", Responses()),
    "/v1/chat/completions": ("chat", Chat()),
    "/v1/embeddings": ("embeddings", Embeddings()),
    "/v1/messages": ("messages", Messages()),
}
_COUNTED: dict[str, tuple[Endpoint, Dialect]] = {
    "/v1/responses/input_tokens": ("input_tokens", InputTokens()),
    "/v1/messages/count_tokens": ("count_tokens", CountTokens()),
}


class App:
    """Answers the requests of the client listener."""

    def __init__(self, proxy: Proxy, sessions: SessionGate) -> None:
        self._proxy = proxy
        self._stored = Stored(proxy, sessions)
        self._posted: dict[str, tuple[Endpoint, Act]] = {
            path: (endpoint, partial(proxy.relay, dialect=dialect))
            for path, (endpoint, dialect) in _RELAYED.items()
        }
        counting = Counting(proxy, sessions)
        self._posted |= {
            path: (endpoint, partial(counting.count, dialect=dialect))
            for path, (endpoint, dialect) in _COUNTED.items()
        }

    async def __call__(self, request: BaseRequest) -> Reply:
        """Answer one request."""
        try:
            path = check_head(request)
        except errors.ProxyError as error:
            return self._proxy.refuse(request, error)
        shape = shape_of(path)
        endpoint, act = self._find(request, path)
        return await self._proxy.serve(request, endpoint, shape, act)

    def _find(self, request: BaseRequest, path: str) -> tuple[Endpoint, Act]:
        """What a method and a path mean: an endpoint, and what it does."""
        method = request.method
        if (posted := self._posted.get(path)) is not None:
            if path == "/v1/responses" and _upgrades(request):
                return "responses", _raise(errors.upgrade_not_supported())
            if method == "POST":
                return posted
            return posted[0], _raise(errors.method_not_allowed(method, "POST"))
        if path == "/":
            return self._reading(method, "none", _greet)
        if path == "/v1/models":
            return self._reading(method, "models", self._models)
        if path.startswith("/v1/models/"):
            name = unquote(path.removeprefix("/v1/models/"))
            return self._reading(method, "models", lambda call: self._model(call, name))
        if path.startswith("/v1/responses/"):
            return self._response(method, path)
        return "none", _raise(errors.unknown_url(method, path))

    @staticmethod
    def _reading(method: str, endpoint: Endpoint, act: Act) -> tuple[Endpoint, Act]:
        if method in ("GET", "HEAD"):
            return endpoint, act
        return endpoint, _raise(errors.method_not_allowed(method, "GET, HEAD"))

    def _response(self, method: str, path: str) -> tuple[Endpoint, Act]:
        """`/v1/responses/{id}` and below it."""
        response_id, _, verb = path.removeprefix("/v1/responses/").partition("/")
        allowed = {"": "GET, HEAD, DELETE", "input_items": "GET, HEAD", "cancel": "POST"}.get(verb)
        if allowed is None or not response_id or response_id in ("compact", "input_tokens"):
            return "none", _raise(errors.unknown_url(method, path))
        if method not in allowed.split(", "):
            return "response", _raise(errors.method_not_allowed(method, allowed))
        return "response", act(self._stored, self._proxy, method, verb, response_id)

    async def _models(self, call: Call) -> Outcome:
        key = self._proxy.authenticate(call)
        names = call.snapshot.router.listed(key)
        listed = {"object": "list", "data": [_model_object(name) for name in names]}
        call.send_json(200, msgspec.json.encode(listed))
        return "completed"

    async def _model(self, call: Call, name: str) -> Outcome:
        key = self._proxy.authenticate(call)
        if name not in call.snapshot.router.listed(key):
            raise errors.model_not_found(name)
        call.send_json(200, msgspec.json.encode(_model_object(name)))
        return "completed"


def _upgrades(request: BaseRequest) -> bool:
    """Whether it asks for another protocol; a POST that offers HTTP/2 (as curl does) is a POST."""
    offered = request.headers.get("Upgrade")
    if offered is None:
        return False
    return request.method != "POST" or offered.strip().lower() == "websocket"


def _model_object(name: str) -> dict[str, object]:
    """A model as the API lists it (API reference, "The model object")."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "aiproxy"}


async def _greet(call: Call) -> Outcome:
    """Clients that probe the root without a key find it alive."""
    call.send_json(200, b'{"status":"ok"}')
    return "completed"


def _raise(error: errors.ProxyError) -> Act:
    async def act(_call: Call) -> Outcome:
        raise error

    return act
