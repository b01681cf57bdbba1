"""A tiny bundle, adapters for it, and the same network written out in NumPy."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from regrow_format.kv_cache import CacheSpec, CacheTensor
from regrow_format.manifest import (
    Checks,
    FileEntry,
    GraphSpec,
    Manifest,
    Slot,
    TensorSpec,
)
from regrow_format.methods import get_method
from regrow_format.slot_kinds import SLOT_KINDS
from regrow_runtime import Adapter, Bundle, Coefficients, Head, HeadLayer, Target

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[2]
BACKBONE = "sha256:" + "ab" * 32
TARGETS = (Target("fc1", 16, 8), Target("fc2", 8, 8))
CONFIGS = {
    "nola": {"k": 12, "l": 9, "rank": 2, "c": 1.0, "shared": True},
    "lora": {"rank": 2, "alpha": 2.0, "rslora": False},
    "vera": {"rank": 11},
    "fourierft": {"n": 20, "alpha": 16.0},
    "ia3": {"feedforward": ["fc2"]},
    "ssf": {},
    "bitfit": {},
    "head": {},
}


def _slots() -> tuple[Slot, ...]:
    adapted = [
        Slot(
            t.name, kind, t.in_features, t.out_features,
            {part: f"{t.name}.adapter_{part}" for part in SLOT_KINDS[kind].parts},
        )
        for t in TARGETS
        for kind in ("low_rank", "delta", "bias", "scale", "input_scale")
    ]  # fmt: skip
    return (*adapted, Slot("head", "head", 8, 3, {"weight": "head.weight", "bias": "head.bias"}))


def _entry(path: Path) -> FileEntry:
    data = path.read_bytes()
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture(scope="session")
def weights() -> dict[str, np.ndarray]:
    """float32 `<layer>.weight` [out, in] and `<layer>.bias` [out] of fc1, fc2 and head."""
    return load_file(DATA / "tiny.safetensors")


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory, weights: Any) -> Path:
    """The bundle, shared: tests that change files copy it first."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    folder.mkdir()
    shutil.copyfile(DATA / "tiny.onnx", folder / "backbone.onnx")
    head = {name: value for name, value in weights.items() if name.startswith("head.")}
    save_file(head, folder / "head.safetensors")
    steps = {"do_resize": False, "do_rescale": True, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(steps), encoding="utf-8")
    config = {"num_channels": 1, "image_size": 4}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shape = ("batch", 1, 4, 4)
    manifest = Manifest(
        mode="swappable",
        task="image-classification",
        backbone_id=BACKBONE,
        opset=17,
        ir_version=8,
        graphs=(
            GraphSpec(
                "model",
                "backbone.onnx",
                (TensorSpec("pixel_values", "float32", shape),),
                (TensorSpec("logits", "float32", ("batch", "classes")),),
            ),
        ),
        slots=_slots(),
        labels=("ant", "bee", "cat"),
        files={path.name: _entry(path) for path in sorted(folder.iterdir())},
        parity={"base_max_abs": 1e-6},
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def lm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model of 13 tokens and 24 places, token 12 ends a text; see data/make_lm.py."""
    folder = tmp_path_factory.mktemp("lm") / "tiny"
    folder.mkdir()
    shutil.copyfile(DATA / "tiny-lm.onnx", folder / "backbone.onnx")
    inputs = ("input_ids", "attention_mask", "position_ids")
    both = {part: f"value.adapter_{part}" for part in "AB"}
    manifest = Manifest(
        mode="swappable", task="text-generation", backbone_id=BACKBONE, opset=17, ir_version=8,
        graphs=(
            GraphSpec(
                "model", "backbone.onnx",
                tuple(TensorSpec(name, "int64", ("batch", "length")) for name in inputs),
                (TensorSpec("logits", "float32", ("batch", "length", 13)),),
            ),
        ),
        slots=(Slot("value", "low_rank", 8, 8, both),),
        labels=(),
        files={path.name: _entry(path) for path in folder.iterdir()},
        cache=CacheSpec(
            inputs={name: name for name in inputs}, logits="logits",
            tensors=(CacheTensor("past.0.value", "present.0.value", 2, 4),), context=24, stop=(12,),
        ),
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


@pytest.fixture
def lm(lm_folder: Path) -> Bundle:
    return Bundle.open(lm_folder, threads=1)


@pytest.fixture(scope="session")
def lm_logits() -> Callable[..., np.ndarray]:
    """lm_logits(ids, expansion): of one text, for every token, computed at once in NumPy."""
    stored = load_file(DATA / "tiny-lm.safetensors")

    def call(ids: Any, expansion: Mapping[str, Any] | None = None) -> np.ndarray:
        x = np.tanh(stored["embed"][ids] + stored["place"][: len(ids)])
        value = stored["value"]
        if expansion:
            value = value + expansion["value"]["A"] @ expansion["value"]["B"]
        means = np.cumsum(x @ value, axis=0) / np.arange(1, len(ids) + 1)[:, None]
        return np.tanh(x + means) @ stored["out"]

    return call


@pytest.fixture
def bundle_copy(bundle_folder: Path, tmp_path: Path) -> Path:
    """The bundle, for one test to spoil."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "copy"))


@pytest.fixture(scope="session")
def probed_folder(
    tmp_path_factory: pytest.TempPathFactory, bundle_folder: Path, pixels: Any, reference: Any
) -> Path:
    """The bundle with a probe, and the base's outputs for it."""
    folder = Path(shutil.copytree(bundle_folder, tmp_path_factory.mktemp("probed") / "tiny"))
    save_file({"pixel_values": pixels[:2]}, folder / "probe.safetensors")
    save_file({"logits": reference(pixels[:1]).reshape(-1)}, folder / "expected.safetensors")
    manifest = Manifest.load(folder)
    files = {name: _entry(folder / name) for name in ("probe.safetensors", "expected.safetensors")}
    manifest = replace(
        manifest, checks=Checks(probe="0123456789abcdef"), files={**manifest.files, **files}
    )
    (folder / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
    return folder


@pytest.fixture
def bundle(bundle_folder: Path) -> Bundle:
    return Bundle.open(bundle_folder, threads=1)


@pytest.fixture(scope="session")
def pixels() -> np.ndarray:
    """float32 [5, 1, 4, 4]."""
    return np.random.default_rng(5).standard_normal((5, 1, 4, 4)).astype(np.float32)


def _head(classes: int, rng: np.random.Generator) -> Head:
    # Numbers that fp16 holds, so that a head read from a file is the one that was written.
    weight = rng.standard_normal((classes, 8)).astype(np.float16).astype(np.float32)
    bias = rng.standard_normal(classes).astype(np.float16).astype(np.float32)
    return Head((HeadLayer("head", weight, bias),), tuple(f"own {i}" for i in range(classes)))


@pytest.fixture(scope="session")
def make_adapter() -> Callable[..., Adapter]:
    """make_adapter(method, storage, draw=…, seed=…, targets=…, classes=…, group=…, **config).

    Method "head" has no targets, and 2 classes if not told otherwise.
    """

    def make(
        method: str = "nola",
        storage: str = "int8",
        *,
        draw: int = 0,
        seed: int = 2**63 + 5,
        targets: tuple[Target, ...] = TARGETS,
        classes: int = 0,
        group: int | None = None,
        **config: Any,
    ) -> Adapter:
        rng = np.random.default_rng(draw)
        config = {**CONFIGS[method], **config}
        kind = get_method(method)
        if method == "head":
            targets, classes = (), classes or 2
        constants = kind.constants(config, targets)
        values = {
            name: Coefficients.store(
                3 * rng.standard_normal(shape).astype(np.float32), constants[name], storage, group
            )
            for name, shape in kind.layout(config, targets).items()
        }
        head = _head(classes, rng) if classes else None
        return Adapter(
            method, config, seed, BACKBONE, targets, values, storage, head=head, group=group
        )

    return make


@pytest.fixture(scope="session")
def reference(weights: dict[str, np.ndarray]) -> Callable[..., np.ndarray]:
    """reference(pixels, expansion, head): the bundle's logits, in NumPy."""

    def call(
        pixels: np.ndarray, expansion: Mapping[str, Any] | None = None, head: Head | None = None
    ) -> np.ndarray:
        x = pixels.reshape(len(pixels), 16)
        for name in ("fc1", "fc2"):
            parts = (expansion or {}).get(name, {})
            x = x * (1 + parts.get("t", 0))
            y = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
            if "A" in parts:
                y = y + (x @ parts["A"]) @ parts["B"]
            y = y + (x @ parts["D"] if "D" in parts else 0)
            x = np.tanh(y * (1 + parts.get("s", 0)) + parts.get("b", 0))
        if head is None:
            return x @ weights["head.weight"].T + weights["head.bias"]
        return x @ head.layers[0].weight.T + head.layers[0].bias

    return call


@pytest.fixture(scope="session")
def edit() -> Callable[..., bytes]:
    """edit(data, change, tensors): an adapter's bytes with its metadata or its tensors changed.

    `change` gets the metadata as a dict, or is the metadata's text; `tensors` gets the list of
    [name, dtype, shape, bytes].
    """

    def call(
        data: bytes,
        change: Callable[[dict[str, Any]], None] | str | None = None,
        tensors: Callable[[list[list[Any]]], None] | None = None,
    ) -> bytes:
        size = struct.unpack("<Q", data[:8])[0]
        header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
        text = header.pop("__metadata__")["regrow"]
        if isinstance(change, str):
            text = change
        elif change is not None:
            fields = json.loads(text)
            change(fields)
            text = json.dumps(fields)
        parts = [
            [name, entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])]]
            for name, entry in header.items()
        ]
        if tensors is not None:
            tensors(parts)
        return _safetensors(text, parts)

    return call


def _safetensors(text: str, parts: list[list[Any]]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"regrow": text}}
    body = b""
    for name, dtype, shape, data in parts:
        header[name] = {
            "dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]
        }  # fmt: skip
        body += data
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + body


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """python(code, *arguments): run code in a fresh interpreter that sees this checkout.

    Packages in `block` cannot be found there, as if they were not installed. It may take `timeout`
    seconds.
    """

    def call(code: str, *arguments: str, block: tuple[str, ...] = (), timeout: float = 60) -> Any:
        return subprocess.run(
            [sys.executable, "-c", _BLOCKER.format(block=block) + code, *arguments],
            capture_output=True, text=True, timeout=timeout, env=_environment(), check=False,
        )  # fmt: skip

    return call


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """For subprocesses that a test starts on its own."""
    return _environment()


def _environment() -> dict[str, str]:
    paths = [str(ROOT / part) for part in ("runtime", "export", "toolchain")]
    return {
        **{k: v for k, v in os.environ.items() if k != "ORT_DISABLE_TELEMETRY"},
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONIOENCODING": "utf-8",
    }


# Importing fails, and `importlib.util.find_spec` answers None, as for a package that is not there.
_BLOCKER = """
import sys
class _Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {block!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
if {block!r}:
    sys.meta_path.insert(0, _Block())
    import importlib.util as _util
    _found = _util.find_spec
    _util.find_spec = lambda name, package=None: (
        None if name.partition('.')[0] in {block!r} else _found(name, package))
"""
