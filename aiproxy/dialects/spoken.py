"""Which dialect an upstream is spoken to, for what a client asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from aiproxy.dialects.chat_bridge import ChatBridge
from aiproxy.dialects.messages_bridge import MessagesBridge
from aiproxy.dialects.responses_repair import RepairedResponses

if TYPE_CHECKING:
    from aiproxy.config import Target, Upstream
    from aiproxy.dialects import Asked, Dialect
    from aiproxy.envelope import Envelope


class Way(NamedTuple):
    """How a request is served: what is asked, whom, in which dialect."""

    asked: Asked
    target: Target
    spoken: Dialect


_REPAIRED = RepairedResponses()
_CHAT, _MESSAGES = ChatBridge(), MessagesBridge()


def spoken(asked: Dialect, upstream: Upstream) -> Dialect:
    """The dialect for an upstream that is known to serve what is asked for (see `routes.speaking`).

    Args:
        asked: the client's own dialect.
        upstream: that is to answer.
    """
    if asked.api != "responses":
        return asked
    if "responses" in upstream.apis:
        return _REPAIRED if upstream.normalize else asked
    return _CHAT if "chat" in upstream.apis else _MESSAGES


def rename(way: Way, envelope: Envelope) -> None:
    """Ask for the model by the name that the target knows."""
    model = way.target.model
    if model is not None and model != way.asked.model:
        envelope.put("model", model)
        way.asked.renamed = True
