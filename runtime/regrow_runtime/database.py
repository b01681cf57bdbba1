"""The SQLite file of a store's index: opening, locks, errors. Its tables stand in docs/store.md."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.files import no_folder, sync

__all__ = ["INDEX", "Database"]

FORMAT = 1
INDEX = "index.sqlite"
_BUSY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_BROKEN = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_PRAGMAS = (
    "journal_mode = WAL",
    "synchronous = FULL",  # a commit is on the disk when it returns
    "wal_autocheckpoint = 64",  # pages: the log stays below 300 KB
    "journal_size_limit = 0",
    "secure_delete = ON",  # a removed user's id is overwritten
    "trusted_schema = OFF",  # the file may be a stranger's
)
_SCHEMA = (
    "CREATE TABLE users (user TEXT PRIMARY KEY, newest INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE TABLE adapters (user TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, "
    "size INTEGER NOT NULL, backbone_id TEXT NOT NULL, method TEXT NOT NULL, label TEXT NOT NULL, "
    "added INTEGER NOT NULL, turn INTEGER, signature BLOB, PRIMARY KEY (user, version)"
    ") WITHOUT ROWID",
    "CREATE INDEX by_digest ON adapters (digest)",
    "CREATE INDEX by_turn ON adapters (user, turn) WHERE turn IS NOT NULL",
    f"PRAGMA user_version = {FORMAT}",
)


class Database:
    """The index's file, open; for one thread at a time.

    Args:
        folder: of the store; made if there is none, or an empty one, and `create` is on.
        timeout: seconds to wait for another process that writes.

    Raises:
        UsageError: there is no store, or none may be made.
        FormatError: it is broken, or of another version.
    """

    def __init__(self, folder: Path, *, create: bool, timeout: float) -> None:
        self.folder, self._timeout = folder, timeout
        self._lock, self._process = threading.RLock(), os.getpid()
        _check_folder(folder, create)
        with self._told():
            folder.mkdir(exist_ok=True)
            self._db = sqlite3.connect(
                folder / INDEX, timeout=timeout, isolation_level=None, check_same_thread=False
            )
        try:
            self._prepare()
        except BaseException:
            self._db.close()
            raise

    def _prepare(self) -> None:
        with self.open() as db:
            if (version := self._version()) not in (0, FORMAT):
                raise FormatError(
                    f"{self.folder}: format of the store must be {FORMAT}, the version read here, "
                    f"got {version}; a newer regrow may read it"
                )
            for pragma in _PRAGMAS:
                # Of several who open a new file at once, SQLite does not wait for the journal mode.
                self._patiently(db, f"PRAGMA {pragma}")
        if version == 0:
            with self.change() as db:
                if self._version() == 0:  # no other process was quicker
                    if any(self.folder.glob("objects/*")):
                        raise FormatError(
                            f"{self.folder / INDEX} must name the files, got it empty"
                        )
                    for statement in _SCHEMA:
                        db.execute(statement)
            with suppress(OSError):  # the folder above may be closed to us
                sync(self.folder.parent)

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def close(self) -> None:
        """Let go of the file; a forked copy does nothing."""
        if self._process == os.getpid():  # what a fork copied is not its own to close
            with self._lock:
                self._db.close()
                self._process = 0

    @contextmanager
    def open(self) -> Iterator[sqlite3.Connection]:
        """To read; errors are told in one line."""
        if self._process != os.getpid():
            raise UsageError(
                f"store must be opened in this process, got {self.folder} closed, or opened "
                "before a fork"
            )
        with self._lock, self._told():
            yield self._db

    @contextmanager
    def change(self) -> Iterator[sqlite3.Connection]:
        """To write, all of it or nothing; meanwhile no other process or thread does."""
        with self.open() as db:
            try:
                self._begin(db)
                yield db
                db.execute("COMMIT")
            finally:
                if db.in_transaction:
                    db.execute("ROLLBACK")

    def _begin(self, db: sqlite3.Connection) -> None:
        """Take the write lock. SQLite itself looks ten times a second, and can wait in vain."""
        db.execute("PRAGMA busy_timeout = 0")
        try:
            self._patiently(db, "BEGIN IMMEDIATE")
        finally:
            db.execute(f"PRAGMA busy_timeout = {round(1000 * self._timeout)}")

    def _patiently(self, db: sqlite3.Connection, statement: str) -> None:
        """Execute it, again while another process has the lock."""
        end = time.monotonic() + self._timeout
        while True:
            try:
                db.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if _code(error) not in _BUSY or time.monotonic() >= end:
                    raise
            time.sleep(random.uniform(0.001, 0.008))  # who comes first is chance

    @contextmanager
    def _told(self) -> Iterator[None]:
        where = self.folder / INDEX
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise RegrowError(f"{error.filename or where} could not be used: {reason}") from error
        except UnicodeDecodeError as error:  # in a message of SQLite's
            raise FormatError(f"{where} could not be used: it is broken") from error
        except sqlite3.Error as error:
            if (code := _code(error)) in _BUSY:
                raise RegrowError(
                    f"{self.folder} must be free, got busy: another process has been writing for "
                    f"{self._timeout:g} s; try again"
                ) from error
            kind = FormatError if code in _BROKEN else RegrowError
            raise kind(f"{where} could not be used: {error}") from error


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


def _check_folder(folder: Path, create: bool) -> None:
    """Raise if there is no store in it and none may be made, or a link in the place of a part."""
    parts = list(folder.iterdir()) if folder.is_dir() else []
    for part in parts:
        if part.is_symlink():
            raise FormatError(f"{part} must be no link: a store has none")
    # In this order: another process may make it in between.
    free = not os.path.lexists(folder) or folder.is_dir()
    new = not parts and free and folder.parent.is_dir()
    if not (folder / INDEX).is_file() and not (create and new):
        found = "a folder of something else" if parts else no_folder(folder)
        raise UsageError(
            f"store must be a folder that `regrow store add` made, got {folder}: {found}"
        )
