"""Methods in training: no change at first, gradients that flow, and what the device expands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from regrow_runtime.adapter import STORAGE, Adapter, Coefficients, Target
from regrow_runtime.basis import BasisCache, Role, sign_bits, signs
from regrow_runtime.errors import UsageError
from regrow_runtime.methods import get_method
from regrow_runtime.quantize import quantize
from regrow_toolchain.methods import METHODS, Trained, combine, get_trainable
from regrow_toolchain.methods.base import fake_quantize
from regrow_toolchain.methods.combine import combine_signs

# Two of one size, one wide, one high; sorted as in a file.
TARGETS = (
    Target("a.down", 24, 9),
    Target("a.up", 9, 40),
    Target("b.query", 24, 24),
    Target("c.query", 24, 24),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "nola": {"k": 13, "l": 7, "rank": 3, "c": 2.0},
    "lora": {"rank": 3, "alpha": 5.0},
}
BIG_SEED = 2**63 + 5


def _start(method: str, seed: int = BIG_SEED, **more: Any) -> Trained:
    return get_trainable(method).start(TARGETS, {**SETTINGS[method], **more}, seed)


def _moved(trained: Trained, scale: float = 1.0) -> Trained:
    """As if training had moved every coefficient."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return trained


def _stored(trained: Trained, method: str, storage: str, seed: int = BIG_SEED) -> Adapter:
    """As `adapt` stores it, through the file's bytes."""
    constants = get_method(method).constants(trained.config, TARGETS)
    coefficients = {
        name: Coefficients.store(values, constants[name], storage)
        for name, values in trained.values().items()
    }
    adapter = Adapter(
        method, trained.config, seed, "sha256:" + "0" * 64, TARGETS, coefficients, storage
    )
    return Adapter.from_bytes(adapter.to_bytes())


@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_at_first_and_gradients_flow(method: str) -> None:
    trained = _start(method)
    x = torch.randn(4, 24)
    total = torch.zeros(())
    for target in TARGETS:
        a, b = trained.factors()[target.name]
        assert a.shape == (target.in_features, 3)
        assert b.shape == (3, target.out_features)
        assert a.dtype == b.dtype == torch.float32
        change = (x[:, : target.in_features] @ a) @ b
        assert torch.equal(change, torch.zeros_like(change))
        assert a.abs().max() > 0
        total = total + (change * torch.randn_like(change)).sum()
    total.backward()
    for name, parameter in trained.named_parameters():
        moves = name.startswith("b")  # nola's beta, lora's b
        assert parameter.grad is not None
        assert bool((parameter.grad.abs().amax(dim=1) > 0).all()) is moves, name


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(
    ("method", "more"),
    [("nola", {}), ("nola", {"shared": False}), ("lora", {}), ("lora", {"rslora": True})],
)
def test_training_sees_what_the_device_expands(
    method: str, more: Mapping[str, Any], storage: str
) -> None:
    trained = _moved(_start(method, **more))
    trained.storage, trained.rounded = storage, True
    expansion = get_method(method).expand(_stored(trained, method, storage), BasisCache())
    for name, (a, b) in trained.factors().items():
        for part, tensor in (("A", a), ("B", b)):
            device = expansion[name][part]
            far = np.abs(tensor.detach().numpy() - device).max()
            assert far <= 1e-6 * np.abs(device).max(), (name, part)


@pytest.mark.parametrize("storage", STORAGE)
def test_without_rounding_it_sees_full_precision(storage: str) -> None:
    trained, exact = _moved(_start("nola")), _moved(_start("nola"))
    trained.storage = storage
    for name, (a, b) in trained.factors().items():
        assert torch.equal(a, exact.factors()[name][0])
        assert torch.equal(b, exact.factors()[name][1])


@pytest.mark.parametrize("shared", [True, False])
def test_nola_against_a_basis_written_out(shared: bool) -> None:
    """A = sum alpha_i A_i / sqrt(k in) and B = (c / r) sum beta_j B_j / sqrt(l r), in float64."""
    trained = _moved(_start("nola", shared=shared))
    alpha, beta = (trained.values()[name].astype(np.float64) for name in ("alpha", "beta"))
    for row, (name, (a, b)) in enumerate(trained.factors().items()):
        target = TARGETS[row]
        layer = 0 if shared else 1 + row
        wide, high = target.in_features * 3, target.out_features * 3
        basis_a = np.stack([signs(BIG_SEED, Role.NOLA_A, i, wide, layer=layer) for i in range(13)])
        basis_b = np.stack([signs(BIG_SEED, Role.NOLA_B, j, high, layer=layer) for j in range(7)])
        wanted_a = (alpha[row] @ basis_a).reshape(-1, 3) / np.sqrt(13 * target.in_features)
        wanted_b = (beta[row] @ basis_b).reshape(3, -1) * (2 / 3) / np.sqrt(7 * 3)
        assert name == target.name
        np.testing.assert_allclose(a.detach().numpy(), wanted_a, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(b.detach().numpy(), wanted_b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 5 / 3), (True, 5 / 3**0.5)])
def test_lora_is_scaled_by_alpha_over_the_rank(rslora: bool, scale: float) -> None:
    trained = _moved(_start("lora", rslora=rslora))
    a, b = trained.factors()["a.up"]
    assert torch.equal(a, trained.a[1].T)
    assert torch.allclose(b, trained.b[1] * scale)


def test_lora_starts_as_kaiming_uniform() -> None:
    """With a = sqrt(5): uniform up to 1 / sqrt(in), in every layer another draw."""
    trained = get_trainable("lora").start((Target("x", 400, 30), Target("y", 400, 30)), {}, 0)
    for a in trained.a:
        assert a.abs().max() <= 1 / 20
        assert a.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)
    assert not torch.equal(*trained.a)


def test_parameter_counts_are_the_papers() -> None:
    nola, lora = _start("nola"), _start("lora")
    assert sum(p.numel() for p in nola.parameters()) == (13 + 7) * len(TARGETS)
    both = sum(3 * (t.in_features + t.out_features) for t in TARGETS)
    assert sum(p.numel() for p in lora.parameters()) == both
    for trained in (nola, lora):
        assert sum(v.size for v in trained.values().values()) == sum(
            p.numel() for p in trained.parameters()
        )


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_the_start(method: str) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        return [a.detach() for a, _ in _start(method, seed).factors().values()]

    assert all(torch.equal(one, other) for one, other in zip(start(1), start(1), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(start(1), start(2), strict=True))
    assert len(start(2**64 - 1)) == len(TARGETS)


# -- combinations of signs -----------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [8, 64, 1 << 20])
@pytest.mark.parametrize("entries", [1, 8, 101])
def test_combine_signs_against_a_dense_basis(
    monkeypatch: pytest.MonkeyPatch, at_once: int, entries: int
) -> None:
    monkeypatch.setattr(combine, "_FLOATS_AT_ONCE", at_once)
    bits = torch.from_numpy(sign_bits(7, Role.NOLA_A, 5, 128))  # longer than what is used
    dense = torch.from_numpy(np.stack([signs(7, Role.NOLA_A, i, entries) for i in range(5)]))
    rows = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    other = rows.detach().clone().requires_grad_()
    result, wanted = combine_signs(rows, bits, entries), other @ dense.double()
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, wanted)
    weights = torch.randn(3, entries, dtype=torch.float64)
    (result * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(rows.grad, other.grad)


def test_combine_signs_passes_gradcheck() -> None:
    bits = torch.from_numpy(sign_bits(7, Role.NOLA_B, 4, 21))
    rows = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: combine_signs(c, bits, 21), (rows,))


# -- quantisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quantisation_is_the_devices(bits: int) -> None:
    values = torch.randn(6, 50)
    values[1] = 0
    values[2] *= 1e-30
    values[3] *= 1e30
    values[4] = torch.arange(50) - 25.0  # ties
    values[5] = 1e-44
    codes, scale = quantize(values.numpy(), bits)
    found = fake_quantize(values, f"int{bits}").numpy()
    wanted = codes * scale[:, None]
    largest = np.abs(values.numpy()).max(axis=1, keepdims=True)
    assert np.all(np.abs(found - wanted) <= 2e-7 * largest)
    assert np.array_equal(np.rint(found / scale[:, None]), codes)


def test_half_precision_rounds_and_full_does_not() -> None:
    values = torch.randn(2, 9)
    assert torch.equal(fake_quantize(values, "fp32"), values)
    assert torch.allclose(fake_quantize(values, "fp16"), values.half().float(), rtol=0, atol=1e-7)
    assert not torch.equal(fake_quantize(values, "fp16"), values)


@pytest.mark.parametrize("storage", STORAGE)
def test_gradients_pass_straight_through(storage: str) -> None:
    values = torch.randn(2, 9, requires_grad=True)
    weights = torch.randn(2, 9)
    (fake_quantize(values, storage) * weights).sum().backward()
    assert torch.equal(values.grad, weights)


# -- settings ------------------------------------------------------------------------------------


def test_settings_are_converted_from_text() -> None:
    config = (
        get_trainable("nola")
        .start(TARGETS, {"k": "13", "c": "2", "shared": "False", "rank": "2"}, 0)
        .config
    )
    assert config == {"k": 13, "l": 64, "rank": 2, "c": 2.0, "shared": False}
    assert get_method("nola").check_config(config, "it") == config
    lora = get_trainable("lora").start(TARGETS, {"rslora": "true"}, 0).config
    assert lora == {"rank": 4, "alpha": 4.0, "rslora": True}
    assert get_method("lora").check_config(lora, "it") == lora


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("nola", {"q": 1}, r"among k=64, l=64, rank=8, c=8\.0, shared=True, got 'q'"),
        ("lora", {"k": 1}, r"among rank=4, alpha=4\.0, rslora=False, got 'k'"),
        ("nola", {"k": "many"}, "nola's k must be of type int, got 'many'"),
        ("nola", {"k": "3.5"}, "nola's k must be of type int, got '3.5'"),
        ("nola", {"k": 3.5}, r"nola's k must be of type int, got 3\.5"),
        ("nola", {"c": "x"}, "nola's c must be of type float, got 'x'"),
        ("nola", {"c": "nan"}, "nola: config: c must be a finite number, got nan"),
        ("lora", {"alpha": "inf"}, "lora: config: alpha must be a finite number, got inf"),
        ("nola", {"shared": "yes"}, "nola's shared must be of type bool, got 'yes'"),
        ("nola", {"shared": 1}, "nola's shared must be of type bool, got 1"),
        ("nola", {"k": 0}, "nola: config: k must be from 1 to 65536, got 0"),
        ("nola", {"l": -1}, "l must be from 1 to 65536, got -1"),
        ("nola", {"rank": 0}, "rank must be from 1 to 4096, got 0"),
        ("nola", {"rank": 10}, r"rank must be at most 9, the width of a\.down, got 10"),
        ("nola", {"k": 65537, "rank": 2}, "k must be from 1 to 65536, got 65537"),
        ("lora", {"rank": 0}, "rank must be from 1 to 4096, got 0"),
        ("lora", {"rank": 10}, "rank must be at most 9, the least width, got 10"),
    ],
)
def test_settings_that_make_no_sense(method: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        get_trainable(method).start(TARGETS, settings, 0)


def test_an_unknown_method_lists_those_there_are() -> None:
    with pytest.raises(UsageError, match="method must be one of nola, lora, got 'vera'"):
        get_trainable("vera")
