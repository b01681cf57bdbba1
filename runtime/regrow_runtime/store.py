"""Adapters on the device, by user and version, in a folder that several processes may share.

An index (SQLite) and one file per content, named by its hash: docs/store.md. Files are written and
removed under the index's write lock alone, so nobody sees one in the making, and a file is durable
before the index names it. So whoever is killed, wherever, leaves a store that opens, in which every
adapter that was reported installed is whole; what else is left is cleared when it is opened next.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow_format.adapter import MAX_FILE_BYTES, Adapter
from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.files import read_bytes
from regrow_format.manifest import Manifest

from .adapter_files import AdapterFiles
from .database import Database
from .fit import check_fit
from .index import Index, Installed, clean

if TYPE_CHECKING:
    from .bundle import Bundle, SwapStats

__all__ = ["Installed", "Store", "check_incoming"]


class Store:
    """The store in a folder.

    Any number of processes and threads may use one, each process an object of its own (open it
    after a fork). A user id is 1 to 255 bytes of UTF-8 in any script, taken as NFC, without
    control characters and path separators.

    Args:
        folder: where it is; made if there is none, or an empty one.
        create: False: do not make one.
        timeout: seconds to wait for another process that writes.

    Methods raise `UsageError` for what is not there or makes no sense, `FormatError` for a broken
    file or index, `RegrowError` if the disk is full or the store stays busy. Then nothing changed.
    """

    def __init__(self, folder: str | Path, *, create: bool = True, timeout: float = 30.0) -> None:
        self.folder = Path(folder).absolute()
        self._files = AdapterFiles(self.folder)
        self._database = Database(self.folder, create=create, timeout=timeout)
        self._index = Index(self._database)
        try:
            with self._database.open():
                self._files.make_folders()
            self._tidy()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of the index; the object is of no use afterwards."""
        self._database.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- changing ---------------------------------------------------------------------------------

    def add(
        self,
        user: str,
        source: str | Path | bytes,
        *,
        version: int | None = None,
        label: str = "",
        bundle: Bundle | Manifest | None = None,
        activate: bool = False,
        allow_downgrade: bool = False,
    ) -> Installed:
        """Install an adapter file, or its bytes. When this returns it is on the disk, whole.

        What is there already stays as it is (but becomes active, if asked to).

        Args:
            version: 1 to 2^53 - 1; by default one more than the newest that the user ever had, or
                the newest itself if that has the same content.
            label: a line for people, bounded as user ids are, but may be empty.
            bundle: refuse an adapter that does not fit this one (`MismatchError`).
            activate: make it the user's active one in the same step.
            allow_downgrade: take a version below the newest that the user ever had.
        """
        user, label = clean(user, "user"), clean(label, "label") if label else ""
        data, adapter = check_incoming(source, bundle)
        digest = hashlib.sha256(data).hexdigest()
        with self._changing():
            number = self._index.number(user, version, digest, allow_downgrade)
            self._files.put(digest, data)
            kind = adapter.backbone_id, adapter.method
            entry = Installed(user, number, digest, len(data), *kind, label, int(time.time()))
            self._index.install(entry)
            if activate:
                self._index.activate(entry)
            return self._index.get(user, number)

    def activate(
        self, user: str, version: int | None = None, *, bundle: Bundle | Manifest | None = None
    ) -> Installed:
        """Make a version, by default the newest, the user's active one.

        Its file is read and checked first, and whether it fits `bundle`.
        """
        with self._database.change():
            entry = self._index.get(clean(user, "user"), version)
            where = f"of user {entry.user!r}, version {entry.version},"
            _check_fit(self._files.read(entry.digest), bundle, where)
            self._index.activate(entry)
            return replace(entry, active=True)

    def roll_back(self, user: str) -> Installed:
        """Make the version active again that was so before; can be repeated."""
        with self._database.change():
            entry = self._active(user)
            self._index.deactivate(entry)
            before = self._index.active(entry.user)
            if before is None:
                raise UsageError(
                    f"user {entry.user!r} must have had an active version before {entry.version}, "
                    "got none"
                )
            self._files.read(before.digest)
            return before

    def remove(self, user: str, version: int | None = None) -> tuple[Installed, ...]:
        """Remove a version that is not active, or all that there is of the user; what was removed.

        A file that no other entry names goes too.
        """
        with self._changing():
            last = self._index.get(clean(user, "user"), version)
            if version is not None and last.active:
                raise UsageError(
                    f"version to remove must not be active, got {version} of user {last.user!r}: "
                    "activate another one first, or remove the user"
                )
            gone = (last,) if version is not None else self._index.of_user(last.user)
            for entry in gone:
                self._files.mark(entry.digest)
            self._index.delete(last.user, version)
            return gone

    # -- reading ----------------------------------------------------------------------------------

    def list(self, user: str | None = None) -> tuple[Installed, ...]:
        """What is installed, of one user or of all, by user and version."""
        if user is None:
            return self._index.all()
        return self._index.of_user(clean(user, "user"))

    def active(self, user: str) -> Installed | None:
        """The user's active adapter."""
        return self._index.active(clean(user, "user"))

    def path(self, user: str) -> Path:
        """The file of the user's active adapter: for reading only."""
        return self._files.path(self._active(user).digest)

    def swap(self, bundle: Bundle, user: str, **options: Any) -> SwapStats:
        """`Bundle.swap` to the user's active adapter; the hash of its file is checked.

        It is resident under `Installed.name`, which holds user, version and content, so that an
        adapter that was updated is never served from RAM as it was.
        """
        start = time.perf_counter()
        entry = self._active(user)
        if bundle.holds(entry.name):
            with suppress(UsageError):  # another thread may drop it right now
                return bundle.swap(entry.name, **options)
        entry, adapter = self._fetch(entry)
        read = (time.perf_counter() - start) * 1e3
        cost = bundle.swap(adapter, name=entry.name, **options)
        return replace(cost, read_ms=read, total_ms=read + cost.total_ms)

    def load(self, bundle: Bundle, user: str, **options: Any) -> str:
        """Keep the user's active adapter resident; the name that `Bundle.run` knows it by."""
        entry = self._active(user)
        if not bundle.holds(entry.name):
            entry, adapter = self._fetch(entry)
            bundle.load(adapter, name=entry.name, **options)
        return entry.name

    def verify(self) -> tuple[str, ...]:
        """Read everything; a line for each thing that is not as it was written.

        What a kill or a power cut left behind is removed on the way.
        """
        self._tidy(everything=True)
        found = [f"index: {line}" for line in self._index.damage()]
        for entry in self.list():
            try:
                self._files.read(entry.digest)
            except FormatError as error:
                if entry in self.list(entry.user):  # not removed meanwhile
                    found.append(f"user {entry.user!r}, version {entry.version}: {error}")
        return tuple(found)

    def usage(self) -> dict[str, int]:
        """Numbers of users, adapters and files, and the bytes of files and of the index."""
        entries = self.list()
        files = {entry.digest: entry.size for entry in entries}
        return {
            "users": len({entry.user for entry in entries}),
            "adapters": len(entries),
            "files": len(files),
            "file_bytes": sum(files.values()),
            "index_bytes": sum(path.stat().st_size for path in self.folder.glob("index.*")),
        }

    def _active(self, user: str) -> Installed:
        entry = self.active(user)
        if entry is None:
            self._index.get(clean(user, "user"))  # says so if there is no such user
            raise UsageError(f"user must have an active adapter, got {user!r}: activate one first")
        return entry

    # -- files -----------------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """A change of the index and of files: first files that come, last files that go."""
        try:
            with self._database.change():
                yield
        finally:
            self._tidy()

    def _fetch(self, entry: Installed) -> tuple[Installed, Adapter]:
        """Read the user's active adapter, though it be replaced and removed meanwhile."""
        while True:
            try:
                return entry, self._files.read(entry.digest)
            except FormatError:
                newer = self._active(entry.user)
                if newer.digest == entry.digest:
                    raise
                entry = newer

    def _tidy(self, everything: bool = False) -> None:
        """Remove files that no entry names: those that `pending` marks, or any.

        Where that fails the marks stay, and the next change, or opening, does it.
        """
        with suppress(RegrowError, OSError):
            if not everything and self._files.are_tidy():
                return
            with self._database.change():  # nobody has a file in the making now
                self._files.tidy(self._index.names, everything=everything)


def check_incoming(
    source: str | Path | bytes, bundle: Bundle | Manifest | None = None
) -> tuple[bytes, Adapter]:
    """What `Store.add` reads and checks before anything is written."""
    data = source if isinstance(source, bytes) else _incoming(Path(source))
    where = "adapter" if isinstance(source, bytes) else str(source)
    adapter = Adapter.from_bytes(data, where)
    _check_fit(adapter, bundle, where)
    return data, adapter


def _incoming(path: Path) -> bytes:
    if path.is_symlink():
        raise UsageError(f"an adapter must be a file, got {path}: it is a link; give what it is of")
    return read_bytes(path, limit=MAX_FILE_BYTES, what="an adapter")


def _check_fit(adapter: Adapter, bundle: Bundle | Manifest | None, where: str) -> None:
    if isinstance(bundle, Manifest):
        check_fit(adapter, bundle)
    elif bundle is not None:
        replace(bundle.check(adapter), name=where).require()
