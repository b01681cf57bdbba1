"""What the comparisons share: one model in all its forms, two users, fresh processes, one line.

Everything is made once in a folder (`--room`) and found there again. The model has ViT-Base's
shapes and random weights: times, RAM and bytes do not depend on them. The users' adapters are NOLA
k = l = 1000, rank 8, query and value, int4; peers get the same change, expanded to its factors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

RANK = 8
USERS = (7, 8)  # seeds
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "image_size": 32,
         "num_hidden_layers": 2}  # fmt: skip


# -- making ----------------------------------------------------------------------------------------


class Room:
    """Models by name, made when they are asked for first."""

    def __init__(self, folder: Path, small: bool) -> None:
        self.folder = folder / ("small" if small else "vit-base")
        self.small = small
        self.folder.mkdir(parents=True, exist_ok=True)

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            print(f"making {name}", file=sys.stderr, flush=True)
            unfinished = path.with_name(f"unfinished-{name}")
            make(unfinished)
            os.replace(unfinished, path)
        return path

    def dense(self) -> Path:
        """The model as Hugging Face stores it."""

        def make(path: Path) -> None:
            import torch
            from transformers import ViTConfig, ViTForImageClassification

            torch.manual_seed(0)
            config = ViTConfig(num_labels=10, **(SMALL if self.small else {}))
            ViTForImageClassification(config).save_pretrained(path)

        return self._made("dense", make)

    def pela(self) -> Path:
        """The same, compressed to half by plain SVD: training changes no shape."""

        def make(path: Path) -> None:
            from regrow import CompressConfig, compress, load_backbone, save_backbone

            source = load_backbone(self.dense())
            save_backbone(compress(source, None, CompressConfig(ratio=2.0)).backbone, path)

        return self._made("pela", make)

    def adapter(self, user: int = USERS[0], source: str = "dense") -> Path:
        """A user's file."""

        def make(path: Path) -> None:
            from regrow import load_backbone

            adapter_of(
                load_backbone(getattr(self, source)()), user, 64 if self.small else 1000
            ).save(path)

        return self._made(f"{source}-user-{user}.safetensors", make)

    def bundle(self, source: str = "dense", mode: str = "swappable", precision: str = "fp32",
               user: int = USERS[0]) -> Path:  # fmt: skip
        """An exported model; merged ones have a user's adapter in them."""

        def make(path: Path) -> None:
            from regrow import Adapter, ExportConfig, export, load_backbone

            backbone = load_backbone(getattr(self, source)())
            merged = mode == "merged"
            config = ExportConfig(
                mode=mode, precision=precision, targets=() if merged else ("query", "value")
            )
            built_in = Adapter.load(self.adapter(user, source)) if merged else None
            export(backbone, path, config, adapter=built_in)

        owner = f"-{user}" if mode == "merged" else ""
        return self._made(f"{source}-{mode}-{precision}{owner}", make)

    def stock_int8(self) -> Path:
        """What a user would pick instead: the dense merged model through `quantize_dynamic`."""

        def make(path: Path) -> None:
            from onnxruntime.quantization import quantize_dynamic

            path.mkdir()
            source = self.bundle(mode="merged") / "backbone.onnx"
            quantize_dynamic(source, path / "model.onnx", use_external_data_format=True)

        return self._made("dense-stock-int8", make)

    def factors(self, user: int) -> dict[str, np.ndarray]:
        """A [1, in, r] and B [1, r, out] by the name of the graph's input."""
        from regrow import Adapter, Manifest
        from regrow_toolchain.interop import dense_tensors

        return dense_tensors(
            Adapter.load(self.adapter(user)), Manifest.load(self.bundle()), self.bundle()
        )

    def onnx_adapter(self, user: int) -> Path:
        """The same change for ONNX Runtime's LoraAdapter."""

        def make(path: Path) -> None:
            from regrow import convert

            convert(self.adapter(user), self.bundle(), path, to="onnx_adapter")

        return self._made(f"user-{user}.onnx_adapter", make)

    def peft(self, user: int) -> Path:
        """The same change as a LoRA that PEFT saved."""

        def make(path: Path) -> None:
            import torch
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(torch_model(self.dense()), LoraConfig(
                r=RANK, lora_alpha=RANK, target_modules=["query", "value"]))  # fmt: skip
            state = dict(model.named_parameters())
            for name, value in self.factors(user).items():
                module, part = name.rsplit(".adapter_", 1)
                key = f"base_model.model.{module}.lora_{part}.default.weight"
                state[key].data = torch.from_numpy(np.ascontiguousarray(value[0].T))
            model.save_pretrained(path)

        return self._made(f"peft-user-{user}", make)


def adapter_of(backbone: Any, seed: int, k: int) -> Any:
    """NOLA with coefficients drawn at random."""
    from regrow import Adapter
    from regrow_format.methods import get_method
    from regrow_runtime import Coefficients
    from regrow_toolchain.models import find_targets

    method, draw = get_method("nola"), np.random.default_rng(seed)
    targets = find_targets(backbone.model, ["query", "value"])
    config = {"k": k, "l": k, "rank": RANK, "c": 1.0, "shared": True}
    constants = method.constants(config, targets)
    values = {
        name: Coefficients.store(
            draw.standard_normal(shape).astype(np.float32), constants[name], "int4"
        )
        for name, shape in method.layout(config, targets).items()
    }
    return Adapter("nola", config, seed, backbone.backbone_id, targets, values, "int4")


def torch_model(path: Path) -> Any:
    import torch
    from transformers import ViTForImageClassification

    torch.set_num_threads(1)
    return ViTForImageClassification.from_pretrained(path).eval()


def pixels(small: bool, batch: int = 1) -> np.ndarray:
    """float32 [batch, 3, side, side], the same everywhere."""
    side = 32 if small else 224
    return np.random.default_rng(1).standard_normal((batch, 3, side, side)).astype(np.float32)


def plain_session(path: Path) -> Any:
    """ONNX Runtime with one thread, as regrow opens it otherwise."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def folder_bytes(path: Path) -> int:
    """Of the graph and its weights."""
    return sum(file.stat().st_size for file in path.glob("*.onnx*"))


# -- measuring -------------------------------------------------------------------------------------


def times(call: Callable[[], object], repeat: int, warm: int = 2) -> dict[str, float]:
    """Milliseconds: median, 10th and 90th percentile."""
    found = []
    for _ in range(warm + repeat):
        start = time.perf_counter()
        call()
        found.append((time.perf_counter() - start) * 1e3)
    p10, p50, p90 = np.percentile(found[warm:], [10, 50, 90])
    return {"p50": float(p50), "p10": float(p10), "p90": float(p90), "n": repeat}


def memory() -> dict[str, int | None]:
    """Private bytes now, and the peak with mapped files."""
    from regrow_toolchain.measurement import read_memory

    found = read_memory()
    return {"private": found.rss_anon, "peak": found.peak}


def in_own_process(script: str, case: str, room: Room) -> dict[str, Any]:
    """A case of a script in a fresh process with one thread: models are timed alone."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    command = [sys.executable, script, "--case", case, "--room", str(room.folder.parent)]
    done = subprocess.run(
        [*command, *(["--small"] if room.small else [])], stdout=subprocess.PIPE, text=True,
        env={**os.environ, **dict.fromkeys(names, "1"), "HF_HUB_OFFLINE": "1"}, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


# -- command line ----------------------------------------------------------------------------------


@contextmanager
def arguments(doc: str) -> Any:
    """--small, --room and --case; the room is a temporary one if none is given."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a model of width 64, seconds")
    parser.add_argument("--room", type=Path, help="keep what is made here")
    parser.add_argument("--case", help="run one case in this process; used by the script itself")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        yield given, Room(given.room or Path(name), given.small)


def machine() -> dict[str, Any]:
    from regrow_toolchain.profiling import read_environment

    return read_environment()


def finish(**result: Any) -> None:
    """The last line: one JSON document."""
    print(json.dumps(result))


def spread(row: Mapping[str, float]) -> str:
    return f"{row['p50']:10.3f} ms ({row['p10']:.3f} to {row['p90']:.3f})"
