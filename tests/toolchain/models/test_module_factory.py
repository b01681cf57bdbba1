"""Backbones that a function returns: what they say of themselves, their id, the way on."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from regrow_format.errors import FormatError, MismatchError, RegrowError, UsageError
from regrow_runtime import Bundle
from regrow_toolchain.adapters import adapt
from regrow_toolchain.compress import compress
from regrow_toolchain.config import AdaptConfig, CompressConfig
from regrow_toolchain.data import load_data, load_inputs
from regrow_toolchain.interop import export_backbone
from regrow_toolchain.models import Backbone, load_backbone, save_backbone
from regrow_toolchain.models.identity import backbone_id

_CODE = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(x)))

class Net(nn.Module):
    def __init__(self, outputs=3, tied=False):
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        if tied:
            self.again = nn.Linear(6, 16)
            self.again.weight = self.embed.weight
        self.head = nn.Linear(16, outputs)
        if tied:
            self.register_buffer("part", self.head.weight.data[:1])
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    def forward(self, features):
        x = self.embed(features)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def make(**declared):
    torch.manual_seed(3)
    net = Net()
    for name, value in declared.items():
        setattr(net, name, value)
    return net

def net(): return make()
def named(): return make(labels=["no", "yes", "maybe"], task="gesture-classification")
def tied():
    torch.manual_seed(3)
    return Net(tied=True)
def words(): return "a model"
def fails(): raise ValueError("no weights here\\nmore")
def half(): return make().half()
def double():
    made = make()
    made.register_buffer("extra", torch.zeros(1, dtype=torch.float64))
    return made
def broken():
    made = make()
    with torch.no_grad():
        made.blocks[1].fc1.bias[2] = float("nan")
    return made
def meta(): return make().to("meta")
def with_labels(): return make(labels=["a", "b"])
def bad_labels(): return make(labels="abc")
def twice(): return make(labels=["a", "a", "b"])
def bad_head(): return make_headless("blocks.0")
def no_head(): return make_headless("nothing")
def without_head(): return make_headless(())
def other_head(): return make_headless("blocks.1.fc2")
def make_headless(head):
    net = make()
    net.last = net.head
    del net.head
    net.head = head
    net.forward = lambda features: net.last(features)
    return net
def bad_task(): return make(task=5)
def transformer():
    from transformers import BertConfig, BertForSequenceClassification
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        vocab_size=30, max_position_embeddings=16, num_labels=4,
    ))
class Home:
    @staticmethod
    def net(): return make()
thing = 5
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with a package of plain models; imports do not outlive the test."""
    package = tmp_path / "regrow_test_models"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(_CODE)
    (package / "wrong.py").write_text("1 +")
    (package / "needs.py").write_text("import no_such_module_at_all")
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), list(sys.path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("regrow_test_models"):
            del sys.modules[name]
    assert sys.path == path


def _net(name: str) -> Backbone:
    return load_backbone(f"regrow_test_models.nets:{name}")


def _features(count: int = 90, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    x = rng.normal(0, 1, (count, 6))
    x[np.arange(count), labels] += 2
    return x.astype(np.float32), labels


@pytest.fixture
def data(folder: Path) -> Path:
    x, labels = _features()
    np.savez(folder / "d.npz", features=x, labels=labels)
    return folder / "d.npz"


# -- what it says of itself ----------------------------------------------------------------------


def test_a_plain_module() -> None:
    backbone = _net("net")
    assert (backbone.head, backbone.labels) == (("head",), ("0", "1", "2"))
    assert backbone.task == "classification"
    assert (backbone.files, backbone.folder) == ((), None)
    assert backbone.function == "regrow_test_models.nets:net"
    assert not any(module.training for module in backbone.model.modules())
    assert _net("Home.net").backbone_id == backbone.backbone_id


def test_what_it_says_goes_before_what_it_looks_like() -> None:
    named = _net("named")
    assert named.labels == ("no", "yes", "maybe")
    assert named.task == "gesture-classification"
    other = _net("other_head")
    assert (other.head, len(other.labels)) == (("blocks.1.fc2",), 16)
    without = _net("without_head")
    assert (without.head, without.labels) == ((), ())
    assert without.task == "feature-extraction"


def test_a_function_may_return_a_model_of_transformers() -> None:
    backbone = _net("transformer")
    assert (backbone.task, backbone.head) == ("text-classification", ("classifier",))
    assert backbone.labels == tuple(f"LABEL_{i}" for i in range(4))


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("nothing.at:all", UsageError, "got nothing.at: no module nothing"),
        ("regrow_test_models.gone:net", UsageError, "no module regrow_test_models.gone"),
        ("regrow_test_models.wrong:net", RegrowError, "could not be imported: SyntaxError"),
        ("regrow_test_models.needs:net", RegrowError, "No module named 'no_such_module_at_all'"),
        ("regrow_test_models.nets:gone", UsageError, "must be a function, got .*no gone there"),
        ("regrow_test_models.nets:thing", UsageError, "must be a function, got .*thing: int"),
        ("regrow_test_models.nets:make.x", UsageError, "no x there"),
        ("regrow_test_models.nets:words", UsageError, "must return an nn.Module, got str"),
        ("regrow_test_models.nets:fails", RegrowError, "got ValueError: no weights here$"),
        ("regrow_test_models.nets:make_headless", RegrowError, "got TypeError: .*argument"),
        (
            "regrow_test_models.nets:half",
            UsageError,
            r"must be float32, got embed.weight in float1",
        ),
        ("regrow_test_models.nets:double", UsageError, r"must be float32, got extra in float64"),
        (
            "regrow_test_models.nets:broken",
            RegrowError,
            r"NaN or infinity in blocks\.1\.fc1\.bias$",
        ),
        (
            "regrow_test_models.nets:meta",
            UsageError,
            "must be on the CPU, got embed.weight on meta",
        ),
        ("regrow_test_models.nets:with_labels", UsageError, "one per output of head, got 2 for 3"),
        ("regrow_test_models.nets:bad_labels", UsageError, "labels must be a list of strings"),
        ("regrow_test_models.nets:twice", UsageError, "labels must not repeat one"),
        ("regrow_test_models.nets:bad_head", UsageError, "got blocks.0: Block"),
        ("regrow_test_models.nets:no_head", UsageError, "got nothing: nothing"),
        ("regrow_test_models.nets:bad_task", UsageError, "task must be a string, got 5"),
        (
            "regrow_test_models.nets:net@d.npz",
            UsageError,
            "must be a folder with regrow.json after",
        ),
        ("regrow_test_models.nets:", UsageError, "must be a model's folder"),
    ],
)
def test_names_and_models_that_do_not_serve(name: str, kind: type, words: str) -> None:
    with pytest.raises(kind, match=words) as error:
        load_backbone(name)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)


def test_a_folder_of_that_name_comes_first(folder: Path) -> None:
    (folder / "regrow_test_models.nets:net").mkdir()
    with pytest.raises(UsageError, match=r"it has no config\.json"):
        _net("net")


def test_the_callers_random_numbers_stay() -> None:
    torch.manual_seed(9)
    wanted = torch.rand(3)
    torch.manual_seed(9)
    _net("net")
    assert torch.equal(torch.rand(3), wanted)


# -- identity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net", "tied"])
def test_the_id_is_that_of_the_saved_weights(name: str, folder: Path) -> None:
    backbone = _net(name)
    state = backbone.model.state_dict()
    if name == "tied":
        del state["again.weight"]
        state["part"] = state["part"].clone()
    save_file(state, folder / "model.safetensors")
    assert backbone_id([folder / "model.safetensors"], ["head"]) == backbone.backbone_id
    assert _net(name).backbone_id == backbone.backbone_id


def test_another_head_is_the_same_backbone() -> None:
    assert _net("named").backbone_id == _net("net").backbone_id
    assert _net("without_head").backbone_id != _net("net").backbone_id
    assert _net("tied").backbone_id != _net("net").backbone_id


# -- the way to a device -------------------------------------------------------------------------


def test_a_plain_module_is_adapted_and_exported(data: Path, folder: Path) -> None:
    backbone = _net("net")
    samples = load_data(data, backbone)
    assert sorted(samples.inputs) == ["features"]
    done = adapt(backbone, samples, AdaptConfig(steps=30, holdout=0, head="new", shift=0, noise=0))
    done.adapter.save(folder / "a.safetensors")
    manifest = export_backbone(backbone, folder / "bundle", inputs=load_inputs(data, backbone))
    assert manifest.backbone_id == backbone.backbone_id == done.adapter.backbone_id
    bundle = Bundle.open(folder / "bundle")
    inputs = {"features": samples.inputs["features"][:5]}
    with torch.no_grad():
        wanted = backbone.model(torch.from_numpy(inputs["features"])).numpy()
    np.testing.assert_allclose(bundle.run(inputs)["output"], wanted, atol=1e-5)
    bundle.swap(folder / "a.safetensors")
    assert np.abs(bundle.run(inputs)["output"] - wanted).max() > 1e-3


def test_export_needs_inputs() -> None:
    with pytest.raises(UsageError, match="inputs must be given for a model that is not from"):
        export_backbone(_net("net"), "bundle")


def test_the_command_line_takes_a_function(
    cli: Callable[..., object], data: Path, folder: Path
) -> None:
    name = "regrow_test_models.nets:net"
    out = cli("adapt", name, "-o", "a.safetensors", "--data", data, "--steps", 5,
              "--shift", 0, "--holdout", 0)  # fmt: skip
    assert out.code == 0, out.err
    out = cli("export", name, "-o", "bundle", "--inputs", data, "--json")
    assert out.code == 0, out.err
    assert out.json["backbone_id"] == _net("net").backbone_id
    out = cli("export", name, "-o", "other")
    assert (out.code, "inputs must be given" in out.err) == (2, True)
    out = cli("export", name, "-o", "other", "--inputs", "nowhere.npz")
    assert (out.code, "no such file" in out.err) == (2, True)
    out = cli("run", "bundle", "--input", data, "--adapter", "a.safetensors", "--json")
    assert out.code == 0, out.err
    assert not (folder / "other").exists()


# -- compressed ----------------------------------------------------------------------------------

_SMALL = CompressConfig(ratio=1.5, epochs=2)


@pytest.fixture
def small(data: Path) -> Path:
    """tied, compressed with data: every weight has moved from what the function gives."""
    backbone = _net("tied")
    save_backbone(compress(backbone, load_data(data, backbone), _SMALL).backbone, "small")
    return Path("small")


def test_a_compressed_one_comes_back(small: Path, data: Path) -> None:
    backbone = load_backbone(f"regrow_test_models.nets:tied@{small}")
    stored = load_file(small / "regrow.safetensors")
    assert "again.weight" not in stored
    model = backbone.model
    assert model.again.weight is model.embed.weight
    assert not torch.equal(model.embed.weight, _net("tied").model.embed.weight)
    assert {name: t for name, t in model.state_dict().items() if name in stored}.keys() == {*stored}
    for name, tensor in stored.items():
        assert torch.equal(model.state_dict()[name], tensor), name
    assert backbone.backbone_id == json.loads((small / "regrow.json").read_text())["backbone_id"]
    assert backbone.head == ("head",)
    assert len(backbone.layers) == 4
    assert not any(p.is_meta for p in model.parameters())
    done = adapt(backbone, load_data(data, backbone), AdaptConfig(steps=5, shift=0, holdout=0))
    assert done.adapter.backbone_id == backbone.backbone_id
    bundle = export_backbone(backbone, "bundle", inputs=load_inputs(data, backbone))
    assert len(bundle.slots) >= 4
    assert save_backbone(backbone, "again").backbone_id == backbone.backbone_id


def test_a_folder_alone_runs_no_code(small: Path, folder: Path) -> None:
    for name in [n for n in sys.modules if n.startswith("regrow_test_models")]:
        del sys.modules[name]
    with pytest.raises(UsageError, match=r"give regrow_test_models\.nets:tied@small$"):
        load_backbone(small)
    config = json.loads((small / "regrow.json").read_text())
    config["function"] = "os:abort"
    (small / "regrow.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"that os:abort makes: to import and call"):
        load_backbone(small)
    with pytest.raises(UsageError, match=r"that os:abort makes, got regrow_test_models\.nets:tied"):
        load_backbone(f"regrow_test_models.nets:tied@{small}")
    assert not any(n.startswith("regrow_test_models") for n in sys.modules)


def test_a_folder_of_transformers_takes_no_function(compressed_folder: Path) -> None:
    with pytest.raises(UsageError, match="must be given without regrow_test_models"):
        load_backbone(f"regrow_test_models.nets:net@{compressed_folder}")


def test_a_function_that_has_changed(small: Path, folder: Path) -> None:
    shutil.rmtree(folder / "regrow_test_models" / "__pycache__", ignore_errors=True)
    for name in [n for n in sys.modules if n.startswith("regrow_test_models")]:
        del sys.modules[name]
    code = _CODE.replace("def tied():", "def tied():\n    return Net(outputs=4)\ndef before():")
    (folder / "regrow_test_models" / "nets.py").write_text(code)
    with pytest.raises(MismatchError) as error:
        load_backbone(f"regrow_test_models.nets:tied@{small}")
    assert "head.weight must be [4, 16], got [3, 16]" in error.value.findings
    assert "part is unknown" in error.value.findings


def test_weights_that_lack_a_tensor(small: Path) -> None:
    weights = load_file(small / "regrow.safetensors")
    del weights["embed.bias"]
    weights["head.bias"] = weights["head.bias"].half()
    save_file(weights, small / "regrow.safetensors")
    with pytest.raises(MismatchError) as error:
        load_backbone(f"regrow_test_models.nets:tied@{small}")
    assert set(error.value.findings) == {
        "embed.bias is missing", "head.bias must be torch.float32, got torch.float16",
    }  # fmt: skip


@pytest.mark.parametrize("change", [{"head": []}, {"head": ["embed"]}, {"function": 5}])
def test_a_broken_regrow_json(small: Path, change: dict) -> None:
    path = small / "regrow.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((FormatError, UsageError), match=r"regrow\.json|safetensors"):
        load_backbone(f"regrow_test_models.nets:tied@{small}")


def test_what_could_not_come_back_is_not_saved() -> None:
    backbone = _net("net")
    backbone.function = ""
    with pytest.raises(UsageError, match="must come from load_backbone to be saved"):
        save_backbone(backbone, "out")
    assert not Path("out").exists()
