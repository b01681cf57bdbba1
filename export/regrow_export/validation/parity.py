"""Running a fresh bundle against torch: the base, an adapter, and that every slot does something.

An absolute tolerance on random inputs misses an adapter without effect, so effects are asserted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow_export.slots import Feeds
from regrow_export.tracing import decoded, padded_inputs
from regrow_format.errors import RegrowError
from regrow_format.kv_cache import CacheSpec
from regrow_format.manifest import Slot
from regrow_format.slot_kinds import SLOT_KINDS

if TYPE_CHECKING:
    import onnxruntime as ort
    from torch import nn

__all__ = ["ATOL", "RTOL", "Checker", "check_adapter", "check_folded", "check_slots"]

# ONNX Runtime and torch sum in different orders; optimum's own default is an atol of 1e-4.
RTOL, ATOL = 1e-3, 1e-4
# Where inputs of layers are rounded to 8 bits, as torch's are not: the root of the mean square of
# the difference, over that of the outputs.
INT8_SHARE = 0.1
MADE_SHARE = 0.2  # the same with made adapters, which change weights by as much as there was
_RANK = 4
_BATCHES = (2, 3)
# How often made adapters are halved for a model that amplifies rounding with them, and a change of
# its inputs that is a few times that of rounding.
_HALVINGS, _ROUNDING = 8, 2.0**-20

Arrays = Mapping[str, NDArray[Any]]
Reference = Callable[[Arrays], Arrays]


class Checker:
    """Holds a bundle's session and the inputs to check it with.

    Args:
        path: the graph.
        inputs: batch 3.
        outputs: names of the outputs that are compared.
        precision: int8 rounds inputs of layers, and is held to a share of the outputs. int4 is
            compared with float32 inputs, which ONNX Runtime must be told.
        cache: if the graph has one, every comparison is also made token by token through it.
    """

    def __init__(
        self, path: Path, inputs: Arrays, outputs: Sequence[str], precision: str = "fp32",
        cache: CacheSpec | None = None,
    ) -> None:  # fmt: skip
        self.inputs, self.outputs, self.cache = inputs, list(outputs), cache
        self.share = INT8_SHARE if precision == "int8" else None
        self._base: Arrays = {}
        self.session = self.deployed = _open(path, {})
        if precision == "int4":
            self.session = _open(path, {"session.qdq_matmulnbits_accuracy_level": "1"})

    def rows(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Some rows of the inputs."""
        return {name: value[start:stop] for name, value in self.inputs.items()}

    def run(self, inputs: Arrays, feeds: Arrays, what: str) -> dict[str, NDArray[Any]]:
        """Outputs by name; `RegrowError` says what was being checked."""
        past = self.cache.empty(len(next(iter(inputs.values())))) if self.cache else {}
        return self._run(self.outputs, {**past, **inputs, **feeds}, what)

    def _run(self, outputs: Sequence[str], feeds: Arrays, what: str) -> dict[str, NDArray[Any]]:
        try:
            found = self.session.run(outputs, feeds)
        except Exception as error:  # as above
            raise RegrowError(f"{what}: ONNX Runtime could not run the graph: {error}") from error
        return dict(zip(outputs, found, strict=True))

    def base(self, reference: Reference) -> dict[str, float]:
        """The base against torch, and as ONNX Runtime runs int4 unless it is told otherwise."""
        found = {"base_max_abs": self.against(reference, {}, "base")}
        if self.deployed is not self.session:
            loose = copy(self)
            loose.session, loose.share = self.deployed, INT8_SHARE
            what = "base with rounded inputs"
            found["rounded_inputs_max_abs"] = loose.against(reference, {}, what)
        return found

    def against(self, reference: Reference, feeds: Arrays, what: str) -> float:
        """Largest |ONNX Runtime - torch| on batches of 2 and 3."""
        worst = self._decode(reference, feeds, what)
        for batch in _BATCHES:
            inputs = self.rows(0, batch)
            worst = max(
                worst, self._compare(self.run(inputs, feeds, what), reference(inputs), what)
            )
        return worst

    def _decode(self, reference: Reference, feeds: Arrays, what: str) -> float:
        """The same of logits that come through the cache, in a batch with padding."""
        if (cache := self.cache) is None:
            return 0.0
        inputs = padded_inputs(cache, self.inputs)
        names = [cache.logits, *(tensor.present for tensor in cache.tensors)]
        got = decoded(cache, inputs, lambda fed: self._run(names, {**fed, **feeds}, what))
        real = inputs[cache.inputs["attention_mask"]] != 0
        want = reference(inputs)[cache.logits][real]
        return compare(got[real], want, f"{what}, with the key-value cache", self.share)

    def mixed(self, reference: Callable[[int, Arrays], Arrays], feeds: Arrays) -> float:
        """One adapter per sample: every row must equal a run of its own with its adapter."""
        what, count = "a batch with one adapter per sample", _BATCHES[-1]
        try:
            together = self.run(self.rows(0, count), feeds, what)
        except RegrowError as error:
            raise RegrowError(
                "targets must see the samples of the batch first to have an adapter each, got a "
                "model that puts something else first: export it with a fixed rank, which is one "
                "adapter a batch (--fixed-rank on the command line), or merged"
            ) from error
        pairs: list[tuple[Arrays, Arrays]] = []
        for row in range(count):
            alone = reference(row, self.rows(row, row + 1))
            part = {name: _own(value, row, alone[name]) for name, value in together.items()}
            pairs.append((part, alone))
        if self.share is not None:  # a mean: of one number near 0 (CLIP's logits) it says nothing
            pairs = [_joined(pairs)]
        return max(self._compare(part, alone, what) for part, alone in pairs)

    def change(self, feeds: Arrays, what: str) -> float:
        """Largest |with feeds - without|."""
        if not self._base:
            self._base = self.run(self.rows(0, 1), {}, "base")
        return largest_change(self._base, self.run(self.rows(0, 1), feeds, what))

    def effect(self, feeds: Arrays, what: str) -> float:
        """As `change`; `RegrowError` if it is 0."""
        return _not_zero(self.change(feeds, what), what)

    def _compare(self, got: Arrays, want: Arrays, what: str) -> float:
        worst = 0.0
        for name in self.outputs:
            if name not in want:
                raise RegrowError(f"{what}: torch must give {name}, got {', '.join(want)}")
            where = f"{what}, output {name}"
            worst = max(worst, compare(got[name], want[name], where, self.share))
        return worst


def _own(value: NDArray[Any], row: int, alone: NDArray[Any]) -> NDArray[Any]:
    """A sample's row; where it has a column per sample (CLIP's logits), the sample's own."""
    own = value[row : row + 1]
    pairs = alone.shape == (1, 1) and own.shape == (1, len(value))
    return own[:, row : row + 1] if pairs else own


def _joined(pairs: Sequence[tuple[Arrays, Arrays]]) -> tuple[Arrays, Arrays]:
    """The rows of all pairs as one pair."""
    parts, alone = zip(*pairs, strict=True)
    both = [
        {name: np.concatenate([rows[name] for rows in side]) for name in pairs[0][0]}
        for side in (parts, alone)
    ]
    return both[0], both[1]


def _open(path: Path, config: Mapping[str, str]) -> ort.InferenceSession:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4  # it warns once per overridable input; errors are raised too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    for name, value in config.items():
        options.add_session_config_entry(name, value)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise RegrowError(f"ONNX Runtime must load the exported graph, got: {error}") from error


def _not_zero(change: float, what: str) -> float:
    if change == 0:
        raise RegrowError(
            f"{what} must change the output, got no change; drop it from the targets, or give "
            "inputs that reach it"
        )
    return change


def largest_change(one: Arrays, other: Arrays) -> float:
    """Largest absolute difference over all outputs; infinite where shapes differ."""
    changes = [0.0]
    for name, value in one.items():
        same = value.shape == other[name].shape
        changes.append(float(np.abs(value - other[name]).max(initial=0.0)) if same else np.inf)
    return max(changes)


def compare(got: NDArray[Any], want: NDArray[Any], what: str, share: float | None = None) -> float:
    """Largest |got - want|; `RegrowError` beyond the tolerance, which grows with max |want|.

    Args:
        share: if given, the tolerance of the mean instead, as a share of the outputs'.
    """
    if got.shape != want.shape:
        raise RegrowError(f"{what}: shape must be {list(want.shape)}, got {list(got.shape)}")
    delta = np.abs(got.astype(np.float64) - want.astype(np.float64))
    worst = float(delta.max(initial=0.0))
    if share is not None:
        _compare_mean(delta, want, share, what)
        return worst
    if not _is_near(got, want):
        size = float(np.abs(want).max(initial=0.0))
        raise RegrowError(
            f"{what}: ONNX Runtime and torch must agree within rtol {RTOL:g} and atol {ATOL:g}, "
            f"got a difference of {worst:.3g} where outputs reach {size:.3g}"
        )
    return worst


def _is_near(got: NDArray[Any], want: NDArray[Any]) -> bool:
    """Whether all of it is within the tolerance, which NaN is not."""
    delta = np.abs(got.astype(np.float64) - want.astype(np.float64))
    size = float(np.abs(want).max(initial=0.0))
    return bool((delta <= ATOL * max(1.0, size) + RTOL * np.abs(want)).all())


def _compare_mean(delta: NDArray[np.float64], want: NDArray[Any], share: float, what: str) -> None:
    found, size = (float(np.sqrt(np.square(v, dtype=np.float64).mean())) for v in (delta, want))
    if not found <= max(share * size, ATOL):  # not so for NaN either
        raise RegrowError(
            f"{what}: ONNX Runtime and torch must agree within {share:g} of the outputs' size, "
            f"{size:.3g}, got a difference of {found:.3g} (roots of mean squares): try fp16 or int4"
        )


def random_feeds(slots: Sequence[Slot], count: int) -> Feeds:
    """`count` made adapters, the same at every call, large enough to be seen; low ranks are 4."""
    rng = np.random.default_rng(0)
    feeds: Feeds = {}
    for slot in slots:
        kind, rank = SLOT_KINDS[slot.kind], slot.rank or _RANK
        for part in kind.parts:
            value = rng.standard_normal((count, *kind.shape(part, slot, rank)))
            value *= kind.deviation(part, slot, rank)
            feeds[slot.inputs[part]] = value.astype(np.float32)
    return feeds


def check_slots(checker: Checker, slotted: nn.Module, slots: Sequence[Slot]) -> dict[str, float]:
    """A made adapter in every slot, in each slot alone, and one per sample where n may be more
    than 1; figures by name.

    Args:
        slotted: the torch model with the same slots; its slots are set.
    """
    from regrow_export.slots import set_slots
    from regrow_export.tracing import run_torch

    reference = partial(run_torch, slotted)
    if checker.share is not None:
        checker = copy(checker)
        checker.share = MADE_SHARE
    strength = _strength(checker, slotted, slots)
    feeds = _scaled(random_feeds(slots, 1), strength)
    set_slots(slotted, feeds)
    found = {"adapter_max_abs": checker.against(reference, feeds, "a made adapter")}
    found["adapter_effect"] = checker.effect(feeds, "a made adapter")
    effects = [_effect_of(checker, slotted, slot, feeds) for slot in slots]
    found["slot_effect_min"] = min((e for e in effects if e is not None), default=0.0)
    if any(slot.fixed for slot in slots):
        return found
    many = _scaled(random_feeds(slots, _BATCHES[-1]), strength)

    def alone(row: int, inputs: Arrays) -> Arrays:
        set_slots(slotted, {name: value[row : row + 1] for name, value in many.items()})
        return reference(inputs)

    found["mixed_max_abs"] = checker.mixed(alone, many)
    return found


def _strength(checker: Checker, slotted: nn.Module, slots: Sequence[Slot]) -> float:
    """What to multiply made adapters by, so that outputs do not hang on how sums are rounded.

    A deep model without norms that look at their inputs, such as BatchNorm in use, amplifies
    changes from layer to layer. 1 if inputs are no floats.
    """
    from regrow_export.slots import set_slots
    from regrow_export.tracing import run_torch

    inputs = checker.rows(0, _BATCHES[0])
    if all(value.dtype != np.float32 for value in inputs.values()):
        return 1.0
    moved = {name: value * (1 + _ROUNDING) if value.dtype == np.float32 else value
             for name, value in inputs.items()}  # fmt: skip
    feeds = random_feeds(slots, 1)
    for halvings in range(_HALVINGS):
        set_slots(slotted, _scaled(feeds, 0.5**halvings))
        want, found = (run_torch(slotted, side) for side in (inputs, moved))
        if all(_is_near(found[name], want[name]) for name in checker.outputs):
            return 0.5**halvings
    return 0.5**_HALVINGS


def _scaled(feeds: Feeds, factor: float) -> Feeds:
    return {name: value * np.float32(factor) for name, value in feeds.items()}


def _effect_of(checker: Checker, slotted: nn.Module, slot: Slot, feeds: Feeds) -> float | None:
    """The effect of one slot alone, or None where torch has none either, and may."""
    own = {name: feeds[name] for name in slot.inputs.values()}
    what = f"slot {slot.target} ({slot.kind})"
    found = checker.change(own, what)
    if SLOT_KINDS[slot.kind].may_cancel and found < ATOL:
        others = {name: np.zeros_like(value) for name, value in feeds.items()}
        if _torch_change(checker, slotted, others, own) < ATOL:
            return None
    return _not_zero(found, what)


def _torch_change(checker: Checker, slotted: nn.Module, one: Feeds, other: Feeds) -> float:
    """Largest change of torch's outputs when slots are set to `other` after `one`."""
    from regrow_export.slots import set_slots
    from regrow_export.tracing import run_torch

    outputs = []
    for feeds in (one, other):
        set_slots(slotted, feeds)
        outputs.append(run_torch(slotted, checker.rows(0, 1)))
    return largest_change(*outputs)


def check_adapter(
    checker: Checker, base: nn.Module, slotted: nn.Module, feeds: Feeds
) -> dict[str, float]:
    """A bundle with an adapter built in against torch with the adapter in its slots."""
    from regrow_export.slots import set_slots
    from regrow_export.tracing import run_torch

    set_slots(slotted, feeds)
    found = {"adapter_max_abs": checker.against(partial(run_torch, slotted), {}, "the adapter")}
    return found | _effect_in_torch(checker.rows(0, _BATCHES[0]), base, slotted, feeds)


def check_folded(
    inputs: Arrays, base: nn.Module, slotted: nn.Module, folded: nn.Module, feeds: Feeds
) -> dict[str, float]:
    """A torch model with an adapter in its weights against the same adapter in slots."""
    from regrow_export.slots import set_slots
    from regrow_export.tracing import run_torch

    set_slots(slotted, feeds)
    want = run_torch(slotted, inputs)
    for name, value in run_torch(folded, inputs).items():
        compare(value, want[name], f"the adapter in the weights, output {name}")
    return _effect_in_torch(inputs, base, slotted, feeds)


def _effect_in_torch(
    inputs: Arrays, base: nn.Module, slotted: nn.Module, feeds: Feeds
) -> dict[str, float]:
    """What an adapter in `slotted` changes, which must be something."""
    from regrow_export.tracing import run_torch

    found: dict[str, float] = {}
    change = largest_change(run_torch(base, inputs), run_torch(slotted, inputs))
    if change == 0 and _is_change(slotted, feeds):
        raise RegrowError("the adapter must change the output, got no change on the check's inputs")
    if np.isfinite(change):  # with another number of classes there is no difference to take
        found["adapter_effect"] = change
    return found


def _is_change(slotted: nn.Module, feeds: Feeds) -> bool:
    """Whether what targets' slots are fed changes anything."""
    from regrow_export.slots import TargetSlot

    targets = (module for module in slotted.modules() if isinstance(module, TargetSlot))
    slots = [slot for target in targets for slot in target.slots]
    fed = [slot for slot in slots if feeds.keys() >= set(slot.inputs.values())]
    return any(
        SLOT_KINDS[slot.kind].is_change({part: feeds[name] for part, name in slot.inputs.items()})
        for slot in fed
    )
