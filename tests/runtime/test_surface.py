"""What `import regrow_runtime` brings, seen from a fresh interpreter."""

from __future__ import annotations

import types

import regrow_runtime

HEAVY = (
    "torch",
    "onnx",
    "transformers",
    "optimum",
    "PIL",
    "tokenizers",
    "sklearn",
    "matplotlib",
    "click",
)
UPPER = ("regrow_inputs", "regrow_export", "regrow_toolchain")


def test_all_names_what_is_public():
    for name in regrow_runtime.__all__:
        assert getattr(regrow_runtime, name).__class__ is not types.ModuleType
    loaded_on_use = {"Generated", "Generation"}
    public = loaded_on_use | {
        name
        for name, value in vars(regrow_runtime).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sorted(public) == sorted(regrow_runtime.__all__)
    assert len(set(regrow_runtime.__all__)) == len(regrow_runtime.__all__)


def test_it_imports_nothing_heavy(python):
    found = python(
        "import sys, regrow_runtime\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    assert found.returncode == 0, found.stderr
    names = set(found.stdout.split())
    assert {"regrow_runtime", "numpy", "onnxruntime"} <= names
    assert names.isdisjoint(HEAVY + UPPER)


def test_every_module_works_without_the_extras(python):
    found = python(
        "import importlib, pkgutil, regrow_runtime\n"
        "names = [m.name for m in pkgutil.walk_packages(\n"
        "    regrow_runtime.__path__, 'regrow_runtime.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))",
        block=(*HEAVY, *UPPER),
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 8


def test_telemetry_is_off_unless_somebody_wants_it(python):
    code = "import os, {}regrow_runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    assert python(code.format("")).stdout.strip() == "1"
    wanted = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '0'\n" + code.format("")
    assert python(wanted).stdout.strip() == "0"


def test_opening_swapping_and_running_opens_no_socket(
    python, bundle_folder, make_adapter, tmp_path
):
    make_adapter().save(tmp_path / "a.safetensors")
    found = python(
        "import socket, sys\n"
        "class Refused(socket.socket):\n"
        "    def __init__(self, *args, **options):\n"
        "        raise SystemExit('a socket was opened')\n"
        "socket.socket = Refused\n"
        "from regrow_runtime import Bundle\n"
        "bundle = Bundle.open(sys.argv[1])\n"
        "bundle.swap(sys.argv[2])\n"
        "print(bundle.run({'pixel_values': [[[[0.5] * 4] * 4]]})['logits'].shape)",
        str(bundle_folder),
        str(tmp_path / "a.safetensors"),
    )
    assert found.stdout.strip() == "(1, 3)", found.stderr
    assert found.stderr == ""
