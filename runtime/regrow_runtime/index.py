"""The store's index: who has which adapter in which version. Its tables stand in docs/store.md."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from regrow_format.errors import FormatError, UsageError
from regrow_format.record import Record

from .database import INDEX, Database

__all__ = ["INDEX", "Index", "Installed", "clean"]

_MAX_BYTES = 255
_MAX_VERSION = 2**53 - 1  # what JavaScript counts to
_PATHS_AND_TURNS = set("/\\\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Of a user's versions, the one with the highest turn is active.
_SELECT = (
    "SELECT user, version, digest, size, backbone_id, method, label, added, turn IS NOT NULL AND "
    "turn = (SELECT max(turn) FROM adapters AS a WHERE a.user = adapters.user) FROM adapters "
)
_ONE = "WHERE user = ? AND version = ?"
_OF_USER = "WHERE user = ? ORDER BY version"
_OF_FILE = "WHERE digest = ? LIMIT 1"
_COLUMNS = ("user", "version", "digest", "size", "backbone_id", "method", "label", "added")
_INSERT = f"INSERT OR IGNORE INTO adapters ({', '.join(_COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
_NEWEST = (
    "INSERT INTO users VALUES (?, ?) "
    "ON CONFLICT (user) DO UPDATE SET newest = max(newest, excluded.newest)"
)
_ACTIVATE = (
    "UPDATE adapters SET turn = (SELECT coalesce(max(turn), 0) + 1 FROM adapters WHERE user = ?1) "
    "WHERE user = ?1 AND version = ?2"
)
_DEACTIVATE = "UPDATE adapters SET turn = NULL WHERE user = ? AND version = ?"
_DELETE = "DELETE FROM adapters WHERE user = ? AND version = coalesce(?, version)"
_FORGET = (
    "DELETE FROM users WHERE user = ?1 AND NOT EXISTS (SELECT 1 FROM adapters WHERE user = ?1)"
)
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


class Index:
    """Queries of the index.

    Those under "within `change`" are made within `Database.change`.
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    # -- within `change` --------------------------------------------------------------------------

    def install(self, entry: Installed) -> None:
        """Enter an adapter that is not active; what is there already stays as it is."""
        with self._database.open() as db:
            db.execute(_INSERT, [getattr(entry, column) for column in _COLUMNS])
            db.execute(_NEWEST, (entry.user, entry.version))

    def activate(self, entry: Installed) -> None:
        """Make it the user's active one."""
        with self._database.open() as db:
            db.execute(_ACTIVATE, (entry.user, entry.version))

    def deactivate(self, entry: Installed) -> None:
        """Make the one active again that was so before it."""
        with self._database.open() as db:
            db.execute(_DEACTIVATE, (entry.user, entry.version))

    def delete(self, user: str, version: int | None) -> None:
        """Delete one version, or None for all; and the user, if that was the last one."""
        with self._database.open() as db:
            db.execute(_DELETE, (user, version))
            db.execute(_FORGET, (user,))

    # -- reading ----------------------------------------------------------------------------------

    def all(self) -> tuple[Installed, ...]:
        """Every entry, by user and version."""
        return self._rows("ORDER BY user, version")

    def of_user(self, user: str) -> tuple[Installed, ...]:
        """The user's entries, by version."""
        return self._rows(_OF_USER, user)

    def names(self, digest: str) -> bool:
        """Whether an entry names the content with this hash."""
        return bool(self._rows(_OF_FILE, digest))

    def damage(self) -> list[str]:
        """What SQLite finds wrong in the file, line by line."""
        with self._database.open() as db:
            found = [line for (line,) in db.execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found

    def _rows(self, where: str, *values: object) -> tuple[Installed, ...]:
        with self._database.open() as db:
            rows = db.execute(_SELECT + where, values).fetchall()
        return tuple(self._entry(row) for row in rows)

    def _entry(self, row: tuple[Any, ...]) -> Installed:
        if [*map(type, row)] != _TYPES or not re.fullmatch("[0-9a-f]{64}", row[2]):
            where = self._database.folder / INDEX
            raise FormatError(f"{where} must have entries as regrow writes them, got {row!r:.80}")
        row = (*row[:-1], bool(row[-1]))
        return Installed(*row)

    def get(self, user: str, version: int | None = None) -> Installed:
        """One version, or the newest that is there; `UsageError` if there is none."""
        where = "WHERE user = ? AND version = coalesce(?, version) ORDER BY version DESC LIMIT 1"
        for entry in self._rows(where, user, _checked(version)):
            return entry
        what = "an adapter" if version is None else f"version {version}"
        raise UsageError(f"user {user!r} must have {what} in the store, got none: list shows all")

    def active(self, user: str) -> Installed | None:
        """The user's active version."""
        where = "WHERE user = ? AND turn IS NOT NULL ORDER BY turn DESC LIMIT 1"
        return next(iter(self._rows(where, user)), None)

    def number(self, user: str, version: int | None, digest: str, downgrade: bool) -> int:
        """The version under which to install a content; see `Store.add`."""
        with self._database.open() as db:
            row = db.execute("SELECT newest FROM users WHERE user = ?", (user,)).fetchone()
        newest: int = row[0] if row else 0
        number = _checked(version) or newest
        found = [entry.digest for entry in self._rows(_ONE, user, number)]
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
