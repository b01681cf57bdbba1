"""`import regrow`: what it brings, what it gives in the base install, what it asks for else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import regrow

EXTRAS = ("torch", "onnx", "optimum", "transformers", "accelerate", "rich", "PIL", "tokenizers")
HEAVY = (*EXTRAS, "numpy", "onnxruntime", "safetensors", "click")
DEVICE = ("Adapter", "Bundle", "InputReader", "Manifest", "Store", "answer", "convert", "verify")
MAKERS = ("Backbone", "adapt", "adapt_users", "compress", "export", "load_backbone")


def test_importing_it_loads_nothing(python):
    found = python("import sys, regrow; print(*{name.partition('.')[0] for name in sys.modules})")
    assert found.returncode == 0, found.stderr
    assert set(found.stdout.split()).isdisjoint(HEAVY)


def test_the_device_s_part_works_in_the_base_install(python):
    found = python(
        "import sys, regrow\n"
        f"for name in {DEVICE!r}: print(getattr(regrow, name).__name__)\n"
        "from regrow import AdaptConfig, CompressConfig, Dataset, load_data\n"
        "print(CompressConfig().ratio > 1, regrow.__version__)",
        block=EXTRAS,
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[: len(DEVICE)] == list(DEVICE)


@pytest.mark.parametrize("name", MAKERS)
def test_the_others_name_the_extra_that_is_missing(python, name):
    found = python(
        "import regrow\n"
        f"try: regrow.{name}\n"
        "except regrow.RegrowError as error: print(error)\n"
        f"try: from regrow import {name}\n"
        "except ImportError as error: print(error)",
        block=EXTRAS,
    )
    assert found.returncode == 0, found.stderr
    once, again = found.stdout.splitlines()
    assert once == again
    assert once.startswith(f"regrow.{name} needs torch, ")
    assert "pip install" in once
    assert "[export]" in once


def test_a_bundle_is_opened_swapped_and_run(python, bundle_folder, make_adapter, tmp_path):
    make_adapter().save(tmp_path / "a.safetensors")
    found = python(
        "import sys, regrow\n"
        "bundle = regrow.Bundle.open(sys.argv[1])\n"
        "bundle.swap(sys.argv[2])\n"
        "print(bundle.run({'pixel_values': [[[[0.5] * 4] * 4]]})['logits'].shape)",
        str(bundle_folder),
        str(tmp_path / "a.safetensors"),
        block=EXTRAS,
    )
    assert found.stdout.strip() == "(1, 3)", found.stderr


def test_python_m_regrow_is_the_command_line(python):
    found = python("import runpy, sys; sys.argv = ['regrow', '--version']; "
                   "runpy.run_module('regrow', run_name='__main__')")  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert re.fullmatch(r"regrow \d+\.\d+\S*\n", found.stdout)


def test_type_checkers_see_the_same_names():
    block = next(
        node
        for node in ast.parse(Path(regrow.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    typed = {
        (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    there = {
        (module, regrow._THERE.get(name, name)) for name, (module, _) in regrow._CONTENTS.items()
    }
    assert typed == there
    assert dir(regrow) == sorted({*regrow._CONTENTS, "__version__"})


@pytest.mark.slow
def test_every_name_is_exported_to_type_checkers(tmp_path):
    api = pytest.importorskip("mypy.api")
    code = "\n".join(f"regrow.{name}" for name in dir(regrow))
    (tmp_path / "uses.py").write_text(f"import regrow\n{code}\nregrow.nothing\n")
    options = (
        f"--config-file={Path(__file__).parents[2] / 'pyproject.toml'}",
        f"--cache-dir={tmp_path / 'cache'}",
        "--follow-imports=silent",
    )
    said, _, _ = api.run([*options, str(tmp_path / "uses.py")])
    assert said.count("error:") == 1, said
    assert "nothing" in said


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = regrow.nothing
