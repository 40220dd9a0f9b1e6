"""What one request of the Responses API has to do with stored turns.

It goes on from a turn, it refers to items, and its own turn is kept. `begin` looks up what it names
(rows alone), `place` says whether its target can go on from it; once it is admitted, `prepare`
brings in the content and makes the body that the target can take; `keep` stores its answer before
the client sees its end.
"""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import msgspec

from aiproxy import errors
from aiproxy.aside import aside
from aiproxy.dialects import responses_items
from aiproxy.dialects.responses_items import ENCRYPTED, Replayed
from aiproxy.prompt_size import Size
from aiproxy.sessions import NOTHING, Content, Turn, new_response_id
from aiproxy.sessions.items import LONGEST_ID, array, elements, identified, ids_of, joined

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aiproxy.call import Call
    from aiproxy.config import Target
    from aiproxy.dialects import Asked, Dialect
    from aiproxy.dialects.responses_items import Reference
    from aiproxy.dialects.responses_object import Produced
    from aiproxy.dialects.spoken import Way
    from aiproxy.envelope import Envelope
    from aiproxy.errors import ProxyError
    from aiproxy.session_gate import SessionGate
    from aiproxy.sessions import Delta, Found, Head
    from aiproxy.usage import Usage

_ID = re.compile(r"[A-Za-z0-9._:~-]{1,256}", re.ASCII)  # of an upstream, fit for a path


class Conversation:
    """The part of one request in a conversation.

    Attributes:
        parent: the turn that it goes on from.
    """

    def __init__(self, gate: SessionGate, call: Call, asked: Asked) -> None:
        self._gate = gate
        self._call = call
        self._asked = asked
        self.parent: Head | None = None
        self._references: list[Reference] = []
        self._found: Mapping[str, Found] = {}
        self._input = b""  # the new items, as they are kept
        self._include: bytes | None = None  # as the client wrote it, where something was added
        self._included = False
        self._upstream = ""
        self._theirs = False  # the upstream holds the conversation
        self._spoken: Dialect | None = None
        self._sent_model = ""

    async def begin(self, envelope: Envelope) -> None:
        """Look up what the request names.

        Raises:
            ProxyError: something is not this key's own, or it is too much; or the store is away.
        """
        gate, asked, exchange = self._gate, self._asked, self._call.exchange
        if asked.store:
            await gate.ready()
        if (previous := asked.previous) is not None:
            head = await gate.load(exchange, previous, to_go_on=True)
            if head is None:
                raise errors.previous_response_not_found(previous)
            self.parent = head
            gate.pin(head)
        self._references = responses_items.references(envelope.raw("input"))
        if self._references:
            wanted = dict.fromkeys(each.id for each in self._references)
            ids = [each for each in wanted if each is not None and len(each) <= LONGEST_ID]
            self._found = await gate.find(exchange, ids)
            if len(self._found) < len(wanted):
                raise errors.item_not_found()
        self._check_bounds(envelope.size)

    def _check_bounds(self, size: int) -> None:
        bounds, parent = self._gate.bounds, self.parent
        if parent is not None and parent.depth >= bounds.max_turns:
            raise errors.conversation_too_long(
                f"This conversation has {parent.depth} turns, and at most {bounds.max_turns} are"
                " allowed."
            )
        if self.recalled and self.recalled + size > bounds.max_replay:
            raise errors.conversation_too_long(
                f"This conversation comes to {self.recalled + size} bytes, and at most"
                f" {bounds.max_replay} are allowed.",
                "input" if parent is None else "previous_response_id",
            )

    @property
    def recalled(self) -> int:
        """Bytes of stored items that the request brings in."""
        before = 0 if self.parent is None else self.parent.size
        return before + sum(found.size for found in self._found.values())

    @property
    def goes_on(self) -> bool:
        """Whether it brings in anything that is stored."""
        return self.parent is not None or bool(self._found)

    @property
    def prefers(self) -> str | None:
        """The upstream that made what it goes on from."""
        if self.parent is not None:
            return self.parent.upstream
        found = list(self._found.values())
        return found[-1].upstream if found else None

    async def place(self, way: Way, envelope: Envelope) -> None:
        """Take the target that the request goes to, and the dialect that it is spoken to.

        Raises:
            ProxyError: it holds nothing of what the request goes on from, and cannot be given it.
        """
        target, spoken = way.target, way.spoken
        self._upstream = target.upstream.name
        self._sent_model = target.model or self._asked.model
        self._spoken = spoken
        self._theirs = target.upstream.sessions == "upstream" and not spoken.translates
        parent, found = self.parent, self._found.values()
        here = parent.held if parent is not None else not self._theirs
        if parent is not None and not parent.held:
            there = self._theirs and parent.upstream == self._upstream
            if not there:
                raise errors.unsupported_parameter(
                    "previous_response_id",
                    f"This conversation is held by the upstream '{parent.upstream}', which does not"
                    " serve this model here.",
                )
        # An item that an upstream holds can be referred to there alone.
        if any(not each.held and (here or each.upstream != self._upstream) for each in found):
            raise errors.item_not_found()
        if self._theirs:
            await self._check_items(envelope)

    async def _check_items(self, envelope: Envelope) -> None:
        """Refuse ids that the upstream would look up, unless they are this key's."""
        wanted = list(dict.fromkeys(responses_items.needs_lookup(envelope.raw("input"))))
        if not wanted:
            return
        if any(len(each) > LONGEST_ID for each in wanted):
            raise errors.item_not_found()
        found = await self._gate.find(self._call.exchange, wanted)
        if len(found) < len(wanted):
            raise errors.item_not_found()

    def tokens(self, estimate: Callable[[Size], int]) -> int:
        """Input tokens of what is stored: as its last turn used, or as `estimate` says."""
        found = 0
        if self.parent is not None:
            tokens = self.parent.tokens
            found = estimate(Size(self.parent.size, 0)) if tokens is None else tokens
        if self._found:
            found += estimate(Size(sum(each.weight for each in self._found.values()), 0))
        return found

    def end(self) -> None:
        """The request has ended."""
        if self.parent is not None:
            self._gate.unpin(self.parent)

    # -- the body

    async def recall(self, envelope: Envelope) -> None:
        """Put what is stored in the place of what names it, as far as the target needs it.

        Raises:
            ProxyError: it has been deleted meanwhile; or there is no memory for it.
        """
        if self._theirs:
            await self._hand_over(envelope)
        else:
            await self._expand(envelope)

    async def prepare(self, target: Target, envelope: Envelope) -> None:
        """Make of the request what its target can take, and its answer what can be kept.

        Raises:
            ProxyError: as `recall`.
        """
        asked = self._asked
        asked.keep = asked.store
        if self._theirs:
            await self.recall(envelope)
            return
        asked.own = {
            "id": b'"%b"' % new_response_id().encode(),
            "previous_response_id": msgspec.json.encode(asked.previous),
            "store": b"true" if asked.store else b"false",
        }
        await self.recall(envelope)
        envelope.put("store", False)
        if asked.store and self._spoken is not None and not self._spoken.translates:
            self._ask_for_reasoning(target, envelope)

    async def _expand(self, envelope: Envelope) -> None:
        """Put what is stored in the place of what names it."""
        given = responses_items.as_array(envelope.raw("input"))
        self._input = given
        if not self.goes_on:
            return
        self._call.hold.take(self.recalled)
        path = await self._path()
        items = await self._items()
        sent = await aside(lambda: self._assemble(path, given, items), self.recalled + len(given))
        if self._call.exchange.reasoning_left_out:
            self._gate.reasoning_left_out(self._call.exchange)
        envelope.drop("previous_response_id")
        envelope.put_raw("input", sent)

    async def _path(self) -> Sequence[Delta]:
        parent = self.parent
        if parent is None:
            return ()
        path = await self._gate.path(parent)
        if path is None:  # deleted since it was looked up
            raise errors.previous_response_not_found(parent.id)
        self._call.exchange.replayed_turns = len(path)
        return path

    async def _items(self) -> Mapping[str, bytes]:
        """The items that are referred to, by id."""
        found = list(self._found.values())
        if not found:
            return {}
        items = await self._gate.items(self._call.exchange.key, found)
        if items is None:
            raise errors.item_not_found()
        return {each.id: item for each, item in zip(found, items, strict=True)}

    def _assemble(self, path: Sequence[Delta], given: bytes, items: Mapping[str, bytes]) -> bytes:
        """The whole input: the turns before, then the new items."""
        left_out = 0
        arrays: list[bytes] = []
        for turn in path:
            if not turn.reasons:
                arrays += (turn.input, turn.output)
                continue
            for each in (turn.input, turn.output):
                kept = self._readable(each, turn.upstream)
                arrays.append(kept.items)
                left_out += kept.foreign
        if self._references:
            there = {item_id for turn in path for item_id in ids_of(turn.input, turn.output)}
            new, sent = [], []
            names = {each.position: each.id or "" for each in self._references}
            for position, item in enumerate(elements(given)):
                name = names.get(position)
                if name is None:
                    new.append(item)
                    sent.append(item)
                elif name not in there:
                    new.append(items[name])
                    kept = self._readable(array([items[name]]), self._found[name].upstream)
                    sent.extend(elements(kept.items))
                    left_out += kept.foreign
            self._input = array(new)
            arrays.append(array(sent))
        else:
            arrays.append(given)
        self._call.exchange.reasoning_left_out = left_out
        return joined(arrays)

    def _readable(self, items: bytes, origin: str) -> Replayed:
        """What of stored items the target can read."""
        spoken = self._spoken
        if spoken is not None and spoken.api == "chat":
            return Replayed(items, 0)  # reasoning is no more than text there, if anything
        return responses_items.replayed(
            items,
            same_origin=origin == self._upstream,
            plain=spoken is not None and spoken.translates,
        )

    async def _hand_over(self, envelope: Envelope) -> None:
        """Ask an upstream that holds conversations itself."""
        parent = self.parent
        if parent is not None and parent.held:
            # It began here: it goes on there with all that was said.
            self._asked.own = {"previous_response_id": msgspec.json.encode(parent.id)}
            await self._expand(envelope)
        elif self._references:
            given = responses_items.as_array(envelope.raw("input"))
            envelope.put_raw("input", await self._with_known(given))

    async def _with_known(self, given: bytes) -> bytes:
        """The input with the items that are held here in place of their references."""
        held = [each for each in self._found.values() if each.held]
        self._call.hold.take(sum(each.size for each in held))
        items = await self._gate.items(self._call.exchange.key, held) if held else []
        if items is None:
            raise errors.item_not_found()
        known = {each.id: item for each, item in zip(held, items, strict=True)}
        names = {each.position: each.id or "" for each in self._references}
        return array(
            item
            if (name := names.get(position)) is None
            else known.get(name) or responses_items.reference(name)
            for position, item in enumerate(elements(given))
        )

    # -- reasoning

    def _ask_for_reasoning(self, target: Target, envelope: Envelope) -> None:
        """Have the reasoning encrypted, so that it can be replayed."""
        auto = target.reasoning == "auto"
        if not target.reasoning or (
            auto and (self._upstream, self._sent_model) in self._call.recent.not_reasoning
        ):
            return
        given = envelope.raw("include")
        if given is not None and given[:1] != b"[":
            return  # the upstream says what is wrong with it
        if ENCRYPTED in responses_items.included(given):
            return
        envelope.put_raw("include", joined((given or b"[]", b'["%b"]' % ENCRYPTED.encode())))
        self._include, self._included = given, auto

    def asks_again(self, error: ProxyError, envelope: Envelope) -> bool:
        """Whether a refusal was for what we have added; then it is taken out of the request."""
        refused = error.status == 400 and error.outcome == "upstream_rejected"  # noqa: PLR2004
        if not (self._included and refused and (error.param or "").startswith("include")):
            return False
        self._included = False
        if self._include is None:
            envelope.drop("include")
        else:
            envelope.put_raw("include", self._include)
        return True

    def refused_for_reasoning(self) -> None:
        """Remember the target: without what we had added it took the request."""
        self._call.recent.not_reasoning.add((self._upstream, self._sent_model))

    # -- the answer

    @property
    def holding(self) -> int:
        """Bytes of the request that are needed until its turn is kept."""
        return len(self._input) if self._asked.keep and not self._theirs else 0

    async def keep(self, produced: Produced, usage: Usage | None) -> None:
        """Store the turn: what was asked and what came of it.

        Raises:
            ProxyError: it cannot be stored; the client must not be told that it is complete.
        """
        turn = await aside(lambda: self._turn(produced, usage), len(produced.output))
        if turn is not None:
            await self._gate.put(turn)

    def _turn(self, produced: Produced, usage: Usage | None) -> Turn | None:
        asked = self._asked
        if self._theirs:
            response_id, content = produced.id or "", NOTHING
            if not _ID.fullmatch(response_id):
                return None  # no client could name it
        else:
            response_id = msgspec.json.decode(asked.own["id"], type=str)
            content = Content(self._input, produced.output, produced.before, produced.after)
        return Turn(
            id=response_id,
            owner=self._call.exchange.key,
            parent=self.parent,
            created=int(time.time()),
            model=asked.model,
            upstream=self._upstream,
            tokens=None if usage is None else usage.total,
            held=not self._theirs,
            reasons=responses_items.may_reason(content.input, content.output),
            content=content,
            items=identified(content.input, produced.output),
        )
