"""KWT-1 as a plain module, with its own words or with yours, and clips sorted into folders.

    python examples/keywords/spotter.py RECORDINGS.zip FOLDER OWNER ...

Clips are called WORD_SPEAKER_NUMBER.wav. An owner's clips 5 to 14 of each word go to
FOLDER/owners/OWNER/WORD, the others to FOLDER/test/OWNER/WORD; everybody else's to FOLDER/base.
$KWT is a folder with kwt1.safetensors, $WORDS the file with the head for your words.
"""

import os
import sys
from pathlib import Path
from zipfile import ZipFile

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from regrow import Adapter


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.wo = nn.Linear(width, width)
        self.ln1, self.ln2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        mixed = scaled_dot_product_attention(self.wq(x), self.wk(x), self.wv(x))
        x = self.ln1(x + self.wo(mixed))
        return self.ln2(x + self.fc2(gelu(self.fc1(x), approximate="tanh")))


class Kwt(nn.Module):
    def __init__(self, weights):
        super().__init__()
        classes, width = weights["head.weight"].shape
        self.embed = nn.Linear(40, width)
        self.class_emb = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_emb = nn.Parameter(torch.zeros(1, 99, width))
        count = sum(name.endswith("wq.weight") for name in weights)
        self.layers = nn.ModuleList(Block(width) for _ in range(count))
        self.head = nn.Linear(width, classes)
        self.load_state_dict(weights)

    def forward(self, mfcc):  # float32 [clips, 98, 40]
        token = self.class_emb.expand(mfcc.shape[0], -1, -1)
        x = torch.cat([token, self.embed(mfcc)], dim=1) + self.pos_emb
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, 0])


def published(words=None):
    tensors = load_file(Path(os.environ["KWT"]) / "kwt1.safetensors")
    weights = {name: x for name, x in tensors.items() if not name.startswith("feat.")}
    return Kwt(weights | (words or {}))


def with_words():
    (head,) = Adapter.load(os.environ["WORDS"]).head.layers
    return published({f"head.{n}": torch.tensor(getattr(head, n)) for n in ("weight", "bias")})


def sort(recordings, folder, owners):
    archive = ZipFile(recordings)
    for name in (n for n in archive.namelist() if n.endswith(".wav")):
        word, speaker, number = Path(name).stem.split("_")
        part = "owners" if 5 <= int(number) < 15 else "test"
        place = f"{part}/{speaker}" if speaker in owners else "base"
        path = Path(folder, place, word, Path(name).name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(archive.read(name))


if __name__ == "__main__":
    sort(sys.argv[1], sys.argv[2], sys.argv[3:])
