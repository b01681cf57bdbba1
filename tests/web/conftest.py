"""What the tests of examples/web share: a folder with its files, onnxruntime-web, a small model."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regrow_export import ExportSource

WEB = Path(__file__).parents[2] / "examples" / "web"
BACKBONE = "sha256:" + "ab" * 32


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what Node imports."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout
    if int(re.findall(r"\d+", version)[0]) < 18:
        pytest.skip(f"node must be 18 or newer, got {version.strip()}")
    folder = tmp_path_factory.mktemp("web")
    for path in (*WEB.iterdir(), *Path(__file__).parent.glob("*.mjs")):
        if path.is_file():
            shutil.copy(path, folder)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # onnxruntime-web unpacks to 150 MB


@pytest.fixture(scope="session")
def installed(room: Path, npm_install: Callable[..., None]) -> Path:
    """The same with onnxruntime-web, as package.json pins it."""
    npm_install()
    return room


@pytest.fixture(scope="session")
def npm_install(room: Path) -> Callable[..., None]:
    """npm_install(PACKAGES...): into `room`; skips the test where npm or a registry is missing."""

    def install(*packages: str) -> None:
        npm = shutil.which("npm")
        if npm is None:
            pytest.skip("npm is not installed")
        options = [
            "--no-audit", "--no-fund", "--no-package-lock", "--ignore-scripts", "--prefer-offline",
            "--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--loglevel=error",
        ]  # fmt: skip
        try:
            done = subprocess.run(
                [npm, "install", *options, *packages],
                cwd=room, capture_output=True, text=True, timeout=180, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            pytest.skip("npm install took more than 180 s")
        if done.returncode:
            codes = re.findall(r"npm error code (\S+)", done.stderr) or ["no reason"]
            pytest.skip(f"npm install must reach a registry, got {codes[0]}")

    return install


@pytest.fixture(scope="session")
def vit() -> ExportSource:
    """2 layers, 32 wide, 5 tokens, 4 classes."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(1)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        image_size=8, patch_size=4, num_channels=1, num_labels=4,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    return ExportSource(model, "image-classification", BACKBONE, ("classifier",), tuple("abcd"))
