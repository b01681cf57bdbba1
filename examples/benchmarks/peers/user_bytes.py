"""Bytes per user: every method's file, PEFT's own files beside, and what is known of accuracy.

    python examples/benchmarks/peers/user_bytes.py [--small] [--room FOLDER]

On the model of `mnist_writers.py` (width 64, four layers), because accuracies of these very
settings are known there: the column is copied from docs/results.md, mean of 80 writers, int4. Files
do not depend on what was trained. And on ViT-Base, where only bytes are told. Ends in one line of
JSON.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from models import Room, arguments, finish, machine

MLP = ["attention.output.dense", "intermediate.dense", "output.dense"]
QV = ["query", "value"]
# label: method, settings, targets, accuracy of it in docs/results.md (int4)
WRITERS = {
    "LoRA r=1": ("lora", {"rank": 1, "alpha": 1.0}, MLP, 96.1),
    "LoRA r=4": ("lora", {"rank": 4, "alpha": 4.0}, MLP, 96.3),
    "NOLA k=l=32": ("nola", {"k": 32, "l": 32, "rank": 4}, MLP, 96.3),
    "VeRA r=64": ("vera", {"rank": 64}, QV, 96.2),
    "FourierFT n=64": ("fourierft", {"n": 64}, MLP, 96.2),
}
BASE = {
    "LoRA r=1": ("lora", {"rank": 1, "alpha": 1.0}, QV, None),
    "LoRA r=4": ("lora", {"rank": 4, "alpha": 4.0}, QV, None),
    "NOLA k=l=1000, r=8": ("nola", {"k": 1000, "l": 1000, "rank": 8}, QV, None),
    "VeRA r=256": ("vera", {"rank": 256}, QV, None),
    "FourierFT n=1000": ("fourierft", {"n": 1000}, QV, None),
}
STORED = {"LoRA r=1": ("fp32", "int4"), "LoRA r=4": ("fp32", "int4")}
OURS = ("fp16", "int8", "int4")


def model_of(name: str, small: bool) -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    if name == "writers" or small:
        config = ViTConfig(
            hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128,
            num_labels=10, image_size=28, patch_size=7, num_channels=1,
        )  # fmt: skip
    else:
        config = ViTConfig(num_labels=10)
    return ViTForImageClassification(config).eval()


def rows_of(model: Any, variants: dict[str, Any], room: Path) -> Iterator[dict[str, Any]]:
    for label, (method, settings, targets, accuracy) in variants.items():
        known = {"label": label, "accuracy": accuracy}
        for storage in STORED.get(label, OURS):
            size = ours(model, method, settings, targets, storage, room)
            yield {**known, "file": f"regrow {storage}", "bytes": size}
        if (size := peft_file(model, method, settings, targets, room)) is not None:
            yield {**known, "file": "PEFT safetensors", "bytes": size}
        if method in ("lora", "nola"):
            size = onnx_adapter(model, method, settings, targets)
            yield {**known, "file": "onnx_adapter fp32", "bytes": size}


def ours(model: Any, name: str, settings: dict[str, Any], patterns: list[str], storage: str,
         room: Path) -> int:  # fmt: skip
    """Size of a file with random coefficients and no head."""
    return made(model, name, settings, patterns, storage).save(room / "user.safetensors")


def made(model: Any, name: str, settings: dict[str, Any], patterns: list[str], storage: str) -> Any:
    from regrow import Adapter
    from regrow_format.methods import get_method
    from regrow_runtime import Coefficients
    from regrow_toolchain.models import find_targets

    method, draw = get_method(name), np.random.default_rng(0)
    targets = find_targets(model, patterns)
    config = {**DEFAULTS[name], **settings}
    constants = method.constants(config, targets)
    values = {
        key: Coefficients.store(
            draw.standard_normal(shape).astype(np.float32), constants[key], storage
        )
        for key, shape in method.layout(config, targets).items()
    }
    return Adapter(name, config, 7, "sha256:" + "ab" * 32, targets, values, storage)


DEFAULTS: dict[str, dict[str, Any]] = {
    "lora": {"rslora": False},
    "nola": {"c": 1.0, "shared": True},
    "vera": {},
    "fourierft": {"alpha": 16.0},
}


def peft_file(model: Any, name: str, settings: dict[str, Any], patterns: list[str],
              room: Path) -> int | None:  # fmt: skip
    """Size of adapter_model.safetensors; None where PEFT has no such method."""
    import copy

    from peft import FourierFTConfig, LoraConfig, VeraConfig, get_peft_model

    from regrow_toolchain.models import find_targets

    names = [target.name for target in find_targets(model, patterns)]
    kinds = {
        "lora": lambda: LoraConfig(
            r=settings["rank"], lora_alpha=settings["rank"], target_modules=names
        ),
        "vera": lambda: VeraConfig(r=settings["rank"], target_modules=names, save_projection=False),
        "fourierft": lambda: FourierFTConfig(n_frequency=settings["n"], target_modules=names),
    }
    if name not in kinds:
        return None
    get_peft_model(copy.deepcopy(model), kinds[name]()).save_pretrained(room / "peft")
    return (room / "peft" / "adapter_model.safetensors").stat().st_size


def onnx_adapter(model: Any, name: str, settings: dict[str, Any], patterns: list[str]) -> int:
    """Size of ONNX Runtime's own form: the factors, expanded."""
    from regrow_format.basis import BasisCache
    from regrow_format.methods import get_method
    from regrow_toolchain.interop import FORMATS

    adapter = made(model, name, settings, patterns, "fp32")
    parts = get_method(name).expand(adapter, BasisCache(0))
    tensors = {
        f"{target}.adapter_{part}": value[None]
        for target, kinds in parts.items()
        for found in kinds.values()
        for part, value in found.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        return len(FORMATS["onnx_adapter"](tensors, Path(folder)))


def main() -> None:
    with arguments(__doc__) as (_given, room), tempfile.TemporaryDirectory() as name:
        assert isinstance(room, Room)
        found = {}
        for task, variants in (("writers", WRITERS), ("ViT-Base", BASE)):
            model = model_of(task, room.small)
            found[task] = list(rows_of(model, variants, Path(name)))
            for row in found[task]:
                accuracy = "" if row["accuracy"] is None else f"{row['accuracy']:.1f} %"
                print(f"{task:9} {row['label']:20} {row['file']:20} {row['bytes']:10,} {accuracy}")
        finish(task="user-bytes", rows=found, machine=machine())


if __name__ == "__main__":
    main()
