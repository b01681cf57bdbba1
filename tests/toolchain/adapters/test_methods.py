"""Methods in training: no change at first, gradients that flow, and what the device expands."""

from __future__ import annotations

import math
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from expansions import expanded, flat
from torch import Tensor, nn

from regrow_export.slots import KINDS
from regrow_format.adapter import STORAGE, Adapter, Coefficients, Head, HeadLayer, Target
from regrow_format.basis import BasisCache, Role, locations, sign_bits, signs
from regrow_format.errors import UsageError
from regrow_format.methods import get_method
from regrow_format.quantize import quantize
from regrow_toolchain.adapters import TrainableAdapter, get_trainable
from regrow_toolchain.adapters.methods import Changes, sign_products
from regrow_toolchain.adapters.methods.base import fake_quantize
from regrow_toolchain.adapters.methods.fourierft import biased_places
from regrow_toolchain.adapters.methods.registry import METHODS
from regrow_toolchain.adapters.methods.sign_products import combine_signs, ready_signs

# Two of one size, one wide, one high, one of even and odd width; sorted as in a file.
TARGETS = (
    Target("a.down", 24, 9),
    Target("a.up", 9, 40),
    Target("b.query", 24, 24),
    Target("c.query", 24, 24),
    Target("d.odd", 15, 16),
)
QUERY = TARGETS[2]
SETTINGS: dict[str, dict[str, Any]] = {
    "nola": {"k": 13, "l": 7, "rank": 3, "c": 2.0},
    "vera": {"rank": 11},
    "fourierft": {"n": 17, "alpha": 20.0},
    "lora": {"rank": 3, "alpha": 5.0},
    "ia3": {"feedforward": "down, d.odd"},
    "ssf": {},
    "bitfit": {},
}
WITH_TARGETS = list(SETTINGS)
# What a file may say beside the defaults above.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in WITH_TARGETS),
    ("nola", {"shared": False}),
    ("nola", {"rank": 9}),
    ("vera", {"rank": 70}),
    ("fourierft", {"n": 216}),
    ("fourierft", {"init": "paper"}),
    ("fourierft", {"bias_width": 4.0, "bias_frequency": 3.0}),
    ("lora", {"rslora": True}),
]
BIG_SEED = 2**63 + 5


def _start(
    method: str, seed: int = BIG_SEED, users: int = 1, targets: tuple[Target, ...] = TARGETS,
    **more: Any,
) -> TrainableAdapter:  # fmt: skip
    return get_trainable(method).start(targets, {**SETTINGS[method], **more}, seed, users)


def _moved(trained: TrainableAdapter, scale: float = 1.0) -> TrainableAdapter:
    """As if training had moved every coefficient."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return trained


def _adapter(
    trained: TrainableAdapter, method: str, storage: str, group: int = 0, user: int = 0
) -> Adapter:
    """As `adapt` stores it, through the file's bytes."""
    constants = get_method(method).constants(trained.config, trained.targets)
    coefficients = {
        name: Coefficients.store(values, constants[name], storage, group or None)
        for name, values in trained.values(user).items()
    }
    adapter = Adapter(
        method, trained.config, BIG_SEED, "sha256:" + "0" * 64, trained.targets, coefficients,
        storage, group=group or None, basis=trained.basis, stored_basis=trained.stored_basis,
    )  # fmt: skip
    return Adapter.from_bytes(adapter.to_bytes())


def _weight(target: Target) -> Tensor:
    """[in, out] of a layer to be changed, the same at every call."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(target.in_features, target.out_features, generator=generator)


def _on_device(parts: Mapping[str, np.ndarray], x: torch.Tensor, target: Target) -> np.ndarray:
    """What slots with these tensors change of a layer's output for x [rows, in], in float64."""
    values, weight = x.double().numpy(), _weight(target).double().numpy()
    tensors = {name: part.astype(np.float64) for name, part in parts.items()}
    if "A" in tensors:
        return np.asarray((values @ tensors["A"]) @ tensors["B"])
    if "D" in tensors:
        return np.asarray(values @ tensors["D"])
    scaled = (values * (1 + tensors.get("t", 0))) @ weight * (1 + tensors.get("s", 0))
    return np.asarray(scaled - values @ weight + tensors.get("b", 0))


def _gain(changes: Changes, target: Target, x: Tensor) -> Tensor:
    """What a layer's output changes by, [users, rows, out], in x's dtype."""
    own = {k: {p: v.to(x.dtype) for p, v in ps.items()} for k, ps in changes[target.name].items()}
    used = [(KINDS[kind], tensors) for kind, tensors in own.items()]
    # Where changes only add, a layer that gives 0 shows them without its rounding.
    weight = _weight(target).to(x.dtype)
    weight = weight if any(kind.kind.multiplies for kind, _ in used) else torch.zeros_like(weight)
    seen, base = x, x @ weight
    for kind, tensors in used:
        seen = kind.on_input(seen, tensors) if "on_input" in kind.steps else seen
    y = seen @ weight
    for kind, tensors in used:
        y = y + kind.added(seen, tensors) if "added" in kind.steps else y
    for kind, tensors in used:
        y = kind.on_output(y, tensors) if "on_output" in kind.steps else y
    return y - base


def _delta(trained: TrainableAdapter, target: Target, user: int = 0) -> np.ndarray:
    """[in, out]: the transposed change of the weight, by what it does to unit vectors."""
    unit = torch.eye(target.in_features).expand(trained.users, -1, -1)
    return _gain(trained.changes(), target, unit)[user].detach().double().numpy()


# -- the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("method", "more"), [v for v in VARIANTS if "init" not in v[1]])
def test_nothing_changes_at_first_and_gradients_flow(
    method: str, more: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """For every user, target and row; exactly zero, also where the model computes in bf16."""
    trained = _start(method, users=2, **more)
    changes = trained.changes()
    assert list(changes) == [target.name for target in TARGETS]
    total = torch.zeros(())
    for target in TARGETS:
        x = torch.randn(2, 5, target.in_features, dtype=dtype)
        change = _gain(changes, target, x)
        assert change.shape == (2, 5, target.out_features)
        assert change.dtype == dtype
        assert torch.equal(change, torch.zeros_like(change))
        total = total + (change * torch.randn_like(change)).float().sum()
    total.backward()
    still = {"nola": {"alpha"}, "vera": {"d"}, "lora": {"A_24", "A_9", "A_15"}}.get(method, set())
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        moves = parameter.grad.abs().amax(dim=2) > 0
        assert bool(moves.all()) is (name not in still), name
        assert bool(moves.any()) is (name not in still), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", WITH_TARGETS)
def test_two_steps_move_every_coefficient(method: str, dtype: torch.dtype) -> None:
    """What has no gradient at first has one after the first step."""
    trained = _start(method)
    optimizer = torch.optim.Adam(trained.parameters(), 0.1)
    before = {name: p.detach().clone() for name, p in trained.named_parameters()}
    inputs = {t.name: torch.randn(1, 6, t.in_features, dtype=dtype) for t in TARGETS}
    goals = {t.name: torch.randn(1, 6, t.out_features) for t in TARGETS}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        changes = trained.changes()
        loss = torch.stack(
            [
                (_gain(changes, t, inputs[t.name]).float() - goals[t.name]).square().mean()
                for t in TARGETS
            ]
        ).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    for name, parameter in trained.named_parameters():
        assert bool((parameter != before[name]).any(dim=2).all()), name


@pytest.mark.parametrize("method", WITH_TARGETS)
def test_users_start_alike_and_stay_apart(method: str) -> None:
    """A gradient of one user's output reaches that user's coefficients alone."""
    trained, alone = _moved(_start(method, users=3)), _start(method)
    for name, parameter in _start(method, users=3).named_parameters():
        assert parameter.shape[0] == 3
        assert torch.equal(parameter[1], alone.get_parameter(name)[0])
    x = torch.randn(3, 4, 24)
    _gain(trained.changes(), QUERY, x)[1].square().sum().backward()
    reached = [p.grad for p in trained.parameters() if p.grad is not None]
    assert any(grad[1].any() for grad in reached)
    assert not any(grad[[0, 2]].any() for grad in reached)
    for user in range(3):
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(trained.get_parameter(name)[user : user + 1])
        torch.testing.assert_close(
            _gain(trained.changes(), QUERY, x)[user],
            _gain(alone.changes(), QUERY, x[user : user + 1])[0],
        )
        for name, values in trained.values(user).items():
            assert np.array_equal(values, alone.values()[name])


@pytest.mark.parametrize("method", ["nola", "lora"])
def test_the_seed_decides_the_start(method: str) -> None:
    def start(seed: int) -> list[torch.Tensor]:
        first = "alpha" if method == "nola" else "A_24"
        return list(_start(method, seed).get_parameter(first).detach()[0])

    assert all(torch.equal(one, other) for one, other in zip(start(1), start(1), strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(start(1), start(2), strict=True))
    assert len(start(2**64 - 1)) > 0


@pytest.mark.parametrize("method", ["nola", "vera", "fourierft"])
def test_the_seed_decides_the_basis(method: str) -> None:
    one, same, other = (_moved(_start(method, seed)) for seed in (1, 1, 2))
    for target in TARGETS:
        assert np.array_equal(_delta(one, target), _delta(same, target))
        assert not np.allclose(_delta(one, target), _delta(other, target))


# -- what the device expands ----------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(("method", "more"), VARIANTS)
def test_training_sees_what_the_device_expands(
    method: str, more: Mapping[str, Any], storage: str
) -> None:
    """Of the second of two users, rounded in training as the file rounds it."""
    trained = _moved(_start(method, users=2, **more))
    trained.storage, trained.rounded = storage, True
    expansion = expanded(_adapter(trained, method, storage, user=1))
    assert list(expansion) == [target.name for target in TARGETS]
    changes = trained.changes()
    for target in TARGETS:
        x = torch.randn(2, 6, target.in_features)
        wanted = _on_device(expansion[target.name], x[1], target)
        found = _gain(changes, target, x)[1].detach().double().numpy()
        assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max(), target.name


@pytest.mark.parametrize("group", [8, 64])
@pytest.mark.parametrize("storage", ["int8", "int4", "int2"])
@pytest.mark.parametrize("method", WITH_TARGETS)
def test_training_sees_what_the_device_expands_from_groups(
    method: str, storage: str, group: int
) -> None:
    trained = _moved(_start(method))
    trained.storage, trained.group, trained.rounded = storage, group, True
    adapter = _adapter(trained, method, storage, group)
    expansion = flat(get_method(method).expand(adapter, BasisCache()))
    for target in TARGETS:
        x = torch.randn(1, 6, target.in_features)
        wanted = _on_device(expansion[target.name], x[0], target)
        found = _gain(trained.changes(), target, x)[0].detach().double().numpy()
        assert np.abs(found - wanted).max() <= 2e-6 * np.abs(wanted).max(), target.name


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("method", WITH_TARGETS)
def test_without_rounding_it_sees_full_precision(method: str, storage: str) -> None:
    trained, exact = _moved(_start(method)), _moved(_start(method))
    trained.storage = storage
    for target in TARGETS:
        assert np.array_equal(_delta(trained, target), _delta(exact, target))


@pytest.mark.parametrize("method", WITH_TARGETS)
def test_the_file_has_the_tensors_that_are_trained(method: str) -> None:
    trained = _moved(_start(method, users=2))
    layout = get_method(method).layout(trained.config, TARGETS)
    assert {name: v.shape for name, v in trained.values().items()} == layout
    parameters = dict(trained.named_parameters())
    assert list(parameters) == [name.replace(".", "_") for name in layout]
    for name, values in trained.values(1).items():
        found = parameters[name.replace(".", "_")]
        assert np.array_equal(found[1].detach().numpy(), values)
        assert values.dtype == np.float32
        values[:] = 0
        assert found[1].any()  # a copy


def test_parameter_counts_are_the_papers() -> None:
    """k + l, r + out, n, r (in + out) and out numbers per target; on real shapes."""
    base = tuple(Target(f"{i:02}.{n}", 768, 768) for i in range(12) for n in ("query", "value"))
    wanted = {
        ("nola", (("k", 1000), ("l", 1000))): 24 * 2000,
        ("vera", (("rank", 1024),)): 43_008,
        ("fourierft", (("n", 1000),)): 24_000,
        ("lora", (("rank", 4),)): 147_456,
        ("ia3", ()): 24 * 768,
        ("ssf", ()): 2 * 24 * 768,
        ("bitfit", ()): 24 * 768,
    }
    for (method, settings), count in wanted.items():
        trained = get_trainable(method).start(base, dict(settings), 0)
        assert sum(p.numel() for p in trained.parameters()) == count
    nothing = get_trainable("head").start((), {}, 0, 3)
    assert list(nothing.parameters()) == []
    assert nothing.changes() == nothing.values() == {}


# -- NOLA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_nola_against_a_basis_written_out(shared: bool) -> None:
    """A = sum alpha_i A_i / sqrt(k in) and B = (c / r) sum beta_j B_j / sqrt(l r), in float64."""
    trained = _moved(_start("nola", shared=shared))
    alpha, beta = (trained.values()[name].astype(np.float64) for name in ("alpha", "beta"))
    for row, target in enumerate(TARGETS):
        layer = 0 if shared else 1 + row
        wide, high = target.in_features * 3, target.out_features * 3
        basis_a = np.stack([signs(BIG_SEED, Role.NOLA_A, i, wide, layer=layer) for i in range(13)])
        basis_b = np.stack([signs(BIG_SEED, Role.NOLA_B, j, high, layer=layer) for j in range(7)])
        a = (alpha[row] @ basis_a).reshape(-1, 3) / np.sqrt(13 * target.in_features)
        b = (beta[row] @ basis_b).reshape(3, -1) * (2 / 3) / np.sqrt(7 * 3)
        np.testing.assert_allclose(_delta(trained, target), a @ b, rtol=1e-4, atol=1e-6)


def test_nola_starts_at_a_normal_alpha() -> None:
    alpha = get_trainable("nola").start(TARGETS, {"k": 4000}, 0).get_parameter("alpha")
    assert alpha.mean().item() == pytest.approx(0, abs=0.03)
    assert alpha.std().item() == pytest.approx(1, rel=0.02)


@contextmanager
def _saved_bytes() -> Iterator[list[int]]:
    """Bytes of what autograd keeps for the backward pass, each storage once."""
    found: dict[int, int] = {}
    total: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total
    total.append(sum(found.values()))


def test_nola_keeps_one_bit_per_sign_for_the_backward_pass() -> None:
    """k x in x r = 6 million signs each way: 768 KB as bits, 25 MB as floats."""
    target = Target("x", 768, 768)
    settings = {"k": 1000, "l": 1000, "rank": 8}
    signs_each = 1000 * 768 * 8
    trained = get_trainable("nola").start((target,), settings, 0)
    with _saved_bytes() as saved:
        out = _gain(trained.changes(), target, torch.randn(1, 4, 768))
    assert out.requires_grad
    bits = 2 * signs_each // 8
    assert bits <= saved[0] <= bits + 200_000
    assert saved[0] < 4 * signs_each / 10


def test_more_layers_of_a_shared_basis_keep_no_more_of_it() -> None:
    settings = {"k": 1000, "l": 1000, "rank": 8}
    kept = []
    for count in (1, 4):
        targets = tuple(Target(f"x{i}", 768, 768) for i in range(count))
        trained = get_trainable("nola").start(targets, settings, 0)
        with _saved_bytes() as saved:
            changes = trained.changes()
            _ = [_gain(changes, t, torch.zeros(1, 4, 768)) for t in targets]
        kept.append(saved[0])
    assert kept[1] - kept[0] < 4 * 60_000  # A, B and activations of three layers more


_ONE_STEP = """
import resource, sys, torch
from regrow_format.adapter import Target
from regrow_toolchain.adapters import get_trainable
torch.set_num_threads(1)
targets = tuple(Target(f"x{i}", 768, 768) for i in range(4))
def step(k):
    trained = get_trainable("nola").start(targets, {"k": k, "l": k, "rank": 16}, 0)
    changes = trained.changes()
    total = 0
    for t in targets:
        parts = changes[t.name]["low_rank"]
        total = total + (torch.randn(1, 8, 768) @ parts["A"] @ parts["B"]).sum()
    total.backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
first = step(50)
print(step(4000) - first)
"""


@pytest.mark.slow
def test_memory_of_a_training_step_does_not_grow_with_the_basis(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    """k = l = 4000, rank 16, width 768: the signs of A and B as floats would take 393 MB."""
    out, err = start(program=_ONE_STEP).communicate(timeout=300)
    assert err == ""
    assert float(out) < 60


# -- VeRA -----------------------------------------------------------------------------------------


def _vera_signs(seed: int, role: Role, vectors: int, entries: int) -> np.ndarray:
    return np.stack([signs(seed, role, i, entries) for i in range(vectors)]).astype(np.float64)


def test_vera_against_the_formula() -> None:
    """lambda_b * (B (lambda_d * (A x))), the entries of A and B of variance 2 / fan, in float64."""
    trained = _moved(_start("vera"))
    values = {name: v.astype(np.float64) for name, v in trained.values().items()}
    used: dict[int, int] = {}
    for row, target in enumerate(TARGETS):
        wide, high = target.in_features, target.out_features
        a = _vera_signs(BIG_SEED, Role.VERA_A, 11, wide) * math.sqrt(2 / wide)
        b = _vera_signs(BIG_SEED, Role.VERA_B, high, 11) * math.sqrt(2 / 11)
        scale_b = values[f"b.{high}"][used.get(high, 0)]
        used[high] = used.get(high, 0) + 1
        delta = np.diag(scale_b) @ b @ np.diag(values["d"][row]) @ a
        np.testing.assert_allclose(_delta(trained, target), delta.T, rtol=1e-4, atol=1e-5)


def test_vera_computes_as_peft_does() -> None:
    """PEFT's layer with our A, B and scales put in gives the same, forwards and backwards."""
    from peft import VeraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Linear(24, 24)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.query(x)
            return result

    target = Target("query", 24, 24)
    torch.manual_seed(0)
    model = Model()
    plain = Model()
    plain.load_state_dict(model.state_dict())
    ours = _moved(get_trainable("vera").start((target,), {"rank": 11}, 5))
    theirs = get_peft_model(model, VeraConfig(r=11, target_modules=["query"]))
    layer = theirs.base_model.model.query
    a = torch.from_numpy(_vera_signs(5, Role.VERA_A, 11, 24)).float()
    b = torch.from_numpy(_vera_signs(5, Role.VERA_B, 24, 11)).float()
    with torch.no_grad():
        layer.vera_A["default"].copy_(a * math.sqrt(2 / 24))
        layer.vera_B["default"].copy_(b * math.sqrt(2 / 11))
        layer.vera_lambda_d["default"].copy_(ours.get_parameter("d")[0, 0])
        layer.vera_lambda_b["default"].copy_(ours.get_parameter("b_24")[0, 0])
    x = torch.randn(7, 24)
    found = plain(x) + _gain(ours.changes(), target, x[None])[0]
    torch.testing.assert_close(found, theirs(x), rtol=1e-5, atol=1e-5)
    weights = torch.randn(7, 24)
    (found * weights).sum().backward()
    (theirs(x) * weights).sum().backward()
    for mine, other in (("d", "vera_lambda_d"), ("b_24", "vera_lambda_b")):
        grad = ours.get_parameter(mine).grad
        assert grad is not None
        torch.testing.assert_close(
            grad[0, 0], getattr(layer, other)["default"].grad, rtol=1e-5, atol=1e-5
        )


def test_vera_starts_at_d_initial() -> None:
    trained = _start("vera", d_initial=0.25)
    assert torch.equal(trained.get_parameter("d"), torch.full((1, len(TARGETS), 11), 0.25))
    assert trained.config == {"rank": 11}  # what it started at is nothing for the file
    for width in (9, 16, 24, 40):
        assert not trained.get_parameter(f"b_{width}").any()


# -- FourierFT ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 17, 135])
def test_fourierft_against_the_closed_form(count: int) -> None:
    """delta W[a, b] = (alpha / (in out)) sum_l c_l cos 2 pi (a j_l / out + b k_l / in), float64.

    Grids of even and odd height and width; with 135 of them, every place of the smallest one and
    with it those that are their own mirrors.
    """
    targets = tuple(
        Target(f"{wide}x{high}", wide, high) for wide in (9, 12, 24) for high in (15, 16, 24)
    )
    trained = _moved(_start("fourierft", targets=targets, n=count))
    c = trained.values()["c"].astype(np.float64)
    for row, target in enumerate(targets):
        high, wide = target.out_features, target.in_features
        delta = np.zeros((high, wide))
        for value, place in zip(c[row], locations(BIG_SEED, count, high, wide), strict=True):
            j, k = divmod(int(place), wide)
            a, b = np.arange(high)[:, None], np.arange(wide)[None]
            delta += value * np.cos(2 * np.pi * (a * j / high + b * k / wide))
        delta *= 20 / (high * wide)
        found = _delta(trained, target)
        assert np.abs(found - delta.T).max() <= 1e-6 * np.abs(delta).max(), target.name


def test_fourierft_is_the_real_part_of_an_inverse_transform() -> None:
    """As the paper has it: coefficients on an empty grid, ifft2, real part."""
    trained = _moved(_start("fourierft"))
    c = trained.values()["c"].astype(np.float64)
    for row, target in enumerate(TARGETS):
        grid = np.zeros((target.out_features, target.in_features))
        grid.reshape(-1)[locations(BIG_SEED, 17, *grid.shape)] = c[row]
        delta = 20 * np.fft.ifft2(grid).real
        assert np.abs(_delta(trained, target) - delta.T).max() <= 1e-6 * np.abs(delta).max()


def test_targets_of_one_shape_share_places_and_the_rest_repeats() -> None:
    trained = _moved(_start("fourierft"))
    with torch.no_grad():
        trained.get_parameter("c")[:, 3] = trained.get_parameter("c")[:, 2]
    assert np.array_equal(_delta(trained, TARGETS[2]), _delta(trained, TARGETS[3]))
    for target in TARGETS:
        assert np.array_equal(_delta(trained, target), _delta(trained, target))


def test_fourierft_may_start_as_in_the_paper() -> None:
    trained = get_trainable("fourierft").start(TARGETS, {"n": 135, "init": "paper"}, 3)
    c = trained.get_parameter("c").detach()
    assert c.std().item() == pytest.approx(1, rel=0.15)
    assert c.mean().item() == pytest.approx(0, abs=0.15)
    again = get_trainable("fourierft").start(TARGETS, {"n": 135, "init": "paper"}, 3)
    assert torch.equal(again.get_parameter("c"), c)
    assert trained.config == {"n": 135, "alpha": 64.0}
    assert any(_delta(trained, target).any() for target in TARGETS)


def test_biased_places_are_stored() -> None:
    trained = _start("fourierft", bias_width=5.0, bias_frequency=2.0)
    assert (trained.basis.kind, trained.basis.version) == ("stored", 1)
    assert sorted(trained.stored_basis) == [
        "places.16x15", "places.24x24", "places.40x9", "places.9x24",
    ]  # fmt: skip
    for name, places in trained.stored_basis.items():
        high, wide = map(int, name.removeprefix("places.").split("x"))
        assert places.dtype == np.uint32
        assert np.array_equal(places, biased_places((high, wide), 17, 2.0, 5.0, BIG_SEED))


def _eq5(grid: tuple[int, int], frequency: float, width: float) -> np.ndarray:
    """The weight of every place, from the formula; D to the nearest corner of the repeated grid."""
    weights = np.zeros(grid)
    for j in range(grid[0]):
        for k in range(grid[1]):
            d = math.hypot(min(j, grid[0] - j), min(k, grid[1] - k))
            if d:
                weights[j, k] = math.exp(-(((d * d - frequency**2) / (d * width)) ** 2))
            else:
                weights[j, k] = 1.0 if frequency == 0 else 0.0
    return weights.reshape(-1)


@pytest.mark.parametrize(("frequency", "width"), [(0.0, 2.0), (3.0, 2.0), (2.0, 10.0)])
def test_biased_places_follow_eq_5(frequency: float, width: float) -> None:
    """The first of each draw has probability weight / sum: chi-square over 4,000 draws."""
    grid, draws = (10, 7), 4000
    weights = _eq5(grid, frequency, width)
    wanted = draws * weights / weights.sum()
    first = [biased_places(grid, 1, frequency, width, seed)[0] for seed in range(draws)]
    found = np.bincount(first, minlength=grid[0] * grid[1])
    often = wanted >= 5
    cells = [*zip(found[often], wanted[often], strict=True),
             (found[~often].sum(), wanted[~often].sum())]  # fmt: skip
    chi = sum((f - w) ** 2 / w for f, w in cells if w > 0)
    freedom = len(cells) - 1
    assert chi < freedom + 4 * math.sqrt(2 * freedom)
    assert found[0] == 0 or frequency == 0  # D = 0 has no weight but in a band around 0
    if frequency == 0:
        assert found.argmax() == 0


def test_the_second_place_is_drawn_from_what_is_left() -> None:
    """Without repeats: given the first place, weights of the others decide."""
    grid, draws = (4, 3), 6000
    weights = _eq5(grid, 1.0, 2.0)
    pairs = np.array([biased_places(grid, 2, 1.0, 2.0, seed) for seed in range(draws)])
    assert (pairs[:, 0] != pairs[:, 1]).all()
    total = weights.sum()
    share = np.array([
        sum(weights[i] / total * weights[p] / (total - weights[i]) for i in range(12) if i != p)
        for p in range(12)
    ])  # fmt: skip
    found = np.bincount(pairs[:, 1], minlength=12)
    wanted = draws * share
    chi = sum((f - w) ** 2 / w for f, w in zip(found, wanted, strict=True) if w > 5)
    assert chi < 11 + 4 * math.sqrt(22)


def test_biased_places_are_distinct_and_reproducible() -> None:
    one = biased_places((24, 30), 400, 4.0, 6.0, 2**64 - 1)
    assert one.dtype == np.int64
    assert len(set(one.tolist())) == 400
    assert one.min() >= 0
    assert one.max() < 720
    assert np.array_equal(one, biased_places((24, 30), 400, 4.0, 6.0, 2**64 - 1))
    assert not np.array_equal(one, biased_places((24, 30), 400, 4.0, 6.0, 1))
    every = biased_places((6, 5), 30, 0.0, 2.0, 0)
    assert sorted(every.tolist()) == list(range(30))


@pytest.mark.parametrize(("frequency", "width"), [(1.0, 2.0), (1.0, 1e-200), (math.nan, 1.0)])
def test_too_few_places_with_a_weight(frequency: float, width: float) -> None:
    """D = 0 has none beside a band, and a band may be too narrow for float64."""
    with pytest.raises(UsageError, match=r"must leave 30 places on a grid of 6 x 5.*widen it"):
        biased_places((6, 5), 30, frequency, width, 0)


# -- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rslora", "scale"), [(False, 5 / 3), (True, 5 / 3**0.5)])
def test_lora_is_scaled_by_alpha_over_the_rank(rslora: bool, scale: float) -> None:
    trained = _moved(_start("lora", rslora=rslora))
    values = {name: v.astype(np.float64) for name, v in trained.values().items()}
    used: dict[str, int] = {}
    for target in TARGETS:
        parts = []
        for name in (f"A.{target.in_features}", f"B.{target.out_features}"):
            start = used.get(name, 0)
            parts.append(values[name][start : start + 3])
            used[name] = start + 3
        wanted = parts[0].T @ parts[1] * scale
        np.testing.assert_allclose(_delta(trained, target), wanted, rtol=1e-4, atol=1e-5)


def test_lora_starts_as_kaiming_uniform() -> None:
    """With a = sqrt(5): uniform up to 1 / sqrt(in), in every layer another draw."""
    targets = (Target("x", 400, 30), Target("y", 400, 30))
    trained = get_trainable("lora").start(targets, {}, 0)
    one, other = trained.get_parameter("A_400")[0].detach().unflatten(0, (2, 4))
    for a in (one, other):
        assert a.abs().max() <= 1 / 20
        assert a.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.05)
    assert not torch.equal(one, other)


# -- BitFit and head ------------------------------------------------------------------------------


def test_bitfit_adds_a_vector_whatever_comes_in() -> None:
    trained = _moved(_start("bitfit", users=2))
    values = trained.values(1)
    rows = {"a.down": ("b.9", 0), "b.query": ("b.24", 0), "c.query": ("b.24", 1)}
    for name, (tensor, row) in rows.items():
        target = next(target for target in TARGETS if target.name == name)
        change = _gain(trained.changes(), target, torch.randn(2, 3, 24))[1].detach().numpy()
        assert np.array_equal(change, np.broadcast_to(values[tensor][row], change.shape))


IA3_TARGETS = tuple(
    Target(f"attention.encoder.layer.{i}.{name}", wide, high)
    for i in (0, 1)
    for name, wide, high in (
        ("attention.output.dense", 8, 8),
        ("attention.self.key", 8, 8),
        ("intermediate.dense", 8, 12),
        ("output.dense", 12, 8),
    )
)


@pytest.mark.parametrize(
    ("said", "endings"),
    [
        ("auto", ["0.output.dense", "1.output.dense"]),
        ("", []),
        ("key, intermediate.dense", ["intermediate.dense", "key"]),
        ("output.dense", ["output.dense"]),  # the attention's too
    ],
)
def test_ia3_knows_feedforward_layers(said: str, endings: list[str]) -> None:
    trained = get_trainable("ia3").start(IA3_TARGETS, {"feedforward": said}, 0)
    assert trained.config == {"feedforward": endings}
    dotted = tuple(f".{ending}" for ending in endings)
    forward = {name for name, parts in trained.changes().items() if "input_scale" in parts}
    assert forward == {t.name for t in IA3_TARGETS if endings and t.name.endswith(dotted)}


def test_ia3_multiplies_outputs_or_inputs() -> None:
    """The paper's l ∘ k, and l ∘ γ(W1 x) before W2, with l = 1 + what is stored."""
    trained = _moved(_start("ia3", users=2))
    values, x = trained.values(1), torch.randn(2, 3, 24)
    rows = {"a.down": ("t.24", 0), "b.query": ("s.24", 0), "c.query": ("s.24", 1)}
    for target in TARGETS:
        if target.name not in rows:
            continue
        tensor, row = rows[target.name]
        scale, weight = torch.from_numpy(1 + values[tensor][row]), _weight(target)
        wanted = (x * scale) @ weight if tensor == "t.24" else (x @ weight) * scale
        found = _gain(trained.changes(), target, x) + x @ weight
        torch.testing.assert_close(found[1], wanted[1], rtol=1e-5, atol=1e-5)


def test_head_only_has_a_file_with_a_head_alone() -> None:
    trained = get_trainable("head").start((), {}, 1)
    layer = HeadLayer("head", np.zeros((2, 3), np.float32), np.zeros(2, np.float32))
    adapter = Adapter(
        "head", trained.config, 1, "sha256:0", trained.targets, {}, head=Head((layer,), ("a", "b"))
    )
    assert Adapter.from_bytes(adapter.to_bytes()).coefficients == {}


# -- combinations of signs ------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [8, 64, 1 << 20])
@pytest.mark.parametrize("entries", [1, 8, 101])
@pytest.mark.parametrize("kept", [False, True])
def test_combine_signs_against_a_dense_basis(
    monkeypatch: pytest.MonkeyPatch, at_once: int, entries: int, kept: bool
) -> None:
    """For several users and targets; as bits, and as the floats of a small basis."""
    monkeypatch.setattr(sign_products, "_FLOATS_AT_ONCE", at_once)
    bits = torch.from_numpy(sign_bits(7, Role.NOLA_A, 5, 128))  # longer than what is used
    basis = ready_signs(bits, 128) if kept else bits
    assert basis.is_floating_point() is kept
    dense = torch.from_numpy(np.stack([signs(7, Role.NOLA_A, i, entries) for i in range(5)]))
    rows = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    other = rows.detach().clone().requires_grad_()
    result, wanted = combine_signs(rows, basis, entries), other @ dense.double()
    assert result.dtype == torch.float64
    torch.testing.assert_close(result, wanted)
    weights = torch.randn(2, 3, entries, dtype=torch.float64)
    (result * weights).sum().backward()
    (wanted * weights).sum().backward()
    torch.testing.assert_close(rows.grad, other.grad)


def test_combine_signs_passes_gradcheck() -> None:
    bits = torch.from_numpy(sign_bits(7, Role.NOLA_B, 4, 21))
    rows = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: combine_signs(c, bits, 21), (rows,))


@pytest.mark.parametrize("kept", [False, True])
def test_a_users_sums_are_the_same_bits_in_any_company(kept: bool) -> None:
    bits = torch.from_numpy(sign_bits(7, Role.NOLA_A, 64, 4096))
    basis = ready_signs(bits, 4096) if kept else bits
    rows = torch.randn(9, 8, 64)
    together = combine_signs(rows, basis, 4096)
    for user in (0, 4, 8):
        alone = combine_signs(rows[user : user + 1], basis, 4096)
        assert torch.equal(together[user], alone[0])


def test_a_large_basis_stays_in_bits() -> None:
    bits = torch.from_numpy(sign_bits(7, Role.NOLA_A, 300, 8192))
    assert ready_signs(bits, 8192) is bits
    assert ready_signs(bits[:, :16], 128).dtype == torch.float32


# -- quantisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 8, 48, 64])
@pytest.mark.parametrize("bits", range(2, 9))
def test_fake_quantisation_is_the_devices(bits: int, group: int) -> None:
    values = torch.randn(6, 50)
    values[1] = 0
    values[2] *= 1e-30
    values[3] *= 1e30
    values[4] = torch.arange(50) - 25.0  # ties
    values[5] = 1e-44
    codes, scale = quantize(values.numpy(), bits, group or None)
    found = fake_quantize(values[None], f"int{bits}", group)[0].numpy()
    wide = np.repeat(scale[:, None] if not group else scale, min(group, 50) or 50, axis=1)[:, :50]
    wanted = codes * wide
    largest = np.abs(values.numpy()).max(axis=1, keepdims=True)
    assert np.all(np.abs(found - wanted) <= 2e-7 * largest)
    assert np.array_equal(np.rint(found / wide), codes)


def test_half_precision_rounds_and_full_does_not() -> None:
    values = torch.randn(2, 9)
    assert torch.equal(fake_quantize(values, "fp32"), values)
    assert torch.allclose(fake_quantize(values, "fp16"), values.half().float(), rtol=0, atol=1e-7)
    assert not torch.equal(fake_quantize(values, "fp16"), values)


@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("storage", STORAGE)
def test_gradients_pass_straight_through(storage: str, group: int) -> None:
    values = torch.randn(2, 3, 9, requires_grad=True)
    weights = torch.randn(2, 3, 9)
    (fake_quantize(values, storage, group) * weights).sum().backward()
    assert torch.equal(values.grad, weights)


# -- settings -------------------------------------------------------------------------------------


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
    fourier = get_trainable("fourierft").start(TARGETS, {"alpha": "3", "bias_width": "2"}, 0)
    assert fourier.config == {"n": 128, "alpha": 3.0}
    assert fourier.basis.kind == "stored"


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("nola", {"q": 1}, r"among k=64, l=64, rank=8, c=8\.0, shared=True, got 'q'"),
        ("lora", {"k": 1}, r"among rank=4, alpha=4\.0, rslora=False, got 'k'"),
        ("ia3", {"k": 1}, "of ia3 must be among feedforward=auto, got 'k'"),
        (
            "ia3",
            {"feedforward": "down,up,wo"},
            "auto or endings of targets, got 'wo', which ends none: endings: down, odd, query, up",
        ),
        ("ssf", {"k": 1}, "of ssf must be among none: it has no settings, got 'k'"),
        ("bitfit", {"k": 1}, "of bitfit must be among none: it has no settings, got 'k'"),
        ("head", {"rank": 1}, "of head must be among none: it has no settings, got 'rank'"),
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
        ("lora", {"rank": 10}, r"rank must be at most 9, the width of a\.down, got 10"),
        ("vera", {"rank": 0}, "rank must be from 1 to 4096, got 0"),
        ("vera", {"d_initial": "much"}, "vera's d_initial must be of type float, got 'much'"),
        ("vera", {"d_initial": 0}, "vera's d_initial must be a finite number other than 0, got 0"),
        ("vera", {"d_initial": "nan"}, "d_initial must be a finite number other than 0, got nan"),
        ("fourierft", {"n": 0}, "n must be from 1 to 65536, got 0"),
        ("fourierft", {"n": 217}, r"n must be at most 216, the size of a\.down, got 217"),
        ("fourierft", {"init": "normal"}, "fourierft's init must be zero or paper, got 'normal'"),
        ("fourierft", {"bias_width": -1}, "bias_width must be 0 or more"),
        ("fourierft", {"bias_frequency": "-2"}, "bias_frequency and bias_width must be 0 or more"),
        (
            "fourierft",
            {"bias_frequency": 2},
            "bias_frequency must come with a bias_width, got 2 alone",
        ),
        ("fourierft", {"bias_width": "nan"}, "bias_frequency and bias_width must be 0 or more"),
    ],
)
def test_settings_that_make_no_sense(method: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        get_trainable(method).start(TARGETS, settings, 0)


def test_an_unknown_method_lists_those_there_are() -> None:
    listed = "nola, vera, fourierft, lora, ia3, ssf, bitfit, head"
    with pytest.raises(UsageError, match=f"method must be one of {listed}, got 'dora'"):
        get_trainable("dora")
    assert list(METHODS) == listed.split(", ")
