"""How many tokens a request would have: asked of an upstream that counts them itself.

Nothing is made, so nothing is charged but one request. An upstream that speaks another API than the
client counts something else; there the path is unknown.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aiproxy import auth, errors
from aiproxy.attempts import send
from aiproxy.conversation import Conversation
from aiproxy.dialects import members_of
from aiproxy.dialects.spoken import Way, rename
from aiproxy.upstream import Ask

if TYPE_CHECKING:
    from aiproxy.call import Call
    from aiproxy.dialects import Dialect
    from aiproxy.errors import Outcome
    from aiproxy.proxy import Proxy
    from aiproxy.session_gate import SessionGate


class Counting:
    """The counting endpoints."""

    def __init__(self, proxy: Proxy, sessions: SessionGate) -> None:
        self._proxy = proxy
        self._sessions = sessions

    async def count(self, call: Call, dialect: Dialect) -> Outcome:
        """A POST to one of them."""
        proxy = self._proxy
        key = proxy.authenticate(call)
        envelope, _ = await proxy.receive(call)
        asked = call.asked = dialect.request(envelope)
        route = proxy.choose(call, asked, key)
        auth.permit(key, envelope)
        await proxy.restrict(route, envelope)
        if not any(dialect.api in target.upstream.apis for target in route.targets):
            raise errors.unknown_url("POST", f"/v1{dialect.path}")
        conversation = None
        if dialect.api == "responses":
            conversation = call.conversation = Conversation(self._sessions, call, asked)
            await conversation.begin(envelope)
        target = proxy.order(call, route, dialect, bridged=False).reach(0)
        way = Way(asked, target, dialect)
        if conversation is not None:
            await conversation.place(way)
        await proxy.admit(call)
        if conversation is not None:
            await conversation.recall(envelope)
        rename(way, envelope)
        ask = Ask(
            call.snapshot.clients[target.upstream.name],
            proxy.standings.of(target.upstream),
            call.exchange,
            call.watch,
            shape=call.shape,
        )
        with await send(call, way, envelope, ask) as answer:
            call.hold.release()
            if answer.media_type not in ("application/json", ""):
                raise answer.not_an_answer("The upstream's answer is not JSON.")
            call.exchange.answered = time.monotonic()
            body = await answer.read()
            if members_of(body) is None:
                raise answer.not_an_answer("The upstream's answer is not a JSON object.")
            call.send_json(200, body, answer.passed_on())
        return "completed"
