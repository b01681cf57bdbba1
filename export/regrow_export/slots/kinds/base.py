"""What a kind of slot must say of itself in torch and in a graph."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_export.layers import LINEAR_TITLES, LayerType
from regrow_format.errors import UsageError
from regrow_format.manifest import Slot
from regrow_format.slot_kinds import SLOT_KINDS, SlotKind

if TYPE_CHECKING:
    import onnx

    from regrow_format.adapter import Adapter, Target

__all__ = ["TRACE_RANK", "Tensors", "TorchKind", "zeros"]

# The tensors of a slot by part, [n, rows, columns]; n is 1, or that of users or samples.
Tensors = Mapping[str, Tensor]

# While tracing, slots hold unlike random numbers: the exporter merges equal initializers, and a
# rank of 0 would let it fold the products away.
TRACE_RANK = 2


class TorchKind(ABC):
    """The torch half of a `SlotKind` of targets. Instances hold no state.

    A layer's output goes through every kind that its slots are of: `on_input` changes what the
    layer sees, `added` is added to what it gives, `on_output` changes that; a kind has the steps
    that it needs. Rows are [n, rows, features].

    Attributes:
        name: as in `SLOT_KINDS`.
        steps: those of "on_input", "added" and "on_output" that it has.
        replaces_weight: `added` gives the layer's whole output but its bias.
        constant_names: what its tensors have beside its parts.
        keeps_default: the default of its graph inputs is what the tracer wrote.
        fits: what a target must be to have its changes folded in, for messages.
    """

    name: ClassVar[str]
    steps: ClassVar[tuple[str, ...]]
    replaces_weight: ClassVar[bool] = False
    constant_names: ClassVar[tuple[str, ...]] = ()
    keeps_default: ClassVar[bool] = False
    fits: ClassVar[str] = f"{LINEAR_TITLES} or a pair of them, down and up"

    @property
    def kind(self) -> SlotKind:
        """The NumPy half."""
        return SLOT_KINDS[self.name]

    def takes(self, layer: LayerType) -> bool:
        """Whether layers of a type can have such a slot."""
        return layer.is_linear

    def refuse(self, target: str, module: nn.Module) -> UsageError:
        """The error for a target of another type, though other kinds of slots fit it."""
        return UsageError(
            f"target must take {self.name} slots, got {target}, {type(module).__name__}: use slots "
            "of another kind"
        )

    def slot(self, target: Target, rank: int | None = None, like: Adapter | None = None) -> Slot:
        """A slot of a target.

        Args:
            rank: if every dimension is fixed, the rank of slots that have one.
            like: an adapter that the bundle is for.
        """
        has_rank = any("rank" in dims for dims in self.kind.dims.values())
        return Slot(
            target=target.name,
            kind=self.name,
            in_features=target.in_features,
            out_features=target.out_features,
            inputs=self.kind.inputs(target.name),
            rank=rank if has_rank else None,
            fixed=rank is not None or self.kind.for_batch,
        )

    # -- computing --------------------------------------------------------------------------------

    def on_input(self, x: Tensor, tensors: Tensors) -> Tensor:
        """[n, rows, in] that the layer sees, and every change of it."""
        raise NotImplementedError

    def added(self, x: Tensor, tensors: Tensors) -> Tensor:
        """[n, rows, out] that the output gains, from [n, rows, in]."""
        raise NotImplementedError

    def on_output(self, y: Tensor, tensors: Tensors) -> Tensor:
        """[n, rows, out], from what the layer gives with all that is added."""
        raise NotImplementedError

    def merged(self, layer: LayerType, module: nn.Module, tensors: Tensors) -> nn.Module | None:
        """The layer with a change in its own parameters, None where it does not fit.

        Args:
            tensors: float32, by part [rows, columns], as an expansion has them.
        """
        return None

    # -- in a graph -------------------------------------------------------------------------------

    def traced(self, slot: Slot, layer: LayerType, module: nn.Module) -> dict[str, Tensor]:
        """By part, what a slot holds while it is traced."""
        return {
            part: torch.randn(1, *self.kind.shape(part, slot, TRACE_RANK)) for part in slot.inputs
        }

    def constants(self, slot: Slot) -> dict[str, NDArray[np.float32]]:
        """By name, what the graph holds beside the inputs of a slot."""
        return {}

    def traced_constants(self, slot: Slot) -> dict[str, Tensor]:
        """By name, what stands in for `constants` while a slot is traced."""
        return {}

    def rewrite(self, model: onnx.ModelProto, slots: Sequence[Slot], *, whole: bool) -> None:  # noqa: B027
        """Change what the tracer made of slots of this kind.

        Args:
            whole: the slots are never empty.
        """

    def dim_prefix(self, slot: Slot) -> str:
        """What the names of its dynamic dimensions begin with: each slot has its own."""
        return f"{slot.target}.{self.name}"

    def graph_shape(self, part: str, slot: Slot) -> tuple[int | str, ...]:
        """Of a graph input; dimensions that are not fixed have names, each slot its own."""
        name = self.dim_prefix(slot)
        rank = slot.rank or f"{name}.rank"
        sizes: dict[int | str, int | str] = {
            1: 1,
            "in": slot.in_features,
            "out": slot.out_features,
            "rank": rank,
            "rows": slot.in_features if slot.fixed else rank,
        }
        rows, columns = self.kind.dims[part]
        return (1 if slot.fixed else f"{name}.n", sizes[rows], sizes[columns])


def zeros(shape: Sequence[int | str]) -> NDArray[np.float32]:
    """n = 1; other dimensions that have a name are 0, the rank."""
    sizes = [size if isinstance(size, int) else int(size.endswith(".n")) for size in shape]
    return np.zeros(sizes, np.float32)
