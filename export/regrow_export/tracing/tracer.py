"""From a torch module to an ONNX graph: optimum for Hugging Face models, torch.onnx for others.

Nothing here goes to the network: models are in memory, and optimum's lower functions, which are
used here, do not look for preprocessors on a hub as its higher ones do.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from regrow_export.environment import release_memory, require_module
from regrow_export.graph import OPSET
from regrow_export.slots import learn_folds, shared_copy
from regrow_format.errors import RegrowError, UsageError
from regrow_format.kv_cache import CacheSpec

from .control_flow import check_flow
from .kv_cache import cache_names, cache_of
from .model_inputs import completed, dummy_inputs

__all__ = ["Traced", "called_modules", "run_torch", "trace"]

_BATCH = 3

Arrays = Mapping[str, NDArray[Any]]


@dataclass
class Traced:
    """A traced graph, as the exporter made it until passes change it, and inputs to run it on.

    Attributes:
        graph: with its weights inside.
        inputs: by name, batch 3: those given, repeated or cut to 3 rows, or made up.
        outputs: names, in order; those of the cache are not among them.
        cache: the key-value cache, if it was traced with one.
        fixed: by name of an input of four dimensions, those after the batch that may not vary.
    """

    graph: onnx.ModelProto
    inputs: dict[str, NDArray[Any]]
    outputs: tuple[str, ...]
    fixed: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    cache: CacheSpec | None = None


def trace(
    model: nn.Module, task: str, inputs: Arrays | None, folder: Path, *, cache: bool = False
) -> Traced:
    """Trace a module; `folder` takes the exporter's files.

    Args:
        cache: with a key-value cache, if optimum knows one for the model and the task.

    Raises:
        UsageError: the task or the architecture is unknown to optimum and no inputs are given, or
            the inputs do not fit the model.
        RegrowError: the exporter failed.
    """
    config = _optimum_config(model, task, inputs is not None)
    past = _with_past(model, task) if cache and config is not None else None
    if config is None and inputs is None:
        raise UsageError(
            "inputs must be given for a model that is not from transformers, got none "
            "(--inputs FILE.npz on the command line)"
        )
    path = folder / "traced.onnx"
    made = _inputs(model, config, inputs)
    _check_arguments(model, made)
    try:
        learn_folds(model, lambda: run_torch(model, made), _BATCH)
        copied = shared_copy(model)  # exporters change attributes of what they trace
        release_memory()
        if config is not None:
            traced = _trace_optimum(copied, past or config, made, path)
        else:
            traced = _trace_plain(copied, made, path)
        return replace(traced, fixed=_fixed_sizes(model, traced.inputs))
    except (RegrowError, OSError):  # the latter: files could not be written
        raise
    except Exception as error:  # exporters raise whatever comes up inside the model
        raise _untraced(model, error) from error


def _untraced(model: nn.Module, error: Exception) -> RegrowError:
    own = getattr(model, "config", None)
    if getattr(own, "is_encoder_decoder", False):
        return RegrowError(
            "architecture must be an encoder or a decoder alone, got "
            f"{getattr(own, 'model_type', 'one')}, which has both: give package.module:function "
            f"that returns one of them, and --inputs ({_first_line(error)})"
        )
    return RegrowError(
        f"model must be one that torch.onnx can trace, got {_first_line(error)}: give "
        "package.module:function that returns it without what cannot be traced"
    )


def _fixed_sizes(model: nn.Module, made: Arrays) -> dict[str, tuple[int, ...]]:
    """Channels of images, and height and width too where the model takes no others.

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
    require_module("optimum.exporters.onnx.model_configs")
    from optimum.exporters.tasks import TasksManager

    if task.endswith("-with-past"):
        raise UsageError(
            f"task must be {task.removesuffix('-with-past')!r}, which has a key-value cache unless "
            f"--no-cache says otherwise, got {task!r}"
        )
    try:
        make = TasksManager.get_exporter_config_constructor(
            "onnx", model=model, task=TasksManager.map_from_synonym(task),
            library_name="transformers",
        )  # fmt: skip
        config = _with_outputs(make(model.config), getattr(model, "extra_outputs", {}))
    except (KeyError, ValueError) as error:
        if has_inputs:
            return None
        raise _unknown(own, task) from error
    if not (lost := _no_arguments(model, config)):
        return config
    if has_inputs:
        return None
    raise UsageError(
        f"inputs must be given for {type(model).__name__}, a part of what optimum exports for "
        f"{own.model_type} (it takes no {', '.join(lost)}), got none (--inputs FILE.npz on the "
        "command line): torch.onnx traces it then"
    )


def _no_arguments(model: nn.Module, config: Any) -> list[str]:
    """Inputs of optimum's config that the model does not take: it is an encoder alone."""
    known = inspect.signature(model.forward).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
    return [] if takes_all else [name for name in config.inputs if name not in known]


def _unknown(own: Any, task: str) -> UsageError:
    """Which of the two optimum does not know, the architecture or the task, and the other way."""
    from optimum.exporters.tasks import TasksManager

    kinds = TasksManager._LIBRARY_TO_SUPPORTED_MODEL_TYPES["transformers"]
    known = kinds.get(own.model_type, {}).get("onnx", {})
    what = (
        f"task must be one that optimum exports for {own.model_type}, got {task!r}"
        if known
        else f"architecture must be one that optimum exports, got {own.model_type}"
    )
    return UsageError(
        f"{what}: give inputs by the names of its arguments (--inputs FILE.npz on the command "
        "line) to trace it with torch.onnx instead"
    )


def _with_outputs(config: Any, more: Mapping[str, dict[int, str]]) -> Any:
    """`config` with outputs that optimum does not know of, and their dynamic axes, at the end."""
    kind = type(config)
    if more:
        outputs = property(lambda self: {**kind.outputs.fget(self), **more})
        config.__class__ = type(kind.__name__, (kind,), {"outputs": outputs})
    return config


def _with_past(model: nn.Module, task: str) -> Any | None:
    """optimum's export config with a key-value cache, or None if it has none."""
    from optimum.exporters.tasks import TasksManager

    if TasksManager.map_from_synonym(task) != "text-generation":
        return None
    try:
        make = TasksManager.get_exporter_config_constructor(
            "onnx", model=model, task="text-generation-with-past", library_name="transformers"
        )
        return make(model.config, use_past=True, use_past_in_inputs=True)
    except (KeyError, ValueError, TypeError):
        return None


def _trace_optimum(model: nn.Module, config: Any, made: Arrays, path: Path) -> Traced:
    from optimum.exporters.onnx.convert import export_pytorch

    past = getattr(config, "use_past_in_inputs", False)
    wanted = [n for n in config.ordered_inputs(model) if not n.startswith("past_key_values.")]
    _check_inputs(made, wanted)
    _, outputs = export_pytorch(model, config, OPSET, path)
    graph = onnx.load(str(path))
    taken = {value.name for value in graph.graph.input}  # the tracer drops those not read
    cache = cache_of(graph, model) if past else None
    kept = {name: value for name, value in made.items() if name in taken}
    outputs = [name for name in outputs if name not in cache_names(cache)]
    return Traced(graph, kept, tuple(outputs), cache=cache)


def _inputs(model: nn.Module, config: Any | None, given: Arrays | None) -> dict[str, NDArray[Any]]:
    """Those given, or else made up; batch 3."""
    if given is None:
        return dummy_inputs(config, model, _BATCH)
    wanted = [] if config is None else list(config.ordered_inputs(model))
    return completed(_rows(given, _BATCH), wanted)


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
    check_flow(partial(run_torch, model), made)
    names, inner = tuple(made), model.forward

    def forward(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(inputs_by_name(inner(**dict(zip(names, values, strict=True)))).values())

    # On the instance, not in a wrapper: parameters keep their module paths.
    model.forward = forward
    tensors = tuple(torch.from_numpy(value) for value in made.values())
    torch.onnx.export(
        model, tensors, str(path), input_names=list(names), output_names=list(outputs),
        dynamic_axes={name: {0: "batch_size"} for name in (*names, *outputs)},
        opset_version=OPSET, dynamo=False,
    )  # fmt: skip
    graph = onnx.load(str(path))
    taken = {value.name for value in graph.graph.input}
    if unread := [name for name in names if name not in taken]:
        raise UsageError(
            f"inputs must be what the outputs depend on, got {', '.join(unread)}, which the traced "
            "graph does not read: leave it out, or the model decides by its values"
        )
    return Traced(graph, dict(made), outputs)


def _check_arguments(model: nn.Module, inputs: Arrays) -> None:
    known = inspect.signature(model.forward).parameters
    unknown = [name for name in inputs if name not in known]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        raise UsageError(f"inputs must be arguments of forward: {', '.join(known)}; got {unknown}")


def inputs_by_name(result: Any) -> dict[str, torch.Tensor]:
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
    return {name: value.numpy() for name, value in inputs_by_name(result).items()}


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
