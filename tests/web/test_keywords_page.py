"""examples/keywords/web: audio as on the device, and a look at the page in Chromium."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import wave
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from regrow_export import ExportConfig, ExportRequest, ExportSource, export_bundle, slot_targets
from regrow_format.methods import get_method
from regrow_inputs import AudioPreprocessor, read_wav
from regrow_runtime import Adapter, Coefficients

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "keywords" / "web"
KWT = json.loads((PAGE.parent / "preprocessor_config.json").read_text(encoding="utf-8"))
PLAYWRIGHT = "playwright-core@1.65.1"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
BACKBONE = "sha256:" + "ab" * 32


def _write(path: Path, sound: NDArray[Any], rate: int, channels: int = 1, width: int = 2) -> None:
    full = 2 ** (8 * width - 1)
    numbers = np.clip(np.rint(sound * full), -full, full - 1).astype("<i4")
    numbers = numbers + 128 if width == 1 else numbers
    data = numbers.astype("<i4")[:, None].view(np.uint8)[:, :width].tobytes()
    with wave.open(str(path), "wb") as out:
        out.setparams((channels, width, rate, 0, "NONE", ""))
        out.writeframes(data)


@pytest.fixture(scope="module")
def page(room: Path) -> Path:
    """The page's files beside those of examples/web, for Node to import."""
    for path in PAGE.iterdir():
        if path.name != "index.html":  # that of examples/web stays
            shutil.copy(path, room)
    return room


def _node(room: Path, *arguments: object) -> Any:
    done = subprocess.run(
        ["node", "audio.mjs", *map(str, arguments)],
        cwd=room, capture_output=True, text=True, timeout=120, check=False, encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_features_come_out_as_on_the_device(page, tmp_path):
    other = {
        "feature_extractor_type": "MelFeatureExtractor", "sampling_rate": 11_025,
        "frame_length": 301, "hop_length": 150, "fft_length": 320, "center": True,
        "remove_dc_offset": True, "preemphasis": 0.97, "periodic_window": False,
        "num_mel_filters": 24, "mel_scale": "slaney", "norm": "slaney", "log_mel": "log10",
        "mean": -3.0, "std": 2.0, "num_frames": 90, "time_last": True,
    }  # fmt: skip
    ortho = {**other, "mel_scale": "htk", "norm": None, "num_mfcc": 13, "time_last": False}
    files = [
        (8_000, 1, 2, 3_001),
        (16_000, 1, 2, 20_000),
        (44_100, 2, 3, 30_002),
        (11_025, 1, 1, 90),
    ]
    rng, cases, wanted = np.random.default_rng(0), [], []
    for number, (rate, channels, width, length) in enumerate(files):
        path = tmp_path / f"{number}.wav"
        _write(path, 0.3 * rng.standard_normal(length), rate, channels, width)
        for index, settings in enumerate((KWT, other, ortho)):
            folder = tmp_path / f"{number}-{index}"
            folder.mkdir()
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
            cases.append({"settings": settings, "wav": path.name})
            wanted.append(AudioPreprocessor.from_folder(folder)([read_wav(path)])["values"])
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    for case, found, values in zip(cases, _node(page, "features", tmp_path), wanted, strict=True):
        assert found["dims"] == list(values.shape), case
        got = np.array(found["values"], np.float32).reshape(values.shape)
        np.testing.assert_allclose(got, values, rtol=1e-4, atol=1e-4, err_msg=str(case))


class _Spotter(nn.Module):
    """MFCCs [clips, 98, 40] to 3 words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.blocks = nn.ModuleList([nn.Linear(40, 40), nn.Linear(40, 40)])
        self.head = nn.Linear(40, 3)

    def forward(self, mfcc: torch.Tensor) -> torch.Tensor:
        x = mfcc / 20
        for block in self.blocks:
            x = torch.tanh(block(x)) + x
        return self.head(x.mean(1))


@pytest.fixture
def tour(tmp_path: Path) -> Path:
    """bundle/, adapters/ of ann and bob, and a clip of each word by ann."""
    model = _Spotter().eval()
    words = ("down", "left", "up")
    source = ExportSource(model, "audio-classification", BACKBONE, ("head",), words)
    names = ["blocks.0", "blocks.1"]
    mfcc = np.random.default_rng(4).standard_normal((2, 98, 40)).astype(np.float32)
    export_bundle(
        source,
        tmp_path / "bundle",
        ExportRequest(ExportConfig(targets=names), inputs={"mfcc": 10 * mfcc}),
    )
    shutil.copy(PAGE.parent / "preprocessor_config.json", tmp_path / "bundle")
    (tmp_path / "adapters").mkdir()
    targets, method = slot_targets(model, names), get_method("lora")
    config: dict[str, Any] = {"rank": 2, "alpha": 60.0, "rslora": False}
    rng = np.random.default_rng(5)
    values = {
        name: Coefficients.store(
            rng.standard_normal(shape).astype(np.float32), method.constants(config, targets)[name],
            "int8",
        )
        for name, shape in method.layout(config, targets).items()
    }  # fmt: skip
    ann = Adapter("lora", config, 1, BACKBONE, targets, values, "int8")
    ann.save(tmp_path / "adapters" / "ann.safetensors")
    replace(ann, backbone_id="sha256:" + "cd" * 32).save(tmp_path / "adapters" / "bob.safetensors")
    for index, word in enumerate(words):
        folder = tmp_path / "test" / "ann" / word
        folder.mkdir(parents=True)
        tone = np.sin(np.arange(6000) * 0.05 * (index + 1))
        _write(folder / "0.wav", 0.3 * tone, 8000)
    return tmp_path


@contextmanager
def _serving(room: Path, folder: Path) -> Iterator[int]:
    process = subprocess.Popen(
        [sys.executable, room / "serve.py", folder, "--port", "0", "--page", PAGE],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rsplit(":", 1)[1].split("/")[0])
    finally:
        process.terminate()
        process.wait(timeout=10)
        process.stdout.close()


def test_the_page_in_a_browser(installed, page, npm_install, tour):
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        pytest.skip(f"none of {', '.join(CHROMIUM)} is installed")
    npm_install("--no-save", PLAYWRIGHT)
    with _serving(installed, tour) as port:
        found = _node(page, "drive", f"http://localhost:{port}/", chromium, "ann")
    assert found["errors"] == []
    assert set(found["hosts"]) == {f"localhost:{port}"}
    assert found["refused"].startswith("bob: ")
    assert "backbone_id must be" in found["refused"]
    assert found["answers"]["ann"]["swap"].endswith("to change the speaker")
    assert "with ann’s adapter" in found["answers"]["ann"]["score"]
    assert found["answers"][""]["swap"] == "nothing to swap"
    assert found["recorded"] in ("down", "left", "up")
    assert found["width"] <= 360
