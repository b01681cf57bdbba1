"""The demo from end to end in its smallest form: what it leaves, twice the same, or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("sklearn")

from regrow_format.adapter import Adapter
from regrow_format.errors import RegrowError, UsageError
from regrow_inputs import InputReader
from regrow_runtime import Bundle
from regrow_toolchain.config import AdaptConfig, CompressConfig
from regrow_toolchain.demo import DemoSettings, DenseRecipe, load_digits, pipeline, run_demo
from regrow_toolchain.demo.synthetic_users import USERS, capture
from regrow_toolchain.models import load_backbone

_TINY = DemoSettings(
    seed=3,
    dense=DenseRecipe(epochs=2),
    compress=CompressConfig(epochs=1, seed=3),
    adapt=AdaptConfig(steps=4, seed=3, holdout=0.0),
)
_USERS = ["slanted", "thick", "inverted", "relabelled"]


@dataclass
class Made:
    folder: Path
    report: dict[str, Any]
    lines: list[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("demo") / "out"
    lines: list[str] = []
    report = run_demo(folder, _TINY, say=lines.append)
    return Made(folder, report, lines)


@pytest.mark.slow
def test_everything_is_there(made: Made) -> None:
    names = {p.name for p in made.folder.iterdir()}
    assert names == {
        "dense", "backbone", "adapters", "users", "bundle", "merged", "seeded",
        "report.html", "report.json",
    }  # fmt: skip
    assert {p.name for p in made.folder.parent.iterdir()} == {"out"}
    assert {p.stem for p in (made.folder / "adapters").iterdir()} == set(_USERS)
    assert {p.name for p in (made.folder / "users").iterdir()} == {
        name for user in _USERS for name in (f"{user}.npz", f"{user}-test.npz")
    }
    assert len(made.lines) == 5


@pytest.mark.slow
def test_the_report_has_the_figures(made: Made) -> None:
    report = json.loads((made.folder / "report.json").read_text(encoding="utf-8"))
    assert report == json.loads(json.dumps(made.report))
    assert {
        "regrow", "seconds", "steps", "seed", "environment", "data", "backbone", "users", "bytes",
        "bundles", "device", "checks", "commands",
    } <= report.keys()  # fmt: skip
    assert [user["id"] for user in report["users"]] == _USERS
    for user in report["users"]:
        assert {
            "before", "before_se", "after", "after_se", "gain", "gain_se", "adapter_bytes",
            "head_bytes", "storage", "parity_max_abs", "swap_ms", "samples", "own_head",
        } <= user.keys()  # fmt: skip
        assert user["samples"] <= 60
        assert user["adapter_bytes"] <= 4096
        assert user["storage"] in ("int4", "int8")
        assert user["parity_max_abs"] < 1e-4
        assert user["swap_ms"].keys() == {"cold", "cached", "resident"}
        assert user["gain"] == pytest.approx(user["after"] - user["before"])
        file = made.folder / "adapters" / f"{user['id']}.safetensors"
        assert file.stat().st_size == user["adapter_bytes"] + user["head_bytes"]
    assert [user["own_head"] for user in report["users"]] == [False, False, False, True]
    assert report["seed"] == 3
    assert report["device"]["torch_blocked"] is True
    assert (
        report["backbone"]["compressed"]["parameters"] < report["backbone"]["dense"]["parameters"]
    )
    assert report["bundles"].keys() == {"swappable", "merged", "seeded"}
    for times in report["device"]["latency_ms"].values():
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    stages = [stage["rss_anon"] for stage in report["device"]["memory"]]
    assert stages[0] < stages[-1] <= report["device"]["peak_bytes"]


@pytest.mark.slow
def test_what_it_made_can_be_used(made: Made) -> None:
    """The bundle with an adapter gives the accuracy that the report has."""
    bundle = Bundle.open(made.folder / "bundle", threads=1)
    for user in made.report["users"]:
        with np.load(made.folder / "users" / f"{user['id']}-test.npz") as stored:
            images, labels = stored["images"], stored["labels"].astype(str)
        feeds = InputReader.from_bundle(bundle).images(list(images))
        bundle.swap(made.folder / "adapters" / f"{user['id']}.safetensors")
        best = bundle.run_all(feeds)["logits"].argmax(axis=1)
        names = np.array(bundle.labels())[best]
        assert (names == labels).mean() == pytest.approx(user["after"])
    backbone = load_backbone(made.folder / "backbone")
    assert backbone.backbone_id == bundle.manifest.backbone_id
    assert load_backbone(made.folder / "dense").layers == ()
    assert "<html" in (made.folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backbone, adapters and the users' samples; what is measured may differ."""

    class Enough(Exception):
        pass

    kept: dict[str, bytes] = {}

    def keep(now: Any) -> str:
        kept.update(_files(now.folder))
        raise Enough

    steps = {name: pipeline.STEPS[name] for name in ("dense", "compress", "adapt")}
    monkeypatch.setattr(pipeline, "STEPS", {**steps, "keep": keep})
    with pytest.raises(Enough):
        run_demo(tmp_path / "again", _TINY)
    first = _files(made.folder)
    assert "adapters/slanted.safetensors" in kept
    assert {name for name in kept if kept[name] != first[name]} == set()


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_the_seed_is_in_the_adapters(made: Made) -> None:
    for user in _USERS:
        adapter = Adapter.load(made.folder / "adapters" / f"{user}.safetensors")
        assert adapter.seed == 3
        assert bool(adapter.head) is (user == "relabelled")


# -- without the whole way -----------------------------------------------------------------------


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match="output must be a new path"):
        run_demo(tmp_path / "out", _TINY)
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("error", [RegrowError("no luck"), KeyboardInterrupt(), MemoryError()])
def test_a_step_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(made: Any) -> str:
        (made.folder / "half").mkdir()
        (made.folder / "half" / "model.bin").write_bytes(b"x")
        raise error

    monkeypatch.setattr(pipeline, "STEPS", {"fail": fail})
    with pytest.raises(type(error)):
        run_demo(tmp_path / "out", _TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_keeps_what_force_would_replace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_made: Any) -> str:
        raise RegrowError("no luck")

    monkeypatch.setattr(pipeline, "STEPS", {"fail": fail})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text('{"regrow": ""}')
    with pytest.raises(RegrowError, match="no luck"):
        run_demo(tmp_path / "out", _TINY, force=True)
    assert (tmp_path / "out" / "report.json").read_text() == '{"regrow": ""}'
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_device_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    with pytest.raises(RegrowError, match=r"the device process failed: .*manifest"):
        pipeline.run_device(tmp_path)


def test_a_device_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "DEVICE_SECONDS", 0.01)
    with pytest.raises(RegrowError, match=r"the device process took over 0\.01 s"):
        pipeline.run_device(tmp_path)


def test_the_defaults_take_the_seed_everywhere() -> None:
    settings = DemoSettings.with_seed(11)
    assert (settings.seed, settings.compress.seed, settings.adapt.seed) == (11, 11, 11)
    assert settings.adapt.coefficient_dtype in ("int4", "int8")
    assert settings.adapt.method == "nola"
    assert settings.compress.ratio == 2


# -- data ----------------------------------------------------------------------------------------


def test_the_parts_of_the_digits_share_nothing() -> None:
    digits = load_digits(4, seed=1)
    parts = [digits.train, *digits.users, digits.test]
    assert [len(labels) for _, labels in parts] == [1077, 60, 60, 60, 60, 480]
    for images, labels in parts:
        assert images.shape == (len(labels), 8, 8)
        assert images.dtype == np.uint8
        assert set(labels.tolist()) == set(range(10))
    # Of 1,797 images none is in two parts: together they are the whole, each as often as there.
    from sklearn.datasets import load_digits as load

    whole = np.rint(load().images * (255 / 16)).astype(np.uint8)
    together = np.concatenate([images for images, _ in parts])
    assert sorted(p.tobytes() for p in together) == sorted(p.tobytes() for p in whole)
    again = load_digits(4, seed=1)
    assert np.array_equal(again.test[0], digits.test[0])
    assert not np.array_equal(load_digits(4, seed=2).test[0], digits.test[0])


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.id)
def test_users_capture_the_same_signs_their_own_way(user: Any) -> None:
    images, labels = load_digits(1).users[0]
    seen, meant = capture(user, images, labels, seed=5)
    assert seen.shape == images.shape
    assert seen.dtype == np.uint8
    again, _ = capture(user, images, labels, seed=5)
    assert np.array_equal(seen, again)
    if user.labels:
        assert np.array_equal(seen, images)
        assert set(meant.tolist()) == set(range(len(user.labels)))
        # Two digits stand for each command.
        assert sorted(np.bincount(user.meaning)) == [2] * len(user.labels)
    else:
        assert np.abs(seen.astype(int) - images).mean() > 5
        assert np.array_equal(meant, labels)


def test_a_demo_needs_a_seed_of_64_bits(tmp_path: Path) -> None:
    for seed in (-1, 2**64):
        with pytest.raises(UsageError, match="seed must be"):
            run_demo(tmp_path / "out", replace(_TINY, seed=seed))
    assert list(tmp_path.iterdir()) == []


def test_without_a_name_the_folder_is_a_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    taken: list[Path] = []

    def note(out: Path, *_args: Any, **_options: Any) -> dict[str, Any]:
        taken.append(out)
        raise RegrowError("enough")

    monkeypatch.setattr(pipeline, "run_demo", note)
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert cli("demo").code == 1
        taken[-1].mkdir()
    assert [path.name for path in taken] == ["regrow-demo", "regrow-demo-2", "regrow-demo-3"]
