"""What one request of the Responses API has to do with stored turns.

It goes on from a turn, it refers to items, and its own turn is kept. `begin` looks up what it names
(rows alone), `place` says whether its target can go on from it; once it is admitted, `prepare`
brings in the content and makes the body that the target can take; `keep` stores its answer before
the client sees its end.
"""

from __future__ import annotations

import re
import time
from http import HTTPStatus
from typing import TYPE_CHECKING

import msgspec

from aiproxy import errors
from aiproxy.aside import aside
from aiproxy.dialects import responses_items
from aiproxy.dialects.responses_items import ENCRYPTED, Replayed
from aiproxy.jsontext import elements
from aiproxy.prompt_size import Size
from aiproxy.referred import Referred, is_there
from aiproxy.sessions import NOTHING, ROW, Content, Turn, new_response_id
from aiproxy.sessions.items import array, identified, ids_of, joined
from aiproxy.usage import estimate_output

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from aiproxy.call import Call
    from aiproxy.config import Target
    from aiproxy.dialects import Asked, Dialect
    from aiproxy.dialects.responses_object import Produced
    from aiproxy.dialects.spoken import Way
    from aiproxy.envelope import Envelope
    from aiproxy.errors import ProxyError
    from aiproxy.session_gate import SessionGate
    from aiproxy.sessions import Delta, Found, Head
    from aiproxy.usage import Usage

_ID = re.compile(r"[A-Za-z0-9._:~-]{1,256}", re.ASCII)  # of an upstream, fit for a path
# Of what is brought in: its pieces and the input made of them; then this and the body to send.
_COPIES = 2


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
        self._referred = Referred(gate, call)
        self._given = 0  # bytes of the new items, at least
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
        given = envelope.raw("input")
        await self._referred.look(given)
        if given is not None and not self._referred.names:  # these may name what is smaller
            self._given = len(given)
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
        return before + sum(each.size for each in self._referred.all())

    @property
    def named(self) -> Sequence[Head | Found]:
        """What it goes on from: the items that it refers to, and last the turn before it."""
        found = self._referred.found.values()
        return list(found) if self.parent is None else [*found, self.parent]

    @property
    def goes_on(self) -> bool:
        """Whether it brings in anything that is stored."""
        return bool(self.named)

    async def place(self, way: Way) -> None:
        """Take the target that the request goes to, and the dialect that it is spoken to.

        Raises:
            ProxyError: it holds nothing of what the request goes on from, and cannot be given it.
        """
        asked, target, spoken = way
        self._asked, self._included = asked, False  # an attempt before may have
        self._upstream = target.upstream.name
        self._sent_model = target.model or self._asked.model
        self._spoken = spoken
        self._theirs = target.upstream.sessions == "upstream" and not spoken.translates
        parent, found = self.parent, self._referred.found.values()
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
        if any(not each.held and (here or not is_there(each, self._upstream)) for each in found):
            raise errors.item_not_found()
        if self._theirs:
            await self._referred.check(self._upstream)
        elif self._asked.store:
            self._check_room()

    def _check_room(self) -> None:
        """Refuse a turn that could not be kept, before its answer is made and paid for.

        This is less than what it will come to: what it is answered is not known, nor what else its
        conversation holds.
        """
        shares, bound = self._gate.shares, self._gate.bounds.max_bytes
        least = ROW + self._given
        before = 0 if self.parent is None else self.parent.size
        owner = self._call.exchange.key
        if shares.size + least > bound and not shares.fits(owner, before + least, bound):
            raise errors.no_room("the conversation does not fit in sessions.max_bytes")

    def tokens(self, estimate: Callable[[Size], int]) -> int:
        """Input tokens of what is stored: as its last turn used, or as `estimate` says."""
        found = 0
        if self.parent is not None:
            tokens = self.parent.tokens
            found = estimate(Size(self.parent.size, 0)) if tokens is None else tokens
        if self._referred.found:
            weight = sum(each.weight for each in self._referred.all())
            found += estimate(Size(weight, 0))
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

    async def prepare(self, way: Way, envelope: Envelope) -> None:
        """Make of the request what its target can take, and its answer what can be kept.

        Raises:
            ProxyError: as `recall`.
        """
        asked = way.asked
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
        if asked.store and not way.spoken.translates:
            self._ask_for_reasoning(way.target, envelope)

    async def _expand(self, envelope: Envelope) -> None:
        """Put what is stored in the place of what names it."""
        given = responses_items.as_array(envelope.raw("input"))
        self._input = given
        if not self.goes_on:
            return
        self._call.hold.bring(_COPIES * self.recalled)
        path = await self._path()
        items = await self._referred.items()
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
        if self._referred.names:
            there = {item_id for turn in path for item_id in ids_of(turn.input, turn.output)}
            new, sent = [], []
            for position, item in enumerate(elements(given)):
                name = self._referred.names.get(position)
                if name is None:
                    new.append(item)
                    sent.append(item)
                elif name not in there:
                    new.append(items[name])
                    kept = self._readable(array([items[name]]), self._referred.found[name].upstream)
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
            await self._referred.check_brought(envelope.raw("input"), self._upstream)
        elif self._referred.names:
            given = responses_items.as_array(envelope.raw("input"))
            envelope.put_raw("input", await self._with_known(given))
            if any(each.held for each in self._referred.found.values()):
                await self._referred.check_brought(envelope.raw("input"), self._upstream)

    async def _with_known(self, given: bytes) -> bytes:
        """The input with the items that are held here in place of their references."""
        size = sum(each.size for each in self._referred.all(held=True))
        self._call.hold.bring(_COPIES * size)
        known = await self._referred.items(held=True)
        names = self._referred.names

        def put() -> bytes:
            return array(
                item
                if (name := names.get(position)) is None
                else known.get(name) or responses_items.reference(name)
                for position, item in enumerate(elements(given))
            )

        return await aside(put, size + len(given))

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
        bad = error.status == HTTPStatus.BAD_REQUEST
        refused = bad and error.outcome == "upstream_rejected"
        if not (self._included and refused and (error.param or "").startswith("include")):
            return False
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
        size = len(self._input) + len(produced.output)
        turn = await aside(lambda: self._turn(produced, usage), size)
        if turn is not None:
            await self._gate.put(turn)

    def _turn(self, produced: Produced, usage: Usage | None) -> Turn | None:
        asked, parent = self._asked, self.parent
        if self._theirs:
            response_id, content = produced.id or "", NOTHING
            if not _ID.fullmatch(response_id):
                return None  # no client could name it
            if parent is not None and parent.id == response_id:
                parent = None  # it takes its place: the upstream calls the conversation so
        else:
            response_id = msgspec.json.decode(asked.own["id"], type=str)
            content = Content(self._input, produced.output, produced.before, produced.after)
        return Turn(
            id=response_id,
            owner=self._call.exchange.key,
            parent=parent,
            created=int(time.time()),
            # What an upstream holds it shows under its own name, unless the answer had another.
            model="" if self._theirs and not asked.renamed else asked.model,
            upstream=self._upstream,
            tokens=self._spent(usage, len(produced.output)),
            held=not self._theirs,
            reasons=responses_items.may_reason(content.input, content.output),
            content=content,
            items=identified(content.input, produced.output),
        )

    def _spent(self, usage: Usage | None, output: int) -> int | None:
        """Tokens of the turn and those before it; None: what is kept here tells how many."""
        if usage is not None:
            return usage.total
        estimate = self._call.estimate
        if not self._theirs or estimate is None:
            return None
        return estimate.input + estimate_output(0, output)  # nothing is kept that could tell later
