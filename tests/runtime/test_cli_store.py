"""`regrow store` and `regrow run --store`, where only the base install is."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from regrow_toolchain.cli import main


@pytest.fixture
def regrow(capsys):
    """regrow(*arguments): exit code, lines of stdout, lines of stderr."""

    def call(*arguments: object):
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return ended.value.code, told.out.splitlines(), told.err.splitlines()

    return call


@pytest.fixture
def files(make_adapter, tmp_path):
    paths = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for index, path in enumerate(paths):
        make_adapter(draw=index, classes=2 if index == 1 else 0).save(path)
    return paths


def _json(found):
    code, out, err = found
    assert (code, err) == (0, [])
    return json.loads(out[-1])


def test_the_life_of_an_adapter(regrow, files, bundle_folder, tmp_path):
    store = tmp_path / "store"
    code, out, _ = regrow("store", "add", store, "ana", files[0], "--label", "first")
    assert code == 0
    assert out[0].startswith("ana, version 1: ")
    assert "`regrow store activate` makes it so" in out[0]
    added = _json(regrow("store", "add", store, "ana", files[1], "--activate", "--json",
                         "--bundle", bundle_folder))  # fmt: skip
    assert (added["version"], added["active"]) == (2, True)
    assert regrow("store", "activate", store, "ana", "--version", 1)[1] == [
        "ana, version 1 is active"
    ]
    assert regrow("store", "rollback", store, "ana")[1] == ["ana, version 2 is active again"]
    code, out, _ = regrow("store", "list", store)
    assert [line.split()[1] for line in out[2:4]] == ["1", "2*"]
    assert out[-1].startswith("2 adapters of 1 user: 2 files of ")
    listed = _json(regrow("store", "list", store, "--user", "ana", "--json"))
    assert [entry["label"] for entry in listed["adapters"]] == ["first", ""]
    assert regrow("store", "verify", store)[1] == ["2 adapters in 2 files: whole"]
    assert regrow("store", "remove", store, "ana", "--version", 1)[1] == ["ana, version 1 removed"]
    removed = _json(regrow("store", "remove", store, "ana", "--all", "--json"))
    assert [entry["version"] for entry in removed["removed"]] == [2]
    assert _json(regrow("store", "list", store, "--json"))["adapters"] == []


def test_run_with_a_user_of_the_store(regrow, files, bundle, bundle_folder, pixels, tmp_path):
    store, out = tmp_path / "store", tmp_path / "out.npz"
    np.savez(tmp_path / "x.npz", pixel_values=pixels)
    regrow("store", "add", store, "ana", files[1], "--activate")
    run = ("run", bundle_folder, "--input", tmp_path / "x.npz", "--store", store)
    result = _json(regrow(*run, "--user", "ana", "-o", out, "--json"))
    assert result["adapter"].startswith("ana@1#")
    assert result["swap"]["read_ms"] > 0
    bundle.swap(files[1])
    with np.load(out) as stored:
        np.testing.assert_allclose(
            stored["logits"], bundle.run({"pixel_values": pixels})["logits"], rtol=1e-5, atol=1e-6
        )
    code, _, err = regrow(*run, "--user", "bob")
    assert (code, err) == (
        2, ["regrow: user 'bob' must have an adapter in the store, got none: list shows all"]
    )  # fmt: skip
    for more in ((), ("--user", "ana", "--adapter", files[0])):
        code, _, err = regrow(*run, *more)
        assert code == 2
        assert "give --adapter, or --store and --user, or none of them" in err[0]


def test_a_broken_store_is_told_line_by_line(regrow, files, tmp_path):
    store = tmp_path / "store"
    regrow("store", "add", store, "ana", files[0])
    next((store / "objects").iterdir()).write_bytes(b"")
    code, out, err = regrow("store", "verify", store)
    assert (code, out) == (1, [])
    assert err[0] == "regrow: store must be whole, got 1 broken:"
    assert err[1].startswith("  user 'ana', version 1: ")
    code, out, _ = regrow("store", "verify", store, "--json")
    assert code == 1
    assert len(json.loads(out[-1])["findings"]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("add", "S", "a/b", "F"), 2, "user must be 1 to 255 bytes of text without control"),
        (("add", "S", "ana", "none"), 2, "an adapter must be a file, got none: no such file"),
        (("add", "S", "ana", "F", "--version", "0"), 2, "0 is not in the range"),
        (("list", "none"), 2, "store must be a folder that `regrow store add` made, got "),
        (("verify", "none"), 2, "no such folder"),
        (("list", "S", "--user", "bob"), 2, "user must have an adapter in the store, got 'bob'"),
        (("activate", "S", "bob"), 2, "user 'bob' must have an adapter in the store, got none"),
        (("remove", "S", "ana"), 2, "give one of --version and --all"),
        (("remove", "S", "ana", "--version", "1", "--all"), 2, "give one of --version and --all"),
        (("rollback", "S", "bob"), 2, "user 'bob' must have an adapter in the store, got none"),
        (("rollback", "S", "ana"), 2, "user must have an active adapter, got 'ana'"),
        (("list", "F"), 2, "it is a file"),
        (("frob",), 2, "No such command 'frob'"),
    ],
)
def test_wrong_usage(regrow, files, tmp_path, arguments, code, text):
    regrow("store", "add", tmp_path / "store", "ana", files[0])
    places = {"S": tmp_path / "store", "F": files[0]}
    found = regrow("store", *(places.get(word, word) for word in arguments))
    assert (found[0], found[1], len(found[2])) == (code, [], 1)
    assert text in found[2][0]


def test_what_is_refused_makes_no_store(regrow, files, probed_folder, make_adapter, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(files[0].read_bytes()[:-9])
    other = replace(make_adapter(), backbone_id="sha256:" + "cd" * 32)
    other.save(tmp_path / "other.safetensors")
    made = make_adapter()
    zeros = {n: replace(c, values=0 * c.values) for n, c in made.coefficients.items()}
    replace(made, coefficients=zeros).save(tmp_path / "idle.safetensors")
    store, fits = tmp_path / "store", ("--bundle", probed_folder)
    for user, name, more, code, words in (
        ("ana", "gone", (), 2, "no such file"),
        ("ana", "cut.safetensors", (), 1, "must be a whole safetensors file"),
        ("a/b", "0.safetensors", (), 2, "user must be 1 to 255 bytes"),
        ("ana", "0.safetensors", ("--bundle", tmp_path / "none"), 2, "no such folder"),
        ("ana", "other.safetensors", fits, 1, "must be of the bundle's backbone"),
        ("ana", "idle.safetensors", fits, 1, f"adapter {tmp_path}/idle.safetensors must change"),
    ):
        found = regrow("store", "add", store, user, tmp_path / name, *more)
        assert (found[0], found[1], len(found[2])) == (code, [], 1)
        assert words in found[2][0]
        assert not store.exists()


def test_inspect_lists_a_store(regrow, files, tmp_path):
    store = tmp_path / "store"
    regrow("store", "add", store, "ana", files[0])
    assert regrow("inspect", store) == regrow("store", "list", store)
    found = _json(regrow("inspect", store, "--json"))
    assert (found["kind"], found["adapters"][0]["user"]) == ("store", "ana")


def test_listing_makes_no_store(regrow, tmp_path):
    regrow("store", "list", tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_help(regrow):
    code, out, _ = regrow("store", "--help")
    assert code == 0
    text = "\n".join(out)
    for name in ("add", "list", "activate", "rollback", "remove", "verify"):
        assert name in text
    assert "..." not in text.split("Commands:")[1]  # every line is whole


def test_a_killed_command_leaves_a_whole_store(environment, files, tmp_path, regrow):
    """As a user would see it: SIGKILL in the middle of `regrow store add`."""
    code = (
        "import os, sys\n"
        "os.replace = lambda *a: os.kill(os.getpid(), 9)\n"
        "from regrow_toolchain.cli import main; main(sys.argv[1:])"
    )
    store = tmp_path / "store"
    regrow("store", "add", store, "ana", files[0])
    found = subprocess.run(
        [sys.executable, "-c", code, "store", "add", store, "ana", files[1]],
        env=environment, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert found.returncode == -9
    assert regrow("store", "verify", store)[1] == ["1 adapters in 1 files: whole"]
    assert list((store / "pending").iterdir()) == []
