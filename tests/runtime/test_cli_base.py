"""The command line on a device: no torch, no onnx, no transformers, no pillow."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

MAIN = "from regrow_toolchain.cli import main; main()"
EXTRAS = ("torch", "onnx", "optimum", "transformers", "accelerate", "rich", "PIL", "tokenizers",
          "sklearn", "matplotlib")  # fmt: skip
COMMANDS = ["demo", "compress", "adapt", "export", "import", "run", "profile", "inspect"]


@pytest.fixture
def regrow(python):
    """regrow(*arguments): the command line where only the base install is."""

    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        return python(MAIN, *map(str, arguments), block=EXTRAS)

    return call


@pytest.fixture
def adapter_file(make_adapter, tmp_path):
    path = tmp_path / "user-17.safetensors"
    make_adapter(classes=2).save(path)
    return path


@pytest.fixture
def arrays(pixels, tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, pixel_values=pixels)
    return path


def _one_line(found, code, *texts):
    assert found.returncode == code, found.stderr
    lines = found.stderr.splitlines()
    assert len(lines) == 1, found.stderr
    assert lines[0].startswith("regrow: ")
    for text in texts:
        assert text in lines[0]
    assert found.stdout == ""


# -- help ------------------------------------------------------------------------------------------


def test_the_commands_are_these():
    from regrow_toolchain.cli import COMMANDS as found

    assert set(COMMANDS) <= set(found)


@pytest.mark.parametrize("arguments", [(), *((name,) for name in COMMANDS)])
def test_help_answers_at_once(python, arguments):
    """It imports nothing heavy, not even numpy."""
    code = (
        "import atexit, sys\n"
        "heavy = ('numpy', 'onnxruntime', 'safetensors', 'torch', 'transformers')\n"
        "atexit.register(lambda: print(*[n for n in heavy if n in sys.modules], file=sys.stderr))\n"
    )
    found = python(code + MAIN, *arguments, "--help")
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("Usage: regrow")
    assert found.stderr.strip() == ""
    if not arguments:
        assert all(name in found.stdout for name in COMMANDS)


def test_help_works_without_the_extras(regrow):
    for name in COMMANDS:
        assert regrow(name, "--help").returncode == 0


# -- inspect and run -------------------------------------------------------------------------------


def test_inspect_an_adapter(regrow, adapter_file):
    found = regrow("inspect", adapter_file)
    assert found.returncode == 0, found.stderr
    for text in ("nola", "philox-sign", "fc1", "int8"):
        assert text in found.stdout
    result = json.loads(regrow("inspect", adapter_file, "--json").stdout.splitlines()[-1])
    assert result["kind"] == "adapter"
    assert result["seed"] == str(2**63 + 5)
    assert result["bytes"] == adapter_file.stat().st_size
    assert result["targets"] == [["fc1", 16, 8], ["fc2", 8, 8]]
    assert result["labels"] == ["own 0", "own 1"]


def test_inspect_a_bundle(regrow, bundle_folder):
    found = regrow("inspect", bundle_folder)
    assert found.returncode == 0, found.stderr
    assert "swappable" in found.stdout
    result = json.loads(regrow("inspect", bundle_folder, "--json").stdout.splitlines()[-1])
    assert result["kind"] == "bundle"
    assert result["inputs"] == {"pixel_values": ["batch", 1, 4, 4]}
    assert ["head", 8, 3, "head"] in result["targets"]


def test_run_on_arrays(regrow, bundle, bundle_folder, adapter_file, arrays, pixels, tmp_path):
    out = tmp_path / "out.npz"
    found = regrow("run", bundle_folder, "--input", arrays, "--adapter", adapter_file, "-o", out)
    assert found.returncode == 0, found.stderr
    assert "own " in found.stdout
    bundle.swap(adapter_file)
    expected = bundle.run({"pixel_values": pixels})["logits"]
    with np.load(out) as stored:
        assert stored.files == ["logits"]
        np.testing.assert_allclose(stored["logits"], expected, rtol=1e-5, atol=1e-6)


def test_run_on_images_in_an_array(regrow, bundle_folder, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 4)).astype(np.uint8)
    np.savez(tmp_path / "p.npz", images=images, labels=np.array(["ant", "bee", "cat"]))
    found = regrow("run", bundle_folder, "--input", tmp_path / "p.npz", "--json")
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert [a["sample"] for a in result["answers"]] == ["0", "1", "2"]
    assert {a["label"] for a in result["answers"]} <= {"ant", "bee", "cat"}
    assert 0 <= result["accuracy"] <= 1


def test_without_a_command_there_is_help(regrow):
    found = regrow()
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout == regrow("--help").stdout


def test_run_on_a_picture_names_the_extra(regrow, bundle_folder, tmp_path):
    (tmp_path / "x.png").write_bytes(b"any")
    found = regrow("run", bundle_folder, "--image", tmp_path / "x.png")
    _one_line(found, 1, "images need pillow: ", "[run]")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (("demo",), "train"),
        (("compress", "x", "-o", "y"), "export"),
        (("adapt", "x", "-o", "y", "--data", "z"), "export"),
        (("export", "x", "-o", "y"), "export"),
    ],
)
def test_a_missing_extra_is_one_pip_line(regrow, arguments, extra):
    found = regrow(*arguments)
    assert found.returncode == 1
    lines = found.stderr.splitlines()
    assert lines[-1].startswith(f"regrow: regrow {arguments[0]} needs ")
    assert ": pip install " in lines[-1]
    assert f"[{extra}]" in lines[-1]
    assert len(lines) == 1


def test_no_such_file(regrow, tmp_path, bundle_folder, arrays):
    missing = tmp_path / "none"
    _one_line(regrow("inspect", missing), 2, str(missing), "no such file")
    _one_line(regrow("run", missing, "--input", arrays), 2, str(missing))
    _one_line(regrow("run", bundle_folder, "--input", missing), 2, str(missing), "no such file")
    found = regrow("run", bundle_folder, "--input", arrays, "--adapter", missing)
    _one_line(found, 2, str(missing), "no such file")


def test_what_is_there_but_of_another_kind(regrow, bundle_folder, arrays, adapter_file, tmp_path):
    """Never "no such": a file where a folder should be, a folder where a file should be."""
    graph = bundle_folder / "backbone.onnx"
    _one_line(regrow("run", graph, "--input", arrays), 2, str(graph), "it is a file")
    _one_line(regrow("verify", adapter_file), 2, str(adapter_file), "it is a file")
    found = regrow("run", bundle_folder, "--input", tmp_path)
    _one_line(found, 2, f"must be an .npz file, got {tmp_path}: it is a folder")
    found = regrow("verify", bundle_folder, "--adapter", tmp_path)
    _one_line(found, 2, f"must be a file, got {tmp_path}: it is a folder")
    found = regrow("profile", "--compare", tmp_path, tmp_path)
    _one_line(found, 2, f"folder with profile.json, got {tmp_path}: a folder without it")


def test_inspect_of_what_lies_beside_adapters(regrow, bundle_folder, tmp_path):
    graph = bundle_folder / "backbone.onnx"
    _one_line(regrow("inspect", graph), 2, "it is an ONNX graph: give the folder of its bundle")
    dense = tmp_path / "x.onnx_adapter"
    dense.write_bytes(b"TORT of another kind")
    _one_line(regrow("inspect", dense), 2, "must be a regrow adapter", "dense tensors for ONNX")
    other = dense.rename(tmp_path / "x.bin")
    _one_line(regrow("inspect", other), 1, "another kind of file, which is no regrow adapter")


def test_a_broken_adapter(regrow, bundle_folder, arrays, adapter_file):
    adapter_file.write_bytes(adapter_file.read_bytes()[:-1])
    _one_line(regrow("inspect", adapter_file), 1, str(adapter_file), "safetensors")
    found = regrow("run", bundle_folder, "--input", arrays, "--adapter", adapter_file)
    _one_line(found, 1, str(adapter_file), "must be a whole safetensors file")


def test_an_adapter_of_another_backbone(regrow, bundle_folder, arrays, make_adapter, tmp_path):
    path = tmp_path / "other.safetensors"
    replace(make_adapter(), backbone_id="sha256:" + "cd" * 32).save(path)
    found = regrow("run", bundle_folder, "--input", arrays, "--adapter", path)
    _one_line(found, 1, "backbone", "sha256:cdcdcdcdcdcd")


def test_a_broken_bundle(regrow, bundle_copy, arrays):
    (bundle_copy / "manifest.json").write_text("{}", encoding="utf-8")
    _one_line(regrow("run", bundle_copy, "--input", arrays), 1, "manifest.json")
    (bundle_copy / "manifest.json").write_text("{", encoding="utf-8")
    _one_line(regrow("run", bundle_copy, "--input", arrays), 1, "copy the bundle again, or export")


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04broken", b"no zip"])
def test_broken_arrays(regrow, bundle_folder, tmp_path, data):
    (tmp_path / "x.npz").write_bytes(data)
    found = regrow("run", bundle_folder, "--input", tmp_path / "x.npz")
    _one_line(found, 1, "x.npz must be an .npz of plain arrays")


def test_arrays_with_python_objects(regrow, bundle_folder, tmp_path):
    np.savez(tmp_path / "x.npz", pixel_values=np.array([{"a": 1}], dtype=object))
    found = regrow("run", bundle_folder, "--input", tmp_path / "x.npz")
    _one_line(found, 1, "x.npz must be an .npz of plain arrays")


def test_not_a_number_in(regrow, bundle_folder, tmp_path):
    np.savez(tmp_path / "x.npz", pixel_values=np.full((1, 1, 4, 4), np.nan, np.float32))
    found = regrow("run", bundle_folder, "--input", tmp_path / "x.npz", "--json")
    _one_line(found, 1, "logits must be finite, got NaN or infinity for sample 0")


@pytest.mark.parametrize(
    "arguments",
    [("--fast",), ("inspect", "x", "--fast"), ("teleport",), ("run",), ("run", "x"),
     ("run", "x", "--input", "a", "--image", "b"), ("run", "x", "--input", "a", "--threads", "0"),
     ("inspect", "a", "b")],
)  # fmt: skip
def test_wrong_usage(regrow, arguments):
    _one_line(regrow(*arguments), 2)


def test_an_output_that_exists(regrow, bundle_folder, arrays, tmp_path):
    out = tmp_path / "out.npz"
    out.write_bytes(b"mine")
    arguments = ("run", bundle_folder, "--input", arrays, "-o", out)
    _one_line(regrow(*arguments), 2, str(out), "--force replaces it")
    assert out.read_bytes() == b"mine"
    assert regrow(*arguments, "--force").returncode == 0
    assert out.read_bytes() != b"mine"


@pytest.mark.parametrize("name", ["out", "out.csv", "out.npz.gz"])
def test_an_output_of_another_ending(regrow, bundle_folder, arrays, tmp_path, name):
    out = tmp_path / name
    found = regrow("run", bundle_folder, "--input", arrays, "-o", out)
    _one_line(found, 2, f"--out must end in .npz, got {out}: such as {out}.npz")
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(environment, bundle_folder, arrays, number, code):
    """The signal comes while the model runs."""
    program = (
        "import time, regrow_runtime.bundle as b\n"
        "def wait(*args, **options): print('running', flush=True); time.sleep(30)\n"
        "b.Bundle.run_all = wait\n" + MAIN
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, "run", str(bundle_folder), "--input", str(arrays)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    assert process.stdout.readline() == "running\n"
    start = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - start < 10
    assert process.returncode == code
    assert "Traceback" not in errors
