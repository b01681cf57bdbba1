"""Layers that differ by their number share a row; the targets stay what they were."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow_format.errors import FormatError
from regrow_format.target_rows import Target, target_rows, targets_of

PARTS = st.sampled_from(["0", "1", "2", "9", "10", "11", "007", "h", "q", "猫", "*", "1²", "٣", ""])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map(".".join)
TARGETS = st.dictionaries(NAMES, st.tuples(st.integers(1, 2), st.integers(1, 2)), max_size=40)


def _sorted(names: dict[str, tuple[int, int]]) -> tuple[Target, ...]:
    return tuple(Target(name, *names[name]) for name in sorted(names, key=str.encode))


@given(TARGETS)
def test_rows_give_the_targets_back(names):
    targets = _sorted(names)
    rows = target_rows(targets)
    assert targets_of(rows, "here") == targets
    assert target_rows(targets[::-1]) == rows
    assert len(rows) <= len(targets)


def test_twelve_layers_take_a_row():
    names = [f"encoder.layer.{i}.attention.{part}" for i in range(12) for part in ("key", "value")]
    targets = _sorted(dict.fromkeys(names, (768, 768)))
    assert target_rows(targets) == [
        ["encoder.layer.*.attention.key", 768, 768, 0, 11],
        ["encoder.layer.*.attention.value", 768, 768, 0, 11],
    ]
    places = [target.name for target in targets]
    assert places.index("encoder.layer.10.attention.key") == 4  # after 0 and 1, before 2


def test_the_number_that_covers_most_is_replaced():
    """Stages of unlike widths, and layers of a sequence that have no neighbour."""
    swin = {f"s.{s}.b.{b}.q": (2**s, 2**s) for s in range(2) for b in range(3)}
    assert target_rows(_sorted(swin)) == [["s.0.b.*.q", 1, 1, 0, 2], ["s.1.b.*.q", 2, 2, 0, 2]]
    mlp = {f"b.{b}.mlp.{part}": (4, 4) for b in range(3) for part in (0, 2)}
    assert target_rows(_sorted(mlp)) == [["b.*.mlp.0", 4, 4, 0, 2], ["b.*.mlp.2", 4, 4, 0, 2]]


def test_gaps_and_other_widths_break_a_row():
    names = {f"h.{i}": (4, 4) for i in (0, 1, 3, 5, 6)} | {"h.2": (4, 8)}
    assert target_rows(_sorted(names)) == [
        ["h.*", 4, 4, 0, 1], ["h.*", 4, 4, 5, 6], ["h.2", 4, 8], ["h.3", 4, 4],
    ]  # fmt: skip


def test_a_star_in_a_name_stays_one():
    names = {"a.*.1": (1, 1), "a.*.2": (1, 1)}
    assert target_rows(_sorted(names)) == [["a.*.1", 1, 1], ["a.*.2", 1, 1]]
    assert targets_of([["a.*.1", 1, 1]], "here") == (Target("a.*.1", 1, 1),)


@pytest.mark.parametrize(
    "rows",
    [
        [["*", 1, 1, 0, 1], ["0", 1, 1]],
        [["a.*", 1, 1, 0, 5], ["a.*", 1, 1, 5, 9]],
        [["a*", 1, 1, 10, 11], ["a1*", 1, 1, 0, 1]],
    ],
)
def test_a_name_that_two_rows_give_is_refused(rows):
    with pytest.raises(FormatError, match="each named once"):
        targets_of(rows, "here")
