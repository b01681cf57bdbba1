"""The toolchain's README: its lines of Python work as they stand."""

from __future__ import annotations

import re
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from regrow_format.adapter import Adapter
from regrow_format.manifest import Manifest

_README = Path(__file__).parents[2] / "toolchain" / "README.md"


def test_its_lines_work(
    vit_folder: Path,
    class_folder: Callable[..., Path],
    images: Callable[..., tuple[np.ndarray, np.ndarray]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import regrow

    shutil.copytree(vit_folder, tmp_path / "vit")
    class_folder(tmp_path / "train", 30, 1)
    pixels, labels = images(30, 2, inverted=True)
    np.savez(tmp_path / "mine.npz", images=pixels, labels=labels)
    (code,) = re.findall(r"```python\n(.*?)```", _README.read_text(encoding="utf-8"), re.DOTALL)
    names = ", ".join(dir(regrow))
    (tmp_path / "lines.py").write_text(f"from regrow import {names}\n{code}")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("lines.py")
    adapter = Adapter.load(tmp_path / "mine.safetensors")
    assert adapter.backbone_id == Manifest.load(tmp_path / "bundle").backbone_id
    assert len(adapter.targets) == 2


def test_it_fits_on_a_page() -> None:
    lines = _README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 40
    package = _README.parent / "regrow_toolchain"
    for name in re.findall(r"`([a-z_]+(?:\.py|/))`", "\n".join(lines)):
        assert (package / name).exists(), name
