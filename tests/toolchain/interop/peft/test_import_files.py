"""`regrow import` as a function and as a command, and files that are broken or of another kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from regrow_format.adapter import STORAGE
from regrow_runtime import Adapter
from regrow_toolchain.config import ImportConfig
from regrow_toolchain.interop import import_peft

Cli = Callable[..., Any]
Room = Any  # see conftest.py
Q, K = "base_model.model.blocks.0.q", "base_model.model.blocks.0.k"


def test_from_a_bundle_and_from_a_backbone(room: Room) -> None:
    found = import_peft(room.path / "peft", room.path / "bundle")
    assert [(t.name, t.in_features, t.out_features) for t in found.targets] == [
        ("blocks.0.k", 8, 4), ("blocks.0.q", 8, 6),
    ]  # fmt: skip
    assert found.backbone_id == room.identity
    assert found.head is not None
    assert found.head.labels == ("0", "1", "2", "3", "4")  # the bundle has three
    same = import_peft(room.path / "peft", room.path / "backbone")
    assert same.head is not None
    assert same.head.labels == ("c0", "c1", "c2", "c3", "c4")
    assert {n: c.dense().tolist() for n, c in same.coefficients.items()} == {
        n: c.dense().tolist() for n, c in found.coefficients.items()
    }
    assert set(found.coefficients["B.6"].scale) == {3.0}


def test_the_choices_of_storage_are_the_formats() -> None:
    field = ImportConfig.__dataclass_fields__["coefficient_dtype"]
    assert set(field.metadata["choices"]) == set(STORAGE)


def test_the_command(room: Room, cli: Cli) -> None:
    arguments = ("import", room.path / "peft", "-o", room.path / "a.safetensors", "--backbone")
    done = cli(*arguments, room.path / "bundle", "--json")
    assert done.code == 0, done.err
    assert done.json["targets"] == 2
    assert done.json["bytes"] == (room.path / "a.safetensors").stat().st_size
    assert Adapter.load(room.path / "a.safetensors").backbone_id == room.identity
    again = cli(*arguments, room.path / "bundle")
    assert (again.code, again.out) == (2, "")
    assert "--force replaces it" in again.err
    done = cli(*arguments, room.path / "backbone", "--force", "--coefficient-dtype", "int8")
    assert done.code == 0, done.err
    assert done.out.startswith(f"wrote {room.path}/a.safetensors: ")
    assert f"the weights of {room.path}/backbone is your word" in done.out.splitlines()[-1]
    assert Adapter.load(room.path / "a.safetensors").storage == "int8"


def test_a_compressed_backbone_is_told(room: Room, cli: Cli) -> None:
    """A backbone by its plan, a bundle by the names in its graph."""

    def said(base: str) -> str:
        done = cli("import", room.path / "peft", "-o", room.path / "a.safetensors", "--force",
                   "--backbone", room.path / base)  # fmt: skip
        assert done.code == 0, done.err
        return str(done.err)

    words = "1 of the 2 layers are factored there (blocks.0.q), so this adapter was trained on a"
    assert words in said("backbone")
    graph = room.path / "bundle" / "m.onnx"
    for data in (b"/blocks.0/q/base/up/MatMul", b"blocks.0.q.base.up.bias"):
        graph.write_bytes(b"\0" + data + b"\0")
        assert words in said("bundle")
    graph.write_bytes(b"blocks.0.q.weight blocks.0.q.uproot /blocks/0/q/MatMul")
    assert said("bundle") == ""


@pytest.mark.parametrize("method", ["lora", "vera", "fourierft"])
def test_no_torch_is_needed(
    method: str, request: pytest.FixtureRequest, start: Callable[..., Any]
) -> None:
    room = request.getfixturevalue("room" if method == "lora" else f"{method}_room")
    absent = ("torch", "peft", "transformers", "onnx", "accelerate", "optimum", "rich", "PIL")
    program = f"import sys\nsys.modules.update(dict.fromkeys({absent!r}))\n"
    program += "from regrow_toolchain.cli import main; main()"
    for base in ("bundle", "backbone"):
        process = start(
            "import", room.path / "peft", "-o", room.path / f"{base}.safetensors",
            "--backbone", room.path / base, program=program,
        )  # fmt: skip
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert f", {method} (" in out
        assert "2 layers, own head of 5 classes" in out
    (room.path / "backbone" / "regrow.json").unlink()
    process = start(
        "import", room.path / "peft", "-o", room.path / "x.safetensors",
        "--backbone", room.path / "backbone", program=program,
    )  # fmt: skip
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "where torch is not installed" in err
    assert "give the bundle that regrow export made of it" in err


# -- what does not ---------------------------------------------------------------------------------


def test_layers_that_are_missing_are_all_listed(room: Room) -> None:
    room.bundle("bare", layers="")
    words = room.refusal("bare")
    assert words.startswith(f"{room.path}/peft does not fit {room.path}/bare:\n")
    for name in "kq":
        assert (
            f"  blocks.0.{name} must be a slot of the bundle, got none: export it with --target"
            in words.splitlines()
        )
    room.write(tensors={f"{K}.lora_B.weight": np.ones((8, 2), "f4")})
    assert "blocks.0.k must be 8 -> 4, got 8 -> 8" in room.refusal("backbone")


def test_an_adapter_of_another_model_is_one_line(room: Room) -> None:
    """Where some layers are there, those that are not are listed; where none is, that is said."""
    names = {f"{Q}.{part}": f"base_model.model.h.0.{part}" for part in ("lora_A", "lora_B")}
    moved = {f"{new}.weight": room.tensors[f"{old}.weight"] for old, new in names.items()}
    gone = dict.fromkeys(f"{old}.weight" for old in names)
    room.write(tensors=moved | gone)
    assert "h.0 must be a slot of the bundle, got none: export it with" in room.refusal()
    gone |= {f"{K}.{part}.weight": None for part in ("lora_A", "lora_B")}
    room.write(tensors=moved | gone)
    for base in ("bundle", "backbone"):
        assert room.refusal(base).startswith(
            f"{room.path}/peft must be of {room.path}/{base} to fit, got none of its 1 layers "
            "there, such as h.0: it was trained on another model"
        )
        assert "\n" not in room.refusal(base)


def test_bundles_that_take_no_adapters(room: Room) -> None:
    for mode in ("merged", "seeded"):
        room.bundle(mode, mode=mode)
        assert f"bundle must be swappable to take an adapter, got a {mode} one" in room.refusal(
            mode
        )


def test_padding_is_bounded(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow_toolchain.interop.peft.importer.MAX_BYTES", 200)
    assert "adapter must take at most 200 bytes, got 208" in room.refusal()


def test_numbers_too_large_for_the_storage(room: Room) -> None:
    room.write(tensors={f"{K}.lora_B.weight": np.full((4, 2), 1e6, "f4")})
    assert "must be finite, got NaN or infinity" in room.refusal(coefficient_dtype="fp16")
    assert "coefficient_dtype must be one of fp32, fp16" in room.refusal(coefficient_dtype="bf16")


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _lie(folder: Path) -> None:
    """A header that claims a larger tensor than there are bytes for."""
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[2,8]", b"[9,8]"))


def _pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def _inside(folder: Path) -> None:
    (folder / "user").mkdir()
    (folder / "adapter_config.json").rename(folder / "user" / "adapter_config.json")


_FILES: list[tuple[Callable[[Path], object], int, str]] = [
    (_cut, 1, "must lie in the file, which is cut short"),
    (_lie, 1, "must have as many bytes as its shape says"),
    (_pickled, 2, "got adapter_model.bin, which is pickle: save it again with safe_serialization"),
    (_inside, 2, "give one of its folders, user"),
    (lambda f: (f / "adapter_config.json").unlink(), 2, "must have adapter_config.json, got "),
    (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        2,
        "adapter_model.safetensors, got none",
    ),
    (lambda f: (f / "adapter_model.safetensors").write_bytes(b""), 1, "got a broken header"),
    (lambda f: (f / "adapter_config.json").write_text("{"), 1, "must be JSON"),
    (lambda f: (f / "adapter_config.json").write_text("[]"), 1, "adapter_config.json"),
    (lambda f: (f.parent / "bundle" / "manifest.json").unlink(), 2, "a folder with neither"),
    (lambda f: (f.parent / "bundle" / "manifest.json").write_text("{}"), 1, "manifest.json"),
]


@pytest.mark.parametrize(("spoil", "code", "words"), _FILES, ids=[case[2] for case in _FILES])
def test_broken_files(
    room: Room,
    cli: Cli,
    listing: Callable[[Path], dict[str, int]],
    spoil: Callable[[Path], object],
    code: int,
    words: str,
) -> None:
    """One line, and nothing written."""
    spoil(room.path / "peft")
    before = listing(room.path)
    base = room.path / "bundle"
    done = cli("import", room.path / "peft", "-o", room.path / "a.st", "--backbone", base, "--json")
    assert (done.code, done.out) == (code, ""), done.err
    assert words in done.err
    assert len(done.err.splitlines()) == 1
    assert listing(room.path) == before


def test_a_misfit_on_the_command_line(
    room: Room, cli: Cli, listing: Callable[[Path], dict[str, int]]
) -> None:
    room.bundle("bare", layers="k")
    before = listing(room.path)
    arguments = (room.path / "peft", "-o", room.path / "a.st", "--backbone", room.path / "bare")
    done = cli("import", *arguments)
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 2
    assert (cli("import", room.path / "nowhere", *arguments[1:])).code == 2
    assert (cli("import", *arguments[:3])).code == 2  # no --backbone
    assert (cli("import", arguments[0], "-o", room.path, *arguments[3:])).code == 2
    assert listing(room.path) == before
