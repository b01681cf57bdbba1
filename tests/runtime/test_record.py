"""Records compare, hash and show themselves as frozen dataclasses do."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest

from regrow_format.manifest import GraphSpec, TensorSpec
from regrow_format.record import Record


@dataclass(frozen=True)
class Plain:
    name: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Short(Record):
    name: str
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class Other(Record):
    name: str
    shape: tuple[int, ...] = ()


def test_as_dataclasses_do():
    one, same = Short("a", (1, 2)), Short("a", (1, 2))
    assert one == same
    assert hash(one) == hash(same)
    assert one != replace(one, shape=(3,))
    assert one != Other("a", (1, 2))
    assert one != ("a", (1, 2))
    assert repr(one).replace("Short", "Plain") == repr(Plain("a", (1, 2)))
    with pytest.raises(FrozenInstanceError):
        one.name = "b"


def test_fields_that_do_not_hash():
    spec = GraphSpec("g", "f", (), (TensorSpec("x", "float32", (1,)),))
    assert hash(spec) == hash(replace(spec))
    with pytest.raises(TypeError):
        hash(replace(spec, inputs=[]))
