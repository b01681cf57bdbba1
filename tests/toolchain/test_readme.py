"""The README's five-minute tour works as typed, from its first command to its last line."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


def _tour() -> tuple[list[str], str]:
    """The commands of the tour in their order, and its Python."""
    text = README.read_text(encoding="utf-8")
    part = text[text.index("## Five minutes") : text.index("## Your own model")]
    commands = re.findall(r"^    (regrow .*)$", part, flags=re.MULTILINE)
    blocks = re.findall(r"```python\n(.*?)```", part, flags=re.DOTALL)
    return commands, "\n".join(blocks)


def _run(arguments: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONWARNINGS": "default", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


def test_readme_names_the_two_commands() -> None:
    text = README.read_text(encoding="utf-8")
    assert "pip install -e '.[all]' -c constraints.txt && regrow demo" in text
    assert "pip install -e '.[all,test]' -c constraints.txt && pytest" in text
    assert (README.parent / "docs" / "report.png").is_file()


def test_what_the_readme_writes_is_in_the_tour() -> None:
    """Somebody types the lines in the repository, and finds it as it was."""
    text = README.read_text(encoding="utf-8")
    part = text[text.index("## On the device") : text.index("## What it looks like inside")]
    commands = re.findall(r"^    (regrow .*)$", part, flags=re.MULTILINE)
    written = re.findall(r"(?:store add|store list|--store|-o) (\S+)", "\n".join(commands))
    assert written == ["tour/store"] * 3 + ["tour/profile"]


def test_every_link_of_the_documents_leads_somewhere() -> None:
    root = README.parent
    documents = [*root.glob("*.md"), *root.glob("*/*.md"), *root.glob("docs/*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document}: {target}"


@pytest.mark.slow
def test_tour_works_as_typed(tmp_path: Path) -> None:
    commands, python = _tour()
    command_line = "from regrow_toolchain.cli import main; main()"
    outputs = [
        _run([sys.executable, "-c", command_line, *shlex.split(command)[1:]], tmp_path)
        for command in commands
    ]
    report = json.loads((tmp_path / "tour" / "report.json").read_text(encoding="utf-8"))
    assert [check["name"] for check in report["checks"] if not check["ok"]] == []
    without, with_adapter = (
        float(re.findall(r"accuracy on 480 samples: ([\d.]+) %", text)[0])
        for text in outputs
        if "accuracy on 480 samples" in text and "mine" not in text
    )
    assert with_adapter >= without + 10
    assert "logits" not in (said := _run([sys.executable, "-c", python], tmp_path))
    assert said.startswith("cold ")
