"""From what an adapter holds to its file's bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save as save_safetensors

from .adapter_contents import FORMAT, STORAGE, AdapterContents, narrow
from .fields import dump_json
from .philox import check_seed
from .quantize import pack
from .target_rows import target_rows

__all__ = ["adapter_bytes"]


def adapter_bytes(adapter: AdapterContents) -> bytes:
    """The same adapter always gives the same ones. Nothing is checked: see `Adapter.to_bytes`."""
    return save_safetensors(_tensors(adapter), {"regrow": dump_json(_metadata(adapter))})


def _tensors(adapter: AdapterContents) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = dict(adapter.stored_basis)
    for name, part in adapter.coefficients.items():
        tensors[name] = _stored(part.values, adapter.storage)
        tensors[f"{name}.scale"] = part.scale
    if adapter.head:
        for layer in adapter.head.layers:
            tensors[f"head.{layer.name}.weight"] = _stored(layer.weight, adapter.head.storage)
            tensors[f"head.{layer.name}.bias"] = _stored(layer.bias, adapter.head.storage)
    tensors.update({f"extra.{name}": array for name, array in adapter.extra.items()})
    if adapter.probe:
        tensors["probe"] = adapter.probe.expected
    return tensors


def _stored(values: NDArray[Any], storage: str) -> NDArray[Any]:
    bits = STORAGE[storage]
    if bits < 8:
        return pack(values, bits)
    return narrow(values, {8: np.int8, 16: np.float16, 32: np.float32}[bits])


def _metadata(adapter: AdapterContents) -> dict[str, Any]:
    data: dict[str, Any] = {
        "format": FORMAT,
        "method": adapter.method,
        "config": dict(adapter.config),
        "seed": str(check_seed(adapter.seed)),  # a string: JavaScript rounds large numbers
        "basis": {
            "kind": adapter.basis.kind,
            "version": adapter.basis.version,
            **adapter.basis.fields,
        },
        "backbone_id": adapter.backbone_id,
        "storage": adapter.storage,
        "targets": target_rows(adapter.targets),
    }
    if adapter.group is not None:
        data["group"] = adapter.group
    if adapter.extra:
        data["extra"] = sorted(adapter.extra, key=str.encode)
    if adapter.probe:
        named = {"input": adapter.probe.input} if adapter.probe.input else {}
        data["probe"] = {"tolerance": adapter.probe.tolerance, **named}
    if adapter.head:
        names = [layer.name for layer in adapter.head.layers]
        data["head"] = {"layers": names, "labels": list(adapter.head.labels)}
    if adapter.validated:
        data["validated"] = [vars(v) for v in adapter.validated]
    if adapter.user:
        data["user"] = dict(adapter.user)
    return data
