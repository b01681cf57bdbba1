"""Writing whole or not at all."""

from __future__ import annotations

import hashlib
import os
import stat
import tracemalloc

import pytest
from safetensors import SafetensorError

from regrow_format import files
from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.files import check_output, new_folder, read_bytes, sha256_file, write_bytes


def _fill(folder, text="new"):
    (folder / "sub").mkdir()
    (folder / "sub" / "x").write_text(text, encoding="utf-8")


def _fill_and_raise(folder, error):
    _fill(folder)
    raise error


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    _fill(folder, "old")
    (folder / "manifest.json").write_text('{"backbone_id": ""}', encoding="utf-8")  # regrow's
    return folder


def _text(folder):
    return (folder / "sub" / "x").read_text(encoding="utf-8")


def test_a_new_folder_appears_when_it_is_whole(tmp_path):
    out = tmp_path / "out"
    with new_folder(out, marker="manifest.json") as folder:
        _fill(folder)
        assert not out.exists()
    assert _text(out) == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, RegrowError])
def test_a_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out", marker="manifest.json") as folder:
        _fill_and_raise(folder, error)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_folder(old, error):
    with pytest.raises(error), new_folder(old, force=True, marker="manifest.json") as folder:
        _fill_and_raise(folder, error)
    assert _text(old) == "old"
    assert os.listdir(old.parent) == ["out"]


def test_force_replaces(old):
    with new_folder(old, force=True, marker="manifest.json") as folder:
        _fill(folder)
    assert _text(old) == "new"
    assert os.listdir(old.parent) == ["out"]


def test_what_exists_is_refused_before_the_work(old):
    with (
        pytest.raises(UsageError, match=r"which exists \(--force replaces it\)"),
        new_folder(old, marker="manifest.json"),
    ):
        pytest.fail("the block must not run")
    assert _text(old) == "old"


def test_force_replaces_only_what_regrow_wrote(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters.txt").write_text("mine", encoding="utf-8")
    with (
        pytest.raises(UsageError, match=r"or a folder with manifest\.json"),
        new_folder(home, force=True, marker="manifest.json"),
    ):
        pytest.fail("the block must not run")
    assert (home / "letters.txt").read_text(encoding="utf-8") == "mine"


def test_force_replaces_only_a_folder_of_the_same_kind(old):
    """A bundle written over the demo's folder would take all of the demo with it."""
    with pytest.raises(UsageError, match=r"or a folder with report\.json"):
        check_output(old, force=True, marker="report.json")
    with pytest.raises(UsageError, match=r"output must be a file, got .*: it is a folder"):
        check_output(old, force=True)


def test_force_replaces_an_empty_folder(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", force=True, marker="manifest.json") as folder:
        _fill(folder)
    assert _text(tmp_path / "out") == "new"


def test_the_parent_must_exist(tmp_path):
    with pytest.raises(UsageError, match="must lie in an existing folder"):
        check_output(tmp_path / "none" / "out", force=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_old_folder_comes_back_if_the_exchange_fails(old, monkeypatch, error):
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise error
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    expected = RegrowError if isinstance(error, OSError) else KeyboardInterrupt
    with (
        pytest.raises(expected) as caught,
        new_folder(old, force=True, marker="manifest.json") as folder,
    ):
        _fill(folder)
    if expected is RegrowError:
        assert str(caught.value) == f"{old} could not be written: No space left on device"
    assert _text(old) == "old"
    assert os.listdir(old.parent) == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_a_new_folder_is_readable_by_others(tmp_path):
    mask = os.umask(0o022)
    try:
        with new_folder(tmp_path / "out", marker="manifest.json") as folder:
            _fill(folder)
            (folder / "sub" / "x").chmod(0o600)
        write_bytes(tmp_path / "file", b"x")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "sub" / "x").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644


# -- files -----------------------------------------------------------------------------------------


def test_write_bytes(tmp_path):
    path = tmp_path / "x"
    for data in (b"one", b"two and more", b""):
        write_bytes(path, data)
        assert path.read_bytes() == data
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("step", ["replace", "fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(*args):
        raise error

    monkeypatch.setattr(files.os, step, fail)
    expected = RegrowError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_in_no_folder_is_one_error(tmp_path):
    with pytest.raises(RegrowError, match="could not be written: No such file or directory"):
        write_bytes(tmp_path / "none" / "x", b"")


def test_a_folder_is_not_overwritten_by_a_file(old):
    with pytest.raises(RegrowError, match="could not be written"):
        write_bytes(old, b"")
    assert _text(old) == "old"
    assert os.listdir(old.parent) == ["out"]


def test_read_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, limit=5, what="a test") == b"12345"
    with pytest.raises(FormatError, match="x must be at most 4 bytes for a test, got more"):
        read_bytes(path, limit=4, what="a test")
    with pytest.raises(UsageError, match=r"a test must be a file, got .*: no such file"):
        read_bytes(tmp_path / "y", limit=4, what="a test")
    with pytest.raises(UsageError, match=r"a test must be a file, got .*: it is a folder"):
        read_bytes(tmp_path, limit=4, what="a test")


def test_sha256_of_a_file_in_pieces(tmp_path):
    data = bytes(range(256)) * 5000  # more than one piece
    (tmp_path / "x").write_bytes(data)
    assert sha256_file(tmp_path / "x") == hashlib.sha256(data).hexdigest()


def test_a_full_disk_is_one_error_with_a_way_out(old):
    with (
        pytest.raises(RegrowError) as caught,
        new_folder(old, force=True, marker="manifest.json") as folder,
    ):
        _fill_and_raise(folder, OSError(28, "No space left on device"))
    assert str(caught.value) == (
        f"{old} could not be written: No space left on device: free space, or write elsewhere"
    )
    assert _text(old) == "old"
    assert os.listdir(old.parent) == ["out"]


def test_weights_that_the_disk_does_not_take_are_one_error(old):
    """safetensors' own writer reports a full disk as an error of its own kind."""
    with (
        pytest.raises(RegrowError, match=r"could not be written: .*No space left on device"),
        new_folder(old, force=True, marker="manifest.json") as folder,
    ):
        _fill_and_raise(folder, SafetensorError("I/O error: No space left on device"))
    assert _text(old) == "old"
    assert os.listdir(old.parent) == ["out"]


def test_reading_makes_room_for_the_file_not_for_the_limit(tmp_path):
    (tmp_path / "x").write_bytes(b"small")
    tracemalloc.start()
    assert read_bytes(tmp_path / "x", limit=1 << 30, what="x") == b"small"
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("text", ["{}", '{"name": "my app"}', "", '{"start_url": "backbone_id"}'])
def test_a_folder_of_somebody_elses_is_not_replaced(tmp_path, text):
    """Every web app has a manifest.json."""
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=r"with manifest\.json that regrow wrote"):
        check_output(tmp_path, force=True, marker="manifest.json")
