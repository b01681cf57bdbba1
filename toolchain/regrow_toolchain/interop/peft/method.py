"""What import must know of a PEFT method. A further one is one file, and a line in `peft.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from regrow_format.adapter import Target
from regrow_format.basis import PHILOX_SIGN, BasisSpec
from regrow_format.fields import Fields
from regrow_toolchain.models import StoredTensor

from .base_model import Base, Widths

__all__ = ["Basis", "Parts", "PeftKind", "Row"]

Parts = Mapping[str, StoredTensor]
# A tensor of the adapter file, what joins it at its end [rows, length], and the scale of that.
Row = tuple[str, NDArray[np.float32], float]
# The seed, and the tensors of a basis of kind "stored".
Basis = tuple[int, BasisSpec, Mapping[str, NDArray[Any]]]


class PeftKind(ABC):
    """A PEFT method. An instance is what the config of one adapter says.

    Attributes:
        peft_type: as it stands in PEFT's config.
        title: for messages.
        method: regrow's name of it.
        parts: the tensors that every layer has, `<layer>.<part><ending>`.
        bare: those of `parts` whose names have no ending.
        shared: tensors of the whole adapter that may be there, `base_model.<name>`.
        neutral: fields that change nothing here: they tell which layers there are, which the
            tensors tell too, or belong to training alone.
        refused: fields that must not be set, with the reason.
        reasons: why tensors with these pieces of a name cannot come in.
        saved: the names in `modules_to_save`.
    """

    peft_type: ClassVar[str]
    title: ClassVar[str]
    method: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    ending: ClassVar[str] = ""
    bare: ClassVar[tuple[str, ...]] = ()
    shared: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[frozenset[str]]
    refused: ClassVar[Mapping[str, str]] = {}
    reasons: ClassVar[tuple[tuple[str, str], ...]] = ()

    saved: tuple[str, ...]

    @classmethod
    def claims(cls, peft_type: str, fields: Fields) -> bool:
        """Whether a config is of this method; of several the first has it. Nothing is taken."""
        return peft_type == cls.peft_type

    @classmethod
    @abstractmethod
    def read(cls, fields: Fields, saved: tuple[str, ...]) -> Self:
        """Take the method's own fields, checked and bounded."""

    def for_base(self, base: Base, storage: str) -> Self:
        """The same, knowing what it is imported for and how its coefficients will be stored.

        Raises:
            UsageError: `base` does not tell what the method must know of it.
        """
        return self

    @abstractmethod
    def widths(self, layer: str, parts: Parts, base: Base) -> Widths | str:
        """(in, out) that the tensors of a layer say, or what is wrong with them."""

    def findings(self, shared: Parts, targets: Sequence[Target]) -> list[str]:
        """What is wrong with all layers together."""
        return []

    @abstractmethod
    def settings(self, targets: Sequence[Target]) -> dict[str, Any]:
        """The config of the adapter file."""

    @abstractmethod
    def rows(self, target: Target, parts: Parts, settings: Mapping[str, Any]) -> Iterator[Row]:
        """The coefficients of a target."""

    def basis(self, shared: Parts, targets: Sequence[Target], base_dtype: str) -> Basis:
        """What the coefficients belong to; a method without a basis has no seed either."""
        return 0, PHILOX_SIGN, {}
