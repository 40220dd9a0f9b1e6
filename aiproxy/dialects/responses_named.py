"""What an `input` names of what was made before, and what an upstream could look up for it.

An item may stand for another one by its id alone. Readers of JSON differ in what they take for one
(which of two names counts, what may be left out), so whatever any of them could is found here; what
they would read differently is refused. The work is linear, and a document without ids costs no more
than a search for them: it is done before anybody has been admitted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from msgspec import UNSET, Raw, UnsetType

from aiproxy import errors, jsontext
from aiproxy.dialects import value_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiproxy.errors import ProxyError

# Types of items, and what one must have to speak for itself (API reference, "Create a response",
# `input`): of these lists one, its first member not empty, the others at least texts. All else
# says nothing: junk, a summary of reasoning, what the next version of the API will have.
_SAYS: dict[str, tuple[tuple[str, ...], ...]] = {
    "message": (("content",),),
    "reasoning": (("encrypted_content",),),
    "compaction": (("encrypted_content",),),
    "compaction_summary": (("encrypted_content",),),
    "context_compaction": (("encrypted_content",),),
    "function_call": (("name", "arguments"),),
    "function_call_output": (("call_id", "output"), ("output",)),
    "custom_tool_call": (("name", "input"),),
    "custom_tool_call_output": (("call_id", "output"), ("output",)),
    "tool_search_call": (("arguments",),),
    "tool_search_output": (("tools",),),
    "additional_tools": (("tools",),),
    "configuration_update": (("reasoning",), ("text",)),
    "web_search_call": (("action",),),
    "file_search_call": (("queries",),),
    "code_interpreter_call": (("code",), ("outputs",)),
    "image_generation_call": (("result",),),
    "computer_call": (("action",), ("actions",)),
    "computer_call_output": (("output",),),
    "local_shell_call": (("action",),),
    "local_shell_call_output": (("output",),),
    "shell_call": (("action",),),
    "shell_call_output": (("output",),),
    "apply_patch_call": (("operation",),),
    "apply_patch_call_output": (("call_id", "status"),),
    "mcp_list_tools": (("tools",),),
    "mcp_call": (("name", "arguments"),),
    "mcp_approval_request": (("name", "arguments"),),
    "mcp_approval_response": (("approval_request_id",),),
    "program": (("code",),),
    "program_output": (("call_id", "result"),),
}
_KINDS = {b'"%b"' % kind.encode(): kind for kind in _SAYS}  # as they are usually written
# Only a text will do for these.
_TEXTS = frozenset(
    {"encrypted_content", "name", "call_id", "code", "result", "approval_request_id", "status"}
)
_WORDS = frozenset({"text", "refusal"})  # of a part of content: empty ones are said, too
_DEEPEST = 4  # levels within which something must be said
_READ = (b'"type"', b'"id"', b'"role"')  # what tells whether an item stands for another

MOST = 65_536  # items that an input may name by their ids alone
_AT_ONCE = 256  # items that are searched together
_MASK = b"\\u8"  # in place of the beginning of a lone surrogate: an escape of no ASCII letter


class Reference(NamedTuple):
    """An item that stands for another one, by its id."""

    position: int
    id: str | None  # None: it names none


class Named(NamedTuple):
    """What the items of an input name."""

    references: list[Reference]  # whatever any reader could take for one
    lookups: list[str]  # other ids that an upstream may look up, each once
    unclear: ProxyError | None  # an item that may be anything to an upstream that looks up ids


NONE = Named([], [], None)


def marked(given: bytes | None) -> bool:
    """Whether an `input` may name anything, at a glance."""
    return given is not None and given[:1] == b"[" and _marked(given)


def named(given: bytes | None) -> Named:
    """Find what the items of an `input` name.

    An image that was generated, a search or reasoning may be sent back by its id alone; then who
    knows the id of another client's item would get at it. So with an id an item must be one that is
    known to speak for itself, or be the client's own.

    Raises:
        ProxyError: an item has its type, id or role twice: which one counts is its reader's choice.
    """
    if given is None or not marked(given):
        return NONE
    items = jsontext.cut(given)
    look = _Look()
    for start in range(0, len(items), _AT_ONCE):
        few = items[start : start + _AT_ONCE]
        look.over(range(start, start + len(few)), few)
    return Named(look.references, list(look.lookups), look.unclear)


def _marked(document: bytes) -> bool:
    return b'"id"' in document or b"item_reference" in document or jsontext.hides(document)


class _Look:
    """The items of an input, some at a time."""

    def __init__(self) -> None:
        self.references: list[Reference] = []
        self.lookups: dict[str, None] = {}
        self.unclear: ProxyError | None = None
        self._bare = 0  # items that stand for others

    def over(self, positions: Sequence[int], items: Sequence[Raw | bytes]) -> None:
        """Look at some."""
        text = b",".join(items)
        if not _marked(text):
            return
        members, masked = _decoded(_objects, b"[%b]" % text)
        if members is None:  # some are no objects, and name nothing
            pairs = [
                pair
                for pair in zip(positions, map(bytes, items), strict=True)
                if pair[1][:1] == b"{"
            ]
            if len(pairs) == len(items):
                raise errors.invalid_value("input", "The items of 'input' cannot be read.")
            if pairs:
                self.over([position for position, _ in pairs], [item for _, item in pairs])
            return
        # Nothing is less than it should be, so the sum is right only if all are.
        distinct = text.count(b'"') == sum(2 * len(each) for each in members) + b"".join(
            [value for each in members for value in each.values()]
        ).count(b'"')
        for position, item, each in zip(positions, items, members, strict=True):
            if "id" in each:
                if not distinct:
                    self._check_distinct(position, bytes(item), each)
                if not _speaks(_usual_kind(each), each):
                    self._at(position, each, masked=masked)
            elif _word(each.get("type")) == "item_reference":
                self._refers(position, None)

    def _at(self, position: int, members: dict[str, Raw], *, masked: bool) -> None:
        """Look at one that has an id, and does not clearly speak for itself."""
        type_ = members.get("type")
        kind = _word(type_)
        if kind == "item_reference" or not (kind or _word(members.get("role"))):
            # `type` may be left out (API reference, "Item reference"); a message then has a role.
            self._refers(position, _id(members, masked=masked) or None)
        elif not _speaks(kind or ("message" if _is_null(type_) else ""), members):
            if (item_id := _id(members, masked=masked)) is not None:
                if item_id:
                    self.lookups[item_id] = None
                    self._count()
            elif not _is_null(members["id"]):
                self._refuse(position, f"'input[{position}].id' must be a text of Unicode.", ".id")

    def _refers(self, position: int, item_id: str | None) -> None:
        self.references.append(Reference(position, item_id))
        self._count()

    def _count(self) -> None:
        self._bare += 1
        if self._bare > MOST:
            raise errors.invalid_value(
                "input", f"'input' names more than {MOST} items by their ids alone."
            )

    def _check_distinct(self, position: int, item: bytes, members: dict[str, Raw]) -> None:
        if jsontext.distinct(item, members):
            return
        if _reads_twice(item, members):
            raise errors.invalid_value(
                f"input[{position}]",
                f"'input[{position}]' must have 'type', 'id' and 'role' once each, at most.",
            )
        self._refuse(position, f"The names in 'input[{position}]' must be given once each.")

    def _refuse(self, position: int, message: str, below: str = "") -> None:
        if self.unclear is None:
            self.unclear = errors.invalid_value(f"input[{position}]{below}", message)


def _usual_kind(members: Mapping[str, Raw]) -> str:
    """The type of an item, if it is written as usual: most are done with then."""
    type_ = members.get("type")
    if type_ is not None:
        return _KINDS.get(bytes(type_), "")
    role = members.get("role")
    return "message" if role is not None and _is_text(role) and bytes(role) != b'""' else ""


def _reads_twice(item: bytes, members: Mapping[str, Raw]) -> bool:
    """Whether one of two names counts, as the reader likes, for what the item is."""
    inside = b",".join(list(members.values()))
    for name in _READ:
        if item.count(name) - inside.count(name) > 1:
            return True
    return item.count(b"\\u00") > inside.count(b"\\u00") and jsontext.hides(item)


_objects = msgspec.json.Decoder(list[dict[str, Raw]])
_object = msgspec.json.Decoder(dict[str, Raw])


def _decoded(decoder: msgspec.json.Decoder[Any], document: bytes) -> tuple[Any, bool]:
    """What a document holds, None if it is something else; and whether surrogates are masked."""
    try:
        return decoder.decode(document), False
    except msgspec.ValidationError:
        return None, False
    except (msgspec.DecodeError, ValueError, RecursionError):  # a lone surrogate
        try:
            return decoder.decode(jsontext.masked(document)), True
        except (msgspec.DecodeError, ValueError, RecursionError):
            return None, False


def _word(raw: Raw | None) -> str | None:
    """A text, decoded; None for anything else."""
    if raw is None:
        return None
    value = bytes(raw)
    if value[:1] != b'"':
        return None
    if b"\\" not in value:
        return value[1:-1].decode()
    text: str | None = value_of(raw)
    return text


def _is_null(raw: Raw | None) -> bool:
    return raw is None or bytes(raw) == b"null"


def _id(members: Mapping[str, Raw], *, masked: bool) -> str | None:
    """The id of an item; None: it has none that can be read."""
    raw = members["id"]
    return None if masked and _MASK in bytes(raw) else _word(raw)


def _speaks(kind: str, members: Mapping[str, Raw]) -> bool:
    """Whether an item speaks for itself."""
    for first, *others in _SAYS.get(kind, ()):
        raw = members.get(first)
        if raw is None:
            continue
        value = bytes(raw)
        said = value != b'""' if value[:1] == b'"' else first not in _TEXTS and _says(raw, _DEEPEST)
        if said and (not others or all(_is_given(name, members) for name in others)):
            return True
    return False


def _is_given(name: str, members: Mapping[str, Raw]) -> bool:
    raw = members.get(name)
    return raw is not None and (_is_text(raw) or (name not in _TEXTS and _says(raw, _DEEPEST)))


def _is_text(raw: Raw) -> bool:
    return bytes(raw)[:1] == b'"'


class _First(msgspec.Struct, array_like=True):
    """The first elements of an array: the others may be millions, and are not kept."""

    a: Raw | UnsetType = UNSET
    b: Raw | UnsetType = UNSET
    c: Raw | UnsetType = UNSET
    d: Raw | UnsetType = UNSET


_first = msgspec.json.Decoder(_First)


def _says(raw: Raw, depth: int) -> bool:
    """Whether a value has a text that is not empty, within a few levels."""
    value = bytes(raw)
    if value[:1] == b'"':
        return len(value) > len('""')
    if depth == 0:
        return False
    if value[:1] == b"[":
        return any(_says_part(each, depth - 1) for each in _beginning(value))
    if value[:1] == b"{":
        return any(_says(each, depth - 1) for each in (_decoded(_object, value)[0] or {}).values())
    return False


def _says_part(raw: Raw, depth: int) -> bool:
    """The same of a part of content, whose type says nothing."""
    value = bytes(raw)
    if value[:1] != b"{":
        return _says(raw, depth)
    return any(
        (name in _WORDS and _is_text(each)) or _says(each, depth)
        for name, each in (_decoded(_object, value)[0] or {}).items()
        if name != "type"
    )


def _beginning(value: bytes) -> list[Raw]:
    first = _decoded(_first, value)[0] or _First()
    return [each for each in (first.a, first.b, first.c, first.d) if isinstance(each, Raw)]
