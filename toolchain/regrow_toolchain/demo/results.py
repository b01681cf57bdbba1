"""The report's numbers, as they stand in report.json."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from regrow_format.adapter import Adapter, Coefficients
from regrow_format.manifest import Manifest
from regrow_format.methods import get_method
from regrow_toolchain.measurement import read_cpu
from regrow_toolchain.models import WEIGHTS

from . import digits
from .synthetic_users import USERS, User

if TYPE_CHECKING:
    from .artifacts import Made

__all__ = ["build_report"]

_LORA_RANK = 4
_IMAGE_ARRAYS = 6

# What the demo promises; the report says of each whether it holds.
_LEAST_GAIN = 0.10
_MOST_LOSS = 0.015
_MOST_BYTES = 4096
_MOST_SECONDS = 240.0
_MOST_DELTA = 1e-4


def build_report(made: Made) -> dict[str, Any]:
    """Everything that was measured. Accuracies are shares, times ms unless named, sizes bytes."""
    users = [_user(made, user) for user in USERS]
    device = {k: v for k, v in made.device.items() if k not in ("users", "threads")}
    backbone, sizes = _backbone(made), _bytes(made)
    return {
        "regrow": version("regrow"),
        "seconds": made.seconds["total"],
        "steps": {k: v for k, v in made.seconds.items() if k != "total"},
        "seed": made.settings.seed,
        "environment": _environment(made),
        "data": {
            "name": digits.NAME,
            "train": len(made.digits.train[1]),
            "adapt_per_user": len(made.digits.users[0][1]),
            "test": len(made.digits.test[1]),
        },
        "backbone": backbone,
        "users": users,
        "bytes": sizes,
        "bundles": {
            {"bundle": "swappable"}.get(mode, mode): {
                "bytes": _folder_bytes(made.folder / mode),
                "seconds": made.seconds[f"export {mode}"],
                "parity": dict(Manifest.load(made.folder / mode).parity),
            }
            for mode in ("bundle", "merged", "seeded")
        },
        "device": device,
        "checks": _checks(made, users, backbone),
        "commands": _commands(made.out),
    }


def _environment(made: Made) -> dict[str, Any]:
    cpu = read_cpu()
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "onnxruntime", "torch")},
        "platform": platform.platform(),
        "cpu": cpu.name,
        "cores": cpu.cores,
        "threads": made.device["threads"],
    }


def _backbone(made: Made) -> dict[str, Any]:
    compressed, dense, backbone = made.compressed, made.dense, made.backbone
    if compressed is None or dense is None or backbone is None:
        raise ValueError("the report needs every step's result")
    count = compressed.samples

    def accuracy(share: float) -> dict[str, float]:
        return {"accuracy": share, "se": float(np.sqrt(share * (1 - share) / (count - 1)))}

    return {
        "dense": {
            "parameters": dense.parameters,
            "bytes": (made.folder / "dense" / "model.safetensors").stat().st_size,
            **accuracy(compressed.dense_score),
        },
        "svd_only": accuracy(compressed.start_score),
        "compressed": {
            "parameters": backbone.parameters,
            "bytes": (made.folder / "backbone" / WEIGHTS).stat().st_size,
            "ratio": made.settings.compress.ratio,
            "layers": len(backbone.layers),
            **accuracy(compressed.score),
        },
    }


def _user(made: Made, user: User) -> dict[str, Any]:
    index = [u.id for u in USERS].index(user.id)
    adapter = made.adapters[user.id]
    plain, digit = made.digits.users[index]
    seen, _ = made.samples[user.id]
    # One image of each of the first digits, as written and as captured.
    rows = [int(np.flatnonzero(digit == d)[0]) for d in range(_IMAGE_ARRAYS)]
    names = user.labels or tuple(str(d) for d in range(10))
    return {
        "id": user.id,
        "title": user.title,
        "condition": user.condition,
        "own_head": bool(user.labels),
        "samples": len(digit),
        "labels": list(names),
        **made.device["users"][user.id],
        "adapter_bytes": len(_without_head(adapter).to_bytes()),
        "head_bytes": len(adapter.to_bytes()) - len(_without_head(adapter).to_bytes()),
        "storage": adapter.storage,
        "examples": [seen[row].tolist() for row in rows],
        "examples_plain": [plain[row].tolist() for row in rows],
        "example_labels": [names[user.meaning[d]] for d in range(_IMAGE_ARRAYS)],
    }


def _without_head(adapter: Adapter) -> Adapter:
    from dataclasses import replace

    return replace(adapter, head=None)


def _bytes(made: Made) -> dict[str, Any]:
    """Sizes of files, as written; LoRA's for the same layers at rank 4."""
    one = made.adapters[USERS[0].id]
    backbone = _backbone(made)
    return {
        "dense_model": backbone["dense"]["bytes"],
        "compressed_model": backbone["compressed"]["bytes"],
        "lora": len(_lora(one, "fp32").to_bytes()),
        "lora_int4": len(_lora(one, "int4").to_bytes()),
        "adapter": len(one.to_bytes()),
        "lora_rank": _LORA_RANK,
        "adapter_method": one.method,
        "adapter_storage": one.storage,
    }


def _lora(like: Adapter, storage: str) -> Adapter:
    """A LoRA for the same layers; its size does not depend on what its numbers are."""
    from dataclasses import replace

    method = get_method("lora")
    config = {"rank": _LORA_RANK, "alpha": float(_LORA_RANK), "rslora": False}
    coefficients = {
        name: Coefficients.store(
            np.ones(shape, dtype=np.float32), np.ones(shape[0], dtype=np.float32), storage
        )
        for name, shape in method.layout(config, like.targets).items()
    }
    return replace(
        like, method="lora", config=config, storage=storage, coefficients=coefficients, head=None
    )


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _checks(
    made: Made, users: list[dict[str, Any]], backbone: dict[str, Any]
) -> list[dict[str, Any]]:
    loss = backbone["dense"]["accuracy"] - backbone["compressed"]["accuracy"]
    gain = min(user["gain"] for user in users)
    size = max(user["adapter_bytes"] for user in users)
    delta = max(user["parity_max_abs"] for user in users)
    seconds, blocked = made.seconds["total"], bool(made.device["torch_blocked"])
    rows = [
        ("What each user gains", f"at least {_LEAST_GAIN * 100:.0f} points",
         f"{gain * 100:.1f} points or more", gain >= _LEAST_GAIN),
        ("What compression costs", f"at most {_MOST_LOSS * 100:.1f} points",
         f"{loss * 100:.1f} points", loss <= _MOST_LOSS),
        ("An adapter without its head", f"at most {_MOST_BYTES:,} bytes",
         f"{size:,} bytes", size <= _MOST_BYTES),
        ("Difference of a logit to torch's", f"at most {_MOST_DELTA:.0e}",
         f"{delta:.1e}", delta <= _MOST_DELTA),
        ("Everything", f"at most {_MOST_SECONDS:.0f} s", f"{seconds:.0f} s",
         seconds <= _MOST_SECONDS),
        ("The device process", "cannot import torch",
         "cannot" if blocked else "can", blocked),
    ]  # fmt: skip
    return [
        {"name": name, "limit": limit, "value": value, "ok": bool(ok)}
        for name, limit, value, ok in rows
    ]


def _commands(out: Path) -> list[str]:
    one = USERS[0].id
    return [
        f"regrow inspect {out}/adapters/{one}.safetensors",
        f"regrow inspect {out}/bundle",
        f"regrow run {out}/bundle --input {out}/users/{one}-test.npz",
        f"regrow run {out}/bundle --input {out}/users/{one}-test.npz "
        f"--adapter {out}/adapters/{one}.safetensors",
        f"regrow adapt {out}/backbone --data {out}/users/{one}.npz -o mine.safetensors",
    ]
