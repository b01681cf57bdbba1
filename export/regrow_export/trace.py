"""From a torch module to an ONNX graph: optimum for Hugging Face models, torch.onnx for others.

Nothing here goes to the network: models are in memory, and optimum's lower functions, which are
used here, do not look for preprocessors on a hub as its higher ones do.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from regrow_runtime.errors import RegrowError, UsageError

from .extras import need
from .graph import OPSET
from .slots import learn_folds, shared_copy

__all__ = ["Traced", "called_modules", "run_torch", "trace"]

_BATCH = 3

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Traced:
    """A traced graph, still as the exporter made it, and inputs that it can be run on.

    Attributes:
        graph: with its weights inside.
        inputs: by name, batch 3: those given, repeated or cut to 3 rows, or made up.
        outputs: names, in order.
        fixed: by name of an input of four dimensions, those after the batch that may not vary.
    """

    graph: onnx.ModelProto
    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...]
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def trace(model: nn.Module, task: str, inputs: Arrays | None, folder: Path) -> Traced:
    """Trace a module; `folder` takes the exporter's files.

    Raises:
        UsageError: the task or the architecture is unknown to optimum and no inputs are given, or
            the inputs do not fit the model.
        RegrowError: the exporter failed.
    """
    config = _optimum_config(model, task, inputs is not None)
    if config is None and inputs is None:
        raise UsageError(
            "inputs must be given for a model that is not from transformers, got none "
            "(--inputs FILE.npz on the command line)"
        )
    path = folder / "traced.onnx"
    made = _made_inputs(config) if inputs is None else _rows(inputs, _BATCH)
    _check_arguments(model, made)
    try:
        learn_folds(model, lambda: run_torch(model, made), _BATCH)
        copied = shared_copy(model)  # exporters change attributes of what they trace
        if config is not None:
            traced = _trace_optimum(copied, config, made, path)
        else:
            traced = _trace_plain(copied, made, path)
        return replace(traced, fixed=_fixed_sizes(model, traced.inputs))
    except RegrowError:
        raise
    except Exception as error:  # exporters raise whatever comes up inside the model
        raise RegrowError(f"the model could not be traced: {_first_line(error)}") from error


def _fixed_sizes(model: nn.Module, made: Arrays) -> dict[str, tuple[int, ...]]:
    """Channels of pictures, and height and width too where the model takes no others.

    Tracers call all of them dynamic, and a graph may compute nonsense for a size that the model
    itself would refuse.
    """
    found = {}
    for name, value in made.items():
        if value.ndim == 4:
            larger = {**made, name: np.pad(value, ((0, 0), (0, 0), (0, 1), (0, 1)))}
            try:
                run_torch(model, larger)
            except Exception:  # whatever the model raises to refuse it
                found[name] = value.shape[1:]
            else:
                found[name] = value.shape[1:2]
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def _optimum_config(model: nn.Module, task: str, has_inputs: bool) -> Any | None:
    """optimum's export config of the model, or None where torch.onnx is to trace it."""
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "model_type"):
        return None
    need("optimum.exporters.onnx.model_configs")
    from optimum.exporters.tasks import TasksManager

    if task.endswith("-with-past"):
        raise UsageError(f"task must be one without a key-value cache, got {task!r}")
    try:
        make = TasksManager.get_exporter_config_constructor(
            "onnx", model=model, task=TasksManager.map_from_synonym(task),
            library_name="transformers",
        )  # fmt: skip
        return make(model.config)
    except (KeyError, ValueError) as error:
        if has_inputs:
            return None
        raise UsageError(
            f"task must be one that optimum exports for {own.model_type}, got {task!r} "
            f"({_first_line(error)}); give inputs to trace the model without optimum"
        ) from error


def _trace_optimum(model: nn.Module, config: Any, made: Arrays, path: Path) -> Traced:
    from optimum.exporters.onnx.convert import export_pytorch

    wanted = list(config.ordered_inputs(model))
    _check_inputs(made, wanted)
    _, outputs = export_pytorch(model, config, OPSET, path)
    graph = onnx.load(str(path))
    taken = {value.name for value in graph.graph.input}  # the tracer drops those not read
    return Traced(graph, {k: v for k, v in made.items() if k in taken}, tuple(outputs))


def _made_inputs(config: Any) -> dict[str, NDArray[Any]]:
    """optimum's dummy inputs, batch 3, the same at every call; the caller's random state stays."""
    state = random.getstate()
    try:
        random.seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = config.generate_dummy_inputs(framework="pt", batch_size=_BATCH)
            made = config.rename_ambiguous_inputs(made)
    finally:
        random.setstate(state)
    return {name: value.numpy() for name, value in made.items() if isinstance(value, torch.Tensor)}


def _rows(inputs: Arrays, count: int) -> dict[str, NDArray[Any]]:
    """The first `count` rows of every input, from the start again where there are fewer."""
    for name, value in inputs.items():
        if value.ndim == 0 or len(value) == 0:
            raise UsageError(f"inputs must have a batch first, got {name} {list(value.shape)}")
    return {name: value[np.arange(count) % len(value)] for name, value in inputs.items()}


def _check_inputs(given: Arrays, wanted: Sequence[str]) -> None:
    missing = [name for name in wanted if name not in given]
    if missing:
        raise UsageError(f"inputs must have {', '.join(wanted)}, got {', '.join(given) or 'none'}")


def _trace_plain(model: nn.Module, made: Arrays, path: Path) -> Traced:
    outputs = tuple(run_torch(model, made))
    names, inner = tuple(made), model.forward

    def forward(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_by_name(inner(**dict(zip(names, values, strict=True)))).values())

    # On the instance, not in a wrapper: parameters keep their module paths.
    model.forward = forward
    tensors = tuple(torch.from_numpy(value) for value in made.values())
    torch.onnx.export(
        model, tensors, str(path), input_names=list(names), output_names=list(outputs),
        dynamic_axes={name: {0: "batch_size"} for name in (*names, *outputs)},
        opset_version=OPSET, dynamo=False,
    )  # fmt: skip
    graph = onnx.load(str(path))
    _check_inputs({value.name: made[value.name] for value in graph.graph.input}, names)
    return Traced(graph, dict(made), outputs)


def _check_arguments(model: nn.Module, inputs: Arrays) -> None:
    known = inspect.signature(model.forward).parameters
    unknown = [name for name in inputs if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise UsageError(f"inputs must be arguments of forward: {', '.join(known)}; got {unknown}")


def _by_name(result: Any) -> dict[str, torch.Tensor]:
    """A module's result as named tensors: names of a mapping, else output or output_0, …"""
    if isinstance(result, torch.Tensor):
        return {"output": result}
    if isinstance(result, Mapping):
        return {str(name): v for name, v in result.items() if isinstance(v, torch.Tensor)}
    if isinstance(result, list | tuple) and all(isinstance(v, torch.Tensor) for v in result):
        return {f"output_{i}": value for i, value in enumerate(result)}
    raise UsageError(f"model must give tensors, got {type(result).__name__}")


def run_torch(model: nn.Module, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Outputs of a torch module by name, for inputs by argument name."""
    with torch.inference_mode():
        result = model(**{name: torch.tensor(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in _by_name(result).items()}


def called_modules(model: nn.Module, inputs: Arrays) -> set[str]:
    """Module paths of what the forward pass calls."""
    found: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: found.add(name))
        for name, module in model.named_modules()
    ]
    try:
        run_torch(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
