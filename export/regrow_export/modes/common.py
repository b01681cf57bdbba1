"""What the modes share: tracing, storing weights, writing the graph, and what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray
from torch import nn

from regrow_export.config import ExportConfig, ExportRequest
from regrow_export.graph import GRAPH_FILE, describe, keep_gelu, opset_of, save_graph, specs
from regrow_export.layers import block_weights
from regrow_export.quantization import check_slot_inputs, store_weights
from regrow_export.slots import KINDS, shared_copy
from regrow_export.source import ExportSource
from regrow_export.tracing import Traced, cache_names, called_modules, trace
from regrow_export.validation import Checker, scored
from regrow_format.adapter import Adapter
from regrow_format.kv_cache import CacheSpec
from regrow_format.manifest import Score, SeededSpec, Slot, TensorSpec

__all__ = [
    "Draft",
    "Job",
    "Mode",
    "draft_of",
    "keeps_default",
    "measured",
    "store",
    "traced_model",
    "write",
]


@dataclass(frozen=True, eq=False)
class Job:
    """One bundle to write: of what, what was asked for, and the folder that is to hold it."""

    source: ExportSource
    request: ExportRequest
    folder: Path

    @property
    def config(self) -> ExportConfig:
        """The settings."""
        return self.request.config

    @property
    def built_in(self) -> Adapter | None:
        """The adapter that is part of the bundle; that of a swappable one only shapes its slots."""
        return None if self.config.mode == "swappable" else self.request.adapter


@dataclass(frozen=True)
class Draft:
    """A graph that was written and checked, and what the manifest says about it."""

    file: str
    opset: int
    ir_version: int
    input_specs: tuple[TensorSpec, ...]
    output_specs: tuple[TensorSpec, ...]
    inputs: dict[str, NDArray[Any]]
    slots: tuple[Slot, ...] = ()
    seeded: SeededSpec | None = None
    parity: Mapping[str, float] = field(default_factory=dict)
    score: Score | None = None
    cache: CacheSpec | None = None


@dataclass(frozen=True)
class Mode:
    """One way to put a backbone and adapters into a bundle.

    Attributes:
        check: raises what is wrong with a request for this backbone, before anything is traced.
        draft: traces, writes, and compares to torch.
    """

    check: Callable[[ExportSource, ExportRequest], object]
    draft: Callable[[Job], Draft]


def traced_model(job: Job, model: nn.Module) -> Traced:
    """`model` as a graph, in memory."""
    with TemporaryDirectory(dir=job.folder) as scratch:
        return trace(
            model, job.source.task, job.request.inputs, Path(scratch), cache=job.config.cache
        )


def store(job: Job, model: nn.Module, traced: Traced, outside: Sequence[str] = ()) -> None:
    """Store the weights of the model's blocks in the precision; `outside` are layers with slots."""
    if job.config.precision == "fp32":
        return
    weights = [weight for weight in block_weights(model) if weight.owner not in outside]
    called = called_modules(model, traced.inputs)
    store_weights(traced.graph, weights, job.config.precision, called)


def write(job: Job, traced: Traced, slots: Sequence[Slot] = (), fed: Sequence[str] = ()) -> Checker:
    """Save the graph, its metadata in it, and open it in ONNX Runtime."""
    source, precision = job.source, job.config.precision
    keep_gelu(traced.graph)
    check_slot_inputs(traced.graph, _input_names(slots))
    metadata = {"backbone_id": source.backbone_id, "mode": job.config.mode, "task": source.task}
    describe(traced.graph, metadata | {"variant": precision})
    outside = _input_names([slot for slot in slots if keeps_default(slot)])
    inline = _input_names([slot for slot in slots if not slot.fixed])
    traced.graph = save_graph(traced.graph, job.folder, {*inline, *fed}, outside)
    return Checker(job.folder / GRAPH_FILE, traced.inputs, traced.outputs, precision, traced.cache)


def measured(job: Job, checker: Checker, exact: nn.Module) -> Score | None:
    """What the bundle loses on samples, beside `exact` in fp32."""
    exact = shared_copy(exact)
    return scored(checker.deployed, checker.outputs, checker.cache, exact, job.request.measure)


def draft_of(
    traced: Traced,
    parity: Mapping[str, float],
    score: Score | None,
    slots: tuple[Slot, ...] = (),
    spec: SeededSpec | None = None,
) -> Draft:
    """What the manifest says of a graph; slots, and what `spec` feeds, are no inputs of a model."""
    graph, cache = traced.graph, cache_names(traced.cache)
    fed = spec.inputs.values() if spec else ()
    return Draft(
        file=GRAPH_FILE,
        opset=opset_of(graph),
        ir_version=graph.ir_version,
        input_specs=tuple(
            _with_sizes(found, traced.fixed.get(found.name, ()))
            for found in specs(graph.graph.input, [*_input_names(slots), *fed, *cache])
        ),
        output_specs=specs(graph.graph.output, list(cache)),
        inputs=traced.inputs,
        slots=slots,
        seeded=spec,
        parity=parity,
        score=score,
        cache=traced.cache,
    )


def keeps_default(slot: Slot) -> bool:
    """Whether its default stays what the tracer wrote, in a file beside the graph."""
    return slot.kind in KINDS and KINDS[slot.kind].keeps_default


def _input_names(slots: Sequence[Slot]) -> list[str]:
    return [name for slot in slots for name in slot.inputs.values()]


def _with_sizes(spec: TensorSpec, sizes: Sequence[int]) -> TensorSpec:
    """`spec` with the dimensions after the batch that may not vary as numbers."""
    kept = spec.shape[1 + len(sizes) :]
    return replace(spec, shape=(*spec.shape[:1], *sizes, *kept)) if sizes else spec
