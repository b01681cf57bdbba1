"""What is exported here opens and computes in older ONNX Runtimes, in environments of their own.

1.20 is the oldest that is read for. 1.21 to 1.24 multiply integers wrongly on CPUs with AMX where
columns fill no whole tile: 24 targets would show it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from expansions import flat

from regrow_export import ExportConfig, ExportRequest, build_expander, export_bundle, slot_targets
from regrow_export.methods import adapter_inputs
from regrow_format.adapter import Target
from regrow_format.methods import get_method
from regrow_runtime import BasisCache, Bundle

ROOT = Path(__file__).parents[2]
OLD = ("1.20.1", "1.23.2")
NAMES = ["vit.encoder.layer.0.attention.attention.query", "vit.encoder.layer.1.output.dense"]
PRECISIONS = ("fp32", "fp16", "int8", "int4")
METHODS = ("nola", "vera", "fourierft", "lora")
MANY = tuple(Target(f"layer.{number:02}", 64, 48) for number in range(24))

# Runs with the old one: the runtime alone, from the tree. Writes what it computed.
PROGRAM = """
import json, pathlib, sys
import numpy as np
import onnxruntime as ort
from regrow_format import Adapter, BasisCache
from regrow_format.methods import get_method
from regrow_runtime import Bundle
room = pathlib.Path(sys.argv[1])
made = {}
for folder in sorted(room.glob("bundle-*")):
    bundle = Bundle.open(folder, threads=1)
    x = {"pixel_values": np.load(room / "x.npy")}
    made[f"{folder.name} base"] = bundle.run(x)["logits"]
    made[f"{folder.name} check"] = np.array(bundle.check().ok)
    if bundle.manifest.mode != "merged":
        bundle.swap(room / "user.safetensors", check=True)
        made[f"{folder.name} user"] = bundle.run(x)["logits"]
many = Adapter.load(room / "many.safetensors")
for name, kinds in get_method("nola").expand(many, BasisCache()).items():
    parts = kinds["low_rank"]
    made |= {f"runtime {name}.{part}": value for part, value in parts.items()}
for path in sorted(room.glob("expand-*.onnx")):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with np.load(path.with_suffix(".npz")) as stored:
        fed = {name: stored[name] for name in stored.files}
    for value, found in zip(session.get_outputs(), session.run(None, fed)):
        made[f"{path.name} {value.name}"] = found
np.savez(room / f"{ort.__version__}.npz", **made)
print(json.dumps([ort.__version__, sorted(n for n in sys.modules if n in ("torch", "onnx"))]))
"""


@pytest.fixture(scope="module", params=OLD)
def old(request):
    return request.param


@pytest.fixture(scope="module")
def old_python(old, tmp_path_factory):
    """An interpreter with the old ONNX Runtime, this numpy and safetensors, and nothing else."""
    folder = tmp_path_factory.mktemp("old") / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    wanted = [f"onnxruntime=={old}", *(f"{n}=={version(n)}" for n in ("numpy", "safetensors"))]
    installed = subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps",
         "--disable-pip-version-check", *wanted],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    if installed.returncode:
        pytest.skip(f"pip could not install {wanted[0]}: {installed.stderr.strip()[-200:]}")
    return python


@pytest.fixture(scope="module")
def room(vit, adapter_for, make_adapter, tmp_path_factory):
    """Bundles of every mode and precision, and an expander of every method with its inputs."""
    room = tmp_path_factory.mktemp("room")
    adapter = adapter_for(vit, NAMES)
    adapter.save(room / "user.safetensors")
    for precision in PRECISIONS:
        export_bundle(
            vit,
            room / f"bundle-{precision}",
            ExportRequest(ExportConfig(targets=NAMES, precision=precision)),
        )
    kinds = ("low_rank", "delta", "bias")
    export_bundle(
        vit, room / "bundle-kinds", ExportRequest(ExportConfig(targets=NAMES, slots=kinds))
    )
    for mode in ("seeded", "merged"):
        export_bundle(
            vit, room / f"bundle-{mode}", ExportRequest(ExportConfig(mode=mode), adapter=adapter)
        )
    targets = slot_targets(vit.model, NAMES)
    for method in METHODS:
        made = make_adapter(targets, method=method)
        path = room / f"expand-{method}.onnx"
        onnx.save(build_expander(made.config, targets, "int8", method), path)
        np.savez(path.with_suffix(".npz"), **adapter_inputs(made))
    made = make_adapter(MANY, method="nola")
    onnx.save(build_expander(made.config, MANY, "int8", "nola"), room / "expand-many.onnx")
    np.savez(room / "expand-many.npz", **adapter_inputs(made))
    made.save(room / "many.safetensors")
    rng = np.random.default_rng(0)
    np.save(room / "x.npy", rng.standard_normal((2, 1, 28, 28)).astype(np.float32))
    return room


@pytest.fixture(scope="module")
def computed(old, old_python, room):
    """What the old one gave, by name."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    found = subprocess.run(
        [old_python, "-c", PROGRAM, room], capture_output=True, text=True, timeout=300, check=False,
        env={**variables, "PYTHONPATH": str(ROOT / "runtime")},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout) == [old, []]
    assert onnxruntime.__version__ != old
    with np.load(room / f"{old}.npz") as stored:
        return {name: stored[name] for name in stored.files}


@pytest.mark.slow
def test_every_mode_and_precision_computes_the_same(computed, room):
    x = {"pixel_values": np.load(room / "x.npy")}
    seen = 0
    for folder in sorted(room.glob("bundle-*")):
        bundle = Bundle.open(folder, threads=1)
        assert computed[f"{folder.name} check"]
        close = {"rtol": 1e-3, "atol": 1e-4}
        if bundle.manifest.variant in ("int8", "int4"):  # they round inputs, each in its own way
            close = {"rtol": 0, "atol": 0.1 * float(np.abs(bundle.run(x)["logits"]).max())}
        np.testing.assert_allclose(
            computed[f"{folder.name} base"], bundle.run(x)["logits"], **close
        )
        if bundle.manifest.mode != "merged":
            bundle.swap(room / "user.safetensors")
            now = bundle.run(x)["logits"]
            np.testing.assert_allclose(computed[f"{folder.name} user"], now, **close)
            seen += 1
        if bundle.manifest.mode == "swappable":
            change = np.abs(now - computed[f"{folder.name} base"]).max()
            assert change > 0.01
    assert seen == len(PRECISIONS) + 2


@pytest.mark.slow
def test_expanders_give_the_same_bytes(computed, vit, make_adapter):
    targets = slot_targets(vit.model, NAMES)
    for method in METHODS:
        adapter = make_adapter(targets, method=method)
        for target, parts in flat(get_method(method).expand(adapter, BasisCache())).items():
            for part, value in parts.items():
                found = computed[f"expand-{method}.onnx {target}.adapter_{part}"]
                assert found.shape == (1, *value.shape)
                if method == "fourierft":
                    far = np.abs(found[0] - value).max()
                    assert far <= 1e-6 * np.abs(value).max()
                else:
                    assert found.tobytes() == value.tobytes()


@pytest.mark.slow
def test_many_targets_give_the_same_bytes(computed, make_adapter):
    """In the graph, and in the runtime's own product."""
    adapter = make_adapter(MANY, method="nola")
    for target, parts in flat(get_method("nola").expand(adapter, BasisCache())).items():
        for part, value in parts.items():
            graph = computed[f"expand-many.onnx {target}.adapter_{part}"]
            assert graph.tobytes() == value.tobytes()
            assert computed[f"runtime {target}.{part}"].tobytes() == value.tobytes()
