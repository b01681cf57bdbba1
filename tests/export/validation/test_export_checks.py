"""What stands beside a graph for phones and for other tools, and how its bytes lie."""

from __future__ import annotations

import mmap
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from torch import nn

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle
from regrow_export.slots import set_slots, with_slots
from regrow_export.validation import parity
from regrow_export.validation.mobile import partitions, required_operators
from regrow_format.errors import RegrowError
from regrow_format.manifest import Manifest
from regrow_runtime import Bundle

NAMES = [
    f"vit.encoder.layer.{i}.attention.attention.{part}"
    for i in range(4)
    for part in ("query", "value")
]


@pytest.fixture(scope="module")
def exported(vit, adapter_for, tmp_path_factory):
    """exported(mode, precision): a folder; each is made once."""
    room, made = tmp_path_factory.mktemp("checks"), {}

    def make(mode, precision="fp32"):
        folder = room / f"{mode}-{precision}"
        if folder not in made:
            adapter = None if mode == "swappable" else adapter_for(vit, NAMES)
            config = ExportConfig(
                mode=mode, precision=precision, targets=NAMES if adapter is None else ()
            )
            made[folder] = export_bundle(vit, folder, ExportRequest(config, adapter))
        return folder

    return make


MODES = [("swappable", "fp32"), ("swappable", "int4"), ("merged", "int8"), ("seeded", "fp32")]


@pytest.mark.parametrize(("mode", "precision"), MODES)
def test_every_file_is_listed_and_nothing_besides(exported, mode, precision):
    folder = exported(mode, precision)
    manifest = Manifest.load(folder)
    assert {path.name for path in folder.iterdir()} == {"manifest.json", *manifest.files}
    assert {"probe.safetensors", "expected.safetensors", "operators.config"} <= set(manifest.files)
    manifest.check_files(folder, hashes=True)


@pytest.mark.parametrize(("mode", "precision"), MODES)
def test_the_runtime_gives_what_is_stored(exported, mode, precision):
    bundle = Bundle.open(exported(mode, precision), threads=1)
    assert bundle.check().finding == "fine"
    stored = load_file(bundle.folder / "expected.safetensors")
    probe = load_file(bundle.folder / "probe.safetensors")
    logits = bundle.run({"pixel_values": probe["pixel_values"][:1]})["logits"]
    np.testing.assert_allclose(logits[0], stored["logits"], rtol=1e-4, atol=1e-4)
    assert ("logits.exact" in stored) == (mode == "swappable" and precision != "fp32")


@pytest.mark.parametrize(("mode", "precision"), MODES)
def test_required_operators_are_those_of_the_graph(exported, mode, precision):
    folder = exported(mode, precision)
    model = onnx.load(folder / "backbone.onnx", load_external_data=False)
    used = {(node.domain or "ai.onnx", node.op_type) for node in model.graph.node}
    listed = set()
    for line in (folder / "operators.config").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            domain, opset, names = line.split(";")
            assert int(opset) == Manifest.load(folder).opset
            assert names.split(",") == sorted(set(names.split(",")))
            listed |= {(domain, name) for name in names.split(",")}
    assert listed == used
    assert {domain for domain, _ in listed} == {"ai.onnx"}  # no custom operator anywhere


def test_onnx_runtime_reads_the_list(exported):
    """As its build script does."""
    parser = pytest.importorskip("onnxruntime.tools.reduced_build_config_parser")
    found, _ = parser.parse_config(str(exported("swappable") / "operators.config"))
    assert {"MatMul", "Softmax"} <= set(found["ai.onnx"][18])


def test_operators_of_subgraphs_and_of_every_file_count(tmp_path):
    inner = helper.make_graph(
        [helper.make_node("Neg", ["x"], ["y"])], "then", [], [_value("y", ["n"])]
    )
    other = helper.make_graph(
        [helper.make_node("Abs", ["x"], ["y"])], "else", [], [_value("y", ["n"])]
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=other)],
        "g",
        [_value("c", [], TensorProto.BOOL), _value("x", ["n"])],
        [_value("y", ["n"])],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "a.onnx")
    graph = helper.make_graph(
        [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")],
        "g", [_value("x", ["n"])], [_value("y", ["n"])],
    )  # fmt: skip
    opsets = [helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), tmp_path / "b.onnx")
    lines = required_operators(tmp_path).splitlines()
    assert lines[1:] == ["ai.onnx;18;Abs,If,Neg", "com.microsoft;1;Gelu"]


def _value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


# -- phones ----------------------------------------------------------------------------------------


def _chain(tmp_path, slots):
    """12 layers with low-rank slots beside, of fixed rank, dynamic, or none."""
    nodes, values, inputs = [], [], []
    for i in range(12):
        values.append(numpy_helper.from_array(np.ones((8, 8), np.float32), f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"b{i}"]))
        if slots is None:
            nodes[-1].output[0] = f"x{i + 1}"
            continue
        for part, shape in (("A", (1, 8, slots)), ("B", (1, slots, 8))):
            fixed = [2 if d == "r" else d for d in shape]
            values.append(numpy_helper.from_array(np.ones(fixed, np.float32), f"{part}{i}"))
            inputs.append(_value(f"{part}{i}", [f"r{i}" if d == "r" else d for d in shape]))
        nodes += [
            helper.make_node("MatMul", [f"x{i}", f"A{i}"], [f"a{i}"]),
            helper.make_node("MatMul", [f"a{i}", f"B{i}"], [f"c{i}"]),
            helper.make_node("Add", [f"b{i}", f"c{i}"], [f"x{i + 1}"]),
        ]
    graph = helper.make_graph(
        nodes, "g", [_value("x0", ["batch", 4, 8]), *inputs], [_value("x12", ["batch", 4, 8])],
        values,
    )  # fmt: skip
    path = tmp_path / f"{slots}.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9),
              path)  # fmt: skip
    return partitions(path, {"x0": np.zeros((2, 4, 8), np.float32)})


def test_slots_that_may_be_empty_cut_the_graph_and_fixed_ones_do_not(tmp_path):
    merged, fixed, dynamic = (_chain(tmp_path, slots) for slots in (None, 2, "r"))
    assert set(merged) == {"nnapi", "coreml_neuralnetwork", "coreml_mlprogram"}
    for name, count in merged.items():
        assert fixed[name] <= count == 1
        assert dynamic[name] > 6
    assert {path.name for path in tmp_path.iterdir()} == {"None.onnx", "2.onnx", "r.onnx"}


def test_partitions_stand_in_the_manifest(exported):
    found = {
        mode: Manifest.load(exported(mode)).checks.partitions for mode in ("merged", "swappable")
    }
    for counts in found.values():
        assert set(counts) == {"nnapi", "coreml_neuralnetwork", "coreml_mlprogram"}
        assert all(count > 0 for count in counts.values())
    assert all(found["merged"][name] <= count for name, count in found["swappable"].items())


def test_without_the_checker_there_are_none(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime.tools.mobile_helpers", None)
    assert partitions(tmp_path / "none.onnx", {}) == {}


# -- the bytes -------------------------------------------------------------------------------------


class _Wide(nn.Module):
    """One weight of 1 MiB and more, one below."""

    def __init__(self):
        super().__init__()
        self.small, self.large = nn.Linear(16, 512), nn.Linear(512, 600)

    def forward(self, x):
        return self.large(torch.tanh(self.small(x)))


def test_external_data_can_be_mapped(tmp_path):
    torch.manual_seed(0)
    model = _Wide().eval()
    source = ExportSource(model, "custom", "sha256:00")
    inputs = {"x": np.ones((2, 16), np.float32)}
    export_bundle(
        source,
        tmp_path / "b",
        ExportRequest(ExportConfig(targets=["small", "large"]), inputs=inputs),
    )
    stored = onnx.load(tmp_path / "b" / "backbone.onnx", load_external_data=False)
    seen = {}
    with (tmp_path / "b" / "backbone.onnx.data").open("rb") as stream:
        for tensor in stored.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                continue
            place = {entry.key: entry.value for entry in tensor.external_data}
            offset, length = int(place["offset"]), int(place["length"])
            assert offset % (1 << 16 if length >= 1 << 20 else 64) == 0
            start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            with mmap.mmap(
                stream.fileno(), length + offset - start, offset=start, access=mmap.ACCESS_READ
            ) as mapped:
                data = np.frombuffer(mapped[offset - start :], np.float32)
            seen[tuple(tensor.dims)] = data.reshape(tuple(tensor.dims))
    np.testing.assert_array_equal(seen[(600, 512)], model.large.weight.detach().numpy())
    np.testing.assert_array_equal(seen[(512, 16)], model.small.weight.detach().numpy())


@pytest.mark.parametrize(("mode", "precision"), MODES)
def test_the_graph_is_one_that_others_read(exported, mode, precision):
    """ONNX's full check by path, versions that ONNX Runtime 1.20 reads, names for Netron."""
    folder = exported(mode, precision)
    onnx.checker.check_model(str(folder / "backbone.onnx"), full_check=True)
    model = onnx.load(folder / "backbone.onnx", load_external_data=False)
    assert model.ir_version <= 10
    assert {item.domain for item in model.opset_import} == {""}
    assert model.opset_import[0].version <= 21
    assert model.producer_name == "regrow"
    props = {item.key: item.value for item in model.metadata_props}
    assert props["mode"] == mode
    assert props["variant"] == precision
    names = {value.name for value in model.graph.input}
    if mode == "swappable":
        assert {f"{name}.adapter_{part}" for name in NAMES for part in "AB"} <= names


# -- a probe that does not fit ---------------------------------------------------------------------


class _Fixed(nn.Module):
    """It takes one form of input alone: the probe's values break it, the given ones do not."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if (x < 0).any():
            raise ValueError("x must be positive")
        return self.fc(x)


def test_a_model_that_refuses_the_made_input_has_a_probe_of_the_given(tmp_path):
    source = ExportSource(_Fixed().eval(), "custom", "sha256:00")
    inputs = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    manifest = export_bundle(
        source, tmp_path / "b", ExportRequest(ExportConfig(targets=["fc"]), inputs=inputs)
    )
    assert manifest.checks.probe == ""
    np.testing.assert_array_equal(load_file(tmp_path / "b" / "probe.safetensors")["x"], inputs["x"])
    assert Bundle.open(tmp_path / "b").check().finding == "fine"


def test_a_bundle_that_disagrees_on_the_probe_is_not_kept(tmp_path, monkeypatch):
    """Torch gives something else than what was traced, for the probe alone."""
    from regrow_export.validation import device_checks

    honest = device_checks.first_output

    def other(model, inputs):
        name, values = honest(model, inputs)
        return name, values + 1

    monkeypatch.setattr(device_checks, "first_output", other)
    source = replace(ExportSource(_Wide().eval(), "custom", "sha256:00"))
    with pytest.raises(RegrowError, match="probe: the bundle and torch must agree, got a differ"):
        export_bundle(
            source,
            tmp_path / "b",
            ExportRequest(
                ExportConfig(targets=["small"]), inputs={"x": np.ones((2, 16), np.float32)}
            ),
        )
    assert list(tmp_path.iterdir()) == []


class _Amplifying(nn.Module):
    """Blocks that amplify what goes into them once adapters make their weights large."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)
            nn.init.normal_(self.fc.weight, std=0.05)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(6 * self.fc(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_made_adapters_are_no_stronger_than_a_model_can_take(tmp_path):
    """In full strength its outputs hang on how sums are rounded, in torch alone too."""
    torch.manual_seed(0)
    source = ExportSource(_Amplifying().eval(), "custom", "sha256:" + "ab" * 32)
    x = np.random.default_rng(0).standard_normal((3, 16)).astype(np.float32)
    config = ExportConfig(targets=[f"blocks.{i}.fc" for i in range(16)])
    manifest = export_bundle(source, tmp_path / "b", ExportRequest(config, inputs={"x": x}))
    slots = manifest.slots
    slotted, feeds = with_slots(source.model, slots), parity.random_feeds(slots, 1)
    set_slots(slotted, feeds)
    with torch.inference_mode():
        single = slotted(torch.from_numpy(x)).double()
        exact = slotted.double()(torch.from_numpy(x).double())
    assert (single - exact).abs().max() > 10 * manifest.parity["adapter_max_abs"] + 1e-3
    assert manifest.parity["adapter_effect"] > 0.01
    assert manifest.parity["slot_effect_min"] > 0
