"""Every integer product of exported bundles is exact, whatever it is fed and wherever it runs.

By arithmetic: no two weights of an output, with inputs of 255, pass 16 bits. And by ONNX Runtime,
against int64: here, and (slow) on an emulated Haswell, which has AVX2 and no VNNI.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from expansions import flat
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle, find_linears
from regrow_export.graph import all_graphs
from regrow_format.basis import BasisCache
from regrow_format.files import sha256_file
from regrow_format.manifest import MANIFEST, FileEntry, Manifest
from regrow_format.methods import get_method
from regrow_format.products import integer_products
from regrow_format.rounding import Rounding

MULTIPLY = Path(__file__).with_name("multiply.py")
QUERY = "vit.encoder.layer.0.attention.attention.query"
DOWN = "vit.encoder.layer.3.output.dense"
# Which input is the weight, and which is multiplied with it.
OPERANDS = {"MatMulInteger": (1, 0), "ConvInteger": (1, 0), "QLinearMatMul": (3, 0),
            "QLinearConv": (3, 0)}  # fmt: skip
MOST = 2**15 - 1  # of the 16 bits in which pairs are added
# What moves values and does not change them.
MOVES = {"Reshape", "Slice", "Transpose", "Unsqueeze", "Concat", "Cast", "Identity", "Gather"}

Codes = NDArray[np.int8]  # [in, out]


def _llama() -> ExportSource:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, vocab_size=60, max_position_embeddings=40,
    )  # fmt: skip
    return ExportSource(LlamaForCausalLM(config).eval(), "text-generation", "sha256:" + "ab" * 32)


@pytest.fixture(scope="module")
def adapter(vit, adapter_for):
    return adapter_for(vit, [QUERY, DOWN])


@pytest.fixture(scope="module")
def bundles(vit, adapter, tmp_path_factory) -> dict[str, Path]:
    """In int8, and graphs that have integer products for their expansion."""
    room = tmp_path_factory.mktemp("bundles")
    names = [name for name in find_linears(vit.model) if name not in vit.head]
    slotted = ExportConfig(targets=names, precision="int8")
    export_bundle(vit, room / "swappable", ExportRequest(slotted, expanders=(adapter,)))
    for mode in ("merged", "seeded"):
        config = ExportConfig(mode=mode, precision="int8")
        export_bundle(vit, room / mode, ExportRequest(config, adapter=adapter))
    export_bundle(
        vit,
        room / "constants",
        ExportRequest(ExportConfig(mode="seeded", constants=True), adapter=adapter),
    )
    plain = ExportConfig(mode="merged", precision="int8")
    export_bundle(_llama(), room / "llama", ExportRequest(plain))
    return {path.name: path for path in sorted(room.iterdir())}


# -- what is in the graphs -----------------------------------------------------------------------


class _Graph:
    """Of one file: its products, and where their operands come from."""

    def __init__(self, path: Path) -> None:
        parts = list(all_graphs(onnx.load(str(path)).graph))
        self.tensors = {t.name: numpy_helper.to_array(t) for g in parts for t in g.initializer}
        self.makers = {name: n for g in parts for n in g.node for name in n.output}
        self.products = [n for g in parts for n in g.node if n.op_type in OPERANDS]

    def weights(self) -> dict[str, NDArray[np.generic]]:
        """[in, out] of those that are constant: a convolution's are [out, in, …]."""
        found = {}
        for node in self.products:
            name = node.input[OPERANDS[node.op_type][0]]
            if name in self.tensors:
                codes = self.tensors[name]
                conv = "Conv" in node.op_type
                found[name] = codes.reshape(len(codes), -1).T if conv else codes
        return found

    def others(self) -> list[onnx.NodeProto]:
        names = self.weights()
        return [n for n in self.products if n.input[OPERANDS[n.op_type][0]] not in names]

    def ones_and_zeros(self, name: str) -> bool:
        """Whether a value is what a mask of 1 leaves, moved about."""
        node = self.makers[name]
        if node.op_type == "BitwiseAnd":
            return (self.tensors[node.input[1]] == 1).all()
        sources = node.input if node.op_type == "Concat" else node.input[:1]
        return node.op_type in MOVES and all(map(self.ones_and_zeros, sources))


def _graphs(folder: Path) -> Iterator[_Graph]:
    return map(_Graph, sorted(folder.glob("*.onnx")))


def _products(bundles: dict[str, Path]) -> dict[str, Codes]:
    return {
        f"{bundle}-{number}-{name}": codes
        for bundle, folder in bundles.items()
        for number, graph in enumerate(_graphs(folder))
        for name, codes in graph.weights().items()
    }


def _largest_pair(codes: Codes) -> int:
    """The largest |sum| of two weights of one output, of those that inputs can choose to add."""
    ordered = np.sort(codes.astype(np.int64), axis=0)
    low, high = ordered[:2].clip(max=0).sum(axis=0), ordered[-2:].clip(min=0).sum(axis=0)
    return int(max(high.max(), -low.min()))


def test_the_bundles_have_products(bundles):
    counts = {
        name: [len(graph.products) for graph in _graphs(folder)]
        for name, folder in bundles.items()
    }  # fmt: skip
    assert counts["swappable"] == [24, 3]  # the backbone, the expander
    assert counts["merged"] == [24]
    assert counts["seeded"] == [24 + 3]  # A of two shapes, B of one
    assert counts["constants"] == [3]
    assert counts["llama"] == [14]


def test_no_pair_of_products_can_saturate(bundles):
    products = _products(bundles)
    assert len(products) == 24 * 3 + 14
    for name, codes in products.items():
        assert codes.dtype == np.int8, name
        assert 255 * _largest_pair(codes) <= MOST, name


def test_codes_that_are_fed_are_multiplied_with_ones_and_zeros(bundles):
    """-128 to 127, twice, in any case."""
    others = [(graph, node) for folder in bundles.values()
              for graph in _graphs(folder) for node in graph.others()]  # fmt: skip
    assert len(others) == 3 * 3
    for graph, node in others:
        assert graph.ones_and_zeros(node.input[OPERANDS[node.op_type][1]]), node.output[0]


def test_the_runtime_reads_the_same_weights(bundles):
    """Without onnx: names, and the smallest and largest code."""
    for folder in bundles.values():
        for path in sorted(folder.glob("*.onnx")):
            graph = _Graph(path)
            found = integer_products(path)
            assert len(found) == len(graph.products)
            known = {p.weight: p.codes for p in found if p.codes is not None}
            weights = graph.weights()
            assert known == {n: (w.min(initial=0), w.max(initial=0)) for n, w in weights.items()}


def test_the_manifest_says_how_weights_were_rounded(bundles):
    for name, folder in bundles.items():
        manifest = Manifest.load(folder)
        if name == "constants":  # in fp32
            assert manifest.rounding is None
            continue
        assert manifest.rounding == Rounding("symmetric", (-64, 64), "out")
        codes = np.concatenate([c.ravel() for c in _products({name: folder}).values()])
        assert (codes.min(), codes.max()) == (-64, 64)


# -- what is computed ----------------------------------------------------------------------------


def _extremes(codes: Codes) -> NDArray[np.uint8]:
    """Inputs [rows, in]: all 255; every other; what adds up each output's weights of one sign."""
    wide = len(codes)
    every = np.arange(wide)
    rows = [np.full(wide, 255), 255 * (every % 2), 255 * (every // 2 % 2)]
    signs = [255 * (codes > 0).T, 255 * (codes < 0).T]
    drawn = np.random.default_rng(0).integers(0, 256, (16, wide))
    return np.vstack([*rows, *signs, drawn]).astype(np.uint8)


def _write(folder: Path, products: dict[str, Codes]) -> Path:
    """One-product models with weights that ONNX Runtime packs at load, and that it is fed."""
    folder.mkdir()
    ends = [
        helper.make_tensor_value_info(name, kind, [None, None])
        for name, kind in (
            ("a", TensorProto.UINT8), ("b", TensorProto.INT8), ("y", TensorProto.INT32),
        )
    ]  # fmt: skip
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    for number, codes in enumerate(products.values()):
        a = _extremes(codes)
        b = numpy_helper.from_array(codes, "b")
        for kind, inputs in (("packed", ends[:1]), ("fed", ends[:2])):
            graph = helper.make_graph([node], "product", inputs, ends[2:], [b])
            opsets = [helper.make_opsetid("", 18)]
            model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
            onnx.save(model, folder / f"{number}-{kind}.onnx")
            y = a.astype(np.int64) @ codes.astype(np.int64)
            np.savez(folder / f"{number}-{kind}.npz", a=a, y=y)
    return folder


def _run(*command: object) -> str:
    found = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "ORT_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def _widened(products: dict[str, Codes]) -> dict[str, Codes]:
    """Weights as they were rounded before: codes to 127."""
    return {n: np.rint(codes * (127 / 64)).astype(np.int8) for n, codes in products.items()}


def test_products_are_exact_here(bundles, tmp_path):
    products = _products(bundles)
    found = json.loads(_run(sys.executable, MULTIPLY, _write(tmp_path / "room", products)))
    assert len(found["wrong"]) == 2 * len(products)
    assert not any(found["wrong"].values())


def test_whether_products_saturate_here_is_known(bundles, tmp_path):
    """With codes to 127 sums are wrong where `saturates` says so, and nowhere else."""
    some = dict(list(_products(bundles).items())[:6])
    wide = _widened(some)
    assert all(255 * _largest_pair(codes) > MOST for codes in wide.values())
    found = json.loads(_run(sys.executable, MULTIPLY, _write(tmp_path / "room", wide)))
    assert any(found["wrong"].values()) == found["saturates"]


# -- on a processor without VNNI -----------------------------------------------------------------

QEMU = shutil.which("qemu-x86_64")
HASWELL = (QEMU, "-cpu", "Haswell", sys.executable)

# What a device does: every check, with an adapter, and the bits of an expansion.
DEVICE = """
import hashlib, json, sys
from regrow_format import Adapter, BasisCache
from regrow_format.methods import get_method
from regrow_toolchain.verification import verify
room, *bundles = sys.argv[1:]
user = room + "/user.safetensors"
made = {name: [[c.check, c.result, c.detail] for c in verify(name)] for name in bundles}
parts = get_method("nola").expand(Adapter.load(user), BasisCache())
data = b"".join(
    v.tobytes() for kinds in parts.values() for one in kinds.values() for v in one.values()
)
print(json.dumps({"checks": made, "expansion": hashlib.sha256(data).hexdigest()}))
"""


@pytest.fixture
def haswell():
    """haswell(*arguments): stdout of this interpreter on a processor with AVX2 and no VNNI."""
    if QEMU is None or sys.platform != "linux" or platform.machine() != "x86_64":
        pytest.skip("qemu-x86_64 (Debian's qemu-user) must be installed, on Linux and x86-64")
    return lambda *arguments: _run(*HASWELL, *arguments)


@pytest.mark.slow
def test_products_are_exact_without_vnni(bundles, tmp_path, haswell):
    products = _products(bundles)
    found = json.loads(haswell(MULTIPLY, _write(tmp_path / "room", products)))
    assert found["saturates"]
    assert len(found["wrong"]) == 2 * len(products)
    assert not any(found["wrong"].values())


@pytest.mark.slow
def test_the_old_rounding_is_wrong_without_vnni(bundles, tmp_path, haswell):
    """Every product of it: what is tested above can fail."""
    some = dict(list(_products(bundles).items())[:24])
    found = json.loads(haswell(MULTIPLY, _write(tmp_path / "room", _widened(some))))
    assert found["saturates"]
    assert all(found["wrong"].values())


@pytest.mark.slow
def test_bundles_made_here_are_right_without_vnni(bundles, adapter, tmp_path, haswell):
    """The backbone gives what it gave at export; an expansion has the same bits."""
    adapter.save(tmp_path / "user.safetensors")
    found = json.loads(haswell("-c", DEVICE, tmp_path, *bundles.values()))
    for checks in found["checks"].values():
        assert {result for _, result, _ in checks} == {"ok"}, checks
    parts = flat(get_method("nola").expand(adapter, BasisCache()))
    data = b"".join(value.tobytes() for target in parts.values() for value in target.values())
    assert found["expansion"] == hashlib.sha256(data).hexdigest()


@pytest.mark.slow
def test_weights_that_saturate_are_refused_without_vnni(bundles, adapter, tmp_path, haswell):
    adapter.save(tmp_path / "user.safetensors")
    honest = widen(bundles["merged"], tmp_path / "honest", (-127, 127))
    silent = widen(bundles["merged"], tmp_path / "silent", (-64, 64))
    found = json.loads(haswell("-c", DEVICE, tmp_path, honest, silent))["checks"]
    checks = {name: {c: (result, detail) for c, result, detail in found[str(name)]}
              for name in (honest, silent)}  # fmt: skip
    for name in (honest, silent):
        assert checks[name]["products"][0] == "failed"
    assert "saturate on this processor, which has no VNNI: export" in checks[honest]["products"][1]
    assert "must have codes from -64 to 64, got -127 to 127" in checks[silent]["products"][1]
    result, detail = checks[honest]["graph"]
    assert result == "failed"
    assert "must have codes from -64 to 64 on this processor" in detail
    assert "base" not in checks[honest]


def widen(folder: Path, out: Path, said: tuple[int, int]) -> Path:
    """A copy with codes to 127 in its weights, whose manifest says `said`."""
    shutil.copytree(folder, out)
    model = onnx.load(str(out / "backbone.onnx"))
    products = {name.removesuffix(".int8") for name in _Graph(out / "backbone.onnx").weights()}
    for tensor in model.graph.initializer:
        owner, _, part = tensor.name.rpartition(".")
        values = numpy_helper.to_array(tensor)
        if owner in products and part == "int8":
            wide = np.rint(values * (127 / 64)).astype(np.int8)
            tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
        elif owner in products and part == "scale":
            narrow = (values * (64 / 127)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(narrow, tensor.name))
    (out / "backbone.onnx.data").unlink(missing_ok=True)
    onnx.save(model, out / "backbone.onnx")
    manifest = Manifest.load(folder)
    path = out / "backbone.onnx"
    entry = FileEntry(path.stat().st_size, sha256_file(path))
    files = {name: old for name, old in manifest.files.items() if name != "backbone.onnx.data"}
    changed = replace(
        manifest, files=files | {path.name: entry}, rounding=Rounding("symmetric", said, "out")
    )
    (out / MANIFEST).write_text(changed.to_json(), encoding="utf-8")
    return out
