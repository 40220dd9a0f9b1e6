"""Turns in SQLite: reads, in threads of their own. Each sees what was committed when it began."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from aiproxy.sessions import Content, Delta, Found, Head, Loaded
from aiproxy.sessions.items import picked

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Iterable, Sequence

    from aiproxy.sessions import Pins

_HEAD = """
SELECT t.response, t.id, t.root, t.parent, t.owner, t.depth, t.path_size, t.tokens, t.created,
    t.model, t.upstream, t.held, t.whole, c.used, c.gone
FROM turns t JOIN conversations c ON c.id = t.root WHERE t.response = ?
"""
_FIND = """
SELECT i.item, i.turn, t.root, i.output, i.position, i.size, i.weight, t.upstream, t.held,
    c.used, c.gone
FROM items i JOIN turns t ON t.id = i.turn JOIN conversations c ON c.id = t.root
WHERE i.owner = ? AND i.item = ? ORDER BY i.turn DESC
"""
_PATH = """
WITH RECURSIVE path (id) AS (
    VALUES (?) UNION ALL
    SELECT t.parent FROM path JOIN turns t ON t.id = path.id WHERE t.parent IS NOT NULL
)
SELECT t.depth, t.upstream, t.input, t.output, t.reasons FROM path JOIN turns t ON t.id = path.id
"""
_ARRAY = {
    False: "SELECT input FROM turns WHERE id = ?",
    True: "SELECT output FROM turns WHERE id = ?",
}


class Reader:
    """Reads the file; for one thread at a time."""

    def __init__(
        self, connection: sqlite3.Connection, pins: Pins, read: Callable[[], float]
    ) -> None:
        self._execute = connection.execute
        self.close = connection.close
        self._pins = pins
        self._read = read
        connection.execute("PRAGMA query_only = ON")

    def _expired(self, root: int, used: float, gone: int, ttl: float) -> bool:
        if gone or not ttl or root in self._pins:
            return bool(gone)
        return used + ttl <= self._read()

    def load(self, owner: str, response_id: str, ttl: float) -> Loaded:
        """See `SessionStore`."""
        rows = self._execute(_HEAD, (response_id,)).fetchall()
        if not rows:
            return Loaded("missing")
        for *row, used, gone in rows:
            head = Head(*row)
            if head.owner == owner:
                if self._expired(head.root, used, gone, ttl):
                    return Loaded("expired")
                return Loaded("hit", replace(head, held=bool(head.held), whole=bool(head.whole)))
        return Loaded("foreign")

    def find(self, owner: str, item_ids: Iterable[str], ttl: float) -> dict[str, Found]:
        """See `SessionStore`."""
        found = {}
        for item_id in item_ids:
            for *row, used, gone in self._execute(_FIND, (owner, item_id)):
                each = Found(*row)
                if not self._expired(each.root, used, gone, ttl):
                    found[item_id] = each._replace(output=bool(each.output), held=bool(each.held))
                    break
        return found

    def path(self, head: Head) -> list[Delta] | None:
        """See `SessionStore`."""
        rows = self._execute(_PATH, (head.key,)).fetchall()
        if len(rows) != head.depth:
            return None
        rows.sort(key=lambda row: row[0])
        return [
            Delta(upstream, given, made, bool(reasons))
            for _, upstream, given, made, reasons in rows
        ]

    def content(self, head: Head) -> Content | None:
        """See `SessionStore`."""
        row = self._execute(
            "SELECT input, output, before, after FROM turns WHERE id = ?", (head.key,)
        ).fetchone()
        return None if row is None else Content(*row)

    def items(self, found: Sequence[Found]) -> list[bytes] | None:
        """See `SessionStore`."""
        arrays: dict[tuple[int, bool], bytes] = {}
        for turn, output in dict.fromkeys((each.turn, each.output) for each in found):
            row = self._execute(_ARRAY[output], (turn,)).fetchone()
            if row is None:
                return None
            (arrays[turn, output],) = row
        return picked(arrays, found)
