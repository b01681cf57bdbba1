"""DoRA in training: the paper's formula, PEFT's outputs and gradients, and what the file gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from expansions import expanded
from torch import Tensor, nn

from regrow_export.layers import LowRankLinear
from regrow_export.quantization import rounded_weights
from regrow_format.adapter import STORAGE, Adapter, Target
from regrow_format.errors import UsageError
from regrow_format.methods import get_method
from regrow_toolchain.adapters import Hooks, TrainableAdapter, adapt, applied, get_trainable
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone

TARGETS = (Target("conv", 12, 9), Target("dense", 7, 9), Target("pair", 12, 8))


class Model(nn.Module):
    """A Conv1D of GPT-2, a linear layer without a bias, a factored pair: targets of three types."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        torch.manual_seed(1)
        self.conv = Conv1D(9, 12)
        self.dense = nn.Linear(7, 9, bias=False)
        self.pair = LowRankLinear(12, 8, 5, bias=True)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn_like(parameter))

    def weight(self, name: str) -> Tensor:
        """float64 [out, in]."""
        weight = self.get_submodule(name).weight.detach().double()  # type: ignore[union-attr,operator]
        return weight.T if name == "conv" else weight

    def bias(self, name: str) -> Tensor:
        """float64 [out], zeros where there is none."""
        layer = self.pair.up if name == "pair" else self.get_submodule(name)
        return torch.zeros(9).double() if name == "dense" else layer.bias.detach().double()  # type: ignore[union-attr,operator]


def _start(model: nn.Module, users: int = 1, **settings: Any) -> TrainableAdapter:
    given = {"rank": 3, "alpha": 4.0, **settings}
    return get_trainable("dora").start(TARGETS, given, 5, users, model=model)


def _moved(trained: TrainableAdapter) -> TrainableAdapter:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return trained


def _outputs(model: nn.Module, trained: TrainableAdapter, inputs: dict[str, Tensor]) -> Any:
    """By target [users, rows, out], with what is trained hooked in."""
    hooks, users = Hooks(model, users=trained.users), trained.users
    hooks.attach([target.name for target in TARGETS])
    hooks.changes = trained.changes()
    try:
        return {
            name: model.get_submodule(name)(x.flatten(0, 1)).reshape(users, x.shape[1], -1)
            for name, x in inputs.items()
        }
    finally:
        hooks.detach()


def _inputs(users: int) -> dict[str, Tensor]:
    return {target.name: torch.randn(users, 4, target.in_features) for target in TARGETS}


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_are_the_papers_formula(rslora: bool) -> None:
    """m (W + s B A) / ||W + s B A|| x + bias in float64, eq. 5, of the second of two users."""
    model = Model()
    trained, inputs = _moved(_start(model, users=2, rslora=rslora)), _inputs(2)
    found, used = _outputs(model, trained, inputs), {9: 0, 8: 0}
    values = trained.get_parameter
    a = {"conv": values("A_12")[1, :3], "dense": values("A_7")[1], "pair": values("A_12")[1, 3:]}
    b = {"conv": values("B_9")[1, :3], "dense": values("B_9")[1, 3:], "pair": values("B_8")[1]}
    for target in TARGETS:
        name, high = target.name, target.out_features
        scale = 4 / 3**0.5 if rslora else 4 / 3
        changed = model.weight(name) + scale * (b[name].T.double() @ a[name].double())
        magnitude = trained.get_parameter(f"m_{high}")[1, used[high]].double()
        used[high] += 1
        weight = magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)
        wanted = inputs[name][1].double() @ weight.T + model.bias(name)
        torch.testing.assert_close(found[name][1].double(), wanted, rtol=1e-5, atol=1e-5)


def test_magnitudes_start_at_the_norms() -> None:
    model = Model()
    trained = _start(model, users=2)
    norms = torch.stack([model.weight(name).norm(dim=1) for name in ("conv", "dense")])
    torch.testing.assert_close(trained.get_parameter("m_9")[1].double(), norms, rtol=1e-6, atol=0)
    inputs = _inputs(2)
    for name, found in _outputs(model, trained, inputs).items():
        assert torch.equal(found, model.get_submodule(name)(inputs[name]))


def test_rows_of_zeros_stay_finite() -> None:
    model = Model()
    with torch.no_grad():
        model.dense.weight[2] = 0
    trained, inputs = _start(model), _inputs(1)
    found = _outputs(model, trained, inputs)["dense"]
    assert torch.equal(found, model.dense(inputs["dense"]))
    found.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trained.parameters())


def test_it_computes_as_peft_does() -> None:
    """PEFT's layer with our numbers put in: the same outputs and the same gradients."""
    from peft import LoraConfig, get_peft_model

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(12, 9)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.dense(x)
            return result

    torch.manual_seed(0)
    model, plain, target = One(), One(), Target("dense", 12, 9)
    plain.load_state_dict(model.state_dict())
    start = get_trainable("dora").start((target,), {"rank": 3, "alpha": 4.0}, 5, model=plain)
    ours = _moved(start)
    config = LoraConfig(r=3, lora_alpha=4, use_dora=True, target_modules=["dense"])
    theirs = get_peft_model(model, config)
    layer = theirs.base_model.model.dense
    pairs = {
        "A_12": layer.lora_A.default.weight,
        "B_9": layer.lora_B.default.weight,
        "m_9": layer.lora_magnitude_vector.default.weight,
    }
    with torch.no_grad():
        for name, parameter in pairs.items():
            own = ours.get_parameter(name)[0]
            parameter.copy_({"A": own, "B": own.T, "m": own[0] if name == "m_9" else own}[name[0]])
    x, weights = torch.randn(5, 12), torch.randn(5, 9)
    hooks = Hooks(plain)
    hooks.attach(["dense"])
    hooks.changes = ours.changes()
    found, wanted = plain(x), theirs(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    (found * weights).sum().backward()
    (wanted * weights).sum().backward()
    for name, parameter in pairs.items():
        own, grad = ours.get_parameter(name).grad, parameter.grad
        assert own is not None
        assert grad is not None
        grad = grad.T if name[0] == "B" else grad.reshape(own.shape[1:])
        torch.testing.assert_close(own[0], grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGE)
def test_the_files_bias_goes_with_its_scale(storage: str) -> None:
    """b = -s bias of s as the file rounds it, and nothing where a layer has no bias."""
    model = Model()
    trained = _moved(_start(model, users=2))
    trained.storage = storage
    adapter = _stored(trained, storage, user=1)
    assert dict(adapter.config) == {"rank": 3, "alpha": 4.0, "rslora": False, "bias": True}
    for name, parts in expanded(adapter).items():
        wanted = -parts["s"] * model.bias(name).numpy()
        bits = STORAGE[storage]
        step = 2.0**-10 if bits == 16 else 1 / (2 ** (bits - 1) - 1) if bits < 16 else 1e-7
        assert np.abs(parts["b"] - wanted).max() <= 0.51 * step * np.abs(wanted).max() + 1e-6
        assert (name == "dense") == (not parts["b"].any())
        changed = model.weight(name).numpy() + (parts["A"] @ parts["B"]).T.astype(np.float64)
        row = {"conv": 0, "dense": 1, "pair": 0}[name]
        magnitude = trained.get_parameter(f"m_{len(changed)}")[1, row].detach().double().numpy()
        exact = magnitude / np.linalg.norm(changed, axis=1) - 1
        assert np.abs(parts["s"] - exact).max() <= 0.51 * step * np.abs(exact).max() + 1e-5


def _stored(trained: TrainableAdapter, storage: str, user: int = 0) -> Adapter:
    from regrow_format.adapter import Coefficients

    constants = get_method("dora").constants(trained.config, trained.targets)
    values = {
        name: Coefficients.store(rows, constants[name], storage)
        for name, rows in trained.values(user).items()
    }
    adapter = Adapter("dora", trained.config, 5, "sha256:0", trained.targets, values, storage)
    return Adapter.from_bytes(adapter.to_bytes())


def test_no_bias_is_stored_where_there_is_none() -> None:
    model, target = Model(), TARGETS[1:2]
    trained = get_trainable("dora").start(target, {"rank": 3}, 5, model=model)
    assert trained.config["bias"] is False
    assert set(trained.values()) == {"A.7", "B.9", "s.9"}
    assert set(trained.changes()["dense"]) == {"low_rank", "scale"}
    assert get_method("dora").fills(trained.config, target[0]) == ("low_rank", "scale")


def test_norms_are_of_the_weights_that_training_computes_with(
    backbone: Backbone, dataset: Callable[..., Dataset]
) -> None:
    """At int4 precision s is 0 before the first step, though the exact weights have other norms."""
    config = AdaptConfig(method="dora", steps=1, lr=1e-20, holdout=0, precision="int4")
    adapter = adapt(backbone, dataset(24, 5), config).adapter
    assert not any(parts["s"].any() for parts in expanded(adapter).values())
    name = adapter.targets[0].name
    exact = backbone.model.get_submodule(name).weight.detach().norm(dim=1)  # type: ignore[union-attr,operator]
    with rounded_weights(backbone.model, "int4"):
        rounded = backbone.model.get_submodule(name).weight.detach().norm(dim=1)  # type: ignore[union-attr,operator]
    assert (exact - rounded).abs().max() > 1e-4


def test_layers_without_a_matrix_are_refused() -> None:
    class Odd(nn.Module):
        in_features, out_features = 7, 9

    model = Model()
    model.set_submodule("dense", Odd())
    with pytest.raises(UsageError, match=r"must be layers whose weight is a matrix, .* dense, Odd"):
        _start(model)
    with pytest.raises(UsageError, match="dora must be given the model"):
        get_trainable("dora").start(TARGETS, {}, 0)


def test_a_users_training_is_the_same_alone() -> None:
    model, inputs = Model(), _inputs(3)
    together, alone = _moved(_start(model, users=3)), _start(model)
    found = _outputs(model, together, inputs)
    for user in range(3):
        with torch.no_grad():
            for name, parameter in alone.named_parameters():
                parameter.copy_(together.get_parameter(name)[user : user + 1])
        own = _outputs(model, alone, {name: x[user : user + 1] for name, x in inputs.items()})
        for name, output in own.items():
            torch.testing.assert_close(output[0], found[name][user], rtol=1e-6, atol=1e-6)
        for name, values in together.values(user).items():
            np.testing.assert_array_equal(values, alone.values()[name])


def test_a_file_computes_as_training_did() -> None:
    model, inputs = Model(), _inputs(1)
    trained = _moved(_start(model))
    trained.storage, trained.rounded = "int4", True
    wanted = _outputs(model, trained, inputs)
    with applied(model, _stored(trained, "int4")), torch.no_grad():
        for name, x in inputs.items():
            found = model.get_submodule(name)(x)
            torch.testing.assert_close(found, wanted[name], rtol=1e-5, atol=1e-5)
