"""What a method must be able to do in training, and the settings all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from regrow_format.adapter import STORAGE, Target
from regrow_format.basis import BasisSpec
from regrow_format.errors import FormatError, UsageError
from regrow_format.methods import get_method

__all__ = [
    "Changes",
    "TrainableAdapter",
    "TrainableMethod",
    "fake_quantize",
    "parse_settings",
]

# By target and kind of slot, the slot's tensors by part, [users, rows, columns].
Changes = dict[str, dict[str, dict[str, Tensor]]]


class TrainableAdapter(nn.Module, ABC):
    """Adapters of one method in training, one for each of several users, over one frozen model.

    Every coefficient tensor of the file is one parameter [users, rows, length]: nothing mixes
    users, so each is trained as it would be alone.

    Attributes:
        config: what goes into the adapter files' config.
        targets: the layers that are changed, in the file's order.
        users: how many adapters there are.
        storage, group: how coefficients will be stored; `rounded` trains on them as stored.
        basis, stored_basis: what the file says of the basis, and the tensors it needs for it.
    """

    def __init__(
        self,
        method: str,
        config: Mapping[str, Any],
        targets: Sequence[Target],
        start: Mapping[str, Tensor],
        users: int,
    ) -> None:
        """`start` has the first value of every coefficient tensor, [rows, length], for each."""
        super().__init__()
        self.config, self.targets, self.users = dict(config), tuple(targets), users
        self.storage, self.group, self.rounded = "fp32", 0, False
        self.basis = BasisSpec()
        self.stored_basis: dict[str, NDArray[Any]] = {}
        self._names = list(start)
        constants = get_method(method).constants(self.config, self.targets)
        for name, value in start.items():
            rows = value.float().expand(users, *value.shape).clone()
            self.register_parameter(_key(name), nn.Parameter(rows))
            self.register_buffer(f"{_key(name)}_constant", torch.from_numpy(constants[name]))

    @abstractmethod
    def changes(self) -> Changes:
        """What targets' slots would hold, with gradients; called once a step."""

    def rows(self, name: str) -> Tensor:
        """[users, rows, length]: a tensor as it is used, rounded if training sees it rounded."""
        values: Tensor = self.get_parameter(_key(name))
        values = fake_quantize(values, self.storage, self.group) if self.rounded else values
        return values * self.get_buffer(f"{_key(name)}_constant")[:, None]

    def unstacked(self, part: str, widths: Sequence[int], each: int = 1) -> Iterator[Tensor]:
        """[users, each, width]: the rows of `<part>.<width>` by target, in the targets' order."""
        rows = {width: self.rows(f"{part}.{width}") for width in dict.fromkeys(widths)}
        used = dict.fromkeys(rows, 0)
        for width in widths:
            yield rows[width][:, used[width] : used[width] + each]
            used[width] += each

    def values(self, user: int = 0) -> dict[str, NDArray[np.float32]]:
        """By tensor name of the file, [rows, length]: one user's numbers without any constant."""
        return {
            name: self.get_parameter(_key(name))[user].detach().cpu().numpy().copy()
            for name in self._names
        }


def _key(name: str) -> str:
    """A tensor's name as torch allows it for a parameter."""
    return name.replace(".", "_")


class TrainableMethod(Protocol):
    """A method. Its settings are a dataclass with defaults; instances hold no state."""

    @property
    def name(self) -> str:
        """As on the command line and in adapter files."""
        ...

    @property
    def default_lr(self) -> float:
        """The peak learning rate that suits the method (Adam)."""
        ...

    @property
    def settings(self) -> type:
        """The dataclass of the method's own settings."""
        ...

    def init(
        self,
        targets: Sequence[Target],
        settings: Mapping[str, Any],
        seed: int,
        users: int = 1,
        *,
        model: nn.Module | None = None,
    ) -> TrainableAdapter:
        """Fresh adapters: delta W is 0 and its gradient is not.

        Args:
            model: the backbone with the weights that training computes with, for methods that must
                know them.

        Raises:
            UsageError: a setting is unknown or makes no sense.
        """
        ...


def fake_quantize(values: Tensor, storage: str, group: int = 0) -> Tensor:
    """Round the last dimension as `regrow_format.quantize` does; gradients pass straight through.

    The masters stay in full precision (NOLA, arXiv 2310.02556, section 3.3).
    """
    bits = STORAGE[storage]
    if bits == 32:
        return values
    if group and bits <= 8:
        length = values.shape[-1]
        padded = functional.pad(values, (0, -length % group))
        pieces = padded.reshape(*values.shape[:-1], -1, group)
        return fake_quantize(pieces, storage).flatten(-2)[..., :length]
    with torch.no_grad():
        if bits == 16:
            rounded = values.half().to(values.dtype)
        else:
            top = 2 ** (bits - 1) - 1
            scale = values.abs().amax(dim=-1, keepdim=True) / top
            scale = torch.where(scale > 0, scale, torch.ones_like(scale))
            rounded = (values / scale).round().clamp(-top, top) * scale
    return values + (rounded - values).detach()


def parse_settings(
    kind: type, given: Mapping[str, Any], method: str, *, kept: Sequence[str] | None = None
) -> dict[str, Any]:
    """The settings dataclass `kind` with `given` in it, as a dict; strings are converted.

    Args:
        kept: the settings that the file's config has as they are; all if None. Others are not
            checked here.

    Raises:
        UsageError: a name is unknown (all names are listed), a value has the wrong type, or one
            that the device would not read.
    """
    known = {f.name: f.default for f in fields(kind)}
    values = {}
    for name, value in given.items():
        if name not in known:
            listed = ", ".join(f"{n}={d}" for n, d in known.items()) or "none: it has no settings"
            raise UsageError(f"settings of {method} must be among {listed}, got {name!r}")
        values[name] = _convert(value, type(known[name]), f"{method}'s {name}")
    settings = asdict(kind(**values))
    config = {k: v for k, v in settings.items() if kept is None or k in kept}
    try:
        checked = get_method(method).check_config(config, method)
    except FormatError as error:
        raise UsageError(str(error)) from None
    return {**settings, **{name: checked[name] for name in config}}


def _convert(value: Any, kind: type, what: str) -> Any:
    if kind is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    try:
        converted = kind(value)
    except (TypeError, ValueError):
        converted = None
    exact = isinstance(value, str) or converted == value
    if converted is None or not exact or (kind is bool and not isinstance(value, bool)):
        raise UsageError(f"{what} must be of type {kind.__name__}, got {value!r}")
    return converted
