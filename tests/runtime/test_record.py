"""Records are made, compare, hash and show themselves as frozen dataclasses do."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError, asdict, dataclass, field, fields, replace

import pytest

from regrow_format.manifest import GraphSpec, TensorSpec
from regrow_format.record import Frozen, Record


@dataclass(frozen=True)
class Plain:
    name: str
    shape: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


class Short(Record):
    name: str
    shape: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


class Other(Record):
    name: str
    shape: tuple[int, ...] = ()
    notes: list[str] = field(default_factory=list)


class Alone(Frozen):
    name: str


def test_as_dataclasses_do():
    one, same = Short("a", (1, 2)), Short(shape=(1, 2), name="a")
    assert one == same
    assert one != replace(one, shape=(3,))
    assert one != Other("a", (1, 2))
    assert one != ("a", (1, 2))
    assert repr(one).replace("Short", "Plain") == repr(Plain("a", (1, 2)))
    assert asdict(one) == vars(one) == asdict(Plain("a", (1, 2)))
    assert [f.name for f in fields(Short)] == [f.name for f in fields(Plain)]
    assert copy.deepcopy(one) == one
    with pytest.raises(FrozenInstanceError):
        one.name = "b"
    with pytest.raises(FrozenInstanceError):
        del one.name


def test_defaults_are_made_anew():
    one, other = Short("a"), Short("a")
    one.notes.append("x")
    assert other.notes == []


@pytest.mark.parametrize(
    ("values", "named"),
    [((), {}), ((), {"shape": ()}), (("a",), {"name": "b"}), (("a",), {"size": 1}),
     (("a", (), [], 1), {})],
)  # fmt: skip
def test_wrong_values_are_refused_as_dataclasses_refuse_them(values, named):
    for kind in (Plain, Short):
        with pytest.raises(TypeError):
            kind(*values, **named)


def test_a_frozen_class_compares_by_identity():
    one = Alone("a")
    assert one == one
    assert one != Alone("a")
    assert len({one, Alone("a")}) == 2


def test_fields_that_do_not_hash():
    spec = GraphSpec("g", "f", (), (TensorSpec("x", "float32", (1,)),))
    assert hash(spec) == hash(replace(spec))
    with pytest.raises(TypeError):
        hash(replace(spec, inputs=[]))
