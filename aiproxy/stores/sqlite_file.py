"""The SQLite file of conversations: opened, checked, and made when it is not there.

A write-ahead log, flushed at every commit (`synchronous=FULL`), so that what was committed survives
a crash of the process and of the machine; `secure_delete`, so that what was deleted is overwritten
(sqlite.org, "PRAGMA Statements"). Several processes may have it open: one that takes over begins
while the one before it still drains.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from aiproxy.sessions import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator

APPLICATION_ID = 0x61697078  # "aipx": file(1) and others tell a file by it
VERSION = 1
CHECK = 5.0  # seconds at most for the check of a file's structure at the start
MOST_LOG = 64 * 1024 * 1024  # bytes of the write-ahead log that stay when it is not needed
# What earlier builds have not made, and do not miss.
_ADDED = """
BEGIN IMMEDIATE;
CREATE INDEX IF NOT EXISTS conversations_by_age ON conversations (used);
CREATE TABLE IF NOT EXISTS keys (  -- one row: no key of a turn is ever given twice
    one INTEGER PRIMARY KEY CHECK (one = 1),
    last INTEGER NOT NULL
);
INSERT INTO keys SELECT 1, max(
    coalesce((SELECT max(id) FROM turns), 0), coalesce((SELECT max(id) FROM conversations), 0)
) WHERE true ON CONFLICT DO UPDATE SET last = max(last, excluded.last);
COMMIT;
"""
_RETRY = 0.02  # seconds until the lock of another that opens the file is tried again
_INSTRUCTIONS = 100_000  # of SQLite's machine, between looks at the clock

# What is read of a turn before its content comes first: it stays on the row's own page, while
# content overflows to others, which are not read for it.
SCHEMA = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY,   -- of its root
    owner TEXT NOT NULL,
    used REAL NOT NULL,       -- when a turn of it was made or continued, seconds since the epoch
    size INTEGER NOT NULL,
    turns INTEGER NOT NULL,
    gone INTEGER NOT NULL DEFAULT 0  -- it is being removed, turn by turn
);
CREATE INDEX conversations_by_use ON conversations (owner, used);
CREATE TABLE turns (
    id INTEGER PRIMARY KEY,
    response TEXT NOT NULL,
    owner TEXT NOT NULL,
    root INTEGER NOT NULL,
    parent INTEGER,
    depth INTEGER NOT NULL,
    path_size INTEGER NOT NULL,
    tokens INTEGER,
    created INTEGER NOT NULL,
    model TEXT NOT NULL,
    upstream TEXT NOT NULL,
    held INTEGER NOT NULL,
    reasons INTEGER NOT NULL,
    whole INTEGER NOT NULL,
    size INTEGER NOT NULL,
    input BLOB NOT NULL,
    output BLOB NOT NULL,
    before BLOB NOT NULL,
    after BLOB NOT NULL
);
CREATE UNIQUE INDEX turns_by_response ON turns (response, owner);
CREATE INDEX turns_by_root ON turns (root);
CREATE TABLE items (
    owner TEXT NOT NULL,
    item TEXT NOT NULL,
    turn INTEGER NOT NULL,
    output INTEGER NOT NULL,
    position INTEGER NOT NULL,
    size INTEGER NOT NULL,
    weight INTEGER NOT NULL,
    PRIMARY KEY (owner, item, turn, output, position)
) WITHOUT ROWID;
CREATE INDEX items_by_turn ON items (turn);
"""


class SessionFile:
    """One file. All of it may block.

    Args:
        path: of the file; its directory must be there.
        patience: seconds to wait for others that have it locked.
    """

    def __init__(self, path: Path, *, patience: float) -> None:
        self.path = path
        self._patience = patience

    def open(self) -> sqlite3.Connection:
        """Open and check it, or make it; return the connection for writing.

        Raises:
            StoreError: it cannot be used; the message names the file, and says why.
        """
        try:
            with self._alone():
                return self._open()
        except sqlite3.Error as error:
            raise self.refused(error) from None
        except OSError as error:
            raise StoreError(f"{self.path}: {os.strerror(error.errno or 0)}") from None
        except StoreError as error:
            raise StoreError(f"{self.path}: {error}") from None

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have no other process open it meanwhile: it may be empty yet."""
        lock = os.open(Path(f"{self.path}-lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            until = time.monotonic() + self._patience
            while not _locked(lock):
                if time.monotonic() >= until:
                    raise StoreError("another process is opening it, and does not come to an end")
                time.sleep(_RETRY)
            yield
        finally:
            os.close(lock)

    def _open(self) -> sqlite3.Connection:
        # Prompts are nobody else's business; SQLite gives its other files the same mode.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = self.connect()
        try:
            self._check(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def refused(self, error: sqlite3.Error) -> StoreError:
        """Why it cannot be used."""
        return StoreError(f"{self.path}: {_reason(error)}")

    def connect(self) -> sqlite3.Connection:
        """A connection, for one thread at a time."""
        connection = sqlite3.connect(
            self.path, timeout=self._patience, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA temp_store = MEMORY")  # content goes to this file alone
        return connection

    def _check(self, connection: sqlite3.Connection) -> None:
        application = _number(connection, "application_id")
        version = _number(connection, "user_version")
        empty = not connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]
        if not empty or application or version:
            if application != APPLICATION_ID:
                raise StoreError("this is a database of something else")
            if version > VERSION:
                raise StoreError(
                    f"a newer version of aiproxy has written it: its format is {version}, and this"
                    f" one knows {VERSION}"
                )
            _check_structure(connection)
        connection.execute("PRAGMA secure_delete = ON")
        if connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StoreError("the file system cannot do write-ahead logging")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute(f"PRAGMA journal_size_limit = {MOST_LOG}")
        if empty:
            connection.executescript(
                f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA application_id = {APPLICATION_ID};"
                f" PRAGMA user_version = {VERSION}; COMMIT;"
            )
        connection.executescript(_ADDED)  # that it can be written is found out now


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _number(connection: sqlite3.Connection, pragma: str) -> int:
    return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])


def _check_structure(connection: sqlite3.Connection) -> None:
    """Refuse a damaged file. A large one is not waited for: what is damaged is found when read."""
    until = time.monotonic() + CHECK
    connection.set_progress_handler(lambda: time.monotonic() > until, _INSTRUCTIONS)
    try:
        found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_INTERRUPT:
            raise
        return
    finally:
        connection.set_progress_handler(None, 0)
    if found != "ok":
        raise StoreError(f"the file is damaged: {found}")


def _reason(error: sqlite3.Error) -> str:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_NOTADB:
        return "this is no SQLite database, or a damaged one"
    if code == sqlite3.SQLITE_CORRUPT:
        return f"the file is damaged: {error}"
    return str(error)
