"""What importing brings along, which names there are, and which way dependencies point."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

_TOP = Path(__file__).parents[2]
_PACKAGES = {
    "regrow_format": _TOP / "runtime" / "regrow_format",
    "regrow_runtime": _TOP / "runtime" / "regrow_runtime",
    "regrow_inputs": _TOP / "runtime" / "regrow_inputs",
    "regrow_export": _TOP / "export" / "regrow_export",
    "regrow_toolchain": _TOP / "toolchain" / "regrow_toolchain",
}
# The arrow: toolchain -> export -> inputs -> runtime -> format, never back.
_MAY_IMPORT = {
    "regrow_format": set(),
    "regrow_runtime": {"regrow_format"},
    "regrow_inputs": {"regrow_format", "regrow_runtime"},
    "regrow_export": {"regrow_format", "regrow_runtime", "regrow_inputs"},
    "regrow_toolchain": {"regrow_format", "regrow_runtime", "regrow_inputs", "regrow_export"},
}
_HEAVY = ("torch", "onnx", "transformers", "numpy", "onnxruntime", "safetensors", "rich", "PIL",
          "sklearn")  # fmt: skip


def _loaded(code: str) -> set[str]:
    """The heavy packages that are there after `code` in a fresh interpreter."""
    paths = [str(path.parent) for path in _PACKAGES.values()]
    found = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{code}\n"
         "print(*{name.partition('.')[0] for name in sys.modules})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(found.stdout.split()) & set(_HEAVY)


def test_importing_the_package_brings_nothing_heavy() -> None:
    assert _loaded("import regrow_toolchain") == set()


def test_transformers_comes_without_scikit_learn() -> None:
    """And the rest of the process can have it all the same."""
    pytest.importorskip("transformers")
    code = """
from regrow_toolchain.models import quiet_transformers
with quiet_transformers():
    from transformers import GenerationMixin
"""
    assert "transformers" in _loaded(code)
    assert "sklearn" not in _loaded(code)
    assert "sklearn" in _loaded(f"{code}\nimport sklearn")


def test_the_command_line_brings_nothing_heavy() -> None:
    commands = (
        "demo",
        "compress",
        "adapt",
        "export",
        "import_",
        "convert",
        "run",
        "inspect",
        "profile",
    )
    code = "import regrow_toolchain.cli\n" + "\n".join(
        f"import regrow_toolchain.cli.commands.{name}" for name in commands
    )
    assert _loaded(code) == set()


def test_the_light_parts_bring_no_torch() -> None:
    code = (
        "import regrow_toolchain.measurement, regrow_toolchain.demo.device, "
        "regrow_toolchain.config, regrow_toolchain.profiling.worker, regrow_toolchain.pages"
    )
    assert _loaded(code) == set()
    assert _loaded("from regrow_toolchain.data import load_data, Dataset") <= {
        "numpy", "onnxruntime", "safetensors", "PIL",
    }  # fmt: skip


_FACES = [
    f"{package}.{module.name}"
    for package in ("regrow_toolchain", "regrow_export")
    for module in pkgutil.iter_modules(import_module(package).__path__)
    if module.ispkg
]


@pytest.mark.parametrize("face", _FACES)
def test_every_name_of_a_face_resolves(face: str) -> None:
    package = import_module(face)
    assert package.__doc__
    assert dir(package)
    for name in getattr(package, "__all__", ()):
        assert getattr(package, name) is not None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = import_module("regrow_toolchain.models").nothing


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", _PACKAGES)
def test_dependencies_point_one_way(package: str) -> None:
    files = sorted(_PACKAGES[package].rglob("*.py"))
    assert len(files) > 5
    refused = set(_PACKAGES) - _MAY_IMPORT[package] - {package} | {"pickle"}
    found = {
        f"{file.relative_to(_TOP)}: {name}" for file in files for name in _imports(file)
        if name in refused
    }  # fmt: skip
    assert found == set()
