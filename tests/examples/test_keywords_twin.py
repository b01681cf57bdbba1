"""docs/keywords.md on the twin: the page's commands as they stand there, in their order."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = ROOT / "examples" / "keywords"
OWNERS = ("cyd", "dan")


def _commands() -> str:
    text = (ROOT / "docs" / "keywords.md").read_text(encoding="utf-8")
    return "\n".join(re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))


def _statements(path: Path) -> int:
    """Lines of code: neither blank, nor comments, nor docstrings."""
    text = path.read_text(encoding="utf-8")
    found = {
        number
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#")
    }
    docstring = ast.parse(text).body[0]
    return len(found - set(range(docstring.lineno, (docstring.end_lineno or 0) + 1)))


def test_the_whole_way_takes_at_most_60_lines_of_python() -> None:
    assert _statements(HERE / "spotter.py") <= 60


def test_the_front_end_is_the_one_of_the_documents() -> None:
    text = (ROOT / "docs" / "inputs.md").read_text(encoding="utf-8")
    shown = json.loads(re.findall(r"```json\n(.*?)```", text, flags=re.DOTALL)[-1])
    assert json.loads((HERE / "preprocessor_config.json").read_text(encoding="utf-8")) == shown


@pytest.mark.slow
def test_the_page_works_as_typed(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    tools = tmp_path / "bin"
    tools.mkdir()
    main = '-c "import sys; from regrow_toolchain.cli import main; sys.exit(main())"'
    for name, code in {"python": '"$@"', "regrow": f'{main} "$@"'}.items():
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {code}\n')
        (tools / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "default",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-e"], input=_commands(), cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    accuracies = [float(x) for x in re.findall(r"accuracy on 120 samples: ([\d.]+) %", done.stdout)]
    assert len(accuracies) == 2 * len(OWNERS)
    for before, after in zip(accuracies[::2], accuracies[1::2], strict=True):
        assert before < 40
        assert after > 75
    labels = re.findall(r"4_cyd_2\.wav +(\d) ", done.stdout)
    assert labels[1] == "4"
    assert labels[0] != "4"
    sizes = [(tmp_path / "words" / "adapters" / f"{o}.safetensors").stat().st_size for o in OWNERS]
    assert max(sizes) < 2_500
