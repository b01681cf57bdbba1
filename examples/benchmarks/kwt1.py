"""KWT-1, the Keyword Transformer of Berg, O'Connor and Cruz (arXiv 2104.00769), as a plain module.

`kwt1(folder)` reads `kwt1.safetensors`; `Mfcc(folder)` is its front end in NumPy. Run as a script,
it compares both with the `reference.npz` of the same folder:

    python examples/benchmarks/kwt1.py MODELS/kwt1 [--small]
"""

from __future__ import annotations

import argparse
import json
import wave
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn import functional

WIDTH, FRAMES, MFCCS, CLIP = 64, 98, 40, 16_000


class Block(nn.Module):
    """Post-norm: attention with one head, then the MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.wo = nn.Linear(width, width)
        self.ln1, self.ln2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        mixed = functional.scaled_dot_product_attention(self.wq(x), self.wk(x), self.wv(x))
        x = self.ln1(x + self.wo(mixed))
        return self.ln2(x + self.fc2(functional.gelu(self.fc1(x), approximate="tanh")))


class Kwt(nn.Module):
    """`mfcc` float32 [batch, frames, 40] to logits [batch, classes]."""

    def __init__(self, layers: int = 12, classes: int = 12, frames: int = FRAMES) -> None:
        super().__init__()
        self.embed = nn.Linear(MFCCS, WIDTH)
        self.class_emb = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_emb = nn.Parameter(0.02 * torch.randn(1, frames + 1, WIDTH))
        self.layers = nn.ModuleList(Block(WIDTH, 4 * WIDTH) for _ in range(layers))
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, mfcc: Tensor) -> Tensor:
        x = self.embed(mfcc)
        x = torch.cat([self.class_emb.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_emb
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


def kwt1(folder: Path) -> Kwt:
    """The published weights, in eval mode."""
    model = Kwt()
    tensors = {
        name: torch.from_numpy(array)
        for name, array in load_file(folder / "kwt1.safetensors").items()
        if not name.startswith("feat.")
    }
    model.load_state_dict(tensors)
    return model.eval()


class Mfcc:
    """The front end that KWT-1 was trained with; its constants lie beside the weights."""

    def __init__(self, folder: Path) -> None:
        tensors = load_file(folder / "kwt1.safetensors")
        self.feat = {n[5:]: t for n, t in tensors.items() if n.startswith("feat.")}

    def __call__(self, sound: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 [98, 40] from samples at 16 kHz, -1 to 1; padded or cut to one second."""
        feat = self.feat
        clip = np.zeros(CLIP, np.float32)
        clip[: min(len(sound), CLIP)] = sound[:CLIP]
        rows = 160 * np.arange(FRAMES)[:, None] + np.arange(480)[None, :]
        frames = clip[rows] * feat["window"]
        magnitude = np.hypot(frames @ feat["dft_cos"].T, frames @ feat["dft_sin"].T)
        mel = np.log(np.maximum(magnitude @ feat["mel"].T, 1e-12))
        found: NDArray[np.float32] = (mel @ feat["dct"].T - feat["norm_sub"]) * feat["norm_mul"]
        return found


def read_wav(path: Path | BinaryIO) -> NDArray[np.float32]:
    """Samples of a 16-bit mono file, -1 to 1."""
    with wave.open(str(path) if isinstance(path, Path) else path) as stream:
        samples = np.frombuffer(stream.readframes(stream.getnframes()), "<i2")
    return samples.astype(np.float32) / 32768


def check(folder: Path) -> dict[str, float]:
    """The largest differences to the reference that lies in the folder."""
    front, model = Mfcc(folder), kwt1(folder)
    with np.load(folder / "reference.npz", allow_pickle=False) as stored:
        wanted = {name: stored[name] for name in ("mfcc", "logits")}
        names = [str(name) for name in stored["names"]]
    mfcc = np.stack([front(read_wav(folder / f"{name}.wav")) for name in names])
    with torch.no_grad():
        from_stored = model(torch.from_numpy(wanted["mfcc"])).numpy()
        whole = model(torch.from_numpy(mfcc)).numpy()
    return {
        "mfcc": float(np.abs(mfcc - wanted["mfcc"]).max()),
        "logits": float(np.abs(from_stored - wanted["logits"]).max()),
        "logits_from_wav": float(np.abs(whole - wanted["logits"]).max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--small", action="store_true", help="random weights, shapes only")
    args = parser.parse_args()
    if args.small or args.folder is None:
        with torch.no_grad():
            result = {"shape": list(Kwt(layers=2)(torch.zeros(2, FRAMES, MFCCS)).shape)}
    else:
        result = check(args.folder)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
