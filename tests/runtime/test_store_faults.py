"""A store whose program is killed, or whose disk is full, at every step of a change."""

from __future__ import annotations

import json
import os
import pathlib
import sqlite3
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pytest

from regrow_runtime import RegrowError
from regrow_runtime.store import Store

KILLER = Path(__file__).parent / "store_killer.py"
posix = pytest.mark.skipif(os.name == "nt", reason="signals and limits of POSIX")


@pytest.fixture(scope="module")
def contents(make_adapter) -> list[bytes]:
    return [make_adapter(draw=draw).to_bytes() for draw in range(4)]


class Connection(sqlite3.Connection):
    """Does not wait for the disk, which takes nearly all of the time here; and has faults."""

    faults = None

    def execute(self, statement, *values):
        if self.faults and statement != "ROLLBACK":
            self.faults.step()
        return super().execute(
            statement.replace("synchronous = FULL", "synchronous = OFF"), *values
        )


@pytest.fixture
def no_waiting(monkeypatch):
    monkeypatch.setattr(sqlite3, "connect", partial(sqlite3.connect, factory=Connection))
    monkeypatch.setattr(os, "fsync", lambda _: None)


# -- a fault at every step -------------------------------------------------------------------------


class Faults:
    """Lets so many steps pass, then raises: calls of the system, and statements of SQLite."""

    def __init__(self, monkeypatch, error, after):
        self.error, self.left = error, after
        monkeypatch.setattr(Connection, "faults", self)
        if isinstance(error, sqlite3.Error):
            return  # statements alone
        for owner, name in (
            (os, "fsync"), (os, "replace"), (os, "chmod"), (os, "listdir"), (tempfile, "mkstemp"),
            (os, "fdopen"), (pathlib.Path, "touch"), (pathlib.Path, "unlink"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.faulty(getattr(owner, name)))

    def faulty(self, real):
        def call(*arguments, **options):
            self.step()
            return real(*arguments, **options)

        return call

    def step(self):
        self.left -= 1
        if self.left == 0:  # once: as when another program frees the disk again
            raise self.error


def _full() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database or disk is full")
    error.sqlite_errorcode = sqlite3.SQLITE_FULL
    return error


CHANGES = {
    "add": lambda store, data: store.add("ana", data[2], activate=True),
    "add the same file": lambda store, data: store.add("béla", data[1], activate=True),
    "activate": lambda store, data: store.activate("ana", 1),
    "roll back": lambda store, data: store.roll_back("ana"),
    "remove": lambda store, data: store.remove("ana", 1),
    "remove all": lambda store, data: store.remove("ana"),
}
ERRORS = {
    "full": lambda: OSError(28, "No space left on device"),
    "interrupt": lambda: KeyboardInterrupt(),
    "full index": _full,
}


def _filled(folder, contents) -> Store:
    store = Store(folder)
    store.add("ana", contents[0], activate=True)
    store.add("ana", contents[1], activate=True)
    return store


def _view(store) -> tuple:
    return store.list(), sorted(os.listdir(store.folder / "objects"))


def _changed(change, store, contents) -> bool:
    try:
        change(store, contents)
    except (RegrowError, KeyboardInterrupt) as error:
        return "\n" in str(error)  # every message is one line
    return True


def _try(step, change, error, contents, folder) -> tuple[bool, tuple]:
    """Whether all steps were made without a fault, and what is left after one, mended."""
    with _filled(folder, contents) as store:
        before = _view(store)
        with pytest.MonkeyPatch.context() as patch:
            faults = Faults(patch, error, step)
            changed = _changed(change, store, contents)
        entries = store.list()
        with Store(folder) as other:  # opening clears what is left
            assert other.list() == entries
            assert os.listdir(folder / "pending") == []
            assert other.verify() == ()
            if not changed and _view(other) == before:
                change(store, contents)  # the same object goes on
            return faults.left > 0, _view(other)


@pytest.mark.parametrize("kind", sorted(ERRORS))
@pytest.mark.parametrize("name", sorted(CHANGES))
def test_a_fault_at_every_step(name, kind, contents, tmp_path, monkeypatch, no_waiting):
    """What is left is all of the change or nothing, and then it can be made."""
    monkeypatch.setattr("time.time", lambda: 1e9)
    with _filled(tmp_path / "ideal", contents) as ideal:
        CHANGES[name](ideal, contents)
        expected = _view(ideal)
    step, done = 0, False
    while not done:
        step += 1
        folder = tmp_path / str(step)
        done, found = _try(step, CHANGES[name], ERRORS[kind](), contents, folder)
        assert found == expected
    assert step > (3 if kind == "full index" or name in ("activate", "roll back") else 10)


def test_a_disk_that_keeps_something_else(tmp_path, contents, monkeypatch):
    """What was written is read again before it is reported."""
    from regrow_runtime import adapter_files as module

    with Store(tmp_path / "store") as store:
        short = lambda path, data, **options: Path(path).write_bytes(data[:-1])  # noqa: E731
        monkeypatch.setattr(module, "write_bytes", short)
        with pytest.raises(RegrowError, match="could not be written: it reads otherwise"):
            store.add("ana", contents[0])
        monkeypatch.undo()
        assert store.list() == ()
        assert os.listdir(store.folder / "objects") == []
        store.add("ana", contents[0])
        assert store.verify() == ()


# -- a full disk -----------------------------------------------------------------------------------

LIMITED = """
import os, resource, sys
from pathlib import Path
from regrow_runtime import RegrowError
from regrow_runtime.store import Store

os.fsync = lambda _: None  # to be quicker
folder, files = Path(sys.argv[1]), sorted(Path(sys.argv[2]).iterdir())
found = {}
for limit in [0, 100, 600, *range(4096, 120_000, 7919)]:
    with Store(folder) as store:
        store.add("ana", files[0], activate=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        installed = []
        for number in range(40):
            try:
                installed.append(store.add(f"user {number}", files[number % 4], activate=True))
                if number % 3 == 0:
                    store.remove(f"user {number}")
                    installed.pop()
            except RegrowError as error:
                assert "\\n" not in str(error), error
                found[type(error).__name__] = found.get(type(error).__name__, 0) + 1
        try:
            Store(folder).close()
        except RegrowError as error:
            assert "could not be" in str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert store.path("ana").read_bytes() == files[0].read_bytes()
        assert set(installed) <= set(store.list()), limit
    with Store(folder) as store:
        assert set(installed) <= set(store.list()), limit
        assert store.verify() == (), limit
        for user in {entry.user for entry in store.list()}:
            store.remove(user)
print(found)
"""


@posix
def test_files_that_may_not_grow(python, contents, tmp_path):
    """A limit on a file's size makes writes fall short and then fail, SQLite's own too."""
    (tmp_path / "files").mkdir()
    for number, data in enumerate(contents):
        (tmp_path / "files" / str(number)).write_bytes(data)
    found = python(LIMITED, str(tmp_path / "store"), str(tmp_path / "files"))
    assert found.returncode == 0, found.stderr
    assert "RegrowError" in found.stdout


TOGETHER = """
import os, sys, time
from regrow_runtime.store import Store

failed = 0
for attempt in range(15):
    folder, start, others = f"{sys.argv[1]}/{attempt}", time.time() + 0.02, []
    for _ in range(6):
        others.append(os.fork())
        if others[-1] == 0:
            while time.time() < start:
                pass
            try:
                with Store(folder) as store:
                    os._exit(len(store.list()))
            except BaseException as error:
                os.write(2, repr(error).encode())
            os._exit(1)
    failed += sum(os.waitpid(pid, 0)[1] != 0 for pid in others)
sys.exit(failed)
"""


@posix
def test_a_new_store_is_opened_by_several_at_once(python, tmp_path):
    """SQLite gives up at once where two change the journal mode of a new file."""
    found = python(TOGETHER, str(tmp_path))
    assert (found.returncode, found.stderr) == (0, "")


# -- kills -----------------------------------------------------------------------------------------


def _kill(environment, contents, tmp_path, *numbers):
    (tmp_path / "files").mkdir()
    for number, data in enumerate(contents):
        (tmp_path / "files" / f"{number}.safetensors").write_bytes(data)
    found = subprocess.run(
        [sys.executable, KILLER, tmp_path / "store", tmp_path / "files", *map(str, numbers)],
        capture_output=True, text=True, env=environment, timeout=500, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


@posix
def test_killed_sometimes(environment, contents, tmp_path):
    counts = _kill(environment, contents, tmp_path, 20, 7, 0)
    assert counts["before"] + counts["after"] > 5


@posix
@pytest.mark.slow
def test_killed_300_times(environment, contents, tmp_path):
    counts = _kill(environment, contents, tmp_path, 300, 1, 0)
    assert counts["before"] > 30  # a change was under way, and is not there
    assert counts["after"] > 30  # it is there, though nobody was told
    assert counts["reported"] > 100


@posix
@pytest.mark.slow
def test_killed_beside_four_others(environment, contents, tmp_path):
    counts = _kill(environment, contents, tmp_path, 24, 2, 4)
    assert counts["before"] + counts["after"] > 5
