"""Training one adapter: it learns, leaves the backbone alone, and is the same every time."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from regrow_runtime.adapter import STORAGE, Adapter
from regrow_runtime.basis import BasisCache
from regrow_runtime.errors import MismatchError, RegrowError, UsageError
from regrow_runtime.methods import get_method
from regrow_toolchain.adapting import adapt
from regrow_toolchain.applying import applied
from regrow_toolchain.backbone import Backbone, load_backbone
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.data.dataset import split
from regrow_toolchain.labels import fit_labels
from regrow_toolchain.methods import METHODS
from regrow_toolchain.training import predict, score

Data = Callable[..., Dataset]
_OWN = ("open", "shut", "stop")
_QUICK = AdaptConfig(steps=8)
_LEARN: dict[str, dict[str, Any]] = {
    "nola": {"steps": 100, "shift": 0.3, "noise": 0.05},
    "lora": {"steps": 120, "shift": 0.3, "noise": 0.05, "lr": 0.02},
}


@pytest.fixture
def small(compressed_folder: Path) -> Backbone:
    """The compressed tiny ViT, loaded for this test alone."""
    return load_backbone(compressed_folder)


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_a_shifted_condition_is_learned(
    backbone: Backbone, small: Backbone, dataset: Data, method: str, which: str
) -> None:
    """Light and dark exchanged: the backbone is at chance, 48 samples make up for it."""
    model = backbone if which == "dense" else small
    unseen = dataset(150, 9, inverted=True)
    config = AdaptConfig(method=method, **_LEARN[method])
    done = adapt(model, dataset(60, 5, inverted=True), config)
    before = score(model.model, unseen)
    assert before < 0.5
    assert done.adapter.head is None
    with applied(model.model, done.adapter):
        assert score(model.model, unseen) > before + 0.3
    assert score(model.model, unseen) == before


def test_a_head_of_ones_own_is_learned(small: Backbone, dataset: Data) -> None:
    done = adapt(small, dataset(60, 5, names=_OWN), AdaptConfig(steps=60, shift=0.0))
    head = done.adapter.head
    assert head is not None
    assert head.labels == _OWN
    assert head.layers[0].weight.shape == (3, 32)
    assert done.after > 0.9
    with applied(small.model, done.adapter):
        assert score(small.model, dataset(90, 9, names=_OWN)) > 0.9


def test_head_kept_or_new(small: Backbone, dataset: Data) -> None:
    own, theirs = dataset(24, 5, names=_OWN), dataset(24, 5)
    assert adapt(small, theirs, _QUICK).adapter.head is None
    assert adapt(small, theirs, replace(_QUICK, head="keep")).adapter.head is None
    fresh = adapt(small, theirs, replace(_QUICK, head="new")).adapter.head
    assert fresh is not None
    assert fresh.labels == ("left", "middle", "right")
    with pytest.raises(UsageError, match="labels must be among the backbone's"):
        adapt(small, own, replace(_QUICK, head="keep"))
    with pytest.raises(UsageError, match="labels must be among the backbone's"):
        adapt(small, dataset(24, 5, names=("left", "shut", "stop")), _QUICK)


def test_a_new_head_may_have_fewer_classes(small: Backbone, dataset: Data) -> None:
    data = dataset(24, 5, names=_OWN)
    done = adapt(small, data.take(np.flatnonzero(data.labels < 2)), _QUICK)
    assert done.adapter.head is not None
    assert done.adapter.head.labels == ("open", "shut")
    with applied(small.model, done.adapter):
        assert predict(small.model, data).shape == (24, 2)


def test_both_layers_of_a_deep_head_are_the_adapters(dataset: Data) -> None:
    """A head such as RoBERTa's: `dense`, then `out_proj`."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(8, 8)
            self.out_proj = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out_proj(torch.tanh(self.dense(x)))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.tanh(self.fc(x))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(432, 8)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.head = Head()

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            x = self.stem(pixel_values.flatten(1))
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    torch.manual_seed(0)
    backbone = Backbone(
        Model().eval(), "sha256:1", "custom", ("head.dense", "head.out_proj"), ("a", "b", "c"), ()
    )
    settings = {"rank": 2, "k": 8, "l": 8}
    config = replace(_QUICK, method_settings=settings)
    head = adapt(backbone, dataset(24, 1, names=_OWN), config).adapter.head
    assert head is not None
    assert [layer.name for layer in head.layers] == ["head.dense", "head.out_proj"]
    start = backbone.model.get_parameter("head.dense.weight").detach().numpy()
    moved = np.abs(head.layers[0].weight - start).max()
    assert 1e-4 < moved < 0.5  # trained, from the backbone's own weights on


# -- what stays ----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("left", "middle", "right"), _OWN])
def test_the_backbone_stays_as_it_is(
    backbone: Backbone, dataset: Data, names: tuple[str, ...]
) -> None:
    model = backbone.model
    model.vit.layernorm.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    data = dataset(24, 5, names=names)
    outputs = predict(model, data)
    adapt(backbone, data, _QUICK)
    assert np.array_equal(predict(model, data), outputs)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_state_of_torch_comes_back(small: Backbone, dataset: Data) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    adapt(small, dataset(24, 5), _QUICK)
    assert torch.equal(torch.rand(4), wanted)
    assert not torch.are_deterministic_algorithms_enabled()


# -- reproducible --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes(small: Backbone, dataset: Data, method: str) -> None:
    config = replace(_QUICK, method=method, seed=2**64 - 1)
    data = dataset(24, 5, names=_OWN)
    one = adapt(small, data, config).adapter.to_bytes()
    torch.manual_seed(99)
    assert adapt(small, data, config).adapter.to_bytes() == one
    assert adapt(small, data, replace(config, seed=7)).adapter.to_bytes() != one


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_is_64_bits(small: Backbone, dataset: Data, seed: int) -> None:
    with pytest.raises(UsageError, match="seed must be"):
        adapt(small, dataset(24, 5), replace(_QUICK, seed=seed))


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("method", METHODS)
def test_the_scores_are_those_of_the_file(
    small: Backbone, dataset: Data, tmp_path: Path, method: str, storage: str
) -> None:
    """From the same data, with the adapter as it comes from disk."""
    data = dataset(45, 5, names=_OWN)
    config = replace(_QUICK, method=method, storage=storage, holdout=0.4, steps=20)
    done = adapt(small, data, config)
    written = done.adapter.save(tmp_path / "a.safetensors")
    assert written == (tmp_path / "a.safetensors").stat().st_size
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert adapter.storage == storage
    _, held = split(fit_labels(data, small.labels, "auto")[0], 0.4, config.seed)
    with applied(small.model, adapter):
        after = score(small.model, held)
    (kept,) = adapter.validated
    assert (kept.variant, kept.metric, kept.samples) == ("fp32", "accuracy", 18)
    assert (kept.before, kept.after) == (done.before, done.after)
    assert kept.after == after
    assert kept.before == 0  # the backbone knows none of these names


def test_the_file_says_what_it_is(small: Backbone, dataset: Data) -> None:
    config = replace(_QUICK, method_settings={"k": "9", "rank": 2}, seed=4)
    adapter = adapt(small, dataset(24, 5), config, targets=["query", "value"]).adapter
    assert adapter.backbone_id == small.backbone_id
    assert adapter.config == {"k": 9, "l": 64, "rank": 2, "c": 8.0, "shared": True}
    assert (adapter.method, adapter.seed, adapter.storage) == ("nola", 4, "int4")
    assert [t.name.rpartition(".")[2] for t in adapter.targets] == ["query", "value"] * 2
    assert adapter.coefficients["alpha"].values.shape == (4, 9)


def test_without_samples_held_back_there_is_no_score(small: Backbone, dataset: Data) -> None:
    done = adapt(small, dataset(24, 5), replace(_QUICK, holdout=0))
    assert np.isnan(done.before)
    assert np.isnan(done.after)
    assert done.adapter.validated == ()


# -- failures ------------------------------------------------------------------------------------


def test_a_rate_that_breaks_the_loss_stops(small: Backbone, dataset: Data) -> None:
    with pytest.raises(RegrowError, match=r"loss must be finite, got .*: lower --lr"):
        adapt(small, dataset(24, 5), replace(_QUICK, lr=1e30))
    assert not any(module._forward_hooks for module in small.model.modules())
    assert any(p.requires_grad for p in load_backbone(small.files[0].parent).model.parameters())


def test_samples_that_are_not_finite_stop(small: Backbone, dataset: Data) -> None:
    data = dataset(24, 5)
    data.inputs["pixel_values"][:] = np.nan
    with pytest.raises(RegrowError, match="loss must be finite, got nan at step 0"):
        adapt(small, data, _QUICK)


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int4"])
def test_coefficients_that_break_at_the_last_step_are_no_file(
    small: Backbone, dataset: Data, tmp_path: Path, storage: str
) -> None:
    """The loss was finite, the step after it was not."""
    config = replace(_QUICK, steps=1, lr=1e38, method="lora", storage=storage, holdout=0)
    with pytest.raises(RegrowError, match="finite"):
        adapt(small, dataset(24, 5), replace(config, lr=float("inf"))).adapter.save(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "vera"}, "method must be one of nola, lora, got 'vera'"),
        ({"storage": "int9"}, "storage must be one of fp32"),
        ({"head": "maybe"}, "head must be auto, keep or new, got 'maybe'"),
        ({"steps": 0}, "steps and batch size must be at least 1"),
        ({"batch_size": 0}, "steps and batch size must be at least 1"),
        ({"holdout": 1.0}, "holdout must be from 0 to below 1"),
        ({"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"method_settings": {"rank": 64}}, "rank must be at most 32"),
        ({"method_settings": {"speed": 1}}, "settings of nola must be among"),
    ],
)
def test_settings_that_make_no_sense(
    small: Backbone, dataset: Data, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        adapt(small, dataset(24, 5), replace(_QUICK, **change))


def test_a_backbone_without_a_head(small: Backbone, dataset: Data) -> None:
    bare = replace(small, head=(), labels=())
    for head in ("new", "auto"):
        with pytest.raises(UsageError, match="backbone must have a head to train a new one"):
            adapt(bare, dataset(24, 5), replace(_QUICK, head=head))


def test_a_model_that_takes_no_pictures(bert_folder: Path, dataset: Data) -> None:
    names = ("LABEL_0", "LABEL_1", "LABEL_2")
    with pytest.raises(RegrowError, match=r"model must take the data's inputs, got pixel_values"):
        adapt(load_backbone(bert_folder), dataset(24, 5, names=names), _QUICK)


# -- applying ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", ["query", "output.dense", "query.down"])
def test_applied_adds_x_a_b(small: Backbone, dataset: Data, method: str, target: str) -> None:
    """By hand: every target's output gains (x A) B, with A and B from the device's code."""
    config = replace(_QUICK, method=method, steps=20, method_settings={"rank": 3})
    adapter = adapt(small, dataset(24, 5), config, targets=[target]).adapter
    expansion = get_method(method).expand(adapter, BasisCache())
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str) -> Any:
        return lambda _m, args, out: seen.__setitem__(name, (args[0], out))

    with applied(small.model, adapter), torch.no_grad():
        handles = [
            small.model.get_submodule(name).register_forward_hook(keep(name)) for name in expansion
        ]
        small.model(pixel_values=torch.randn(2, 3, 12, 12))
    for handle in handles:
        handle.remove()
    assert len(seen) == len(expansion) > 1
    for name, (x, out) in seen.items():
        a, b = (torch.from_numpy(np.array(expansion[name][part])) for part in "AB")
        with torch.no_grad():
            plain = small.model.get_submodule(name)(x)
        assert (out - plain).abs().max() > 1e-5
        torch.testing.assert_close(out, plain + (x @ a) @ b)


def test_an_adapter_that_does_not_fit_leaves_no_hooks(
    small: Backbone, bert_folder: Path, dataset: Data
) -> None:
    adapter = adapt(small, dataset(24, 5), _QUICK).adapter
    other = load_backbone(bert_folder).model
    with pytest.raises(MismatchError, match="does not fit the adapter"), applied(other, adapter):
        pytest.fail("the block must not run")
    assert not any(module._forward_hooks for module in other.modules())
    with pytest.raises(KeyError), applied(small.model, adapter):
        raise KeyError
    assert not any(module._forward_hooks for module in small.model.modules())


def test_before_counts_known_names_when_the_head_is_new(small: Backbone, dataset: Data) -> None:
    """The backbone's own names with a new head: what it knows already counts as known."""
    data = dataset(45, 5)
    named = replace(data, names=small.labels, named=True)
    done = adapt(small, named, replace(_QUICK, head="new", holdout=0.4))
    _, held = split(fit_labels(named, small.labels, "new")[0], 0.4, _QUICK.seed)
    assert done.before == pytest.approx(score(small.model, held))


def test_a_checkpoint_without_a_head_gets_a_new_one(
    vit_folder: Path, dataset: Data, tmp_path: Path
) -> None:
    """transformers draws a missing head at random: nothing may be trained against it."""
    folder = tmp_path / "headless"
    shutil.copytree(vit_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if not name.startswith("classifier.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    backbone = load_backbone(folder)
    assert backbone.labels == ()
    assert backbone.backbone_id == load_backbone(vit_folder).backbone_id
    done = adapt(backbone, dataset(24, 5), _QUICK)
    assert done.adapter.head is not None
    with pytest.raises(UsageError, match="must have a trained head"):
        adapt(backbone, dataset(24, 5), replace(_QUICK, head="keep"))
