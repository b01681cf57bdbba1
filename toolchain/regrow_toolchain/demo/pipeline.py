"""The demo's steps, one after the other, and the folder that they leave."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from regrow_format.errors import RegrowError
from regrow_format.files import check_output, new_folder
from regrow_format.philox import check_seed
from regrow_toolchain.adapters import adapt, applied
from regrow_toolchain.compress import compress
from regrow_toolchain.config import ExportConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import Backbone, load_backbone, save_backbone
from regrow_toolchain.training import predict

from .artifacts import DemoSettings, Made
from .dense_model import new_model, save_dense, train_dense
from .digits import load_digits
from .report import render_html
from .results import build_report
from .synthetic_users import USERS, User, capture

__all__ = ["run_demo"]

DEVICE_SECONDS = 300
_REPORT = "report.json"
# The attention's projections: as good here as all layers of the blocks, in fewer bytes.
_TARGETS = ("query", "key", "value", "attention.output.dense")


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
        for name, step in STEPS.items():
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
    return f"dense model trained on {len(made.digits.train[1])} digits"


def _dataset(part: tuple[Any, Any], preprocess: Any, names: tuple[str, ...] = ()) -> Dataset:
    images, labels = part
    known = names or tuple(str(i) for i in range(10))
    return Dataset({"pixel_values": preprocess(list(images))}, labels, known)


def _compress(made: Made) -> str:
    dense = _need(made.dense)
    preprocess = dense.preprocessor()
    made.compressed = compress(
        dense,
        _dataset(made.digits.train, preprocess),
        made.settings.compress,
        eval_data=_dataset(made.digits.test, preprocess),
    )
    made.backbone = save_backbone(made.compressed.backbone, made.folder / "backbone")
    return (
        f"compressed {dense.parameters:,} to {made.backbone.parameters:,} parameters, accuracy "
        f"{made.compressed.dense_score:.1%} to {made.compressed.score:.1%}"
    )


def _adapt(made: Made) -> str:
    backbone = _need(made.backbone)
    preprocess = backbone.preprocessor()
    config = replace(made.settings.adapt, targets=_TARGETS)
    for folder in ("adapters", "users"):
        (made.folder / folder).mkdir()
    for index, user in enumerate(USERS):
        own = capture(user, *made.digits.users[index], seed=100 + index)
        made.samples[user.id] = own
        _save_samples(made.folder / "users" / f"{user.id}.npz", user, own)
        data = _dataset(own, preprocess, user.labels)
        adapter = adapt(backbone, data, config).adapter
        adapter.save(made.folder / "adapters" / f"{user.id}.safetensors")
        made.adapters[user.id] = adapter
    return f"{len(USERS)} adapters trained"


def _save_samples(path: Path, user: User, part: tuple[Any, Any], **more: Any) -> None:
    """What `regrow adapt --data` and `regrow run --input` take; names where the user has own."""
    images, labels = part
    named = np.array(user.labels)[labels] if user.labels else labels
    np.savez_compressed(path, images=images, labels=named, **more)


def _export(made: Made) -> str:
    backbone, one = _need(made.backbone), made.adapters[USERS[0].id]
    for mode in ("bundle", "merged", "seeded"):
        began = time.perf_counter()
        export_backbone(
            backbone,
            made.folder / mode,
            ExportConfig(mode="swappable" if mode == "bundle" else mode),
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
    made.device = run_device(made.folder)
    for file in made.folder.glob("*.reference.npz"):
        file.unlink()
    return "ran on the device side, without torch"


def run_device(folder: Path) -> dict[str, Any]:
    """What the device measures with the bundle in a demo's folder, in a process of its own.

    Raises:
        RegrowError: the process failed, or took too long.
    """
    users = [user.id for user in USERS]
    command = [sys.executable, "-m", "regrow_toolchain.demo.device", str(folder), *users]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEVICE_SECONDS)
    except subprocess.TimeoutExpired:
        raise RegrowError(f"the device process took over {DEVICE_SECONDS} s") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RegrowError(f"the device process failed: {last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _need(backbone: Backbone | None) -> Backbone:
    if backbone is None:
        raise RegrowError("the demo's steps must run in order")
    return backbone


STEPS: dict[str, Callable[[Made], str]] = {
    "dense": _dense,
    "compress": _compress,
    "adapt": _adapt,
    "export": _export,
    "device": _device,
}
