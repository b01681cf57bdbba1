"""What `import regrow_inputs` brings, seen from a fresh interpreter, and what it may use."""

from __future__ import annotations

import types

import regrow_inputs

EXTRAS = ("PIL", "tokenizers")
HEAVY = (*EXTRAS, "torch", "onnx", "transformers", "scipy", "sklearn", "click")
UPPER = ("regrow_export", "regrow_toolchain")


def test_all_names_what_is_public():
    public = {
        name
        for name, value in vars(regrow_inputs).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert sorted(public) == sorted(regrow_inputs.__all__)


def test_it_imports_nothing_heavy(python):
    found = python(
        "import sys, regrow_inputs\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    assert found.returncode == 0, found.stderr
    names = set(found.stdout.split())
    assert {"regrow_inputs", "regrow_runtime", "numpy"} <= names
    assert names.isdisjoint(HEAVY + UPPER)


def test_every_module_works_without_the_extras(python):
    found = python(
        "import importlib, pkgutil, regrow_inputs\n"
        "names = [m.name for m in pkgutil.walk_packages(\n"
        "    regrow_inputs.__path__, 'regrow_inputs.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "print(len(names))",
        block=(*HEAVY, *UPPER),
    )
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) >= 8


def test_arrays_of_images_need_no_pillow(python, bundle_folder):
    found = python(
        "import sys, numpy as np\n"
        "from regrow_inputs import InputReader, answer\n"
        "from regrow_runtime import Bundle\n"
        "bundle = Bundle.open(sys.argv[1])\n"
        "feeds = InputReader.from_bundle(bundle).images([np.zeros((4, 4), np.uint8)])\n"
        "print(feeds['pixel_values'].shape, answer(bundle, feeds)[0][0])",
        str(bundle_folder), block=HEAVY,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert found.stdout.split(") ")[1].strip() in ("ant", "bee", "cat")
