"""Training one adapter: it learns, leaves the backbone alone, and is the same every time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from expansions import flat
from safetensors.torch import load_file, save_file
from torch import nn

from regrow_format.adapter import STORAGE, Adapter, HeadLayer
from regrow_format.basis import BasisCache
from regrow_format.errors import MismatchError, UsageError
from regrow_format.methods import get_method
from regrow_toolchain.adapters import adapt, applied
from regrow_toolchain.adapters.methods.registry import METHODS
from regrow_toolchain.adapters.trainer import AdapterTrainer
from regrow_toolchain.config import AdaptConfig
from regrow_toolchain.data import Dataset, fit_labels, split
from regrow_toolchain.models import Backbone, load_backbone
from regrow_toolchain.training import accuracy, predict

Data = Callable[..., Dataset]
_OWN = ("open", "shut", "stop")
_QUICK = AdaptConfig(steps=8, holdout=0)
# The condition, and what learns it from 48 samples. Biases alone cannot turn light into dark.
_LEARN: dict[str, tuple[str, dict[str, Any]]] = {
    "nola": ("inverted", {"steps": 90}),
    "vera": ("inverted", {"steps": 80, "lr": 0.05}),
    "fourierft": ("inverted", {"steps": 80}),
    "lora": ("inverted", {"steps": 130, "lr": 0.02}),
    "ia3": ("faint", {"steps": 70, "lr": 0.1}),
    "ssf": ("faint", {"steps": 70, "lr": 0.05}),
    "bitfit": ("faint", {"steps": 70, "lr": 0.05}),
    "head": ("swapped", {"steps": 60, "head_lr": 0.05}),
}
# Every method in the default storage, every storage with the default method, and fp16 with others.
_STORED = [
    *((method, "int4") for method in METHODS),
    *(("nola", storage) for storage in STORAGE if storage != "int4"),
    *((method, "fp16") for method in METHODS if method != "nola"),
]


@pytest.fixture
def small(compressed_folder: Path) -> Backbone:
    """The compressed tiny ViT, loaded for this test alone."""
    return load_backbone(compressed_folder)


def _condition(data: Dataset, name: str) -> Dataset:
    """Light for dark, a tenth of the contrast, or left for right."""
    pixels = data.inputs["pixel_values"]
    if name == "swapped":
        return replace(data, labels=np.array([2, 1, 0])[data.labels])
    changed = -pixels if name == "inverted" else 0.1 * pixels
    return replace(data, inputs={"pixel_values": changed.astype(np.float32)})


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("which", ["dense", "compressed"])
def test_another_condition_is_learned(
    backbone: Backbone, small: Backbone, dataset: Data, method: str, which: str
) -> None:
    """The backbone is at chance or near it, 48 samples make up for it."""
    model = backbone if which == "dense" else small
    condition, options = _LEARN[method]
    unseen = _condition(dataset(150, 9), condition)
    noise = 0.05 if condition == "inverted" else 0.0
    config = AdaptConfig(method=method, shift=0.3, noise=noise, **options)
    held = _condition(dataset(30, 6), condition)
    done = adapt(model, _condition(dataset(48, 5), condition), config, held=held)
    before = accuracy(model.model, unseen)
    assert before < 0.5
    assert done.improves
    assert (done.adapter.head is None) is (method != "head")
    with applied(model.model, done.adapter):
        assert accuracy(model.model, unseen) > before + 0.3
    assert accuracy(model.model, unseen) == before


def test_a_head_of_ones_own_is_learned(small: Backbone, dataset: Data) -> None:
    held = dataset(30, 6, names=_OWN)
    config = AdaptConfig(steps=60, shift=0.0)
    done = adapt(small, dataset(48, 5, names=_OWN), config, held=held)
    head = done.adapter.head
    assert head is not None
    assert head.labels == _OWN
    assert head.layers[0].weight.shape == (3, 32)
    assert done.after > 0.9
    with applied(small.model, done.adapter):
        assert accuracy(small.model, dataset(90, 9, names=_OWN)) > 0.9


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


@pytest.mark.parametrize("method", ["nola", "head"])
def test_a_head_that_is_tuned_starts_as_the_backbones(
    small: Backbone, dataset: Data, method: str
) -> None:
    still = replace(_QUICK, method=method, head="tune", head_lr=0.0, steps=1)
    head = adapt(small, dataset(24, 5), still).adapter.head
    assert head is not None
    assert head.labels == small.labels
    own = small.model.get_submodule(small.head[-1])
    assert np.abs(head.layers[-1].weight - own.weight.detach().numpy()).max() < 1e-3  # fp16
    moved = adapt(small, dataset(24, 5), replace(still, head_lr=0.01, steps=8)).adapter.head
    assert moved is not None
    assert np.abs(moved.layers[-1].weight - own.weight.detach().numpy()).max() > 1e-3
    with pytest.raises(UsageError, match="labels must be among the backbone's"):
        adapt(small, dataset(24, 5, names=_OWN), still)


def test_head_only_with_ones_own_labels(small: Backbone, dataset: Data) -> None:
    config = AdaptConfig(method="head", steps=60, shift=0.0, head_lr=0.01)
    held = dataset(30, 6, names=_OWN)
    done = adapt(small, dataset(48, 5, names=_OWN), config, held=held)
    assert (done.adapter.targets, dict(done.adapter.coefficients)) == ((), {})
    assert done.after > 0.8
    assert done.improves


def test_a_head_learns_at_its_own_rate(small: Backbone, dataset: Data) -> None:
    data = dataset(24, 5, names=_OWN)
    weights = []
    for rate in (0.001, 0.002):
        done = adapt(small, data, replace(_QUICK, head_lr=rate, steps=1, lr=0.0, noise=0.0))
        assert done.adapter.head is not None
        weights.append(done.adapter.head.layers[-1].weight)
    still = adapt(small, data, replace(_QUICK, head_lr=0.0, steps=1)).adapter.head
    assert still is not None
    first = still.layers[-1].weight
    ratio = np.abs(weights[1] - first).mean() / np.abs(weights[0] - first).mean()
    assert ratio == pytest.approx(2, rel=0.1)  # Adam's first step is as long as its rate


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
    config = replace(_QUICK, method=method, seed=2**64 - 1, steps=4)
    data = dataset(24, 5, names=_OWN)
    one = adapt(small, data, config).adapter.to_bytes()
    torch.manual_seed(99)
    assert adapt(small, data, config).adapter.to_bytes() == one
    assert adapt(small, data, replace(config, seed=7)).adapter.to_bytes() != one


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "storage"), _STORED)
def test_the_scores_are_those_of_the_file(
    small: Backbone, dataset: Data, tmp_path: Path, method: str, storage: str
) -> None:
    """From the same data, with the adapter as it comes from disk."""
    data = dataset(126, 5, names=_OWN)  # 51 are held back: enough without folds
    config = replace(_QUICK, method=method, storage=storage, holdout=0.4, steps=10)
    done = adapt(small, data, config)
    written = done.adapter.save(tmp_path / "a.safetensors")
    assert written == (tmp_path / "a.safetensors").stat().st_size
    adapter = Adapter.load(tmp_path / "a.safetensors")
    assert adapter.storage == storage
    _, held = split(fit_labels(data, small.labels, "auto")[0], 0.4, config.seed)
    with applied(small.model, adapter):
        after = accuracy(small.model, held)
    (kept,) = adapter.validated
    assert (kept.variant, kept.metric, kept.samples) == ("fp32", "accuracy", 51)
    assert (kept.before, kept.after) == (done.before, done.after)
    assert done.folds == 0
    assert kept.after == after
    assert kept.before == 0  # the backbone knows none of these names


def test_the_file_says_what_it_is(small: Backbone, dataset: Data) -> None:
    config = replace(_QUICK, method_settings={"k": "9", "rank": 2}, seed=4)
    adapter = adapt(small, dataset(24, 5), replace(config, targets=["query", "value"])).adapter
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
    assert (done.samples, done.folds, done.verdict) == (0, 0, None)
    assert done.improves  # nobody looked, so nobody can say no


# -- applying ------------------------------------------------------------------------------------


def _changed(
    layer: torch.nn.Module, parts: Mapping[str, np.ndarray], x: torch.Tensor
) -> torch.Tensor:
    """(layer(x (1 + t)) + (x A) B + x D) (1 + s) + b, of what there is."""
    tensors = {name: torch.from_numpy(np.array(part)) for name, part in parts.items()}
    y: torch.Tensor = layer(x * (1 + tensors.get("t", 0)))
    if "A" in tensors:
        y = y + (x @ tensors["A"]) @ tensors["B"]
    if "D" in tensors:
        y = y + x @ tensors["D"]
    return y * (1 + tensors.get("s", 0)) + tensors.get("b", 0)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        *((m, t) for m in METHODS for t in ("query", "output.dense") if m != "head"),
        *((m, "query.down") for m in ("nola", "vera", "fourierft", "lora")),
        *((m, t) for m in ("ssf", "bitfit") for t in ("query.up", "*layernorm*")),
        ("bitfit", "layernorm_before"),
    ],
)
def test_applied_changes_what_the_slots_do(
    small: Backbone, dataset: Data, method: str, target: str
) -> None:
    """By hand, with the tensors that the device's code expands."""
    config = replace(_QUICK, method=method)
    if method in ("nola", "vera", "lora"):
        config = replace(config, method_settings={"rank": 3})
    adapter = adapt(small, dataset(24, 5), replace(config, targets=[target])).adapter
    expansion = flat(get_method(method).expand(adapter, BasisCache()))
    came: dict[str, torch.Tensor] = {}
    gave: dict[str, torch.Tensor] = {}
    layers = {name: small.model.get_submodule(name) for name in expansion}

    def note(name: str) -> Any:
        return lambda _m, args: came.__setitem__(name, args[0])

    def keep(name: str) -> Any:
        return lambda _m, _args, out: gave.__setitem__(name, out)

    with applied(small.model, adapter), torch.no_grad():
        handles = []
        for name, layer in layers.items():
            handles += [
                layer.register_forward_pre_hook(note(name), prepend=True),
                layer.register_forward_hook(keep(name)),
            ]
        small.model(pixel_values=torch.randn(2, 3, 12, 12))
    for handle in handles:
        handle.remove()
    assert len(gave) == len(expansion) > 1
    for name, layer in layers.items():
        with torch.no_grad():
            plain, wanted = layer(came[name]), _changed(layer, expansion[name], came[name])
        assert (gave[name] - plain).abs().max() > 1e-5
        torch.testing.assert_close(gave[name], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_training_and_the_file_are_one_computation(
    small: Backbone, dataset: Data, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """What a further step would compute, rounded, is what `applied` computes from the file."""
    seen: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
    original = AdapterTrainer.run

    def run(self: AdapterTrainer, *arguments: Any, **more: Any) -> None:
        inputs = self.batches.batch(0).inputs
        original(self, *arguments, **more)
        self.hooks.attach([target.name for target in self.trained.targets])
        with torch.no_grad():
            seen.append((inputs, self._outputs(self.batches.batch(0))[0]))
        self.hooks.detach()

    monkeypatch.setattr(AdapterTrainer, "run", run)
    config = replace(_QUICK, method=method, holdout=0, storage="int4", noise=0.0, shift=0.0)
    adapter = adapt(small, dataset(24, 5), config).adapter
    ((inputs, outputs),) = seen
    with torch.no_grad():
        plain = small.model(**inputs).logits
        with applied(small.model, adapter):
            found = small.model(**inputs).logits
    assert (found - plain).abs().max() > 1e-2
    near = 1e-3 if method == "head" else 1e-5  # heads are stored in fp16
    torch.testing.assert_close(found, outputs, rtol=near, atol=near)


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


def test_a_head_that_does_not_fit_leaves_no_hooks(
    small: Backbone, gpt2_folder: Path, bert_folder: Path, dataset: Data
) -> None:
    config = replace(_QUICK, method="head", steps=1)
    adapter = adapt(small, dataset(24, 5, names=_OWN), config).adapter
    head = adapter.head
    assert head is not None
    gpt2 = load_backbone(gpt2_folder).model
    with pytest.raises(MismatchError, match="classifier must be a head of 32 inputs"):
        applied(gpt2, adapter).__enter__()
    narrow = HeadLayer("classifier", head.layers[0].weight[:, :16], head.layers[0].bias)
    cut = replace(adapter, head=replace(head, layers=(narrow,)))
    with pytest.raises(MismatchError, match="classifier must be a head of 16 inputs"):
        applied(small.model, cut).__enter__()
    for model in (gpt2, small.model):
        assert not any(module._forward_hooks for module in model.modules())


class _Named(nn.Module):
    """Hands its layers their input by name."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(6, 6)}) for _ in range(2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = torch.tanh(block["fc"](input=x))
        result: torch.Tensor = self.head(input=x)
        return result


def test_layers_may_get_their_input_by_name() -> None:
    torch.manual_seed(0)
    backbone = Backbone(_Named().eval(), "sha256:1", "custom", ("head",), ("a", "b", "c"), ())
    x = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)
    data = Dataset({"x": x}, np.arange(24) % 3, _OWN)
    done = adapt(backbone, data, replace(_QUICK, method_settings={"rank": 2}))
    assert done.adapter.head is not None
    plain = predict(backbone.model, data)
    with applied(backbone.model, done.adapter):
        assert np.abs(predict(backbone.model, data) - plain).max() > 1e-3


def test_before_counts_known_names_when_the_head_is_new(small: Backbone, dataset: Data) -> None:
    """The backbone's own names with a new head: what it knows already counts as known."""
    data = dataset(126, 5)
    named = replace(data, names=small.labels, named=True)
    done = adapt(small, named, replace(_QUICK, head="new", holdout=0.4))
    _, held = split(fit_labels(named, small.labels, "new")[0], 0.4, _QUICK.seed)
    assert done.before == pytest.approx(accuracy(small.model, held))


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
