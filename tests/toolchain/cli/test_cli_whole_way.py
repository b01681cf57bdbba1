"""The command line from a model to answers, in processes of its own, on data of a user's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regrow_format.adapter import Adapter
from regrow_format.manifest import Manifest
from regrow_toolchain.interop import factored
from regrow_toolchain.models import load_backbone

pytestmark = pytest.mark.slow

Run = Callable[..., Any]


def test_every_step_ends_well(workshop: Any) -> None:
    for name, outcome in workshop.said.items():
        assert outcome.code == 0, (name, outcome.err)
        assert outcome.err == "", name
        assert outcome.json["out"].startswith(str(workshop.room)), name


def test_compress_says_what_it_made(workshop: Any) -> None:
    said = workshop.said["compress"].json
    backbone = load_backbone(workshop.room / "small")
    assert said["backbone_id"] == backbone.backbone_id
    assert said["parameters"]["compressed"] == backbone.parameters
    assert said["parameters"]["dense"] > 1.7 * backbone.parameters
    assert said["metric"] == "accuracy"
    assert said["scores"]["compressed"] > 0.8
    assert (said["layers"], said["samples"], said["ratio"]) == (12, 18, 3.0)


def test_adapt_says_what_it_made(workshop: Any) -> None:
    said = workshop.said["adapt"].json
    adapter = Adapter.load(workshop.room / "mine.safetensors")
    assert said["bytes"] == (workshop.room / "mine.safetensors").stat().st_size < 4096
    assert said["backbone_id"] == adapter.backbone_id
    assert (said["method"], said["storage"], said["labels"]) == ("nola", "int4", None)
    assert said["samples"] == {"data": 60, "held_back": 60, "folds": 5}
    assert said["gate"]["improves"] is True
    assert said["gate"]["p_value"] <= 0.02
    assert said["gate"]["groups"] == 60
    assert said["after"] > said["before"] + 0.2
    own = workshop.said["adapt own"].json
    assert own["labels"] == ["open", "shut", "stop"]
    assert own["config"]["k"] == 16
    assert (own["storage"], own["targets"]) == ("int8", 2)


def test_export_says_what_it_made(workshop: Any) -> None:
    said = workshop.said["export"].json
    assert (said["mode"], said["slots"]) == ("swappable", 13)  # 12 layers and the head
    assert said["backbone_id"] == workshop.said["compress"].json["backbone_id"]
    far = [value for name, value in said["parity"].items() if name.endswith("max_abs")]
    assert 0 < max(far) < 1e-4
    manifest = json.loads((workshop.room / "bundle" / "manifest.json").read_text())
    assert manifest["backbone_id"] == said["backbone_id"]


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_export_in_another_precision(
    workshop: Any, run: Run, tmp_path: Path, precision: str
) -> None:
    """It says what that costs, and the adapter that was trained in fp32 still helps."""
    room, out = workshop.room, tmp_path / "bundle"
    said = run(
        "export", room / "small", "-o", out, "--precision", precision, "--data",
        room / "test.npz", "--adapter", room / "mine.safetensors", "--json",
    ).json  # fmt: skip
    manifest = json.loads((out / "manifest.json").read_text())
    assert said["variant"] == manifest["variant"] == precision
    assert said["backbone_id"] == workshop.said["export"].json["backbone_id"]
    score = manifest["score"]
    assert (score["metric"], score["higher_is_better"]) == ("accuracy", True)
    before = run("run", room / "bundle", "--input", room / "test.npz", "--json").json
    assert score["fp32"] == pytest.approx(before["accuracy"])
    assert abs(score["variant"] - score["fp32"]) < 0.1
    arguments = ("run", out, "--input", room / "test.npz", "--json", "--adapter")
    after = run(*arguments, room / "mine.safetensors").json
    assert after["accuracy"] > score["variant"] + 0.2


def test_run_on_arrays_with_labels(workshop: Any, run: Run, tmp_path: Path) -> None:
    room = workshop.room
    arguments = ("run", room / "bundle", "--input", room / "test.npz", "--json")
    before = run(*arguments).json
    outcome = run(*arguments, "--adapter", room / "mine.safetensors", "-o", tmp_path / "out.npz")
    assert (outcome.code, outcome.err) == (0, "")
    after = outcome.json
    assert after["samples"] == len(after["answers"]) == 90
    assert after["adapter"] == "mine"
    assert after["swap"]["kind"] == "cold"
    assert after["accuracy"] > before["accuracy"] + 0.2
    with np.load(tmp_path / "out.npz") as stored:
        logits = stored["logits"]
    assert logits.shape == (90, 3)
    best = [("left", "middle", "right")[i] for i in logits.argmax(axis=1)]
    assert [answer["label"] for answer in after["answers"]] == best


def test_run_on_images(workshop: Any, run: Run) -> None:
    """A folder with folders, and one file; the same answers as from the array."""
    room = workshop.room
    arguments = ("run", room / "bundle", "--adapter", room / "mine.safetensors", "--json")
    folder = run(*arguments, "--image", room / "test").json
    assert folder["samples"] == 12
    names = [answer["sample"] for answer in folder["answers"]]
    assert names == sorted(names)
    right = [a["label"] == Path(a["sample"]).parent.name for a in folder["answers"]]
    assert folder["accuracy"] == np.mean(right) > 0.5
    one = run(*arguments, "--image", names[4]).json
    assert one["answers"][0]["label"] == folder["answers"][4]["label"]
    assert one["answers"][0]["probability"] == pytest.approx(
        folder["answers"][4]["probability"], abs=1e-4
    )


def test_run_with_a_head_of_ones_own(workshop: Any, run: Run) -> None:
    room = workshop.room
    outcome = run(
        "run", room / "bundle", "--input", room / "own.npz", "--adapter", room / "own.safetensors"
    )
    assert outcome.code == 0
    assert outcome.err == ""
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["sample", "label", "probability", "true"]
    assert {line.split()[1] for line in lines[2:22]} <= {"open", "shut", "stop"}
    assert "… 40 more (--json lists all)" in lines
    score = next(line for line in lines if line.startswith("accuracy on 60 samples: "))
    assert float(score.split()[-2]) > 80


def test_labels_that_the_head_does_not_know_are_no_zero(
    workshop: Any, cli: Run, tmp_path: Path
) -> None:
    """Without the user's head nothing can be scored, and the command says so."""
    arguments = ("run", workshop.room / "bundle", "--input", workshop.room / "own.npz")
    assert cli(*arguments, "--json").json["accuracy"] is None
    assert "accuracy on 60 samples: none, this head does not know" in cli(*arguments).out
    with np.load(workshop.room / "own.npz") as stored:
        images = stored["images"]
    for labels in (np.arange(60) - 5, np.linspace(0, 1, 60)):
        np.savez(tmp_path / "bad.npz", images=images, labels=labels)
        outcome = cli("run", workshop.room / "bundle", "--input", tmp_path / "bad.npz")
        assert outcome.code == 2
        assert "labels must be integers from 0 or names" in outcome.err


@pytest.mark.parametrize("what", ["mine.safetensors", "bundle", "small"])
def test_inspect(workshop: Any, cli: Run, what: str) -> None:
    found = cli("inspect", workshop.room / what, "--json").json
    kind = {"mine.safetensors": "adapter", "small": "backbone"}.get(what, what)
    assert found["kind"] == kind
    assert found["backbone_id"] == workshop.said["compress"].json["backbone_id"]
    assert len([row for row in found["targets"] if row[0].startswith("vit.encoder")]) == 12
    shown = cli("inspect", workshop.room / what)
    assert shown.code == 0
    assert found["backbone_id"] in shown.out


@pytest.mark.parametrize("mode", ["merged", "seeded", "swappable"])
def test_export_with_an_adapter(workshop: Any, cli: Run, tmp_path: Path, mode: str) -> None:
    """Built in for good, or a bundle with just the slots that it needs."""
    room = workshop.room
    adapter, test = room / "mine.safetensors", room / "test.npz"
    outcome = cli(
        "export", room / "small", "-o", tmp_path / "out", "--mode", mode, "--adapter", adapter
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert f"wrote {tmp_path / 'out'}: {mode}" in outcome.out
    swapped = ("--adapter", adapter) if mode == "swappable" else ()
    arguments = ("--input", test, "--json")
    found = cli("run", tmp_path / "out", *swapped, *arguments).json["answers"]
    wanted = cli("run", room / "bundle", "--adapter", adapter, *arguments).json["answers"]
    assert [a["label"] for a in found] == [a["label"] for a in wanted]
    np.testing.assert_allclose(
        [a["probability"] for a in found], [a["probability"] for a in wanted], atol=1e-3
    )


def test_the_same_command_writes_the_same_bytes(workshop: Any, cli: Run, tmp_path: Path) -> None:
    room = workshop.room
    out = tmp_path / "again.safetensors"
    outcome = cli(
        "adapt", room / "small", "-o", out, "--data", room / "mine",
        "--steps", 80, "--shift", 0.3, "--noise", 0.05,
    )  # fmt: skip
    assert outcome.code == 0
    assert out.read_bytes() == (room / "mine.safetensors").read_bytes()
    assert outcome.out.splitlines()[-1].startswith(f"wrote {out}: ")


def test_an_output_is_replaced_by_force(workshop: Any, cli: Run, tmp_path: Path) -> None:
    shutil.copytree(workshop.room / "small", tmp_path / "out")
    (tmp_path / "out" / "of-old").touch()
    outcome = cli("compress", workshop.room / "vit", "-o", tmp_path / "out", "--force")
    assert outcome.code == 0
    assert "no data, so plain SVD" in outcome.out
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert not (tmp_path / "out" / "of-old").exists()
    assert load_backbone(tmp_path / "out").layers


@pytest.mark.parametrize("command", ["demo", "compress", "adapt", "export", "run", "inspect", None])
def test_help_answers_at_once(run: Run, command: str | None) -> None:
    """The median of three, start of Python included."""
    import time

    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        outcome = run(*filter(None, [command]), "--help")
        seconds.append(time.perf_counter() - start)
        assert outcome.code == 0
        assert outcome.out.startswith(f"Usage: regrow {command or ''}".rstrip())
        assert outcome.err == ""
    assert sorted(seconds)[1] < 0.5


def test_a_bundle_tells_which_layers_are_factored(workshop: Any) -> None:
    """By the names in its graph, as `regrow import` asks for."""
    bundle = workshop.room / "bundle"
    names = {slot.target for slot in Manifest.load(bundle).slots if slot.kind != "head"}
    assert len(names) == 12
    for place in (bundle, workshop.room / "small"):
        assert set(factored(place, names)) == names
    assert factored(workshop.room / "vit", names) == ()
