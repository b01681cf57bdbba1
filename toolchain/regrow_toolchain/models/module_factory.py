"""Plain modules: a function of the user's, `package.module:function`, that returns one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module, invalidate_caches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regrow_format.errors import RegrowError, UsageError

__all__ = [
    "FUNCTION",
    "Declared",
    "check_finite",
    "check_weights",
    "declared",
    "function_called",
    "made_by",
    "tied",
    "unique_tensors",
]

_NAME = r"[^\W\d]\w*(?:\.[^\W\d]\w*)*"
# `package.module:function`, and `package.module:function@FOLDER` for what was compressed from it.
FUNCTION = re.compile(rf"(?P<function>{_NAME}:{_NAME})(?:@(?P<folder>.+))?")
_SHOWN = 5


@dataclass(frozen=True)
class Declared:
    """What a module says about itself, by attributes of these names; None where it does not.

    Attributes:
        head: module paths of the head's linear layers; empty for none.
        labels: class names in the order of the outputs.
        task: such as "image-classification".
    """

    head: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    task: str | None = None


def made_by(function: str) -> nn.Module:
    """What the function returns, in eval mode; its module may lie in the current directory.

    Importing runs the module's code: the name must come from the user, never from a file.

    Raises:
        UsageError: there is no such module or function, or it returns no `nn.Module`.
        RegrowError: the module or the function raised an error of its own.
    """
    with _current_directory():
        found = function_called(function, "backbone")
        try:
            with torch.random.fork_rng(devices=[]):
                model = found()
        except Exception as error:  # whatever the user's code raises
            raise RegrowError(f"{function} must return a model, got {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{function} must return an nn.Module, got {type(model).__name__}")
    return model.eval()


def function_called(function: str, what: str) -> Callable[..., Any]:
    """The function `package.module:function`, imported; `what` it is for begins the errors.

    Raises:
        UsageError: there is no such module or function.
        RegrowError: the module raised an error of its own.
    """
    if not FUNCTION.fullmatch(function) or "@" in function:
        raise UsageError(f"{what} must be package.module:function, got {function!r}")
    module_name, _, name = function.partition(":")
    with _current_directory():
        found = _imported(module_name, what)
    for part in name.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{what} must be a function, got {function}: no {part} there")
        found = getattr(found, part)
    if not callable(found):
        raise UsageError(f"{what} must be a function, got {function}: {type(found).__name__}")
    made: Callable[..., Any] = found
    return made


def _imported(name: str, what: str) -> Any:
    invalidate_caches()
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise RegrowError(f"{name} could not be imported: {_told(error)}") from error
        raise UsageError(
            f"{what} must be of a module that can be imported, here or where packages are "
            f"installed; got {name}: no module {error.name}"
        ) from None
    except Exception as error:  # whatever the user's code raises
        raise RegrowError(f"{name} could not be imported: {_told(error)}") from error


@contextmanager
def _current_directory() -> Iterator[None]:
    """The current directory among the places of modules, after all others."""
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.reverse()  # a module may have added places of its own: take out the last one
        if here in sys.path:
            sys.path.remove(here)
        sys.path.reverse()


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def declared(model: nn.Module, where: str) -> Declared:
    """The module's own attributes, checked.

    Raises:
        UsageError: an attribute is not what it must be, or they do not fit one another.
    """
    head, labels, task = (getattr(model, name, None) for name in ("head", "labels", "task"))
    found = Declared(
        None if head is None or isinstance(head, nn.Module) else _strings(head, "head", where),
        None if labels is None else _strings(labels, "labels", where),
        None if task is None else _word(task, where),
    )
    for name in found.head or ():
        try:
            layer = model.get_submodule(name)
        except AttributeError:
            layer = None
        if not isinstance(layer, nn.Linear):
            what = "nothing" if layer is None else type(layer).__name__
            raise UsageError(f"{where}: head must name linear layers, got {name}: {what}")
    return found


def _strings(value: object, name: str, where: str) -> tuple[str, ...]:
    items = (value,) if name == "head" and isinstance(value, str) else value
    if not isinstance(items, list | tuple) or not all(isinstance(i, str) and i for i in items):
        raise UsageError(f"{where}: {name} must be a list of strings, got {value!r:.80}")
    if len(set(items)) != len(items):
        raise UsageError(f"{where}: {name} must not repeat one, got {value!r:.80}")
    return tuple(items)


def _word(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f"{where}: task must be a string, got {value!r:.80}")
    return value


def check_weights(model: nn.Module, where: str) -> None:
    """Raise an error unless all weights are finite float32 on the CPU."""
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise UsageError(f"{where}: weights must be tensors, got {name}: {type(tensor)}")
        kind = str(tensor.dtype).removeprefix("torch.")
        if (tensor.is_floating_point() or tensor.is_complex()) and kind != "float32":
            raise UsageError(
                f"{where}: weights must be float32, got {name} in {kind}: use .float()"
            )
        if tensor.device.type != "cpu":
            raise UsageError(f"{where}: weights must be on the CPU, got {name} on {tensor.device}")
    check_finite(model, where)


def check_finite(model: nn.Module, where: str) -> None:
    """Raise `RegrowError` if a parameter is NaN or infinite; buffers may be, as masks are."""
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    if broken:
        more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise RegrowError(
            f"{where}: weights must be finite, got NaN or infinity in "
            f"{', '.join(broken[:_SHOWN])}{more}"
        )


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers, tied ones once, under their first name."""
    twice = tied(model)
    return {name: tensor for name, tensor in model.state_dict().items() if name not in twice}


def tied(model: nn.Module) -> dict[str, str]:
    """The first name of every tensor that has several, by each of the others."""
    first: dict[tuple[object, ...], str] = {}
    found = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.is_meta or not tensor.numel():
            continue
        if key in first:
            found[name] = first[key]
        else:
            first[key] = name
    return found
