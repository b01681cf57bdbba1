"""The store of adapters: what it keeps, what it refuses, and what it tells."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from regrow_runtime import FormatError, Manifest, MismatchError, RegrowError, UsageError
from regrow_runtime.store import Store

links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")


@pytest.fixture(scope="module")
def contents(make_adapter) -> list[bytes]:
    return [make_adapter(draw=draw, classes=2 if draw % 2 else 0).to_bytes() for draw in range(4)]


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "store") as opened:
        yield opened


def _versions(store, user="ana"):
    return [entry.version for entry in store.list(user)]


def _active(store, user="ana"):
    entry = store.active(user)
    return entry.version if entry else None


# -- what it keeps ---------------------------------------------------------------------------------


def test_add_activate_and_read_again(store, contents, tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(contents[1])
    entry = store.add("ana", path, label="from the gateway")
    assert (entry.user, entry.version, entry.active) == ("ana", 1, False)
    assert entry.digest == hashlib.sha256(contents[1]).hexdigest()
    assert (entry.size, entry.method, entry.label) == (len(contents[1]), "nola", "from the gateway")
    assert store.active("ana") is None
    assert store.activate("ana") == replace(entry, active=True) == store.active("ana")
    path.unlink()
    assert store.path("ana").read_bytes() == contents[1]
    with Store(store.folder) as other:
        assert other.list() == (replace(entry, active=True),)


def test_versions_grow_by_themselves(store, contents):
    assert [store.add("ana", data).version for data in contents[:3]] == [1, 2, 3]
    assert store.add("béla", contents[0]).version == 1
    assert store.add("ana", contents[3], version=10).version == 10
    assert store.add("ana", contents[0]).version == 11
    assert _versions(store) == [1, 2, 3, 10, 11]
    assert _versions(store, "béla") == [1]


def test_adding_again_changes_nothing(store, contents):
    first = store.add("ana", contents[0], label="first")
    assert store.add("ana", contents[0], label="second") == first
    assert store.add("ana", contents[0], version=1) == first
    store.add("ana", contents[1])
    assert store.add("ana", contents[0], version=1) == first  # below the newest, but there
    assert store.add("ana", contents[0], version=1, activate=True).active
    assert _versions(store) == [1, 2]


def test_one_version_is_one_content(store, contents):
    store.add("ana", contents[0], version=3)
    with pytest.raises(
        UsageError, match=r"^version must be a new one for another content, got 3, "
    ):
        store.add("ana", contents[1], version=3)


def test_downgrades_are_refused_unless_asked_for(store, contents):
    store.add("ana", contents[0], version=5)
    with pytest.raises(
        UsageError, match=r"^version must be above 5, the newest of user 'ana', got 4"
    ):
        store.add("ana", contents[1], version=4)
    assert store.add("ana", contents[1], version=4, allow_downgrade=True).version == 4
    store.add("ana", contents[2], version=7)
    store.remove("ana", 7)
    with pytest.raises(UsageError, match="version must be above 7, the newest"):
        store.add("ana", contents[3], version=6)  # what was removed counts
    assert store.add("ana", contents[3]).version == 8


def test_rolling_back_goes_the_way_that_was_come(store, contents):
    for data in contents:
        store.add("ana", data)
    for version in (1, 3, 2, 3):
        store.activate("ana", version)
    found = [_active(store)]
    for _ in range(2):
        found.append(store.roll_back("ana").version)
        assert _active(store) == found[-1]
    assert found == [3, 2, 1]
    with pytest.raises(UsageError, match="must have had an active version before 1, got none"):
        store.roll_back("ana")
    assert _active(store) == 1  # refused as a whole


def test_activating_takes_the_newest(store, contents):
    store.add("ana", contents[0])
    store.add("ana", contents[1])
    assert store.activate("ana").version == 2
    assert store.activate("ana", 1).version == 1
    assert [e.active for e in store.list("ana")] == [True, False]


def test_the_same_content_is_one_file(store, contents):
    for user in ("ana", "béla", "楚"):
        store.add(user, contents[0])
    store.add("ana", contents[1])
    names = {f"{hashlib.sha256(data).hexdigest()}.safetensors" for data in contents[:2]}
    assert set(os.listdir(store.folder / "objects")) == names
    usage = store.usage()
    assert (usage["users"], usage["adapters"], usage["files"]) == (3, 4, 2)
    assert usage["file_bytes"] == len(contents[0]) + len(contents[1])
    assert usage["index_bytes"] > 0


def test_removing_frees_files_that_nobody_else_has(store, contents):
    store.add("ana", contents[0])
    store.add("ana", contents[1])
    store.add("béla", contents[0])
    assert [e.version for e in store.remove("ana", 2)] == [2]
    assert len(os.listdir(store.folder / "objects")) == 1
    store.remove("ana")
    assert len(os.listdir(store.folder / "objects")) == 1
    store.remove("béla")
    assert os.listdir(store.folder / "objects") == os.listdir(store.folder / "pending") == []
    assert store.list() == ()


def test_the_active_version_is_not_removed_alone(store, contents):
    store.add("ana", contents[0], activate=True)
    with pytest.raises(
        UsageError, match="version to remove must not be active, got 1 of user 'ana'"
    ):
        store.remove("ana", 1)
    store.remove("ana")
    assert store.active("ana") is None


def test_nothing_of_a_removed_user_is_left(store, contents):
    name = "a-name-that-nobody-else-has"
    store.add(name, contents[0], label="secret-label")
    store.remove(name)
    store.close()
    for path in store.folder.rglob("*"):
        if path.is_file():
            assert not {w for w in (name, "secret-label") if w.encode() in path.read_bytes()}


# -- with a bundle ---------------------------------------------------------------------------------


def test_swapping_from_the_store(store, bundle, pixels, make_adapter, contents):
    store.add("ana", contents[0], activate=True)
    cost = store.swap(bundle, "ana")
    assert cost.kind in ("cold", "cached")
    assert cost.read_ms > 0
    bundle_again = bundle.run({"pixel_values": pixels})["logits"]
    bundle.swap(make_adapter(draw=0), name="direct")
    np.testing.assert_array_equal(bundle_again, bundle.run({"pixel_values": pixels})["logits"])
    assert store.swap(bundle, "ana").kind == "resident"


def test_an_update_is_never_served_from_what_is_resident(store, bundle, pixels, contents):
    outputs, names = [], []
    for data in contents:
        store.add("ana", data, activate=True)
        store.swap(bundle, "ana")
        outputs.append(bundle.run({"pixel_values": pixels})["logits"])
        names.append(bundle.active)
    assert len(set(names)) == 4
    store.remove("ana")
    store.add("ana", contents[2], activate=True)  # version 1 again, with another content
    assert store.swap(bundle, "ana").kind != "resident"
    np.testing.assert_array_equal(bundle.run({"pixel_values": pixels})["logits"], outputs[2])


def test_one_adapter_per_sample(store, bundle, pixels, contents):
    for user, data in zip(("ana", "béla"), contents[::2], strict=False):
        store.add(user, data, activate=True)
    names = [store.load(bundle, user) for user in ("ana", "béla", "ana")]
    assert names[0] == names[2] != names[1]
    assert store.load(bundle, "ana") == names[0]
    assert bundle.active is None
    mixed = bundle.run({"pixel_values": pixels[:3]}, names)["logits"]
    for row, user in enumerate(("ana", "béla", "ana")):
        store.swap(bundle, user)
        alone = bundle.run({"pixel_values": pixels[row : row + 1]})["logits"]
        np.testing.assert_allclose(mixed[row : row + 1], alone, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_the_bundle_is_not_added(store, bundle_folder, make_adapter):
    manifest = Manifest.load(bundle_folder)
    other = replace(make_adapter(), backbone_id="sha256:" + "cd" * 32).to_bytes()
    with pytest.raises(MismatchError, match="adapter must be of the bundle's backbone"):
        store.add("ana", other, bundle=manifest)
    assert store.list() == ()
    store.add("ana", other)
    with pytest.raises(MismatchError, match="adapter must be of the bundle's backbone"):
        store.activate("ana", bundle=manifest)
    assert store.active("ana") is None


def test_an_adapter_that_is_replaced_while_it_is_read(store, bundle, contents, monkeypatch):
    """Another process activates a newer one and removes this between look-up and reading."""
    store.add("ana", contents[0], activate=True)

    def holds(name):
        """Asked between the two."""
        assert name == store.active("ana").name
        with Store(store.folder) as other:
            other.add("ana", contents[1], activate=True)
            other.remove("ana", 1)
        return False

    monkeypatch.setattr(bundle, "holds", holds)
    assert store.swap(bundle, "ana").name == store.active("ana").name
    assert store.active("ana").version == 2


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "user", ["ana", "béla", "मारिया", "مریم\u200c", "楚\u200d", "🙂", "a@b.c", "x" * 255, "\u200fא"]
)
def test_users_of_any_script(store, contents, user):
    store.add(user, contents[0], label=user, activate=True)
    assert store.active(user).label == store.list()[0].user


def test_one_user_in_two_spellings(store, contents):
    store.add(unicodedata.normalize("NFD", "béla"), contents[0], activate=True)
    assert store.active(unicodedata.normalize("NFC", "béla")).user == "béla"
    assert len(store.list()) == 1


@pytest.mark.parametrize(
    "user",
    ["", " ", ".", "..", "../x", "a/b", "a\\b", "a\0", "a\nb", "\x1b[2J", "\x7f", "\ud800",
     "\u202eabc", "a\u2066b", "\u2028", "é" * 128, "x" * 256, "x" * 10**7, None, 17, b"ana"],
)  # fmt: skip
def test_users_that_are_none(store, contents, user):
    for call in (lambda: store.add(user, contents[0]), lambda: store.active(user)):
        with pytest.raises(
            UsageError, match=r"^user must be 1 to 255 bytes of text without"
        ) as found:
            call()
        assert len(str(found.value)) < 200
    if user:
        with pytest.raises(UsageError, match=r"^label must be 1 to 255 bytes of text"):
            store.add("ana", contents[0], label=user)
    assert store.list() == ()


@pytest.mark.parametrize("version", [0, -1, 2**53, 10**30, 1.0, "1", True])
def test_versions_that_are_none(store, contents, version):
    store.add("ana", contents[0])
    for call in (
        lambda: store.add("ana", contents[1], version=version),
        lambda: store.activate("ana", version),
        lambda: store.remove("ana", version),
    ):
        with pytest.raises(UsageError, match=r"^version must be from 1 to 9007199254740991, got "):
            call()
    assert _versions(store) == [1]


def test_no_version_is_above_the_last(store, contents):
    store.add("ana", contents[0], version=2**53 - 1)
    with pytest.raises(UsageError, match="version must be from 1 to"):
        store.add("ana", contents[1])


def test_who_is_not_there(store, contents):
    store.add("ana", contents[0])
    for call in (store.activate, store.remove):
        with pytest.raises(
            UsageError, match=r"^user 'béla' must have an adapter in the store, got n"
        ):
            call("béla")
        with pytest.raises(
            UsageError, match=r"^user 'ana' must have version 9 in the store, got none"
        ):
            call("ana", 9)
    for call in (store.path, store.roll_back, lambda user: store.swap(None, user)):
        with pytest.raises(
            UsageError, match=r"^user must have an active adapter, got 'ana': activate"
        ):
            call("ana")


def test_broken_adapters(store, contents, tmp_path):
    for data in (b"", contents[0][:-1], b"{}"):
        (tmp_path / "x").write_bytes(data)
        for source in (data, tmp_path / "x"):
            with pytest.raises(FormatError, match="must be a whole safetensors file"):
                store.add("ana", source)
    with pytest.raises(UsageError, match=r"an adapter must be a file, got .*: no such file"):
        store.add("ana", tmp_path / "none")
    assert os.listdir(store.folder / "objects") == []


@links
def test_links_are_refused(store, contents, tmp_path):
    (tmp_path / "real").write_bytes(contents[0])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(UsageError, match=r"an adapter must be a file, got .*link: it is a link"):
        store.add("ana", tmp_path / "link")
    store.add("ana", contents[0], activate=True)
    path = store.path("ana")
    path.unlink()
    path.symlink_to(tmp_path / "real")  # of the very content
    with pytest.raises(FormatError, match="must be a file, got a link"):
        store.activate("ana")
    assert len(store.verify()) == 1
    store.add("ana", contents[0])  # adding again mends it
    assert not path.is_symlink()
    assert store.verify() == ()
    assert (tmp_path / "real").read_bytes() == contents[0]


@links
@pytest.mark.parametrize("part", ["index.sqlite", "index.sqlite-wal", "objects", "pending"])
def test_a_store_of_links_is_none(tmp_path, contents, part):
    with Store(tmp_path / "store") as store:
        store.add("ana", contents[0])
    path = store.folder / part
    if path.exists():
        path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match=f"{part} must be no link: a store has none"):
        Store(store.folder)


@links
def test_the_store_itself_may_be_a_link(tmp_path, contents):
    with Store(tmp_path / "store") as store:
        store.add("ana", contents[0])
    (tmp_path / "link").symlink_to(store.folder)
    with Store(tmp_path / "link") as linked:
        assert _versions(linked) == [1]


@pytest.mark.parametrize("name", ["none", "none/none", "file", "full"])
def test_folders_that_are_no_store(tmp_path, name):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letters.txt").write_bytes(b"mine")
    with pytest.raises(
        UsageError, match=r"^store must be a folder that `regrow store add` made, got "
    ):
        Store(tmp_path / name, create=name != "none")
    assert os.listdir(tmp_path / "full") == ["letters.txt"]
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


def test_the_folder_is_where_it_was_when_the_program_moves(tmp_path, contents, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store("store") as store:
        store.add("ana", contents[0], activate=True)
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert store.path("ana").read_bytes() == contents[0]
        store.add("ana", contents[1])


# -- what others did to it -------------------------------------------------------------------------


def test_a_changed_byte_is_found(store, contents, bundle):
    store.add("ana", contents[0], activate=True)
    store.add("béla", contents[1])
    assert store.verify() == ()
    path = store.path("ana")
    path.write_bytes(contents[0][:-1] + b"\0")
    (finding,) = store.verify()
    assert finding.startswith("user 'ana', version 1: ")
    assert "content must have the hash in its name, got another: add it again" in finding
    for call in (lambda: store.swap(bundle, "ana"), lambda: store.activate("ana")):
        with pytest.raises(FormatError, match="content must have the hash in its name"):
            call()
    assert bundle.active is None
    path.unlink()
    with pytest.raises(FormatError, match="is missing: add the adapter again"):
        store.swap(bundle, "ana")
    store.add("ana", contents[0])
    assert store.verify() == ()


def test_rolling_back_to_a_broken_file_changes_nothing(store, contents):
    store.add("ana", contents[0], activate=True)
    path = store.path("ana")
    store.add("ana", contents[1], activate=True)
    path.write_bytes(b"")
    with pytest.raises(FormatError):
        store.roll_back("ana")
    assert _active(store) == 2


def test_verify_clears_what_no_entry_names(store, contents):
    store.add("ana", contents[0])
    orphan = store.folder / "objects" / f"{'0' * 64}.safetensors"
    orphan.write_bytes(b"left by a power cut")
    (store.folder / "objects" / "letters.txt").write_bytes(b"mine")
    assert store.verify() == ()
    assert not orphan.exists()
    assert (store.folder / "objects" / "letters.txt").exists()


def _edit(folder, *statements):
    db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    for statement in statements:
        db.execute(statement)
    db.close()


@pytest.mark.parametrize(
    "change",
    ["digest = '../../../etc/passwd'", "digest = x'00'", "version = 'one'", "size = 1.5",
     "user = x'ff'", "label = CAST(x'ff' AS TEXT)"],
)  # fmt: skip
def test_hostile_entries(store, contents, change):
    store.add("ana", contents[0], activate=True)
    _edit(store.folder, f"UPDATE adapters SET {change}")
    with pytest.raises(FormatError, match=r"index\.sqlite "):
        store.list()
    assert "passwd" not in os.listdir(store.folder / "objects")


@pytest.mark.parametrize(
    "data", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 9000]
)
def test_a_broken_index(tmp_path, contents, data):
    with Store(tmp_path / "store") as store:
        store.add("ana", contents[0])
    (store.folder / "index.sqlite").write_bytes(data)
    with pytest.raises(FormatError, match=r"index\.sqlite could not be used: "):
        Store(store.folder)
    assert len(os.listdir(store.folder / "objects")) == 1


def test_an_empty_index_costs_no_files(tmp_path, contents):
    with Store(tmp_path / "store") as store:
        store.add("ana", contents[0])
    (store.folder / "index.sqlite").write_bytes(b"")
    with pytest.raises(FormatError, match=r"index\.sqlite must name the files, got it empty"):
        Store(store.folder)
    (store.folder / "index.sqlite").unlink()
    with pytest.raises(UsageError, match="a folder of something else"):
        Store(store.folder)
    assert len(os.listdir(store.folder / "objects")) == 1


def test_an_index_without_its_tables(store):
    _edit(store.folder, "DROP TABLE adapters")
    with pytest.raises(FormatError, match=r"index\.sqlite could not be used: no such table"):
        store.list()


def test_another_format_names_the_one_that_is_read(store):
    _edit(store.folder, "PRAGMA user_version = 2")
    with pytest.raises(
        FormatError, match="format of the store must be 1, the version read here, got"
    ):
        Store(store.folder)


def test_a_busy_store_says_so(tmp_path, contents):
    with Store(tmp_path / "store", timeout=0.1) as store:
        store.add("ana", contents[0], activate=True)
        other = sqlite3.connect(store.folder / "index.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(
            RegrowError, match=r"must be free, got busy: another process has been wr"
        ):
            store.add("ana", contents[1])
        assert store.path("ana").read_bytes() == contents[0]  # reading goes on
        other.execute("ROLLBACK")
        other.close()
        assert store.add("ana", contents[1]).version == 2


@pytest.fixture
def connections(monkeypatch):
    """Those to SQLite's files that are opened from here on."""
    found, connect = [], sqlite3.connect

    def noting(*args, **options):
        found.append(connect(*args, **options))
        return found[-1]

    monkeypatch.setattr(sqlite3, "connect", noting)
    return found


def test_a_change_waits_for_its_turn(tmp_path, contents, connections):
    with Store(tmp_path / "store", timeout=20) as store:
        other = sqlite3.connect(
            store.folder / "index.sqlite", isolation_level=None, check_same_thread=False
        )
        other.execute("BEGIN IMMEDIATE")
        release = threading.Timer(0.2, other.execute, ("ROLLBACK",))
        release.start()
        assert store.add("ana", contents[0], activate=True).version == 1
        release.join()
        other.close()
        # Reading and the log's own locks are waited for as before.
        assert connections[0].execute("PRAGMA busy_timeout").fetchone() == (20_000,)


def test_a_closed_store_and_a_forked_one(store, contents, monkeypatch):
    store.add("ana", contents[0])
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(
        UsageError, match=r"must be opened in this process, got .*, or opened before a"
    ):
        store.list()
    monkeypatch.undo()
    store.close()
    store.close()
    with pytest.raises(UsageError, match="must be opened in this process"):
        store.list()


def test_threads_share_a_store(store, contents):
    start = threading.Barrier(8)
    digests = {hashlib.sha256(data).hexdigest() for data in contents}

    def work(index: int) -> None:
        user, rng = f"user {index % 4}", np.random.default_rng(index)
        start.wait()
        for _ in range(12):
            data = contents[rng.integers(4)]
            entry = store.add(user, data, activate=True)
            assert entry.digest == hashlib.sha256(data).hexdigest()
            assert store.active(user).digest in digests

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert store.verify() == ()


# -- a thousand ------------------------------------------------------------------------------------


def _work(store, connection, monkeypatch, users):
    """Statements and files that looking up, activating and adding take; entries are read whole."""
    statements, opened, real = [], [], os.open
    import builtins

    real_open = builtins.open
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", lambda *a, **k: (opened.append(a), real(*a, **k))[1])
        patch.setattr(builtins, "open", lambda *a, **k: (opened.append(a), real_open(*a, **k))[1])
        connection.set_trace_callback(statements.append)
        for user in users:
            store.path(user)
            store.activate(user)
            store.add(user, store.path(user), activate=True)
        connection.set_trace_callback(None)
    return statements, len(opened)


def test_a_thousand_adapters_take_no_more_work_than_ten(
    tmp_path, contents, connections, monkeypatch
):
    counts = {}
    for number in (10, 1000):
        with Store(tmp_path / str(number)) as store:
            connection = connections[-1]
            store.add("user 0", contents[0], activate=True)
            _edit(
                store.folder,
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < "
                f"{number - 1}) INSERT INTO adapters SELECT 'user ' || i, 1, digest, size, "
                "backbone_id, method, label, added, 1, NULL FROM adapters, n",
                "INSERT INTO users SELECT user, 1 FROM adapters WHERE true ON CONFLICT DO NOTHING",
            )
            assert store.usage()["adapters"] == number
            statements, opened = _work(
                store, connection, monkeypatch, ["user 0", "user 7", "user 9"]
            )
            counts[number] = (len(statements), opened)
            for statement in statements:
                _is_by_index(connection, statement)
    assert counts[10] == counts[1000]


def _is_by_index(connection, statement):
    """SQLite finds the rows by an index: what it does not grows with the number of adapters."""
    if statement.startswith(("SELECT", "UPDATE", "DELETE")):
        plan = connection.execute(f"EXPLAIN QUERY PLAN {statement}").fetchall()
        assert plan
        assert not [row for row in plan if row[3].startswith("SCAN")], (statement, plan)
