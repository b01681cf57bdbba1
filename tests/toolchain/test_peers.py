"""The comparisons with peers: their versions are those that were tested, their sizes are right."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PEERS = ROOT / "examples" / "benchmarks" / "peers"
SCRIPTS = ("basis", "steady", "swap", "user_bytes")


def _pins(path: Path) -> dict[str, str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    pins = [line.partition("==") for line in lines if "==" in line]
    return {name: version for name, _, version in pins}


@pytest.mark.parametrize("name", SCRIPTS)
def test_requirements_are_the_versions_tested_together(name: str) -> None:
    assert (PEERS / f"{name}.py").is_file()
    pins = _pins(PEERS / "requirements" / f"{name}.txt")
    assert {"numpy", "onnxruntime", "safetensors", "click"} <= pins.keys()
    assert pins.items() <= _pins(ROOT / "constraints.txt").items()


def test_the_runner_knows_every_script() -> None:
    spec = importlib.util.spec_from_file_location("peers_run", PEERS / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sorted(module.NAMES) == sorted(SCRIPTS)
    named = re.findall(r"`?(\w+)\.py`?", (ROOT / "docs" / "benchmarks.md").read_text("utf-8"))
    assert set(SCRIPTS) <= set(named)


@pytest.mark.slow
def test_bytes_per_user_are_those_of_the_files(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    paths = [str(ROOT / part) for part in ("runtime", "export", "toolchain")]
    done = subprocess.run(
        [sys.executable, PEERS / "user_bytes.py", "--small", "--room", tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]["writers"]
    sizes = {(row["label"], row["file"]): row["bytes"] for row in rows}
    # 12 layers, rank 4: 9,216 numbers of 4 bytes, or of half a byte, and a header.
    wide = 4 * 4 * sum((64 + 64, 64 + 128, 128 + 64))
    assert 4 * wide <= sizes["LoRA r=4", "PEFT safetensors"] < 4 * wide + 8000
    assert wide // 2 <= sizes["LoRA r=4", "regrow int4"] < wide // 2 + 4000
    assert sizes["NOLA k=l=32", "regrow int4"] < sizes["LoRA r=1", "regrow int4"]
