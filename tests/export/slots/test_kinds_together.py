"""Kinds of slots beside each other: one order in slots and in what is folded into a weight."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from regrow_export.modes import merged_model
from regrow_export.slots import KINDS, TARGET_KINDS, expansion_feeds, set_slots, with_slots
from regrow_format.adapter import Target
from regrow_format.slot_kinds import SLOT_KINDS

TARGET = Target("0", 5, 6)
# Those that a method's expansion can fill without more than its own tensors.
FREE = [
    name
    for name in TARGET_KINDS
    if not KINDS[name].constant_names and not SLOT_KINDS[name].takes_dense
]


def _parts(name: str) -> dict[str, np.ndarray]:
    kind, draw = SLOT_KINDS[name], np.random.default_rng(len(name))
    slot = KINDS[name].slot(TARGET)
    shapes = {part: kind.shape(part, slot, 3) for part in kind.parts}
    return {part: draw.standard_normal(shape).astype(np.float32) for part, shape in shapes.items()}


@pytest.mark.parametrize("names", list(combinations(FREE, 2)), ids="-".join)
def test_two_kinds_fold_into_a_weight_as_slots_apply_them(names):
    model = torch.nn.Sequential(torch.nn.Linear(5, 6), torch.nn.Tanh())
    expansion = {"0": {name: _parts(name) for name in names}}
    slotted = with_slots(model, [KINDS[name].slot(TARGET) for name in names])
    set_slots(slotted, expansion_feeds(expansion))
    x = torch.randn(4, 7, 5)
    with torch.inference_mode():
        wanted = slotted(x)
        assert (wanted - model(x)).abs().max() > 0.01
        torch.testing.assert_close(merged_model(model, expansion)(x), wanted, rtol=1e-4, atol=1e-5)


def test_every_kind_has_both_halves_and_inputs_of_its_own():
    assert set(KINDS) == {name for name, kind in SLOT_KINDS.items() if not kind.is_head}
    inputs = [name for kind in KINDS for name in SLOT_KINDS[kind].inputs("layer").values()]
    assert len(set(inputs)) == len(inputs)
