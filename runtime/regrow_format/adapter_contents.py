"""What an adapter holds: what the methods and the reader and writer of its file share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .basis import PHILOX_SIGN, BasisSpec
from .quantize import quantize, scale_shape
from .record import Frozen, Record
from .target_rows import Target

__all__ = [
    "FORMAT",
    "STORAGE",
    "AdapterContents",
    "Coefficients",
    "Head",
    "HeadLayer",
    "Probe",
    "Target",
    "Validated",
    "narrow",
]

FORMAT = 1

# What coefficients may be stored as, and how many bits a value takes.
STORAGE = {"fp32": 32, "fp16": 16, "int8": 8, **{f"int{bits}": bits for bits in range(2, 8)}}


class Coefficients(Frozen):
    """Stacked vectors of numbers, as stored.

    Attributes:
        values: [rows, length], int8 codes for integer storage, else float32.
        scale: float32 [rows], or [rows, ceil(length / group)] with a scale per group of `group`
            values; it includes every constant of the method, so that an expansion with one scale
            per vector is one sum times one number.
        group: how many values share a scale; None for all of a vector.
    """

    values: NDArray[Any]
    scale: NDArray[np.float32]
    group: int | None = None

    @classmethod
    def store(
        cls,
        values: NDArray[np.float32],
        constant: NDArray[np.float32],
        storage: str,
        group: int | None = None,
    ) -> Coefficients:
        """Round `values` [rows, length] as `storage` says; `constant` [rows] joins the scale."""
        bits = STORAGE[storage]
        if bits <= 8:
            codes, scale = quantize(values, bits, group)
        else:
            codes = narrow(values, np.float16 if bits == 16 else np.float32).astype(np.float32)
            scale = np.ones(scale_shape(values.shape, group), dtype=np.float32)
        constant = constant if group is None else constant[:, None]
        return cls(codes, (scale * constant).astype(np.float32), group)

    def dense(self) -> NDArray[np.float32]:
        """float32 [rows, length]: values times scale, one multiply each."""
        scale = self.scale[:, None]
        if self.group is not None:
            length = self.values.shape[1]
            scale = np.repeat(self.scale, min(self.group, length), axis=1)[:, :length]
        return self.values.astype(np.float32) * scale


class HeadLayer(Frozen):
    """One linear layer of a task head: weight float32 [classes, in], bias float32 [classes]."""

    name: str
    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


class Head(Frozen):
    """A task head of the adapter's own, with the names of its classes.

    `storage` is how its numbers are stored, "fp16" or "fp32".
    """

    layers: tuple[HeadLayer, ...]
    labels: tuple[str, ...]
    storage: str = "fp16"


class Probe(Frozen):
    """What the model gives for the bundle's probe input: 1 to 64 numbers, float16 [m].

    Attributes:
        input: fingerprint of the input that they are for; "" if the file does not say.
    """

    expected: NDArray[np.float16]
    tolerance: float
    input: str = ""


class Validated(Record):
    """A score on samples that training did not see, before and after adaptation."""

    variant: str
    metric: str
    before: float
    after: float
    samples: int


class AdapterContents(Frozen):
    """What an adapter file holds; `regrow_format.Adapter` reads and writes one.

    Attributes:
        method: name of the method, such as "nola".
        config: the method's own numbers, such as k, l, rank.
        seed: uint64 from which the basis is regenerated.
        backbone_id: the backbone that it was trained on, "sha256:…".
        targets: the layers it changes, sorted by the UTF-8 bytes of their names.
        coefficients: by tensor name, as the method's `layout` lists them.
        storage: how coefficients are stored, a key of `STORAGE`.
        group: how many coefficients share a scale; None for all of a vector.
        stored_basis: the tensors of a basis of kind "stored", as the method's `stored_basis` lists.
        extra: whole replacements of parameters by their path, float16 or float32.
    """

    method: str
    config: Mapping[str, Any]
    seed: int
    backbone_id: str
    targets: tuple[Target, ...]
    coefficients: Mapping[str, Coefficients]
    storage: str = "fp32"
    basis: BasisSpec = PHILOX_SIGN
    head: Head | None = None
    validated: tuple[Validated, ...] = ()
    user: Mapping[str, str] = field(default_factory=dict)
    group: int | None = None
    stored_basis: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    extra: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    probe: Probe | None = None


def narrow(values: NDArray[Any], dtype: type) -> NDArray[Any]:
    """`values` in `dtype`; those too large for it become infinite."""
    with np.errstate(over="ignore"):  # what becomes infinite is refused by name
        return values.astype(dtype)
