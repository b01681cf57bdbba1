"""Bad input on the command line: one clear line, the right exit code, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regrow_format.adapter import Adapter
from regrow_toolchain.adapters import adapt
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import load_backbone

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def filled(
    compressed_folder: Path,
    vit_folder: Path,
    bert_folder: Path,
    pictures: Callable[..., tuple[np.ndarray, np.ndarray]],
    dataset: Callable[..., Dataset],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Good things, and bad ones, to be named on the command line."""
    room = tmp_path_factory.mktemp("filled")
    for name, folder in (("small", compressed_folder), ("vit", vit_folder), ("bert", bert_folder)):
        shutil.copytree(folder, room / name)
    (room / "empty").mkdir()
    (room / "file.txt").write_text("not a model")
    pixels, labels = pictures(24, 1)
    np.savez(room / "d.npz", images=pixels, labels=labels)
    np.savez(room / "beyond.npz", images=pixels, labels=labels + 5)
    np.savez(room / "mixed.npz", images=pixels, labels=np.array(["left", "up", "down"])[labels])
    np.savez(room / "one.npz", images=pixels, labels=np.full(24, "up"))
    np.savez(room / "none.npz", images=pixels)
    np.savez(room / "wide.npz", pixel_values=np.zeros((24, 3, 20, 20), "f4"), labels=labels)
    np.savez(room / "pixels.npz", pixel_values=np.zeros((24, 3, 12, 12), "f4"), labels=labels)
    np.savez(room / "nan.npz", pixel_values=np.full((24, 3, 12, 12), np.nan, "f4"), labels=labels)
    few = np.arange(24) % 5
    np.savez(room / "few.npz", images=pixels[few], labels=labels[few])
    (room / "cut.npz").write_bytes((room / "d.npz").read_bytes()[:500])
    config = AdaptConfig(steps=2, holdout=0)
    adapter = adapt(load_backbone(compressed_folder), dataset(24, 1), config).adapter
    adapter.save(room / "good.safetensors")
    (room / "cut.safetensors").write_bytes((room / "good.safetensors").read_bytes()[:-10])
    adapt(load_backbone(vit_folder), dataset(24, 1), config).adapter.save(
        room / "other.safetensors"
    )
    (room / "there").mkdir()
    (room / "there" / "mine.txt").write_text("keep")
    return room


@pytest.fixture
def room(filled: Path, tmp_path: Path) -> Path:
    """A copy for one test alone."""
    return Path(shutil.copytree(filled, tmp_path / "room"))


def _check(outcome: Any, code: int, words: str) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("regrow: ")
    first, *findings = outcome.err.splitlines()
    assert words in outcome.err
    # One line; only what does not fit, of two good files, may be listed below it.
    assert all(line.startswith("  ") for line in findings), outcome.err
    assert not findings or "fit" in first, outcome.err
    assert "Traceback" not in outcome.err


_ADAPT = ("adapt", "{room}/small", "-o", "{room}/new.safetensors", "--data", "{room}/d.npz")
_COMPRESS = ("compress", "{room}/vit", "-o", "{room}/new")
_EXPORT = ("export", "{room}/small", "-o", "{room}/new")


def _with(command: tuple[str, ...], *more: str, **places: str) -> tuple[str, ...]:
    """`command` with `more`; model="x" and data="x" name other files."""
    found = list(command)
    if "model" in places:
        found[1] = "{room}/" + places["model"]
    if "out" in places:
        found[3] = "{room}/" + places["out"]
    if "data" in places and "--data" in found:
        found[5] = "{room}/" + places["data"]
    elif "data" in places:
        found += ["--data", "{room}/" + places["data"]]
    return (*found, *more)


_CASES: list[tuple[tuple[str, ...], int, str]] = [
    # models
    (_with(_ADAPT, model="nowhere"), 2, "backbone must be a model's folder, got "),
    (_with(_ADAPT, model="file.txt"), 2, "it is a file"),
    (_with(_ADAPT, model="empty"), 2, "it has no config.json"),
    (_with(_COMPRESS, model="nowhere"), 2, "no such folder"),
    (_with(_COMPRESS, model="small"), 2, "model must be a dense one, got a compressed one"),
    (_with(_EXPORT, model="empty"), 2, "it has no config.json"),
    # data
    (_with(_ADAPT, data="nowhere.npz"), 2, "no such file"),
    (_with(_ADAPT, data="nowhere"), 2, "no such file"),
    (_with(_ADAPT, data="file.txt"), 2, "backbone must be a language model (text-generation)"),
    (_with(_ADAPT, data="empty"), 2, "data must be a folder with one folder per class"),
    (_with(_ADAPT, data="cut.npz"), 1, "must be an .npz of plain arrays"),
    (_with(_ADAPT, data="none.npz"), 2, "must have an array `labels`"),
    (_with(_ADAPT, "--force", out="d.npz"), 2, "output must not be the data itself"),
    (_with(_ADAPT, data="beyond.npz"), 2, "labels must be from 0 to 2 as in the backbone, got 7"),
    (_with(_ADAPT, data="mixed.npz"), 2, "labels must be among the backbone's (left, middle"),
    (_with(_ADAPT, "--head", "new", data="one.npz"), 2, "two samples or more, of two classes"),
    (_with(_ADAPT, "--head", "keep", data="mixed.npz"), 2, "labels must be among the backbone's"),
    (
        _with(_ADAPT, "--holdout", "0", data="wide.npz"),
        1,
        "model must take the data's inputs, got pixel_values",
    ),
    (_with(_ADAPT, data="wide.npz"), 2, "6 different samples or more to tell whether an adapter"),
    (_with(_ADAPT, data="few.npz"), 2, "improves, got 5: give more, or train one untested with"),
    (_with(_ADAPT, data="nan.npz"), 2, "pixel_values must be finite, got NaN"),
    (_with(_ADAPT, model="bert"), 2, "names of forward's arguments (input_ids, attention_mask"),
    (_with(_ADAPT, model="bert", data="pixels.npz"), 2, "names of forward's arguments (input_ids"),
    (_with(_COMPRESS, data="beyond.npz"), 2, "labels must be from 0 to 2"),
    (_with(_COMPRESS, data="one.npz"), 2, "labels must be among the backbone's"),
    (_with(_COMPRESS, data="wide.npz"), 1, "model must take the data's inputs"),
    # settings
    (_with(_ADAPT, "--lr", "1e30"), 1, "loss must be finite"),
    (_with(_ADAPT, "--steps", "1", "--lr", "1e-9"), 1, "adapter must be better than none to be"),
    (_with(_ADAPT, "--loss", "no.such:loss"), 2, "loss must be of a module that can be imported"),
    (_with(_ADAPT, "--lr", "nan"), 2, "must be a finite number, got nan"),
    (_with(_ADAPT, "--label-smoothing", "2"), 2, "--label-smoothing"),
    (_with(_ADAPT, "--holdout", "1"), 2, "holdout must be from 0 to below 1"),
    (_with(_ADAPT, "--seed", str(2**64)), 2, "seed must be"),
    (_with(_ADAPT, "--target", "quary"), 2, "which matches none; near: query"),
    (_with(_ADAPT, "--set", "rubbish"), 2, "--set must be NAME=VALUE, got 'rubbish'"),
    (_with(_ADAPT, "--set", "=3"), 2, "--set must be NAME=VALUE"),
    (_with(_ADAPT, "--set", "q=3"), 2, "settings of nola must be among k=64"),
    (_with(_ADAPT, "--set", "k=many"), 2, "nola's k must be of type int, got 'many'"),
    (_with(_ADAPT, "--set", "rank=1000"), 2, "rank must be at most 32"),
    (_with(_ADAPT, "--method", "lora", "--set", "k=3"), 2, "settings of lora must be among rank=4"),
    (_with(_ADAPT, "--method", "magic"), 2, "--method"),
    (_with(_ADAPT, "--no-such-option"), 2, "No such option"),
    (_with(_COMPRESS, "--ratio", "0.5"), 2, "--ratio"),
    (_with(_COMPRESS, "--ratio", "nan"), 2, "must be a finite number, got nan"),
    (_with(_COMPRESS, "--ratio", "1000"), 2, "ratio must leave every layer a rank of 1 or more"),
    (("adapt",), 2, "Missing argument"),
    (("grow",), 2, "No such command 'grow'"),
    # outputs
    (_with(_ADAPT, out="file.txt"), 2, "output must be a new path, got "),
    (_with(_ADAPT, out="there"), 2, "it is a folder"),
    (_with(_ADAPT, "--force", out="vit"), 2, "it is a folder"),
    (_with(_ADAPT, "--force", out="small"), 2, "it is a folder"),
    (_with(_COMPRESS, "--force", out="there"), 2, "remove it yourself"),
    (_with(_ADAPT, out="no/such/a.safetensors"), 2, "no such folder"),
    (_with(_COMPRESS, out="there"), 2, "(--force replaces it)"),
    (_with(_EXPORT, out="there"), 2, "(--force replaces it)"),
    (("demo", "-o", "{room}/there"), 2, "(--force replaces it)"),
    (("demo", "-o", "{room}/new", "--seed", str(2**64)), 2, "seed must be"),
    # adapters
    (_with(_EXPORT, "--mode", "seeded"), 2, "--adapter must be given for --mode seeded, got none"),
    (_with(_EXPORT, "--adapter", "{room}/nowhere"), 2, "no such file"),
    (_with(_EXPORT, "--adapter", "{room}/cut.safetensors"), 1, "must be a whole safetensors file"),
    (_with(_EXPORT, "--adapter", "{room}/d.npz"), 1, "must be a whole safetensors file"),
    (
        _with(_EXPORT, "--mode", "merged", "--adapter", "{room}/other.safetensors"),
        1,
        "adapter must be of this backbone, sha256:",
    ),
    (
        _with(_EXPORT, "--adapter", "{room}/other.safetensors"),
        1,
        "adapter must be of this backbone, sha256:",
    ),
    # precision
    (
        _with(_EXPORT, "--precision", "int2"),
        2,
        "--precision must be one of fp32, fp16, int8, int4, got 'int2'",
    ),
    (_with(_EXPORT, "--data", "{room}/nowhere.npz"), 2, "no such file"),
    (_with(_EXPORT, "--data", "{room}/beyond.npz"), 2, "labels must be from 0 to 2 as in the"),
    (_with(_EXPORT, "--data", "{room}/wide.npz"), 1, "model must take the data's inputs, got"),
    # looking
    (("inspect", "{room}/nowhere"), 2, "no such file or folder"),
    (("inspect", "{room}/empty"), 2, "a folder with none of them"),
    (("inspect", "{room}/file.txt"), 1, "must be a whole safetensors file"),
    (("inspect", "{room}/cut.safetensors"), 1, "must be a whole safetensors file"),
    (("run", "{room}/empty", "--input", "{room}/d.npz"), 2, "bundle"),
    (("run", "{room}/empty"), 2, "give one of --input, --image, --wav and --text"),
]


@pytest.mark.parametrize(
    ("command", "code", "words"), _CASES, ids=[" ".join(case[0]) for case in _CASES]
)
def test_one_line_and_nothing_written(
    cli: Cli,
    room: Path,
    listing: Callable[[Path], dict[str, int]],
    command: tuple[str, ...],
    code: int,
    words: str,
) -> None:
    before = listing(room)
    outcome = cli(*(part.format(room=room) for part in command))
    _check(outcome, code, words)
    assert listing(room) == before


@pytest.mark.slow
def test_failures_of_run(
    workshop: Any,
    cli: Cli,
    room: Path,
    tmp_path: Path,
    listing: Callable[[Path], dict[str, int]],
) -> None:
    """With a real bundle."""
    bundle, test = workshop.room / "bundle", workshop.room / "test.npz"
    (tmp_path / "out.npz").write_bytes(b"mine")
    foreign = json.loads((bundle / "manifest.json").read_text())
    assert Adapter.load(room / "other.safetensors").backbone_id != foreign["backbone_id"]
    np.savez(room / "short.npz", pixel_values=np.zeros((3, 3, 12, 12), "f4"), labels=[0, 1])
    cases: list[tuple[tuple[object, ...], int, str]] = [
        (("--input", test, "--adapter", room / "other.safetensors"), 1, "got one of another"),
        (("--input", test, "--adapter", room / "cut.safetensors"), 1, "must be a whole"),
        (("--input", test, "--adapter", room / "nowhere"), 2, "no such file"),
        (("--input", room / "nowhere.npz"), 2, "no such file"),
        (("--input", room / "short.npz", "-o", room / "new.npz"), 2, "labels must be one per"),
        (("--input", test, "-o", tmp_path / "out.npz"), 2, "(--force replaces it)"),
        (("--image", room / "nowhere.png"), 2, "no such file"),
        (("--image", room / "empty"), 2, "must have images"),
        (("--image", room / "file.txt"), 1, "must be an image"),
        (("--input", test, "--threads", "0"), 2, "--threads"),
    ]
    before = listing(tmp_path)
    for arguments, code, words in cases:
        _check(cli("run", bundle, *arguments), code, words)
        assert listing(tmp_path) == before, arguments
    assert (tmp_path / "out.npz").read_bytes() == b"mine"


@pytest.mark.slow
def test_failures_in_a_process_of_its_own(
    run: Cli, room: Path, listing: Callable[[Path], dict[str, int]]
) -> None:
    """What a user sees: no traceback, no warning of a library."""
    before = listing(room)
    command = _with(_ADAPT, data="beyond.npz")
    outcome = run(*(part.format(room=room) for part in command), cwd=room)
    _check(outcome, 2, "labels must be from 0 to 2")
    assert listing(room) == before
