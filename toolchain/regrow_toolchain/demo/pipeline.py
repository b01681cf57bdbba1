"""The demo's steps, one after the other, and the folder that they leave."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regrow_format.adapter import Adapter
from regrow_format.errors import RegrowError
from regrow_format.files import check_output, new_folder
from regrow_format.philox import check_seed

from ..adapting import adapt
from ..applying import applied
from ..backbone import Backbone, load_backbone, save_backbone
from ..compressing import Compressed, compress
from ..config import AdaptConfig, CompressConfig
from ..data import Dataset
from ..exporting import export_backbone
from ..training import predict
from .dense import DenseRecipe, new_model, save_dense, train_dense
from .digits import Digits, load_digits
from .record import build_report
from .report import render_html
from .users import USERS, User, capture

__all__ = ["DemoSettings", "Made", "run_demo"]

_DEVICE_SECONDS = 300
_REPORT = "report.json"

# The attention's projections: as good here as all layers of the blocks, in fewer bytes.
_LR = 5e-2  # above the default: the inverted user is far from what the backbone knows
_TARGETS = ("query", "key", "value", "attention.output.dense")


@dataclass(frozen=True)
class DemoSettings:
    """Every number of the demo that is not the library's default."""

    seed: int = 0
    dense: DenseRecipe = field(default_factory=DenseRecipe)
    compress: CompressConfig = field(default_factory=CompressConfig)
    adapt: AdaptConfig = field(default_factory=AdaptConfig)

    @classmethod
    def with_seed(cls, seed: int) -> DemoSettings:
        """The demo as it is run, with another seed."""
        compress = CompressConfig(
            seed=seed,
            epochs=14,
            lr=2e-3,
            shift=0.8,
            noise=0.05,
            start="svd",
            alpha=100.0,
            features="paper",
            keep="last",  # what is held back here are the test signs: nothing is chosen on them
        )
        return cls(seed=seed, compress=compress, adapt=AdaptConfig(seed=seed, holdout=0.0, lr=_LR))


@dataclass
class Made:
    """What the steps leave for the report; seconds are by step."""

    settings: DemoSettings
    folder: Path
    out: Path
    digits: Digits
    compressed: Compressed | None = None
    dense: Backbone | None = None
    backbone: Backbone | None = None
    adapters: dict[str, Adapter] = field(default_factory=dict)
    samples: dict[str, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]] = field(
        default_factory=dict
    )
    seconds: dict[str, float] = field(default_factory=dict)
    device: dict[str, Any] = field(default_factory=dict)


def run_demo(
    out: Path,
    settings: DemoSettings | None = None,
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda _line: None,
) -> dict[str, Any]:
    """Do everything, and leave models, adapters, bundles and the report in the folder `out`.

    Args:
        say: called with a line for people after each step.

    Returns:
        The report, as in report.json.

    Raises:
        UsageError: `out` exists and `force` is off.
        RegrowError: a step failed; nothing is left behind.
    """
    settings = settings or DemoSettings()
    check_seed(settings.seed)
    check_output(out, force=force, marker=_REPORT)
    start = time.perf_counter()
    with new_folder(out, marker=_REPORT, force=force) as folder, _one_thread():
        made = Made(settings, folder, out, load_digits(len(USERS), settings.seed))
        for name, step in _STEPS.items():
            began = time.perf_counter()
            line = step(made)
            made.seconds[name] = time.perf_counter() - began
            say(f"{line} ({made.seconds[name]:.1f} s)")
        made.seconds["total"] = time.perf_counter() - start
        report = build_report(made)
        text = json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False)
        (folder / _REPORT).write_text(text + "\n", encoding="utf-8")
        (folder / "report.html").write_text(render_html(report), encoding="utf-8")
    return report


@contextmanager
def _one_thread() -> Iterator[None]:
    """One thread for torch: models this small gain little from two, and sums then come out the
    same on machines with other numbers of cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _dense(made: Made) -> str:
    settings = made.settings
    model = new_model(settings.seed)
    folder = made.folder / "dense"
    save_dense(model, folder)
    preprocess = load_backbone(folder).preprocessor()
    train_dense(model, _dataset(made.digits.train, preprocess), settings.dense, settings.seed)
    shutil.rmtree(folder)
    save_dense(model, folder)
    made.dense = load_backbone(folder)
    return f"dense model trained on {len(made.digits.train[1])} signs"


def _dataset(part: tuple[Any, Any], preprocess: Any, names: tuple[str, ...] = ()) -> Dataset:
    pictures, labels = part
    known = names or tuple(str(i) for i in range(10))
    return Dataset({"pixel_values": preprocess(list(pictures))}, labels, known)


def _compress(made: Made) -> str:
    dense = _need(made.dense)
    preprocess = dense.preprocessor()
    made.compressed = compress(
        dense,
        _dataset(made.digits.train, preprocess),
        made.settings.compress,
        held=_dataset(made.digits.test, preprocess),
    )
    made.backbone = save_backbone(made.compressed.backbone, made.folder / "backbone")
    return (
        f"compressed {dense.parameters:,} to {made.backbone.parameters:,} parameters, accuracy "
        f"{made.compressed.dense_score:.1%} to {made.compressed.score:.1%}"
    )


def _adapt(made: Made) -> str:
    backbone = _need(made.backbone)
    preprocess = backbone.preprocessor()
    for folder in ("adapters", "users"):
        (made.folder / folder).mkdir()
    for index, user in enumerate(USERS):
        own = capture(user, *made.digits.users[index], seed=100 + index)
        made.samples[user.id] = own
        _save_samples(made.folder / "users" / f"{user.id}.npz", user, own)
        data = _dataset(own, preprocess, user.labels)
        adapter = adapt(backbone, data, made.settings.adapt, targets=_TARGETS).adapter
        adapter.save(made.folder / "adapters" / f"{user.id}.safetensors")
        made.adapters[user.id] = adapter
    return f"{len(USERS)} adapters trained"


def _save_samples(path: Path, user: User, part: tuple[Any, Any], **more: Any) -> None:
    """What `regrow adapt --data` and `regrow run --input` take; names where the user has own."""
    pictures, labels = part
    named = np.array(user.labels)[labels] if user.labels else labels
    np.savez_compressed(path, images=pictures, labels=named, **more)


def _export(made: Made) -> str:
    backbone, one = _need(made.backbone), made.adapters[USERS[0].id]
    for mode in ("bundle", "merged", "seeded"):
        began = time.perf_counter()
        export_backbone(
            backbone,
            made.folder / mode,
            mode="swappable" if mode == "bundle" else mode,
            adapter=None if mode == "bundle" else one,
        )
        made.seconds[f"export {mode}"] = time.perf_counter() - began
    return "exported: swappable, merged, seeded"


def _device(made: Made) -> str:
    """Test sets with torch's own answers, then a process that has no torch."""
    backbone = _need(made.backbone)
    preprocess = backbone.preprocessor()
    for index, user in enumerate(USERS):
        part = capture(user, *made.digits.test, seed=200 + index)
        data = _dataset(part, preprocess, user.labels)
        with applied(backbone.model, made.adapters[user.id]):
            logits = predict(backbone.model, data)
        path = made.folder / "users" / f"{user.id}-test.npz"
        _save_samples(path, user, part)
        np.savez(
            made.folder / f"{user.id}.reference.npz",
            pixel_values=data.inputs["pixel_values"],
            labels=np.array(data.names)[data.labels],
            torch_logits=logits,
        )
    made.device = _run_device(made.folder)
    for file in made.folder.glob("*.reference.npz"):
        file.unlink()
    return "ran on the device side, without torch"


def _run_device(folder: Path) -> dict[str, Any]:
    users = [user.id for user in USERS]
    command = [sys.executable, "-m", "regrow_toolchain.demo.device", str(folder), *users]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_DEVICE_SECONDS)
    except subprocess.TimeoutExpired:
        raise RegrowError(f"the device process took over {_DEVICE_SECONDS} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RegrowError(f"the device process failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _need(backbone: Backbone | None) -> Backbone:
    if backbone is None:
        raise RegrowError("the demo's steps must run in order")
    return backbone


_STEPS: dict[str, Callable[[Made], str]] = {
    "dense": _dense,
    "compress": _compress,
    "adapt": _adapt,
    "export": _export,
    "device": _device,
}
