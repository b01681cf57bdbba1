"""VeRA of PEFT, made by hand: where A and B come from, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from expansions import flat

from regrow_format.methods import get_method
from regrow_format.mt19937 import uniform_kaiming
from regrow_runtime import Adapter, BasisCache, UsageError
from regrow_toolchain.interop import import_peft

Room = Any  # see conftest.py
Q, K = "base_model.model.blocks.0.q", "base_model.model.blocks.0.k"
A, B = "base_model.vera_A", "base_model.vera_B"


def _imported(room: Room, base: str = "bundle", **options: Any) -> Adapter:
    return Adapter.from_bytes(
        import_peft(room.path / "peft", room.path / base, **options).to_bytes()
    )


def _change(adapter: Adapter, layer: str) -> np.ndarray:
    parts = flat(get_method("vera").expand(adapter, BasisCache()))[layer]
    return np.asarray(parts["A"] @ parts["B"], dtype=np.float64)  # [in, out]


def _wanted(room: Room, path: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """PEFT's delta W, transposed."""
    d, scale = room.tensors[f"{path}.vera_lambda_d"], room.tensors[f"{path}.vera_lambda_b"]
    delta = (scale[:, None] * b[: scale.size]) @ (d[:, None] * a[:, :8])
    return np.asarray(delta.T, dtype=np.float64)


def _saved(shapes: tuple[int, int] = (8, 6), dtype: str = "float32") -> dict[str, np.ndarray]:
    a, b = uniform_kaiming(3, 2, *shapes, dtype)
    return {A: a, B: b}


def test_drawn_from_the_seed(vera_room: Room) -> None:
    found = _imported(vera_room)
    assert (found.method, dict(found.config), found.seed) == ("vera", {"rank": 2}, 3)
    assert dict(found.basis.fields) == {"in": 8, "out": 6, "dtype": "float32"}
    assert found.basis.kind == "peft-mt19937"
    a, b = uniform_kaiming(3, 2, 8, 6)
    for path, layer in ((Q, "blocks.0.q"), (K, "blocks.0.k")):
        np.testing.assert_allclose(
            _change(found, layer), _wanted(vera_room, path, a, b), rtol=1e-6, atol=1e-7
        )
    assert found.head is not None
    assert found.user == {"imported": "PEFT VeRA"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_saved_projections_that_are_the_drawn_ones(vera_room: Room, dtype: str) -> None:
    vera_room.write({"save_projection": True}, _saved(dtype=dtype))
    found = _imported(vera_room)
    assert (found.basis.kind, found.basis.fields["dtype"]) == ("peft-mt19937", dtype)
    assert not found.stored_basis
    vera_room.write(tensors={A: None, B: None})
    drawn = _imported(vera_room, base_dtype=dtype)
    assert drawn.to_bytes() == found.to_bytes()


def test_saved_projections_of_wider_layers(vera_room: Room) -> None:
    """As when an adapter of other layers was added first; each then takes the first columns."""
    vera_room.write({"save_projection": True}, _saved((11, 9)))
    found = _imported(vera_room)
    assert (found.basis.fields["in"], found.basis.fields["out"]) == (11, 9)
    a, b = uniform_kaiming(3, 2, 11, 9)
    np.testing.assert_allclose(
        _change(found, "blocks.0.q"), _wanted(vera_room, Q, a, b), rtol=1e-6, atol=1e-7
    )


def test_saved_projections_of_another_machine(vera_room: Room) -> None:
    tensors = _saved((11, 9))
    tensors[A] = np.nextafter(tensors[A], np.float32(9))
    vera_room.write({"save_projection": True}, tensors)
    found = _imported(vera_room)
    assert found.basis.kind == "stored"
    assert {name: array.shape for name, array in found.stored_basis.items()} == {
        "basis.A": (2, 8), "basis.B": (6, 2),
    }  # fmt: skip
    for path, layer in ((Q, "blocks.0.q"), (K, "blocks.0.k")):
        np.testing.assert_allclose(
            _change(found, layer),
            _wanted(vera_room, path, tensors[A], tensors[B]),
            rtol=1e-6,
            atol=1e-7,
        )


@pytest.mark.parametrize(("key", "seed"), [(0, 0), (2**64 - 1, 2**64 - 1), (-1, 2**64 - 1)])
def test_seeds(vera_room: Room, key: int, seed: int) -> None:
    vera_room.write({"projection_prng_key": key})
    assert _imported(vera_room).seed == seed


def test_names_of_older_files(vera_room: Room) -> None:
    wanted = _imported(vera_room)
    renamed = {
        f"{name}.default": value for name, value in vera_room.tensors.items() if "vera" in name
    }
    vera_room.write(
        {"save_projection": True},
        {**{n: None for n in vera_room.tensors if "vera" in n}, **renamed,
         **{f"{n}.default": v for n, v in _saved().items()}},
    )  # fmt: skip
    assert _imported(vera_room).to_bytes() == wanted.to_bytes()


def test_from_a_backbone_whose_weights_may_be_transposed(
    vera_room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    """k lies in the file as [4, 8]: a Conv1D of 4 -> 8, if lambda_b says so."""
    found = _imported(vera_room, "backbone")
    assert [(t.in_features, t.out_features) for t in found.targets] == [(8, 4), (8, 6)]
    vera_room.write(tensors={f"{K}.vera_lambda_b": np.ones(8, "f4")})
    found = _imported(vera_room, "backbone")
    assert [(t.in_features, t.out_features) for t in found.targets] == [(4, 8), (8, 6)]


_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"bias": "vera_only"}, "bias must be 'none', got 'vera_only': an adapter of one method"),
    ({"bias": "all"}, "cannot change the backbone's biases too"),
    ({"r": 0}, "r must be from 1 to 4096, got 0"),
    ({"r": 10**9}, "r must be from 1 to 4096"),
    ({"r": 3}, "blocks.0.q must have vera_lambda_d [3] and vera_lambda_b [6], got [2] and [6]"),
    ({"projection_prng_key": 2**64}, "projection_prng_key must be from -9223372036854775808"),
    ({"projection_prng_key": 0.5}, "projection_prng_key must be of type int"),
    ({"save_projection": True}, "vera_A and vera_B must be there, as save_projection says"),
    ({"save_projection": "yes"}, "save_projection must be of type bool"),
    ({"shiny_new": 3}, "fields that are set must be those of PEFT 0.21, got 'shiny_new'"),
    ({"use_dora": True}, "fields that are set must be those of PEFT 0.21, got 'use_dora'"),
]


@pytest.mark.parametrize(("fields", "words"), _FIELDS, ids=[str(f[0])[:40] for f in _FIELDS])
def test_configs_that_are_refused(vera_room: Room, fields: dict[str, Any], words: str) -> None:
    vera_room.write(config=fields)
    assert words in vera_room.refusal()


def _ones(*shape: int, dtype: str = "f4") -> np.ndarray:
    return np.ones(shape, dtype)


_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({f"{Q}.vera_lambda_d": None}, "of every layer, blocks.0.q.vera_lambda_d missing"),
    ({f"{p}.vera_lambda_{x}": None for p in (Q, K) for x in "bd"}, "of a layer, got none"),
    ({f"{Q}.vera_lambda_b": _ones(8)}, "and vera_lambda_b [6], got [2] and [8]"),
    ({f"{Q}.vera_lambda_b": _ones(6, 1)}, "and vera_lambda_b [6], got [2] and [6, 1]"),
    ({f"{Q}.vera_lambda_b": np.full(6, np.nan, "f4")}, "vera_lambda_b must be finite, got NaN"),
    ({f"{Q}.vera_lambda_b": _ones(6, dtype="f8")}, "must be F32, F16, BF16, got F64"),
    ({f"{Q}.lora_A.weight": _ones(2, 8)}, "must be the head (head), got blocks.0.q.lora_A"),
    ({f"{Q}.vera_A": _ones(2, 8)}, "is neither vera_lambda_d, vera_lambda_b nor a module's"),
    ({"base_model.model.blocks.1.q.vera_lambda_d": _ones(2),
      "base_model.model.blocks.1.q.vera_lambda_b": _ones(6)},
     "blocks.1.q must be a slot of the bundle, got none: export it with --target"),
    ({A: _ones(2, 8)}, "vera_B must be there, as save_projection says, got none"),
    ({A: _ones(2, 7), B: _ones(6, 2)}, "vera_A must be [2, 8 or more] and vera_B [6 or more, 2]"),
    ({A: _ones(3, 8), B: _ones(6, 2)}, "got [3, 8] and [6, 2]"),
    ({A: _ones(2, 8), B: _ones(5, 2)}, "got [2, 8] and [5, 2]"),
    ({A: _ones(16), B: _ones(6, 2)}, "got [16] and [6, 2]"),
    ({A: np.full((2, 8), np.inf, "f4"), B: _ones(6, 2)}, "base_model.vera_A must be finite"),
    ({A: _ones(2, 8), B: _ones(6, 2)}, "as PEFT uses these where save_projection is false"),
    ({**_saved(), f"{A}.default": _ones(2, 8)}, "is there twice, for the adapter of two adapters"),
    ({"base_model.model.head.vera_lambda_d": _ones(2),
      "base_model.model.head.vera_lambda_b": _ones(3)}, "head must be no target, got a layer of"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), _TENSORS, ids=[t[1][:50] for t in _TENSORS])
def test_tensors_that_are_refused(vera_room: Room, changes: dict[str, Any], words: str) -> None:
    vera_room.write(tensors=changes)
    assert words in vera_room.refusal()


def test_all_mismatches_stand_in_one_error(vera_room: Room) -> None:
    vera_room.write(
        tensors={f"{Q}.vera_lambda_b": _ones(8), f"{K}.vera_lambda_d": _ones(3),
                 "base_model.model.norm.weight": _ones(6)}
    )  # fmt: skip
    words = vera_room.refusal()
    assert all(part in words for part in ("blocks.0.q must", "blocks.0.k must", "got norm"))


def test_dtypes_that_there_are_not(vera_room: Room) -> None:
    with pytest.raises(UsageError, match="base_dtype must be one of float32, bfloat16, float16"):
        _imported(vera_room, base_dtype="float64")


def test_the_command(vera_room: Room, cli: Callable[..., Any]) -> None:
    done = cli(
        "import", vera_room.path / "peft", "-o", vera_room.path / "a.safetensors",
        "--backbone", vera_room.path / "bundle", "--base-dtype", "bfloat16",
        "--coefficient-dtype", "int8",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "vera (rank 2) in int8, 2 layers, own head of 5 classes" in done.out
    found = Adapter.load(vera_room.path / "a.safetensors")
    assert found.basis.fields["dtype"] == "bfloat16"
