"""The items of earlier turns that a request refers to: whose, where, and what they hold."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiproxy import errors
from aiproxy.aside import aside
from aiproxy.dialects import responses_named
from aiproxy.sessions.items import LONGEST_ID

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from aiproxy.call import Call
    from aiproxy.dialects.responses_named import Named
    from aiproxy.session_gate import SessionGate
    from aiproxy.sessions import Found

_EACH = 8  # an item that is looked at by itself takes as long as many times its bytes in one go
_AT_ONCE = 256  # ids that are looked for in the store together


class Referred:
    """What the input of one request refers to.

    Attributes:
        found: the items, by id.
        names: the ids by the places of the references in the input.
    """

    def __init__(self, gate: SessionGate, call: Call) -> None:
        self._gate = gate
        self._call = call
        self._named = responses_named.NONE
        self.found: Mapping[str, Found] = {}
        self.names: Mapping[int, str] = {}

    async def look(self, given: bytes | None) -> None:
        """Find out what an `input` refers to.

        Raises:
            ProxyError: something is not this key's own, or may mean several things; or the store is
                away.
        """
        self._named = await _named(given)
        self.found = await self._find(each.id for each in self._named.references)
        self.names = {each.position: each.id or "" for each in self._named.references}

    def all(self, *, held: bool = False) -> list[Found]:
        """The items as they are brought in: what is named twice, twice. `held`: only those here."""
        every = (self.found[name] for name in self.names.values())
        return [each for each in every if each.held or not held]

    async def items(self, *, held: bool = False) -> Mapping[str, bytes]:
        """The items themselves, by id.

        Raises:
            ProxyError: one was deleted meanwhile.
        """
        found = [each for each in self.found.values() if each.held or not held]
        if not found:
            return {}
        items = await self._gate.items(self._call.exchange.key, found)
        if items is None:
            raise errors.item_not_found()
        return {each.id: item for each, item in zip(found, items, strict=True)}

    # -- what an upstream that holds conversations could look up

    async def check(self, upstream: str) -> None:
        """Refuse ids that this upstream would look up, unless they are this key's there.

        Raises:
            ProxyError: some are not; or the store is away.
        """
        await self._check(self._named, upstream)

    async def check_brought(self, given: bytes | None, upstream: str) -> None:
        """Check an input once more, in which items of turns made elsewhere were put."""
        named = await _named(given)
        for each in named.references:
            found = self.found.get(each.id or "")
            if found is None or not is_there(found, upstream):
                raise errors.item_not_found()
        await self._check(named, upstream)

    async def _check(self, named: Named, upstream: str) -> None:
        if named.unclear is not None:
            raise named.unclear
        found = await self._find(named.lookups)
        if not all(is_there(each, upstream) for each in found.values()):
            raise errors.item_not_found()

    async def _find(self, wanted: Iterable[str | None]) -> Mapping[str, Found]:
        """Look for items by their ids, all of which must be this key's own."""
        ids = list(dict.fromkeys(wanted))
        named = [each for each in ids if each is not None and len(each) <= LONGEST_ID]
        if len(named) < len(ids):
            raise errors.item_not_found()
        found: dict[str, Found] = {}
        for start in range(0, len(named), _AT_ONCE):
            few = named[start : start + _AT_ONCE]
            if start:
                await asyncio.sleep(0)  # others have their turn: a request may name thousands
            found.update(await self._gate.find(self._call.exchange, few))
            if not all(each in found for each in few):
                raise errors.item_not_found()
        return found


def is_there(found: Found, upstream: str) -> bool:
    """Whether this upstream gave the item to the key, and holds it.

    An id in what a client has sent is not the client's own for that.
    """
    return not found.held and found.output and found.upstream == upstream


async def _named(given: bytes | None) -> Named:
    """What an `input` names, without holding up the others."""
    if given is None or not responses_named.marked(given):
        return responses_named.NONE
    return await aside(lambda: responses_named.named(given), _EACH * len(given))
