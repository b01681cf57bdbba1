"""Tiny models and data, none of them the demo's, and a way to call the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from regrow_toolchain.compress import Compressed, compress
from regrow_toolchain.config import CompressConfig
from regrow_toolchain.data import Dataset
from regrow_toolchain.models import (
    Backbone,
    load_backbone,
    logits_of,
    quiet_transformers,
    save_backbone,
)
from regrow_toolchain.training import batches, cosine, deterministic

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CLASSES = ("left", "middle", "right")
SIDE = 12
# A user of the device has no editable install's finder to rely on; nor has a test.
_PATHS = [str(Path(__file__).parents[2] / part) for part in ("runtime", "export", "toolchain")]

_MAIN = "from regrow_toolchain.cli import main; main()"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError(f"the toolchain must not use the network, got {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def before_steps() -> Iterator[Callable[[Callable[..., None]], None]]:
    """before_steps(hook): calls hook(optimizer, ...) before every step of an optimizer of torch."""
    handles = []

    def register(hook: Callable[..., None]) -> None:
        handles.append(register_optimizer_step_pre_hook(hook))

    yield register
    for handle in handles:
        handle.remove()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Models this small are faster with one thread, and their sums come out the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# -- data ----------------------------------------------------------------------------------------

Images = tuple[np.ndarray, np.ndarray]


def make_images(count: int, seed: int, *, inverted: bool = False) -> Images:
    """uint8 [n, 12, 12, 3] with labels [n]: a coloured square left, in the middle, or right."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    images = rng.normal(40, 15, (count, SIDE, SIDE, 3))
    for image, label in zip(images, labels, strict=True):
        top = rng.integers(0, SIDE - 3)
        column = 4 * label + rng.integers(-1, 2)
        image[top : top + 4, max(column, 0) : column + 4] += rng.uniform(90, 200, 3)
    if inverted:
        images = 255 - images
    return np.clip(np.rint(images), 0, 255).astype(np.uint8), labels.astype(np.int64)


def normal(images: np.ndarray) -> np.ndarray:
    """What the tiny ViT's preprocessing does: float32 [n, 3, 12, 12] from -1 to 1."""
    return (images.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5


@pytest.fixture(scope="session")
def images() -> Callable[..., Images]:
    return make_images


@pytest.fixture(scope="session")
def dataset() -> Callable[..., Dataset]:
    """dataset(count, seed, inverted=False, names=CLASSES)."""

    def make(
        count: int, seed: int, *, inverted: bool = False, names: tuple[str, ...] = CLASSES
    ) -> Dataset:
        pixels, labels = make_images(count, seed, inverted=inverted)
        return Dataset({"pixel_values": normal(pixels)}, labels, names)

    return make


@pytest.fixture(scope="session")
def class_folder() -> Callable[..., Path]:
    """class_folder(path, count, seed, ...): images as PNG files, a folder per class."""
    from PIL import Image

    def make(
        path: Path,
        count: int,
        seed: int,
        *,
        names: tuple[str, ...] = CLASSES,
        inverted: bool = False,
    ) -> Path:
        for index, (pixels, label) in enumerate(
            zip(*make_images(count, seed, inverted=inverted), strict=True)
        ):
            (path / names[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path / names[label] / f"{index:03}.png")
        return path

    return make


# -- models --------------------------------------------------------------------------------------


def save_huggingface(model: nn.Module, folder: Path) -> Path:
    with quiet_transformers():
        model.save_pretrained(folder)
    return folder


def write_preprocessing(folder: Path) -> None:
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": SIDE, "width": SIDE},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config), encoding="utf-8")


def tiny_vit(seed: int = 0, **other: Any) -> nn.Module:
    """2 layers, 32 wide, 10 tokens, 3 classes; about 20,000 parameters."""
    from transformers import ViTConfig, ViTForImageClassification

    options: dict[str, Any] = {
        "image_size": SIDE, "patch_size": 4, "num_channels": 3, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.08, "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: i for i, name in enumerate(CLASSES)},
    }  # fmt: skip
    torch.manual_seed(seed)
    return ViTForImageClassification(ViTConfig(**{**options, **other})).eval()


def _train(model: nn.Module, data: Dataset, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1)
    schedule = cosine(optimizer, steps)
    with deterministic(0):
        for inputs, labels in batches(data, 48, steps, 0):
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits_of(model.train(), inputs), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@pytest.fixture(scope="session")
def vit_folder(tmp_path_factory: pytest.TempPathFactory, dataset: Callable[..., Dataset]) -> Path:
    """A tiny ViT that has learned where the square is, as a Hugging Face directory."""
    folder = tmp_path_factory.mktemp("models") / "vit"
    model = tiny_vit()
    _train(model, dataset(240, 1), 120)
    save_huggingface(model, folder)
    write_preprocessing(folder)
    return folder


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(1)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        vocab_size=60, max_position_embeddings=24, num_labels=4,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "bert"
    return save_huggingface(BertForSequenceClassification(config).eval(), folder)


@pytest.fixture(scope="session")
def reading_folder(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The BERT with a tokenizer of letters and a few words."""
    from transformers import BertTokenizerFast

    folder = Path(shutil.copytree(bert_folder, tmp_path_factory.mktemp("models") / "reading"))
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join([*words, "the", "word", "more"]), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model whose output weights are its embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=24, vocab_size=60)
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    return save_huggingface(GPT2LMHeadModel(config).eval(), folder)


@pytest.fixture
def backbone(vit_folder: Path) -> Backbone:
    """The trained tiny ViT, dense; a fresh one, so that a test may change it."""
    return load_backbone(vit_folder)


@pytest.fixture(scope="session")
def compressed(vit_folder: Path, dataset: Callable[..., Dataset]) -> Compressed:
    """The tiny ViT at ratio 3, with a few epochs of distillation."""
    config = CompressConfig(ratio=3, epochs=8, lr=3e-3, init="svd")
    return compress(load_backbone(vit_folder), dataset(240, 1), config, eval_data=dataset(120, 2))


@pytest.fixture(scope="session")
def compressed_folder(tmp_path_factory: pytest.TempPathFactory, compressed: Compressed) -> Path:
    folder = tmp_path_factory.mktemp("models") / "compressed"
    save_backbone(compressed.backbone, folder)
    return folder


# -- the command line ----------------------------------------------------------------------------


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of stdout."""
        found: dict[str, Any] = json.loads(self.out.strip().splitlines()[-1])
        return found


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """The command line in this process: cli("adapt", path, ...)."""
    from regrow_toolchain.cli import main

    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Outcome(int(ended.value.code or 0), out, err)

    yield call
    signal.signal(signal.SIGTERM, before)


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(_PATHS),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "default",
    }


@pytest.fixture(scope="session")
def start() -> Callable[..., subprocess.Popen[str]]:
    """The command line in a process of its own: start("adapt", path, ..., cwd=folder)."""

    def call(
        *arguments: object, cwd: Path | None = None, program: str = _MAIN
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment(),
        )  # fmt: skip

    return call


@pytest.fixture(scope="session")
def run(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., Outcome]:
    """As `start`, to the end."""

    def call(*arguments: object, cwd: Path | None = None) -> Outcome:
        process = start(*arguments, cwd=cwd)
        out, err = process.communicate(timeout=300)
        return Outcome(process.returncode, out, err)

    return call


@pytest.fixture(scope="session")
def listing() -> Callable[[Path], dict[str, int]]:
    """Every file and folder below a path with its size: what "nothing was written" means."""

    def call(path: Path) -> dict[str, int]:
        return {
            str(p.relative_to(path)): p.stat().st_size if p.is_file() else -1
            for p in sorted(path.rglob("*"))
        }

    return call


@dataclass
class Workshop:
    """A folder in which the command line has gone the whole way, and what it said."""

    room: Path
    said: dict[str, Outcome]


@pytest.fixture(scope="session")
def workshop(
    tmp_path_factory: pytest.TempPathFactory,
    vit_folder: Path,
    class_folder: Callable[..., Path],
    run: Callable[..., Outcome],
) -> Workshop:
    """compress, adapt from a folder and from an .npz, export; in `room`, each by its own name."""
    room = tmp_path_factory.mktemp("workshop")
    shutil.copytree(vit_folder, room / "vit")
    class_folder(room / "train", 180, 1)
    class_folder(room / "mine", 60, 5, inverted=True)
    pixels, labels = make_images(60, 6)
    np.savez(room / "own.npz", images=pixels, labels=np.array(["open", "shut", "stop"])[labels])
    pixels, labels = make_images(90, 7, inverted=True)
    np.savez(room / "test.npz", images=pixels, labels=labels)
    class_folder(room / "test", 12, 8, inverted=True)
    options = ("--steps", 80, "--shift", 0.3, "--noise", 0.05, "--json")
    commands: dict[str, tuple[object, ...]] = {
        "compress": (room / "vit", "-o", room / "small", "--data", room / "train", "--ratio", 3,
                     "--epochs", 6, "--lr", "3e-3", "--json"),
        "adapt": (room / "small", "-o", room / "mine.safetensors", "--data", room / "mine",
                  *options),
        "adapt own": (room / "small", "-o", room / "own.safetensors", "--data", room / "own.npz",
                      "--coefficient-dtype", "int8", "--set", "k=16", "--target", "query",
                      *options),
        "export": (room / "small", "-o", room / "bundle", "--json"),
    }  # fmt: skip
    said = {name: run(name.partition(" ")[0], *rest) for name, rest in commands.items()}
    return Workshop(room, said)
