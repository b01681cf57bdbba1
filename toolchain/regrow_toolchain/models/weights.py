"""The weights of a compressed backbone: into a model from its file, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regrow_format.errors import FormatError, MismatchError

from .module_factory import tied, unique_tensors

__all__ = ["WEIGHTS", "load_tied_weights", "load_weights", "save_weights"]

WEIGHTS = "regrow.safetensors"
_ALIGNED = 64  # bytes, as torch allocates


def load_weights(model: nn.Module, path: Path) -> None:
    """Into a model of transformers, which ties its weights itself.

    Raises:
        FormatError: the file is missing or broken.
        MismatchError: its tensors are not those of the model; every one is named.
    """
    tensors = _stored(path)
    findings = _unfitting(tensors, model.state_dict())
    fitting = {name: t for name, t in tensors.items() if name not in findings}
    model.load_state_dict(fitting, strict=False, assign=True)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    lost = [n for n, p in model.named_parameters() if p.is_meta and n not in tensors]
    _check_fit(path, findings, lost)


def load_tied_weights(model: nn.Module, path: Path) -> None:
    """Into a module that does not tie its weights itself: they are tied again as they were.

    Raises:
        FormatError: the file is missing or broken.
        MismatchError: its tensors are not those of the model; every one is named.
    """
    tensors = _stored(path)
    state, ties = unique_tensors(model), tied(model)
    findings = _unfitting(tensors, state)
    _check_fit(path, findings, [name for name in state if name not in tensors])
    model.load_state_dict(tensors, strict=False, assign=True)
    for name, first in ties.items():
        (owner, part), (other, same) = (name.rpartition(".")[::2] for name in (name, first))
        value = getattr(model.get_submodule(other), same)
        setattr(model.get_submodule(owner), part, value)


def _stored(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FormatError(f"{path} is missing: compress the model again")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise FormatError(
            f"{path} must be a whole safetensors file, got a broken one: copy it again, or "
            f"compress the model again ({error})"
        ) from None
    return {name: _aligned(tensor) for name, tensor in tensors.items()}


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would have put it: at a multiple of 64 bytes, not where a file has it.

    MKL without AVX-512 rounds products otherwise for other addresses: so what is loaded computes
    what was saved, to the bit.
    """
    return tensor if tensor.data_ptr() % _ALIGNED == 0 else tensor.clone()


def _unfitting(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """What is wrong, by name of a tensor."""
    findings = {}
    for name, tensor in tensors.items():
        if name not in state:
            findings[name] = f"{name} is unknown"
        elif tensor.shape != (shape := state[name].shape):
            findings[name] = f"{name} must be {list(shape)}, got {list(tensor.shape)}"
        elif tensor.dtype != (kind := state[name].dtype):
            findings[name] = f"{name} must be {kind}, got {tensor.dtype}"
    return findings


def _check_fit(path: Path, findings: Mapping[str, str], lost: Sequence[str]) -> None:
    if findings or lost:
        lines = [*findings.values(), *(f"{name} is missing" for name in lost)]
        raise MismatchError(f"{path} does not fit its config:", lines)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write them as `unique_tensors` has them; a part of another tensor is saved on its own."""
    tensors = {}
    for name, tensor in unique_tensors(model).items():
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor.contiguous() if whole else tensor.clone()
    save_file(tensors, path, {"format": "pt"})
