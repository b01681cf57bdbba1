"""What the package shows, and what importing it brings in."""

from __future__ import annotations

import subprocess
import sys

import regrow_export

HEAVY = ("torch", "onnx", "transformers", "optimum")


def test_all_is_the_table_of_contents():
    assert regrow_export.__all__ == [
        "ExportConfig", "ExportRequest", "ExportSource", "Measure", "build_expander",
        "check_objects", "check_settings", "default_of", "export_bundle", "find_biased",
        "find_linears", "kinds_for", "setting", "slot_targets", "targets_setting",
    ]  # fmt: skip
    assert all(hasattr(regrow_export, name) for name in regrow_export.__all__)


def test_importing_it_is_light():
    code = f"import sys, regrow_export; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=_env()
    )
    assert done.stdout.strip() == "[]"


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
