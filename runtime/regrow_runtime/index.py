"""The store's index: who has which adapter in which version. Its tables stand in docs/store.md."""

from __future__ import annotations

import os
import random
import re
import sqlite3
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.files import no_folder, sync
from regrow_format.record import Record

__all__ = ["Index", "Installed", "clean"]

FORMAT = 1
INDEX = "index.sqlite"
_MAX_BYTES = 255
_MAX_VERSION = 2**53 - 1  # what JavaScript counts to
_PATHS_AND_TURNS = set("/\\\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

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
# Of a user's versions, the one with the highest turn is active.
_SELECT = (
    "SELECT user, version, digest, size, backbone_id, method, label, added, turn IS NOT NULL AND "
    "turn = (SELECT max(turn) FROM adapters AS a WHERE a.user = adapters.user) FROM adapters "
)
_ONE = "WHERE user = ? AND version = ?"
_TYPES = [str, int, str, int, str, str, str, int, int]


class Installed(Record):
    """An adapter in a store.

    Attributes:
        digest, size: hex SHA-256 and bytes of its file.
        backbone_id, method: as in the file.
        label: a line for people.
        added: when, in seconds since 1970.
        active: whether it is what the user is served with.
    """

    user: str
    version: int
    digest: str
    size: int
    backbone_id: str
    method: str
    label: str
    added: int
    active: bool = False

    @property
    def name(self) -> str:
        """What it is called when resident; nothing of another content is called so."""
        return f"{self.user}@{self.version}#{self.digest[:16]}"


def clean(text: str, what: str) -> str:
    """`text` as NFC, if it is a line of 1 to 255 bytes of UTF-8, in any script.

    Refused is what disturbs a terminal or turns its direction around, and what means something in
    a path: people name files after users.
    """
    fits = isinstance(text, str) and len(text) <= _MAX_BYTES  # before work that grows with it
    text = unicodedata.normalize("NFC", text).strip() if fits else text
    if (
        not fits
        or text in ("", ".", "..")
        or _PATHS_AND_TURNS & set(text)
        or {unicodedata.category(c) for c in text} & {"Cc", "Cs", "Zl", "Zp"}
        or len(text.encode()) > _MAX_BYTES
    ):
        raise UsageError(
            f"{what} must be 1 to {_MAX_BYTES} bytes of text without control characters and "
            f"slashes, got {text!r:.80}"
        )
    return text


def _code(error: sqlite3.Error) -> int:
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF


class Index:
    """The open index, for one thread at a time."""

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

    def rows(self, where: str = "", *values: object) -> tuple[Installed, ...]:
        """Entries; `where` is the rest of the query."""
        with self.open() as db:
            rows = db.execute(_SELECT + where, values).fetchall()
        return tuple(self._entry(row) for row in rows)

    def _entry(self, row: tuple[Any, ...]) -> Installed:
        if [*map(type, row)] != _TYPES or not re.fullmatch("[0-9a-f]{64}", row[2]):
            where = self.folder / INDEX
            raise FormatError(f"{where} must have entries as regrow writes them, got {row!r:.80}")
        row = (*row[:-1], bool(row[-1]))
        return Installed(*row)

    def get(self, user: str, version: int | None = None) -> Installed:
        """One version, or the newest that is there; `UsageError` if there is none."""
        where = "WHERE user = ? AND version = coalesce(?, version) ORDER BY version DESC LIMIT 1"
        for entry in self.rows(where, user, _checked(version)):
            return entry
        what = "an adapter" if version is None else f"version {version}"
        raise UsageError(f"user {user!r} must have {what} in the store, got none: list shows all")

    def active(self, user: str) -> Installed | None:
        """The user's active version."""
        where = "WHERE user = ? AND turn IS NOT NULL ORDER BY turn DESC LIMIT 1"
        return next(iter(self.rows(where, user)), None)

    def number(self, user: str, version: int | None, digest: str, downgrade: bool) -> int:
        """The version under which to install a content; see `Store.add`."""
        with self.open() as db:
            row = db.execute("SELECT newest FROM users WHERE user = ?", (user,)).fetchone()
        newest: int = row[0] if row else 0
        number = _checked(version) or newest
        found = [entry.digest for entry in self.rows(_ONE, user, number)]
        if found == [digest]:
            return number
        if version is None:
            return _checked(newest + 1) or 0
        if found:
            raise UsageError(
                f"version must be a new one for another content, got {version}, which user "
                f"{user!r} has: take {newest + 1}"
            )
        if version < newest and not downgrade:
            raise UsageError(
                f"version must be above {newest}, the newest of user {user!r}, got {version}: "
                "allow_downgrade (--allow-downgrade) installs it"
            )
        return version


def _checked(version: int | None) -> int | None:
    if version is not None and (type(version) is not int or not 1 <= version <= _MAX_VERSION):
        raise UsageError(f"version must be from 1 to {_MAX_VERSION}, got {version!r:.40}")
    return version


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
