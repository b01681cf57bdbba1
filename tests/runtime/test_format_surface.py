"""What `import regrow_format` brings, seen from a fresh interpreter; and how much ships."""

from __future__ import annotations

import types
from pathlib import Path

import regrow_format
import regrow_runtime

ABOVE = ("regrow_runtime", "regrow_inputs", "regrow_export", "regrow_toolchain")
HEAVY = ("torch", "onnx", "transformers", "PIL", "tokenizers", "click")


def test_all_names_what_is_public():
    public = {
        name
        for name, value in vars(regrow_format).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sorted(public) == sorted(regrow_format.__all__)


def test_the_runtime_gives_the_same_names():
    assert set(regrow_format.__all__) <= set(regrow_runtime.__all__)
    for name in regrow_format.__all__:
        assert getattr(regrow_format, name) is getattr(regrow_runtime, name)


def test_files_are_read_and_expanded_without_onnxruntime(python, make_adapter, tmp_path):
    make_adapter().save(tmp_path / "a.safetensors")
    code = (
        "import sys, importlib, pkgutil, regrow_format\n"
        "from regrow_format import Adapter, BasisCache\n"
        "from regrow_format.methods import get_method\n"
        "names = [m.name for m in pkgutil.walk_packages(\n"
        "    regrow_format.__path__, 'regrow_format.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "adapter = Adapter.load(sys.argv[1])\n"
        "parts = get_method(adapter.method).expand(adapter, BasisCache(0))\n"
        "print(len(names) > 10, [part.tobytes().hex() for kinds in parts.values()\n"
        "                        for one in kinds.values() for part in one.values()])\n"
    )
    path = str(tmp_path / "a.safetensors")
    without = python(code, path, block=(*HEAVY, *ABOVE, "onnxruntime"))
    assert without.returncode == 0, without.stderr
    assert without.stdout.startswith("True [")
    assert without.stdout == python(code, path).stdout


def test_the_runtime_is_small():
    """What opens bundles, swaps, runs and stores can be read in an afternoon."""
    files = list(Path(regrow_runtime.__file__).parent.rglob("*.py"))
    texts = [file.read_bytes() for file in files]
    assert sum(map(len, texts)) < 120_000
    assert sum(text.count(b"\n") for text in texts) < 2_900
