"""A PEFT directory, a bundle and a backbone made by hand: no PEFT, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from regrow_format.errors import RegrowError
from regrow_format.manifest import FileEntry, GraphSpec, TensorSpec
from regrow_runtime import Manifest, Slot
from regrow_toolchain.interop import import_peft

ID = "sha256:" + "ab" * 32
Q, K = "base_model.model.blocks.0.q", "base_model.model.blocks.0.k"
HEAD = "base_model.model.head"
# Of q: 8 -> 6 and k: 8 -> 4, rank 2 or 7 and 9 frequencies; a head of 5 classes on 6 features.
_LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}
_VERA: dict[str, Any] = {"peft_type": "VERA", "r": 2, "projection_prng_key": 3,
                         "save_projection": False, "bias": "none"}  # fmt: skip
_FOURIERFT: dict[str, Any] = {"peft_type": "FOURIERFT", "n_frequency": 9, "scaling": 12.0,
                              "random_loc_seed": 777,
                              "n_frequency_pattern": {"0.k": 7}}  # fmt: skip
_IA3: dict[str, Any] = {"peft_type": "IA3", "target_modules": ["q", "k"],
                        "feedforward_modules": ["k"], "bias": "none"}  # fmt: skip
_HEAD = {f"{HEAD}.weight": (5, 6), f"{HEAD}.bias": (5,)}
_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "LORA": {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2),
             f"{K}.lora_A.weight": (2, 8), f"{K}.lora_B.weight": (4, 2), **_HEAD},
    "VERA": {f"{Q}.vera_lambda_d": (2,), f"{Q}.vera_lambda_b": (6,),
             f"{K}.vera_lambda_d": (2,), f"{K}.vera_lambda_b": (4,), **_HEAD},
    "FOURIERFT": {f"{Q}.fourierft_spectrum": (9,), f"{K}.fourierft_spectrum": (7,), **_HEAD},
    "IA3": {f"{Q}.ia3_l": (6, 1), f"{K}.ia3_l": (1, 8), **_HEAD},
}  # fmt: skip
_KINDS = {"low_rank": ("A", "B"), "delta": ("D",), "scale": ("s",), "input_scale": ("t",),
          "head": ("weight", "bias")}  # fmt: skip


def _slot(target: str, kind: str, wide: int, high: int) -> Slot:
    return Slot(target, kind, wide, high, {part: f"{target}.{part}" for part in _KINDS[kind]})


@dataclass
class Room:
    """A folder with `peft`, `bundle` and `backbone` in it."""

    path: Path
    config: dict[str, Any] = field(default_factory=lambda: dict(_LORA))
    identity: str = ID
    tensors: dict[str, np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.tensors = {
            name: rng.normal(size=shape).astype(np.float32)
            for name, shape in _SHAPES[self.config["peft_type"]].items()
        }

    def write(
        self, config: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None
    ) -> Path:
        """`peft`, with changes by name; a tensor that is None is left out."""
        folder = self.path / "peft"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(self.config | dict(config or {})))
        kept = {n: t for n, t in {**self.tensors, **(tensors or {})}.items() if t is not None}
        save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
        return folder

    def refusal(self, base: str = "bundle", **options: Any) -> str:
        """What importing `peft` for `base` says when it fails."""
        with pytest.raises(RegrowError) as caught:
            import_peft(self.path / "peft", self.path / base, **options).to_bytes()
        return str(caught.value)

    def bundle(
        self, name: str, mode: str = "swappable", layers: str = "qk", kind: str = "low_rank"
    ) -> Path:
        """A manifest alone: an import reads no more of a bundle."""
        widths = {"q": (8, 6), "k": (8, 4)}
        slots = [
            _slot(f"blocks.0.{layer}", one, *widths[layer])
            for layer in layers
            for one in kind.split("+")
        ]
        logits = TensorSpec("logits", "float32", ("n", 3))
        manifest = Manifest(
            mode=mode, task="image-classification", backbone_id=ID, opset=20, ir_version=9,
            graphs=(GraphSpec("model", "m.onnx", (), (logits,)),),
            labels=("ant", "bee", "cat"),
            slots=(*slots, _slot("head", "head", 6, 3)), files={"m.onnx": FileEntry(1, "0")},
        )  # fmt: skip
        folder = self.path / name
        folder.mkdir()
        (folder / "manifest.json").write_text(manifest.to_json())
        return folder

    def backbone(self) -> Path:
        """A compressed backbone's files: q is a pair of factors, k is dense."""
        folder = self.path / "backbone"
        folder.mkdir()
        plan = {"name": "blocks.0.q", "in_features": 8, "out_features": 6, "rank": 2, "bias": False}
        config = {"format": 1, "backbone_id": ID, "head": ["head"], "layers": [plan], "report": {}}
        (folder / "regrow.json").write_text(json.dumps(config))
        names = {str(i): f"c{i}" for i in range(5)}
        (folder / "config.json").write_text(json.dumps({"id2label": names}))
        shapes = {"blocks.0.q.down": (2, 8), "blocks.0.q.up": (6, 2), "blocks.0.k": (4, 8),
                  "head": (5, 6)}  # fmt: skip
        weights = {f"{name}.weight": np.zeros(shape, "f4") for name, shape in shapes.items()}
        save_file(weights, folder / "regrow.safetensors")
        return folder


@pytest.fixture
def room(tmp_path: Path) -> Room:
    """A LoRA."""
    return _made(Room(tmp_path), "low_rank")


@pytest.fixture
def vera_room(tmp_path: Path) -> Room:
    """A VeRA without its projections."""
    return _made(Room(tmp_path, dict(_VERA)), "low_rank")


@pytest.fixture
def fourierft_room(tmp_path: Path) -> Room:
    return _made(Room(tmp_path, dict(_FOURIERFT)), "delta")


@pytest.fixture
def ia3_room(tmp_path: Path) -> Room:
    """q's outputs and k's inputs are multiplied."""
    return _made(Room(tmp_path, dict(_IA3)), "scale+input_scale")


def _made(room: Room, kind: str) -> Room:
    room.write()
    room.bundle("bundle", kind=kind)
    room.backbone()
    return room
