"""`regrow convert`: dense tensors, fed by hand or as ONNX Runtime's LoraAdapter, equal a swap."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle
from regrow_format.errors import MismatchError, RegrowError, UsageError
from regrow_format.methods import get_method
from regrow_runtime import Adapter, Bundle, Coefficients, Head, HeadLayer, Manifest, Target
from regrow_toolchain.interop import FORMATS, convert, export_backbone, tensor_files
from regrow_toolchain.models import load_backbone

Cli = Callable[..., Any]
CONFIGS: dict[str, dict[str, Any]] = {
    "nola": {"k": 12, "l": 9, "rank": 3, "c": 4.0, "shared": True},
    "vera": {"rank": 6},
    "fourierft": {"n": 20, "alpha": 64.0},
    "lora": {"rank": 2, "alpha": 2.0, "rslora": False},
    "ia3": {"feedforward": ["query"]},
    "ssf": {},
    "bitfit": {},
    "head": {},
}
LAYERS = tuple(f"vit.encoder.layer.{i}.attention.attention.{part}" for i in (0, 1)
               for part in ("query", "value"))  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, vit_folder: Path) -> Path:
    """A tiny ViT with slots of every kind at its queries and values."""
    kinds = ("low_rank", "delta", "bias", "scale", "input_scale")
    folder, backbone = tmp_path_factory.mktemp("convert") / "bundle", load_backbone(vit_folder)
    source = ExportSource(
        backbone.model, backbone.task, backbone.backbone_id, head=backbone.head,
        labels=backbone.labels, files=backbone.files,
    )  # fmt: skip
    export_bundle(
        source,
        folder,
        ExportRequest(ExportConfig(targets=LAYERS, slots=kinds)),
    )
    return folder


def _adapter(method: str, bundle: Path, *, storage: str = "int8", classes: int = 4) -> Adapter:
    rng = np.random.default_rng(7)
    kind, config = get_method(method), CONFIGS[method]
    targets = tuple(Target(name, 32, 32) for name in LAYERS) if method != "head" else ()
    constants = kind.constants(config, targets)
    coefficients = {
        name: Coefficients.store(
            rng.standard_normal(shape).astype(np.float32), constants[name], storage
        )
        for name, shape in kind.layout(config, targets).items()
    }
    weight = rng.standard_normal((classes, 32)).astype(np.float16).astype(np.float32)
    head = HeadLayer("classifier", weight, np.arange(classes, dtype=np.float32))
    return Adapter(
        method=method, config=config, seed=11, backbone_id=Manifest.load(bundle).backbone_id,
        targets=targets, coefficients=coefficients, storage=storage,
        head=Head((head,), tuple("abcdefgh"[:classes])),
    )  # fmt: skip


def _session(bundle: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    path = bundle / Manifest.load(bundle).graphs[0].file
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _pictures() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, 3, 12, 12)).astype(np.float32)


@pytest.mark.parametrize("method", CONFIGS)
def test_both_formats_equal_a_swap(method: str, bundle: Path, tmp_path: Path) -> None:
    adapter = _adapter(method, bundle)
    adapter.save(tmp_path / "a.safetensors")
    device = Bundle.open(bundle)
    plain = device.run({"pixel_values": _pictures()})["logits"]
    device.swap(tmp_path / "a.safetensors")
    wanted = device.run({"pixel_values": _pictures()})["logits"]
    assert wanted.shape != plain.shape

    convert(tmp_path / "a.safetensors", bundle, tmp_path / "a.npz", to="npz")
    session = _session(bundle)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as stored:
        feeds = dict(stored)
    assert {array.dtype for array in feeds.values()} == {np.dtype("float32")}
    found = session.run(["logits"], {"pixel_values": _pictures(), **feeds})[0]
    assert np.array_equal(found, wanted)

    convert(tmp_path / "a.safetensors", bundle, tmp_path / "a.onnx_adapter", to="onnx_adapter")
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(tmp_path / "a.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(loaded)
    found = session.run(["logits"], {"pixel_values": _pictures()}, options)[0]
    assert np.array_equal(found, wanted)
    again = session.run(["logits"], {"pixel_values": _pictures()})[0]
    assert np.array_equal(again, plain)  # without it: the base


@pytest.mark.parametrize("to", FORMATS)
def test_what_is_written(to: str, bundle: Path, tmp_path: Path) -> None:
    """Names and shapes of the slots; the same bytes each time; a file that others may read."""
    adapter = _adapter("lora", bundle)
    tensors = convert(adapter, bundle, tmp_path / "one", to=to)
    slots = {name for s in Manifest.load(bundle).slots for name in s.inputs.values()}
    assert set(tensors) <= slots
    assert tensors[f"{LAYERS[0]}.adapter_A"].shape == (1, 32, 2)
    convert(adapter, bundle, tmp_path / "two", to=to)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o644
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    if to == "onnx_adapter":
        read = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "one"))
        assert (read.get_adapter_version(), read.get_model_version()) == (1, 1)
        assert set(read.get_parameters()) == set(tensors)


def test_names_that_python_has_for_itself(tmp_path: Path) -> None:
    data = FORMATS["npz"]({"file": np.ones(2, "f4"), "a/b": np.zeros(1, "f4")}, tmp_path)
    (tmp_path / "x.npz").write_bytes(data)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as stored:
        assert stored["file"].tolist() == [1, 1]
        assert stored["a/b"].tolist() == [0]


def test_the_command(
    bundle: Path, tmp_path: Path, cli: Cli, listing: Callable[[Path], dict[str, int]]
) -> None:
    _adapter("vera", bundle).save(tmp_path / "a.safetensors")
    out = tmp_path / "a.npz"
    arguments = ("convert", tmp_path / "a.safetensors", "-o", out, "--bundle", bundle)
    done = cli(*arguments, "--to", "npz", "--json")
    assert done.code == 0, done.err
    assert done.json["bytes"] == out.stat().st_size
    assert done.json["tensors"][f"{LAYERS[0]}.adapter_B"] == [1, 6, 32]
    before = listing(tmp_path)
    again = cli(*arguments, "--to", "onnx_adapter")
    assert (again.code, again.out) == (2, "")
    assert "--force replaces it" in again.err
    assert cli(*arguments, "--to", "pickle", "--force").code == 2
    assert cli("convert", *arguments[1:4], "--to", "npz", "--force").code == 2  # no bundle
    bare = cli(*arguments[:3], tmp_path / "bare", *arguments[4:], "--to", "npz")
    assert (bare.code, bare.out) == (2, "")
    assert f"--out must end in .npz, got {tmp_path}/bare: such as {tmp_path}/bare.npz" in bare.err
    assert listing(tmp_path) == before
    done = cli(*arguments, "--to", "onnx_adapter", "--force")
    assert done.code == 0, done.err
    assert done.out.endswith("10 tensors as onnx_adapter\n")


def test_no_torch_is_needed(bundle: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    _adapter("nola", bundle).save(tmp_path / "a.safetensors")
    absent = ("torch", "peft", "transformers", "onnx", "accelerate", "optimum", "rich", "PIL")
    program = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
    program += "from regrow_toolchain.cli import main; main()"
    for to in FORMATS:
        process = start(
            "convert", tmp_path / "a.safetensors", "-o", tmp_path / f"user.{to}", "--to", to,
            "--bundle", bundle, program=program,
        )  # fmt: skip
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (0, "")


# -- what fails leaves nothing ---------------------------------------------------------------------


def test_adapters_and_bundles_that_do_not_fit(bundle: Path, tmp_path: Path) -> None:
    adapter = _adapter("lora", bundle)
    far = tmp_path / "far" / "a.npz"
    with pytest.raises(UsageError, match="output must lie in an existing folder"):
        convert(adapter, bundle, far, to="npz")
    with pytest.raises(UsageError, match="bundle must be a folder that regrow export made"):
        convert(adapter, tmp_path, tmp_path / "a", to="npz")
    with pytest.raises(UsageError, match="to must be one of npz, onnx_adapter, got 'bin'"):
        convert(adapter, bundle, tmp_path / "a", to="bin")
    wrong = Adapter(**{**vars(adapter), "backbone_id": "sha256:" + "0" * 64})
    with pytest.raises(MismatchError, match="adapter must be of the bundle's backbone"):
        convert(wrong, bundle, tmp_path / "a", to="npz")
    targets = (*adapter.targets[:3], Target("vit.nothing", 32, 32))
    with pytest.raises(MismatchError, match=r"vit\.nothing must be a slot of the bundle"):
        convert(Adapter(**{**vars(adapter), "targets": targets}), bundle, tmp_path / "a", to="npz")
    assert list(tmp_path.iterdir()) == []


def test_a_seeded_bundle_takes_no_dense_tensors(
    bundle: Path, vit_folder: Path, tmp_path: Path
) -> None:
    adapter = _adapter("nola", bundle)
    export_backbone(
        load_backbone(vit_folder), tmp_path / "seeded", ExportConfig(mode="seeded"), adapter=adapter
    )
    with pytest.raises(UsageError, match="bundle must be swappable to take dense tensors"):
        convert(adapter, tmp_path / "seeded", tmp_path / "a.npz", to="npz")


@pytest.mark.parametrize("to", FORMATS)
def test_a_disk_that_is_full(
    to: str, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    monkeypatch.setattr("regrow_format.files.os.replace", full)
    with pytest.raises(RegrowError, match="could not be written: No space left on device"):
        convert(_adapter("lora", bundle), bundle, tmp_path / "a", to=to, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_a_folder_that_takes_no_files(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_args: object) -> None:
        raise RuntimeError("cannot open")

    monkeypatch.setattr(onnxruntime.AdapterFormat, "export_adapter", closed)
    with pytest.raises(RegrowError, match=r"must take a new \.onnx_adapter, got: cannot open"):
        convert(_adapter("lora", bundle), bundle, tmp_path / "a", to="onnx_adapter")
    assert list(tmp_path.iterdir()) == []


def test_more_than_a_flatbuffer_holds(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_files, "_MAX_BYTES", 1000)
    with pytest.raises(RegrowError, match=r"must be less than 1000 bytes, got \d+: convert to npz"):
        convert(_adapter("lora", bundle), bundle, tmp_path / "a", to="onnx_adapter")
    convert(_adapter("lora", bundle), bundle, tmp_path / "a", to="npz")
