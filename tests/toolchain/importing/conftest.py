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

from regrow_runtime import Manifest, Slot
from regrow_runtime.errors import RegrowError
from regrow_runtime.manifest import FileEntry, GraphSpec
from regrow_toolchain.importing import import_peft

ID = "sha256:" + "ab" * 32
Q, K = "base_model.model.blocks.0.q", "base_model.model.blocks.0.k"
HEAD = "base_model.model.head"
_CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}


def _tensors() -> dict[str, np.ndarray]:
    """q: 8 -> 6 and k: 8 -> 4, rank 2; a head of 5 classes on 6 features."""
    rng = np.random.default_rng(0)
    shapes = {f"{Q}.lora_A.weight": (2, 8), f"{Q}.lora_B.weight": (6, 2),
              f"{K}.lora_A.weight": (2, 8), f"{K}.lora_B.weight": (4, 2),
              f"{HEAD}.weight": (5, 6), f"{HEAD}.bias": (5,)}  # fmt: skip
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def _slot(target: str, kind: str, wide: int, high: int) -> Slot:
    parts = ("A", "B") if kind == "low_rank" else ("weight", "bias")
    return Slot(target, kind, wide, high, {part: f"{target}.{part}" for part in parts})


@dataclass
class Room:
    """A folder with `peft`, `bundle` and `backbone` in it."""

    path: Path
    identity: str = ID
    tensors: dict[str, np.ndarray] = field(default_factory=_tensors)

    def write(
        self, config: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None
    ) -> Path:
        """`peft`, with changes by name; a tensor that is None is left out."""
        folder = self.path / "peft"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({**_CONFIG, **(config or {})}))
        kept = {n: t for n, t in {**self.tensors, **(tensors or {})}.items() if t is not None}
        save_file(kept, folder / "adapter_model.safetensors", {"format": "pt"})
        return folder

    def refusal(self, base: str = "bundle", **options: Any) -> str:
        """What importing `peft` for `base` says when it fails."""
        with pytest.raises(RegrowError) as caught:
            import_peft(self.path / "peft", self.path / base, **options).to_bytes()
        return str(caught.value)

    def bundle(self, name: str, mode: str = "swappable", layers: str = "qk") -> Path:
        """A manifest alone: an import reads no more of a bundle."""
        widths = {"q": (8, 6), "k": (8, 4)}
        slots = [_slot(f"blocks.0.{layer}", "low_rank", *widths[layer]) for layer in layers]
        manifest = Manifest(
            mode=mode, task="image-classification", backbone_id=ID, opset=20, ir_version=9,
            graphs=(GraphSpec("model", "m.onnx", (), ()),), labels=("ant", "bee", "cat"),
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
    made = Room(tmp_path)
    made.write()
    made.bundle("bundle")
    made.backbone()
    return made
