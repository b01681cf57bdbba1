"""examples/web in Node: the vectors in JavaScript, expanders and bundles in onnxruntime-web.

Needs node, and for the second part npm with a registry that it can reach: about 10 MB are fetched
the first time, afterwards they come from npm's own cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from expansions import flat
from safetensors.numpy import save_file

from regrow_export import (
    ExportConfig,
    ExportRequest,
    ExportSource,
    build_expander,
    export_bundle,
    slot_targets,
)
from regrow_format.methods import get_method
from regrow_runtime import Adapter, BasisCache, Bundle, Coefficients, Head, HeadLayer, Target

pytestmark = pytest.mark.slow
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).parents[2]
WEB = ROOT / "examples" / "web"
VECTORS = ROOT / "tests" / "vectors"
BACKBONE = "sha256:" + "ab" * 32
TOLERANCE = 1e-6
KINDS = ("low_rank", "delta", "scale", "bias", "input_scale")
OTHER = "nola-other"  # with the config that is built into the seeded bundle
PIXELS = np.random.default_rng(7).standard_normal((3, 1, 8, 8)).astype(np.float32)

# Widths that pass a block of 128 signs and do not fill the last one.
TARGETS = (Target("0.down", 300, 24), Target("0.key", 24, 24), Target("0.up", 24, 300))
NOLA = {"k": 270, "l": 33, "rank": 4, "c": 2.0, "shared": True}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "nola-int8": ("nola", "int8", NOLA),
    "nola-layers-int4": ("nola", "int4", {**NOLA, "shared": False}),
    "vera-int8": ("vera", "int8", {"rank": 37}),
    "vera-fp16": ("vera", "fp16", {"rank": 5}),
    "lora-int8": ("lora", "int8", {"rank": 3, "alpha": 6.0, "rslora": False}),
    "dora-int8": ("dora", "int8", {"rank": 3, "alpha": 6.0, "rslora": False, "bias": True}),
    "dora-fp16": ("dora", "fp16", {"rank": 2, "alpha": 1.0, "rslora": True, "bias": False}),
    "ia3-int8": ("ia3", "int8", {"feedforward": ["0.down", "intermediate.dense"]}),
    "ssf-int8": ("ssf", "int8", {}),
    "bitfit-int8": ("bitfit", "int8", {}),
    "fourierft-int8": ("fourierft", "int8", {"n": 100, "alpha": 30.0}),
}


def _node(room: Path, script: str, *arguments: object) -> str:
    done = subprocess.run(
        ["node", script, *map(str, arguments)],
        cwd=room, capture_output=True, text=True, timeout=120, check=False, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def ask(room: Path) -> Callable[..., Any]:
    """ask(command, folder): what run.mjs answers."""
    return lambda command, folder: json.loads(_node(room, "run.mjs", command, folder))


def _adapter(
    method: str, storage: str, config: Mapping[str, Any], targets: Sequence[Target], seed: int
) -> Adapter:
    found, rng = get_method(method), np.random.default_rng(seed % 1000)
    constants = found.constants(config, targets)
    values = {
        name: Coefficients.store(
            3 * rng.standard_normal(shape).astype(np.float32), constants[name], storage
        )
        for name, shape in found.layout(config, targets).items()
    }
    return Adapter(method, config, seed, BACKBONE, tuple(targets), values, storage)


def _expansion(adapter: Adapter) -> dict[str, np.ndarray]:
    return {
        f"{target}.{part}": np.ascontiguousarray(array)
        for target, parts in flat(get_method(adapter.method).expand(adapter, BasisCache())).items()
        for part, array in parts.items()
    }


# -- JavaScript alone -----------------------------------------------------------------------------


def test_the_vectors_in_javascript(ask):
    found = ask("vectors", VECTORS)
    entries = found.pop("adapters")
    assert set(found) == {
        "philox", "signs", "locations", "packing",
        "mt19937 words", "mt19937 vera", "mt19937 fourierft",
    }  # fmt: skip
    for name, rows in found.items():
        assert rows["rows"] >= 3, name
        assert rows["differ"] == 0, name
    assert len(entries) == len(list((VECTORS / "adapters").iterdir()))
    for entry in entries:
        assert entry["parts"].keys() == entry["tensors"].keys(), entry["name"]
        for part, result in entry["parts"].items():
            where = f"{entry['name']} {part}: {result}"
            assert result["dims"], where
            assert result["values"] == np.prod(entry["tensors"][part]["shape"]), where
            if entry["match"] == "exact":
                assert (result["wrong"], result["sha256"]) == (0, True), where
            else:
                assert result["error"] <= TOLERANCE, where


def test_broken_adapters_are_refused_with_one_kind_of_error(ask):
    found = ask("broken", VECTORS)
    assert found["worse"] == []
    assert found["refused"] > 1000
    assert found["accepted"] > 100  # a coefficient is as good as another


# -- onnxruntime-web ------------------------------------------------------------------------------


def test_expanders_give_numpys_bits(installed, ask, tmp_path):
    values = {}
    for number, (name, (method, storage, config)) in enumerate(CASES.items()):
        adapter = _adapter(method, storage, config, TARGETS, 2**64 - 1 - number)
        adapter.save(tmp_path / f"{name}.safetensors")
        wanted = _expansion(adapter)
        save_file(wanted, tmp_path / f"{name}-wanted.safetensors")
        model = build_expander(config, TARGETS, storage, method)
        onnx.save(model, tmp_path / f"{name}.onnx")
        values[name] = {part: array.size for part, array in wanted.items()}
    (tmp_path / "cases.json").write_text(json.dumps(list(CASES)))
    found = ask("expanders", tmp_path)
    pinned = json.loads((WEB / "package.json").read_text())["dependencies"]["onnxruntime-web"]
    assert found["version"] == pinned
    for name, (method, _, _) in CASES.items():
        parts = found["found"][name]
        for by in ("graph", "script"):
            assert {part: r[by]["values"] for part, r in parts.items()} == values[name]
            for part, result in parts.items():
                where = f"{name} {part}, {by}: {result[by]}"
                if method == "fourierft":
                    assert result[by]["error"] <= TOLERANCE, where
                else:
                    assert result[by]["wrong"] == 0, where


def _own_head() -> Head:
    rng = np.random.default_rng(3)
    weight, bias = rng.standard_normal((3, 32)), rng.standard_normal(3)
    # fp16 holds these numbers.
    rounded = (array.astype(np.float16).astype(np.float32) for array in (weight, bias))
    return Head((HeadLayer("classifier", *rounded),), ("x", "y", "z"))


def _vit_adapters(vit: ExportSource) -> dict[str, Adapter]:
    """By name; low-rank factors, deltas, scales, biases, and heads of 3 classes."""
    names = [
        "vit.encoder.layer.0.attention.attention.query",
        "vit.encoder.layer.1.intermediate.dense",
    ]
    targets = slot_targets(vit.model, names, KINDS)
    made = {
        name: _adapter(method, storage, config, targets, 5 + number)
        for number, (name, (method, storage, config)) in enumerate(CASES.items())
    }
    made[OTHER] = _adapter("nola", "int8", NOLA, targets, 2**63 + 9)
    made["lora-int8"] = _with_head(made["lora-int8"])
    made["head"] = _with_head(_adapter("head", "fp16", {}, (), 0))
    return made


def _with_head(adapter: Adapter) -> Adapter:
    return replace(adapter, head=_own_head())


@dataclass(frozen=True)
class Swapped:
    """A swappable and a seeded bundle in `folder`, and what onnxruntime-web made of them."""

    folder: Path
    files: dict[str, list[str]]  # of the adapters that each was given, by bundle
    found: dict[str, dict[str, Any]]

    def logits(self, bundle: str) -> dict[str, np.ndarray]:
        return {
            name: np.array(run["data"], dtype=np.float32).reshape(run["dims"])
            for name, run in self.found[bundle].items()
            if name != "refused"
        }


@pytest.fixture(scope="module")
def swapped(installed, vit, tmp_path_factory) -> Swapped:
    folder, adapters = tmp_path_factory.mktemp("bundles"), _vit_adapters(vit)
    for name, adapter in adapters.items():
        adapter.save(folder / f"{name}.safetensors")
    _adapter("bitfit", "int8", {}, TARGETS, 1).save(folder / "odd.safetensors")
    nola = adapters["nola-int8"]
    expander = build_expander(nola.config, nola.targets, nola.storage, "nola")
    onnx.save(expander, folder / "expander.onnx")
    names = [target.name for target in nola.targets]
    export_bundle(
        vit, folder / "swappable", ExportRequest(ExportConfig(targets=names, slots=KINDS))
    )
    export_bundle(vit, folder / "seeded", ExportRequest(ExportConfig(mode="seeded"), adapter=nola))
    export_bundle(
        vit,
        folder / "constants",
        ExportRequest(ExportConfig(mode="seeded", constants=True), adapter=nola),
    )
    export_bundle(
        vit,
        folder / "fixed",
        ExportRequest(ExportConfig(targets=names, slots=KINDS, fixed_rank=37), expanders=[nola]),
    )
    save_file({"pixel_values": PIXELS}, folder / "inputs.safetensors")
    files = {
        "swappable": [f"{name}.safetensors" for name in adapters if name != OTHER],
        "seeded": [f"{OTHER}.safetensors", "nola-int8.safetensors"],
        "constants": [],
    }
    files["fixed"] = files["swappable"]
    own = {"graph": "fixed/expand-nola.onnx", "adapter": "nola-int8.safetensors"}
    graph = {"graph": "expander.onnx", "adapter": "nola-int8.safetensors"}
    refused = ["vera-int8.safetensors", "nola-layers-int4.safetensors"]
    request = {
        "swappable": {
            "adapters": files["swappable"], "refused": ["odd.safetensors"], "expander": graph
        },
        "seeded": {"adapters": files["seeded"], "refused": refused},
        "constants": {"adapters": [], "refused": []},
        "fixed": {"adapters": files["fixed"], "refused": ["odd.safetensors"], "expander": own},
    }  # fmt: skip
    (folder / "bundles.json").write_text(json.dumps(request))
    return Swapped(folder, files, json.loads(_node(installed, "run.mjs", "bundles", folder)))


@pytest.mark.parametrize("name", ["swappable", "seeded", "constants", "fixed"])
def test_bundles_and_swaps(swapped, name):
    logits = swapped.logits(name)
    bundle, inputs = Bundle.open(swapped.folder / name, threads=1), {"pixel_values": PIXELS}
    base = bundle.run(inputs)["logits"]
    np.testing.assert_allclose(logits["base"], base, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(logits["base again"], logits["base"])
    for file in swapped.files[name]:
        bundle.swap(swapped.folder / file)
        wanted = bundle.run(inputs)["logits"]
        np.testing.assert_allclose(logits[file], wanted, rtol=1e-4, atol=1e-5, err_msg=file)
        built_in = (name, file) == ("seeded", "nola-int8.safetensors")
        far = wanted.shape != base.shape or np.abs(wanted - base).max() > 0.01
        assert far != built_in, file


def test_other_ways_to_the_same_feeds(swapped):
    logits = swapped.logits("swappable")
    wanted = logits["nola-int8.safetensors"]
    np.testing.assert_array_equal(logits["expander"], wanted)
    fixed = swapped.logits("fixed")
    np.testing.assert_array_equal(fixed["expander"], fixed["nola-int8.safetensors"])
    np.testing.assert_allclose(logits["padded"], wanted, rtol=1e-4, atol=1e-5)


def test_adapters_that_do_not_fit_are_refused(swapped):
    odd, rank = swapped.found["swappable"]["refused"]
    first, *reasons = odd.splitlines()
    assert first == "adapter does not fit this bundle:"
    assert reasons == [
        f"  {t.name} must be a bias slot, got {t.in_features} -> {t.out_features}" for t in TARGETS
    ]
    assert rank == "rank must be 1, got 4,rank must be 1, got 4"
    vera, layers = swapped.found["seeded"]["refused"]
    assert "method must be nola, got vera" in vera
    assert "shared must be true, got false" in layers


def test_the_example_answers(installed, swapped):
    paths = [swapped.folder / file for file in swapped.files["swappable"]]
    lines = _node(installed, "node.mjs", swapped.folder / "swappable", *paths).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["base", *(path.stem for path in paths)]
    assert re.fullmatch(r"base: [a-d], [a-d]", lines[0])
    assert re.fullmatch(r"head: [x-z], [x-z] \(read and expanded in [\d.]+ ms\)", lines[-1])
