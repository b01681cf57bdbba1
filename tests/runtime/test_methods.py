"""NOLA and LoRA on the device against their formulas, written out entry by entry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from expansions import flat

from regrow_format.adapter import Adapter, Coefficients, Target
from regrow_format.basis import BasisCache, signs
from regrow_format.errors import FormatError, RegrowError
from regrow_format.methods import METHODS, get_method

INTEGERS = ["int8", "int7", "int6", "int5", "int4", "int3", "int2"]


def _sum(adapter: Adapter, tensor: str, role: int, row: int, entries: int) -> np.ndarray:
    """sum_i q_i s_i of one target in int64 or float64, one basis vector after another."""
    layer = 0 if adapter.config["shared"] else 1 + row
    values = adapter.coefficients[tensor].values[row]
    kind = np.int64 if values.dtype == np.int8 else np.float64
    total = np.zeros(entries, dtype=kind)
    for i, value in enumerate(values):
        total += kind(value) * signs(adapter.seed, role, i, entries, layer=layer)
    return total


def _nola(adapter: Adapter, row: int, target: Target) -> tuple[np.ndarray, np.ndarray]:
    """A [in, r] and B [r, out] before their scales."""
    rank = adapter.config["rank"]
    a = _sum(adapter, "alpha", 0, row, target.in_features * rank)
    b = _sum(adapter, "beta", 1, row, target.out_features * rank)
    return a.reshape(target.in_features, rank), b.reshape(rank, target.out_features)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("storage", INTEGERS)
def test_nola_from_codes_is_one_integer_sum_times_one_number(make_adapter, storage, shared):
    adapter = make_adapter(storage=storage, shared=shared)
    found = flat(get_method("nola").expand(adapter, BasisCache()))
    assert list(found) == ["fc1", "fc2"]
    for row, target in enumerate(adapter.targets):
        a, b = _nola(adapter, row, target)
        for part, total, name in (("A", a, "alpha"), ("B", b, "beta")):
            expected = total.astype(np.float32) * adapter.coefficients[name].scale[row]
            assert found[target.name][part].dtype == np.float32
            assert found[target.name][part].tobytes() == expected.tobytes()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("storage", ["fp32", "fp16"])
def test_nola_from_floats_agrees_with_float64(make_adapter, storage, shared):
    adapter = make_adapter(storage=storage, shared=shared, k=200)
    found = flat(get_method("nola").expand(adapter, BasisCache()))
    for row, target in enumerate(adapter.targets):
        a, b = _nola(adapter, row, target)
        a = a * adapter.coefficients["alpha"].scale[row]
        b = b * adapter.coefficients["beta"].scale[row]
        np.testing.assert_allclose(found[target.name]["A"], a, atol=1e-6 * np.abs(a).max())
        np.testing.assert_allclose(found[target.name]["B"], b, atol=1e-6 * np.abs(b).max())


def test_nola_is_the_formula_of_the_paper(make_adapter):
    """A = (1/sqrt(k in)) sum alpha_i A_i, B = (c/r) (1/sqrt(l r)) sum beta_j B_j."""
    alpha = np.random.default_rng(1).standard_normal((1, 6)).astype(np.float32)
    beta = np.random.default_rng(2).standard_normal((1, 4)).astype(np.float32)
    config = {"k": 6, "l": 4, "rank": 3, "c": 2.5, "shared": True}
    target = Target("layer", 10, 7)
    constants = get_method("nola").constants(config, [target])
    values = {
        "alpha": Coefficients.store(alpha, constants["alpha"], "fp32"),
        "beta": Coefficients.store(beta, constants["beta"], "fp32"),
    }
    adapter = replace(
        make_adapter(), config=config, targets=(target,), coefficients=values, storage="fp32"
    )
    a = sum(float(alpha[0, i]) * signs(adapter.seed, 0, i, 30).reshape(10, 3) for i in range(6))
    b = sum(float(beta[0, j]) * signs(adapter.seed, 1, j, 21).reshape(3, 7) for j in range(4))
    delta = (a / np.sqrt(6 * 10)) @ (2.5 / 3 * b / np.sqrt(4 * 3))
    found = flat(get_method("nola").expand(adapter, BasisCache()))["layer"]
    np.testing.assert_allclose(found["A"] @ found["B"], delta, atol=1e-6 * np.abs(delta).max())


def test_a_larger_layer_only_reads_further(make_adapter):
    """With a shared basis, what else is targeted changes nothing."""
    adapter = make_adapter()
    alone = replace(
        adapter,
        targets=adapter.targets[1:],
        coefficients={
            name: Coefficients(part.values[1:], part.scale[1:])
            for name, part in adapter.coefficients.items()
        },
    )
    both = flat(get_method("nola").expand(adapter, BasisCache()))
    one = flat(get_method("nola").expand(alone, BasisCache()))
    assert one["fc2"]["A"].tobytes() == both["fc2"]["A"].tobytes()
    assert one["fc2"]["B"].tobytes() == both["fc2"]["B"].tobytes()


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_cached_basis_and_a_fresh_one_give_the_same_bits(make_adapter, name):
    adapter, cache = make_adapter(name), BasisCache()
    first = flat(get_method(name).expand(adapter, cache))
    for found in (
        flat(get_method(name).expand(adapter, cache)),
        flat(get_method(name).expand(adapter, BasisCache(max_bytes=0))),
    ):
        for target, parts in first.items():
            assert {p: v.tobytes() for p, v in parts.items()} == {
                p: v.tobytes() for p, v in found[target].items()
            }


def test_nola_refuses_a_basis_that_does_not_fit_a_device(make_adapter):
    """A file of kilobytes can name one of 25 GB: k = 65,536, rank 4,096."""
    targets = (Target("fc1", 768, 768),)
    adapter = make_adapter(k=2**16, rank=2**12, targets=targets)
    with pytest.raises(RegrowError, match="basis must be at most"):
        flat(get_method("nola").expand(adapter, BasisCache()))


def test_nola_refuses_factors_that_do_not_fit_a_device(make_adapter):
    targets = tuple(Target(f"layer{i:02}", 4096, 4096) for i in range(32))
    adapter = make_adapter(k=1, l=1, rank=2**12, targets=targets)
    assert len(adapter.to_bytes()) < 4000
    with pytest.raises(RegrowError, match="factors must be at most 1073741824 bytes"):
        flat(get_method("nola").expand(adapter, BasisCache()))


@pytest.mark.parametrize("storage", ["fp32", "fp16", *INTEGERS])
def test_lora_is_its_stored_rows(make_adapter, storage):
    adapter = make_adapter("lora", storage)
    found = flat(get_method("lora").expand(adapter, BasisCache()))
    parts = adapter.coefficients
    assert {name: part.values.shape for name, part in parts.items()} == {
        "A.16": (2, 16), "A.8": (2, 8), "B.8": (4, 8),
    }  # fmt: skip
    for target, a, b in (("fc1", "A.16", 0), ("fc2", "A.8", 2)):
        columns = (parts[a].values.astype(np.float32) * parts[a].scale[:, None]).T
        rows = (parts["B.8"].values.astype(np.float32) * parts["B.8"].scale[:, None])[b : b + 2]
        np.testing.assert_array_equal(found[target]["A"], columns)
        np.testing.assert_array_equal(found[target]["B"], rows)


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 6 / 4), (True, 6 / 2)])
def test_lora_scales_b_with_alpha(rslora, scaling):
    config = {"rank": 4, "alpha": 6.0, "rslora": rslora}
    constants = get_method("lora").constants(config, [Target("x", 5, 3), Target("y", 3, 5)])
    assert {name: set(rows.tolist()) for name, rows in constants.items()} == {
        "A.5": {1.0}, "A.3": {1.0}, "B.3": {scaling}, "B.5": {scaling},
    }  # fmt: skip


def test_lora_refuses_factors_that_do_not_fit_a_device():
    """A file of 2 bits a number unfolds sixteenfold."""
    targets = tuple(Target(f"{i:02}", 2**16, 1) for i in range(32))
    rows = Coefficients(np.broadcast_to(np.int8(0), (2**17, 2**16)), np.ones(2**17, np.float32))
    adapter = Adapter(
        "lora", {"rank": 2**12, "alpha": 1.0, "rslora": False}, 0, "", targets, {"A.65536": rows}
    )
    with pytest.raises(RegrowError, match="factors must be at most 1073741824 bytes"):
        flat(get_method("lora").expand(adapter, BasisCache()))


def test_nola_counts_are_the_papers():
    """GPT-2 M, QV of 24 layers, k = l = 1000: 96 K numbers."""
    targets = [Target(f"h.{i}.{part}", 1024, 1024) for i in range(24) for part in "qv"]
    config = {"k": 1000, "l": 1000, "rank": 8, "c": 1.0, "shared": True}
    layout = get_method("nola").layout(config, targets)
    assert sum(rows * length for rows, length in layout.values()) == 96_000


@pytest.mark.parametrize(
    ("method", "config", "message"),
    [
        ("nola", {"k": 0}, "k must be from 1 to 65536, got 0"),
        ("nola", {"k": 2**16 + 1}, "k must be from 1 to 65536, got 65537"),
        ("nola", {"l": -1}, "l must be from 1 to 65536, got -1"),
        ("nola", {"rank": 4097}, "rank must be from 1 to 4096, got 4097"),
        ("nola", {"c": "1"}, "c must be of type float, got '1'"),
        ("nola", {"c": float("inf")}, "c must be a finite number, got inf"),
        ("nola", {"c": 10**400}, "c must be a finite number, got 1000"),
        ("nola", {"shared": 1}, "shared must be of type bool, got 1"),
        ("nola", {"k": True}, "k must be of type int, got True"),
        ("nola", {"extra": 1}, "unknown fields extra"),
        ("lora", {"rank": 0}, "rank must be from 1 to 4096, got 0"),
        ("lora", {"alpha": None}, "alpha must be of type float, got nothing"),
        ("lora", {"k": 1}, "unknown fields k"),
        ("vera", {"rank": 2**12 + 1}, "rank must be from 1 to 4096, got 4097"),
        ("vera", {"alpha": 1.0}, "unknown fields alpha"),
        ("fourierft", {"n": 0}, "n must be from 1 to 65536, got 0"),
        ("fourierft", {"n": 2**16 + 1}, "n must be from 1 to 65536, got 65537"),
        ("fourierft", {"alpha": float("nan")}, "alpha must be a finite number, got nan"),
        ("ia3", {"rank": 1}, "unknown fields rank"),
        ("ia3", {"feedforward": "fc2"}, "feedforward must be of type list, got 'fc2'"),
        ("ia3", {"feedforward": [1]}, "feedforward must be a list of strings, got [1]"),
        ("ia3", {"feedforward": ["b", "a"]}, "endings, sorted, each once, got ['b', 'a']"),
        ("ia3", {"feedforward": ["a", "a"]}, "endings, sorted, each once, got ['a', 'a']"),
        ("ia3", {"feedforward": [f"{i:04}" for i in range(1025)]}, "at most 1024 endings, sorted"),
        ("ia3", {"feedforward": [""]}, "of 1 to 1024 characters that print, got ''"),
        ("ia3", {"feedforward": ["a" * 1025]}, "of 1 to 1024 characters that print, got 'aaa"),
        ("ia3", {"feedforward": ["a\n"]}, "of 1 to 1024 characters that print, got 'a"),
        ("ssf", {"rank": 1}, "unknown fields rank"),
        ("bitfit", {"rank": 1}, "unknown fields rank"),
        ("head", {"rank": 1}, "unknown fields rank"),
    ],
)
def test_a_config_is_bounded(method, config, message):
    good = {
        "nola": {"k": 1, "l": 1, "rank": 1, "c": 1.0, "shared": True},
        "lora": {"rank": 1, "alpha": 1.0, "rslora": False},
        "vera": {"rank": 1},
        "fourierft": {"n": 1, "alpha": 1.0},
    }.get(method, {})
    with pytest.raises(FormatError, match=r"^file: config: ") as caught:
        get_method(method).check_config({**good, **config}, "file")
    assert message in str(caught.value)


def test_an_unknown_method_lists_those_there_are():
    with pytest.raises(FormatError, match="file: method must be one of nola, vera, fourierft"):
        get_method("magic", "file")
