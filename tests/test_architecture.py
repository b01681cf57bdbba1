"""The layout of docs/design.md, over the syntax trees: which way imports point, that none run in a
circle, and that nobody reaches behind the face of a sub-package.

Every import counts, also one within a function or for type checkers alone.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("runtime", "export", "toolchain")
LAYERED = ("regrow_toolchain", "regrow_export")  # those made of sub-packages

# Each may import what stands in rows below, and in its own row, but not back.
ROWS = (
    ("regrow",),
    ("regrow_toolchain.cli",),
    ("regrow_toolchain.serving", "regrow_toolchain.fleet", "regrow_toolchain.demo"),
    (
        "regrow_toolchain.compress",
        "regrow_toolchain.adapters",
        "regrow_toolchain.interop",
        "regrow_toolchain.verification",
        "regrow_toolchain.profiling",
    ),
    ("regrow_toolchain.training",),
    ("regrow_toolchain.config",),  # of which tasks are choices
    ("regrow_toolchain.tasks",),
    ("regrow_toolchain.data",),
    ("regrow_toolchain.models",),
    (
        "regrow_toolchain.measurement",
        "regrow_toolchain.pages",
        "regrow_toolchain.extras",
    ),
    ("regrow_toolchain",),
    ("regrow_export",),
    ("regrow_learn",),
    ("regrow_inputs",),
    ("regrow_runtime",),
    ("regrow_format",),
)
LEVEL = {part: level for level, row in enumerate(ROWS) for part in row}


@cache
def _modules() -> dict[str, Path]:
    """Every module of the packages by its dotted name; a package by that of its `__init__`."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("regrow*/**/*.py")):
            name = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def _is_package(module: str) -> bool:
    return _modules()[module].name == "__init__.py"


@cache
def _imports(module: str) -> tuple[str, ...]:
    """The modules of ours that a module imports, or imports names from."""
    tree = ast.parse(_modules()[module].read_text(encoding="utf-8"))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _base(node, module)
            # `from package import module` imports the module
            found += [
                name if (name := f"{base}.{alias.name}") in _modules() else base
                for alias in node.names
            ]
    return tuple(name for name in dict.fromkeys(found) if name in _modules())


def _base(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".") if _is_package(module) else module.split(".")[:-1]
    parts = parts[: len(parts) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _part(module: str) -> str:
    """What of the layout a module belongs to."""
    head = ".".join(module.split(".")[:2])
    return head if head in LEVEL else module.partition(".")[0]


def _unit(module: str) -> str:
    """The sub-package, or the module beside sub-packages, that a module belongs to."""
    top = module.partition(".")[0]
    return ".".join(module.split(".")[:2]) if top in LAYERED else top


def _circles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """A circle through every edge that closes one, found depth first."""
    done: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> Iterator[list[str]]:
        path.append(node)
        for other in sorted(graph.get(node, ())):
            if other in path:
                yield [*path[path.index(other) :], other]
            elif other not in done:
                yield from visit(other)
        done.add(path.pop())

    for node in sorted(graph):
        if node not in done:
            yield from visit(node)


def test_imports_point_one_way():
    wrong = {
        f"{module} -> {other}"
        for module in _modules()
        for other in _imports(module)
        if LEVEL[_part(other)] < LEVEL[_part(module)]
    }
    assert wrong == set()


def test_no_modules_import_each_other_in_a_circle():
    graph = {module: set(_imports(module)) - {module} for module in _modules()}
    assert [" -> ".join(circle) for circle in _circles(graph)] == []


def test_no_sub_packages_import_each_other_in_a_circle():
    graph: dict[str, set[str]] = {}
    for module in _modules():
        unit = _unit(module)
        if module not in LAYERED:  # a package's own face shows what is below it
            others = {_unit(other) for other in _imports(module)}
            graph.setdefault(unit, set()).update(others - {unit})
    assert [" -> ".join(circle) for circle in _circles(graph)] == []


def test_circles_are_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}
    assert list(_circles(graph)) == [["b", "c", "b"]]
    assert list(pairwise(next(_circles({"a": {"a"}})))) == [("a", "a")]


def _reaches_behind(module: str, other: str) -> bool:
    """Whether `other` lies in a sub-package that `module` is not of, and is not its face."""
    here, there = module.split("."), other.split(".")
    if there[0] not in LAYERED or other in LAYERED:
        return False
    if here[0] != there[0] and len(there) == 2 and not _is_package(other):
        return here[0] == "regrow_toolchain" and other != "regrow_export.lazy"
    return any(
        there[:end] != here[:end] and end < len(there)
        for end in range(2, len(there))
        if ".".join(there[:end]) in _modules() and _is_package(".".join(there[:end]))
    )


def test_nobody_reaches_behind_a_face():
    wrong = {
        f"{module} -> {other}"
        for module in _modules()
        for other in _imports(module)
        if _reaches_behind(module, other)
    }
    assert wrong == set()


def test_the_page_on_tests_names_every_file_with_slow_ones():
    text = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    files = (path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
    slow = {path.name for path in files if "mark.slow" in path.read_text(encoding="utf-8")}
    assert set(re.findall(r"test_\w+\.py", text.partition("| slow tests |")[2])) == slow


def test_few_modules_stand_beside_the_sub_packages():
    folder = ROOT / "toolchain" / "regrow_toolchain"
    assert len({path.name for path in folder.glob("*.py")} - {"__init__.py"}) <= 3


@pytest.mark.parametrize("package", [
    module for module in _modules()
    if module.startswith(LAYERED) and _is_package(module)
    and "load_on_use" in _modules()[module].read_text(encoding="utf-8")
])  # fmt: skip
def test_a_face_shows_type_checkers_what_it_loads(package: str):
    tree = ast.parse(_modules()[package].read_text(encoding="utf-8"))
    typed = {
        ("." * node.level + (node.module or ""), alias.asname)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level and node.module != "lazy"
        for alias in node.names
    }
    (table,) = (node for node in ast.walk(tree) if isinstance(node, ast.Dict))
    loaded = {(at, name) for at, names in ast.literal_eval(table).items() for name in names}
    assert typed == loaded
    assert import_module(package).__all__ == sorted(name for _, name in loaded)
