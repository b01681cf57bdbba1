"""regrow adapt --users: a folder with an adapter per user, also after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regrow_format.adapter import Adapter
from regrow_format.errors import FormatError, UsageError
from regrow_toolchain.adapters import AdapterTrainer, UserFolder
from regrow_toolchain.adapters.user_folder import SUMMARY, file_name
from regrow_toolchain.compress import DistillationTrainer
from regrow_toolchain.training import Checkpoint, TrainingIdentity

Cli = Callable[..., Any]
_NAMES = ("ann", "b/o\\b", "..")
_QUICK = ("--steps", "6", "--keep-anyway", "--users", "who", "--json", "--holdout", "0")


class _KilledError(Exception):
    """Ends the work where a kill would: nothing tidies up that only a polite end would."""


@pytest.fixture
def room(
    tmp_path: Path,
    compressed_folder: Path,
    images: Callable[..., tuple[np.ndarray, np.ndarray]],
) -> Path:
    pixels, labels = images(54, 3, inverted=True)
    np.savez(tmp_path / "d.npz", images=pixels, labels=labels, who=np.repeat(_NAMES, 18))
    (tmp_path / "small").symlink_to(compressed_folder)
    return tmp_path


def _adapt(cli: Cli, room: Path, *more: object, out: str = "out") -> Any:
    command = ("adapt", room / "small", "--data", room / "d.npz", "-o", room / out)
    return cli(*command, *_QUICK, *more)


def _kill(cli: Cli, room: Path, step: int, *more: object) -> None:
    original, calls = AdapterTrainer.step, [0]

    def breaks(self: AdapterTrainer, number: int) -> Any:
        calls[0] += 1
        if calls[0] == step:
            raise _KilledError
        return original(self, number)

    with pytest.MonkeyPatch.context() as patch, suppress(_KilledError):
        patch.setattr(AdapterTrainer, "step", breaks)
        _adapt(cli, room, *more)


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_everybody_has_a_file(cli: Cli, room: Path) -> None:
    done = _adapt(cli, room, "--holdout", 0.2)
    assert (done.code, done.err) == (0, "")
    said = json.loads(done.out)
    assert (said["users"], said["written"]) == (3, 3)
    rows = [json.loads(line) for line in (room / "out" / SUMMARY).read_text().splitlines()]
    assert said["adapters"] == rows
    assert [row["user"] for row in rows] == sorted(_NAMES)
    for row in rows:
        adapter = Adapter.load(room / "out" / row["file"])
        assert row["bytes"] == (room / "out" / row["file"]).stat().st_size
        assert adapter.validated[0].after == row["after"]
        assert (row["folds"], row["held_back"], adapter.validated[0].samples) == (5, 18, 18)
        assert row["baseline"] in ("base model", "class frequencies", "even chances")
        assert 0 < row["p_value"] <= 1
    assert sorted(p.name for p in room.iterdir()) == ["d.npz", "out", "small"]
    assert len(list((room / "out").iterdir())) == 4


def test_names_stay_in_the_folder() -> None:
    names = [file_name(user) for user in (*_NAMES, "a b", "ä", ".x", "C:\\x", "nul\0")]
    assert len(set(names)) == len(names)
    for name in names:
        assert not set(name) & set("/\\:\0")
        assert not name.startswith(".")
        assert name.endswith(".safetensors")


def test_where_nobody_is_helped_the_command_fails(cli: Cli, room: Path) -> None:
    """As for one user; the figures are printed, and nothing is left behind."""
    quick = [option for option in _QUICK if option != "--keep-anyway"]
    done = cli("adapt", room / "small", "--data", room / "d.npz", "-o", room / "out", *quick,
               "--lr", "1e-9", "--holdout", "0.2")  # fmt: skip
    assert done.code == 1
    said = json.loads(done.out)
    assert said["written"] == 0
    assert [row["file"] for row in said["adapters"]] == [None] * 3
    assert (
        "adapters must be better than none to be written (p at most 0.02), got none that is"
        in done.err
    )
    assert "--keep-anyway" in done.err
    assert sorted(p.name for p in room.iterdir()) == ["d.npz", "small"]


@pytest.mark.parametrize(
    ("share", "step"), [*((0, step) for step in (3, 9, 14)), *((0.2, step) for step in (7, 9, 40))]
)
def test_a_kill_loses_nothing(
    cli: Cli, room: Path, monkeypatch: pytest.MonkeyPatch, share: float, step: int
) -> None:
    """One user at a time: killed within the first, the second and the third.

    With folds: before and within the second of the first user's six passes, and in the second's.
    """
    monkeypatch.setitem(Checkpoint.__init__.__kwdefaults__, "seconds", 0.0)
    alone = ("--users-at-once", 1, "--holdout", share)
    _adapt(cli, room, *alone, out="whole")
    _kill(cli, room, step, *alone)
    left = _files(room / "out.resume")
    assert any(name.startswith(".state.") for name in left) is (step != 13)
    refused = _adapt(cli, room)
    assert refused.code == 2
    assert "--resume goes on with it" in refused.err
    assert _files(room / "out.resume") == left
    done = _adapt(cli, room, *alone, "--resume")
    assert (done.code, done.err) == (0, "")
    assert _files(room / "out") == _files(room / "whole")
    assert not (room / "out.resume").exists()


@pytest.mark.parametrize("many", [True, False])
def test_an_interrupt_says_how_to_go_on(
    cli: Cli, room: Path, monkeypatch: pytest.MonkeyPatch, many: bool
) -> None:
    monkeypatch.setitem(Checkpoint.__init__.__kwdefaults__, "seconds", 0.0)
    monkeypatch.setattr(AdapterTrainer, "step", _interrupted(AdapterTrainer.step, at=3))
    quick = _QUICK if many else ("--steps", "6")
    done = cli("adapt", room / "small", "--data", room / "d.npz", "-o", room / "out", *quick)
    assert done.code == 130
    said = done.err.strip().splitlines()[-1]
    assert said.startswith(f"regrow: interrupted: {room / 'out.resume'} has what was done")
    assert "--resume" in said
    assert (room / "out.resume").exists()


def _interrupted(original: Callable[..., Any], at: int) -> Callable[..., Any]:
    calls = [0]

    def step(self: AdapterTrainer, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise KeyboardInterrupt
        return original(self, *arguments)

    return step


def test_a_line_that_was_cut_off_is_made_again(cli: Cli, room: Path) -> None:
    _adapt(cli, room, "--users-at-once", 1, out="whole")
    _kill(cli, room, 14, "--users-at-once", 1)
    summary = room / "out.resume" / SUMMARY
    summary.write_bytes(summary.read_bytes()[:-9])
    assert _adapt(cli, room, "--users-at-once", 1, "--resume").code == 0
    assert _files(room / "out") == _files(room / "whole")


@pytest.mark.parametrize("more", [("--steps", 7), ("--target", "query"), ("--seed", 1)])
def test_another_run_is_not_gone_on_with(cli: Cli, room: Path, more: tuple[object, ...]) -> None:
    _kill(cli, room, 9, "--users-at-once", 1)
    left = _files(room / "out.resume")
    done = _adapt(cli, room, "--resume", *more)
    assert done.code == 2
    assert "must be of the same training" in done.err
    assert _files(room / "out.resume") == left


def test_another_number_of_threads_is_not_gone_on_with(cli: Cli, room: Path) -> None:
    """Whether or not there is a state of somebody half done."""
    _kill(cli, room, 9, "--users-at-once", 1, "--threads", 1)
    left = _files(room / "out.resume")
    done = _adapt(cli, room, "--resume", "--threads", 2)
    assert done.code == 2
    assert "out.resume must be resumed with as many threads as it was begun with" in done.err
    assert "got 2 for 1: give --threads 1" in done.err
    assert _files(room / "out.resume") == left
    assert _adapt(cli, room, "--resume", "--users-at-once", 1, "--threads", 1).code == 0


@pytest.mark.parametrize("first", ["labels", "too few", "targets", "seed", "step"])
def test_what_is_wrong_before_the_first_step_leaves_nothing(
    cli: Cli, room: Path, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """Nothing to remove, and nothing to resume, for the command that is typed again."""
    monkeypatch.setitem(Checkpoint.__init__.__kwdefaults__, "seconds", 0.0)
    loaded = dict(np.load(room / "d.npz"))
    more: tuple[object, ...] = ()
    if first == "labels":
        np.savez(room / "d.npz", **{**loaded, "labels": np.full(54, 7)})
    elif first == "too few":
        more = ("--patience", 1, "--validation", 0)
    elif first == "targets":
        more = ("--target", "querry")
    elif first == "seed":
        more = ("--seed", -1)
    else:
        monkeypatch.setattr(AdapterTrainer, "step", _interrupted(AdapterTrainer.step, at=1))
    before = sorted(room.iterdir())
    done = _adapt(cli, room, *more)
    assert done.code == (130 if first == "step" else 2), done.err
    assert sorted(room.iterdir()) == before
    assert "--resume" not in done.err


@pytest.mark.parametrize(
    ("command", "of"), [("adapt", AdapterTrainer), ("compress", DistillationTrainer)]
)
def test_a_state_is_there_after_the_first_step(
    cli: Cli, room: Path, vit_folder: Path, monkeypatch: pytest.MonkeyPatch, command: str, of: Any
) -> None:
    """Interrupted at the first step there is nothing to resume, at the second there is."""
    monkeypatch.setitem(Checkpoint.__init__.__kwdefaults__, "seconds", 0.0)
    if command == "adapt":
        words = ("adapt", room / "small", "--steps", 4, "--keep-anyway")
    else:
        words = ("compress", vit_folder, "--ratio", 3, "--epochs", 1, "--batch-size", 9)
    before, original = sorted(room.iterdir()), of.step
    for step, more in ((1, []), (2, [room / "out.resume"])):
        monkeypatch.setattr(of, "step", _interrupted(original, at=step))
        done = cli(*words, "--data", room / "d.npz", "-o", room / "out")
        assert done.code == 130, done.err
        assert ("--resume goes on with it" in done.err) == bool(more)
        assert sorted(room.iterdir()) == sorted([*before, *more])


def test_nothing_to_resume_is_said(cli: Cli, room: Path) -> None:
    done = _adapt(cli, room, "--resume")
    assert done.code == 0
    assert "nothing to resume at" in done.err


def _row(**more: object) -> str:
    """A line of the summary."""
    return json.dumps({"user": "a", "metric": "x", "bytes": 1, "held_back": 1, "folds": 0, **more})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{}", "user must be of type str"),
        ("[]", "must be an object"),
        ("rubbish", "must be JSON"),
        (_row(file="../a"), "file must be the"),
        (_row(file="a.safetensors"), "must have a"),
        (_row(bytes=-1), "bytes must be from 0"),
        (_row(more=1), "unknown fields more"),
        (_row(folds=-1), "folds must be from 0"),
        (_row().replace(', "folds": 0', ""), "folds must be"),
        (_row(p_value="low"), "p_value must be"),
    ],
)
def test_a_broken_summary_is_one_error(tmp_path: Path, line: str, words: str) -> None:
    room = tmp_path / "out.resume"
    room.mkdir()
    (room / ".run").write_text("identity\tthe run\nrounding\t\nthreads\t1\n")
    (room / SUMMARY).write_text(line + "\n")
    with pytest.raises(FormatError, match=words):
        UserFolder(
            tmp_path / "out",
            TrainingIdentity("the run", threads=1),
            force=False,
            keep_anyway=False,
            resume=True,
        )


def test_an_output_that_exists_stays(cli: Cli, room: Path) -> None:
    _adapt(cli, room)
    before = _files(room / "out")
    done = _adapt(cli, room, "--seed", 1)
    assert done.code == 2
    assert "--force replaces it" in done.err
    assert _files(room / "out") == before
    assert _adapt(cli, room, "--seed", 1, "--force").code == 0
    assert _files(room / "out") != before
    identity = TrainingIdentity("", threads=1)
    with pytest.raises(UsageError, match="no such folder"):
        UserFolder(room / "no" / "out", identity, force=False, keep_anyway=False, resume=False)
