"""Responses that were made before: `/v1/responses/{id}` and what is below it.

What aiproxy holds it answers itself; what an upstream holds is asked there, under the id that this
key was given. Whatever is not this key's own looks unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from aiproxy import errors, jsontext
from aiproxy.aside import aside
from aiproxy.dialects import members_of
from aiproxy.dialects.responses_items import listed
from aiproxy.upstream import Ask

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

    from aiproxy.call import Call
    from aiproxy.errors import Outcome
    from aiproxy.proxy import Proxy
    from aiproxy.session_gate import SessionGate
    from aiproxy.sessions import Head

DEFAULT_LIMIT, MAX_LIMIT = 20, 100  # items of a page (API reference, "List input items")

_NOT_DONE = frozenset({"stream", "starting_after", "before"})  # parameters of the API

Pairs = list[tuple[str, str]]


class Stored:
    """What can be done with a response that was made before."""

    def __init__(self, proxy: Proxy, sessions: SessionGate) -> None:
        self._proxy = proxy
        self._sessions = sessions

    async def get(self, call: Call, response_id: str) -> Outcome:
        """The response object."""
        query = _query(call, ("include",))
        head = await self._find(call, response_id)
        if not head.held:
            body = await self._ask(call, head, "GET", "", _included(query))
            return self._send(call, _with_model(body, head))
        content = await self._sessions.content(head)
        if content is None:
            raise errors.response_not_found(response_id)
        return self._send(call, content.response)

    async def delete(self, call: Call, response_id: str) -> Outcome:
        """Forget it, content and all."""
        _query(call)
        head = await self._find(call, response_id)
        if head.held:
            if not await self._sessions.delete(head):
                raise errors.response_not_found(response_id)
            gone = {"id": response_id, "object": "response", "deleted": True}
            return self._send(call, msgspec.json.encode(gone))
        try:
            body = await self._ask(call, head, "DELETE", "", ())
        except errors.ProxyError as error:
            if error.status == 404:  # noqa: PLR2004 - HTTP's own number
                await self._sessions.delete(head)
            raise
        await self._sessions.delete(head)
        return self._send(call, body)

    async def input_items(self, call: Call, response_id: str) -> Outcome:
        """Page through what was asked."""
        query = _query(call, ("include", "limit", "order", "after"))
        limit, order, after = _page(query)
        head = await self._find(call, response_id)
        if not head.held:
            given = [pair for pair in query if pair[0] in ("limit", "order", "after")]
            page = [*given, *_included(query)]
            return self._send(call, await self._ask(call, head, "GET", "/input_items", page))
        content = await self._sessions.content(head)
        if content is None:
            raise errors.response_not_found(response_id)
        items = await aside(lambda: listed(content.input, head.id), len(content.input))
        if order == "desc":
            items.reverse()
        if after is not None:
            ids = [item_id for item_id, _ in items]
            if after not in ids:
                raise errors.invalid_value("after", "'after' is no item of this list.")
            items = items[ids.index(after) + 1 :]
        shown = items[:limit]
        return self._send(call, _list(shown, more=len(items) > len(shown)))

    async def cancel(self, call: Call, response_id: str) -> Outcome:
        """Refuse: what is stored is finished."""
        await self._find(call, response_id)
        raise errors.not_cancellable()

    async def _find(self, call: Call, response_id: str) -> Head:
        """The turn of that id, for every verb; one request of the key's limits."""
        await self._proxy.admit(call)
        head = await self._sessions.load(call.exchange, response_id)
        if head is None:
            raise errors.response_not_found(response_id)
        return head

    async def _ask(
        self, call: Call, head: Head, method: str, below: str, query: Iterable[tuple[str, str]]
    ) -> bytes:
        """Ask the upstream that holds it."""
        client = call.snapshot.clients.get(head.upstream)
        if client is None:
            raise errors.upstream_error("The upstream of this response is not configured any more.")
        exchange = call.exchange
        exchange.upstream = head.upstream
        call.watch.bound(client.timeouts.total)
        asked = client.request_head(
            "responses",
            client.target(f"/responses/{quote(head.id, safe='')}{below}", query),
            call.request.headers.items(),
            request_id=exchange.request_id,
            size=0,
            method=method,
            trace=exchange.trace,
        )
        ask = Ask(
            client, self._proxy.standings.of(client.upstream), exchange, call.watch, shape="openai"
        )
        with await ask.send(asked, b"") as answer:
            if answer.media_type not in ("application/json", ""):
                raise answer.not_an_answer("The upstream's answer is not JSON.")
            body = await answer.read()
        if members_of(body) is None:
            raise errors.upstream_error("The upstream's answer is not a JSON object.")
        return body

    @staticmethod
    def _send(call: Call, body: bytes) -> Outcome:
        call.send_json(200, body)
        return "completed"


def act(
    stored: Stored, proxy: Proxy, method: str, verb: str, response_id: str
) -> Callable[[Call], Awaitable[Outcome]]:
    """What a method on a stored response does, once it is known who calls."""
    verbs: Mapping[tuple[str, str], Any] = {
        ("GET", ""): stored.get,
        ("DELETE", ""): stored.delete,
        ("GET", "input_items"): stored.input_items,
        ("POST", "cancel"): stored.cancel,
    }
    done = verbs["GET" if method == "HEAD" else method, verb]

    async def acting(call: Call) -> Outcome:
        proxy.authenticate(call)
        outcome: Outcome = await done(call, response_id)
        return outcome

    return acting


def _query(call: Call, known: Collection[str] = ()) -> Pairs:
    """What of the query means something here.

    Raises:
        ProxyError: `unsupported_parameter`, for what the API has and aiproxy does not.
    """
    found: Pairs = []
    for name, value in call.request.query.items():
        bare = name.removesuffix("[]")
        if bare in _NOT_DONE and value.lower() != "false":
            raise errors.unsupported_parameter(bare, f"'{bare}' is not supported here.")
        if bare in known:
            found.append((bare, value))
    return found


def _included(query: Pairs) -> Pairs:
    """What is asked for besides; where it is held here all there is comes anyway."""
    return [("include[]", value) for name, value in query if name == "include"]


def _page(query: Pairs) -> tuple[int, str, str | None]:
    given = dict(query)
    limit, order = given.get("limit", str(DEFAULT_LIMIT)), given.get("order", "desc")
    known = limit.isascii() and limit.isdigit() and len(limit) <= len(str(MAX_LIMIT))
    if not known or not 1 <= int(limit) <= MAX_LIMIT:
        raise errors.invalid_value("limit", f"'limit' must be from 1 to {MAX_LIMIT}.")
    if order not in ("asc", "desc"):
        raise errors.invalid_value("order", "'order' must be asc or desc.")
    return int(limit), order, given.get("after")


def _list(items: list[tuple[str, bytes]], *, more: bool) -> bytes:
    ids = [item_id for item_id, _ in items]
    return msgspec.json.encode(
        {
            "object": "list",
            "data": [msgspec.Raw(item) for _, item in items],
            "first_id": ids[0] if ids else None,
            "last_id": ids[-1] if ids else None,
            "has_more": more,
        }
    )


def _with_model(body: bytes, head: Head) -> bytes:
    """The object with the model as the client wrote it, where its answer had that."""
    if not head.model:
        return body
    members = members_of(body) or {}
    known = {name: bytes(value) for name, value in members.items() if name == "model"}
    return jsontext.amend(body, known, {"model": msgspec.json.encode(head.model)})
