"""A twin of the job without its data: words and speakers made of tones, and a small model.

    python examples/keywords/twin.py FOLDER [--small]

FOLDER/model has kwt1.safetensors (2 layers of KWT-1's shape, trained on twelve other words) and
labels.txt; FOLDER/recordings.zip has ten words by four speakers, as WORD_SPEAKER_NUMBER.wav. A word
is three tones that glide; a speaker has a pitch, a tempo, a timbre, and a noisy room. Speakers c
and d speak unlike those whom the model has heard. It is about the commands, not about speech.
"""

import argparse
import io
import wave
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

RATE, WIDTH, LAYERS = 16_000, 64, 2
CLIPS = 22  # of each word by each speaker
SPEAKERS = {  # pitch, tempo, share of the second overtone, noise
    "ann": (1.0, 1.0, 0.2, 0.01),
    "bob": (0.9, 1.1, 0.4, 0.02),
    "cyd": (1.45, 0.75, 0.9, 0.05),
    "dan": (0.68, 1.3, 0.0, 0.03),
}


def melodies(count, seed):
    """[count, 4]: frequencies in Hz at the corners of each word's three tones."""
    draw = np.random.default_rng(seed)
    return 300 * 2 ** draw.uniform(0, 2.5, (count, 4))


def clip(melody, speaker, draw):
    """Samples of one word, at most a second."""
    pitch, tempo, overtone, noise = speaker
    length = int(RATE * 0.6 / tempo * draw.uniform(0.9, 1.1))
    corners = melody * pitch * draw.uniform(0.97, 1.03)
    hertz = np.interp(np.linspace(0, 3, length), range(4), corners)
    phase = 2 * np.pi * np.cumsum(hertz) / RATE
    sound = (np.sin(phase) + overtone * np.sin(2 * phase)) * np.hanning(length)
    start = draw.integers(0, 2000)
    whole = np.pad(sound * draw.uniform(0.1, 0.3), (start, max(RATE - length - start, 0)))
    return whole[:RATE] + noise * draw.standard_normal(len(whole[:RATE]))


def wav(sound):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as out:
        out.setparams((1, 2, RATE, 0, "NONE", ""))
        out.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())
    return stream.getvalue()


def record(path, clips):
    """Ten words by everybody, `clips` times each."""
    words, draw = melodies(10, seed=1), np.random.default_rng(2)
    with ZipFile(path, "w", ZIP_DEFLATED) as archive:
        for speaker, voice in SPEAKERS.items():
            for word in range(10):
                for number in range(clips):
                    name = f"{word}_{speaker}_{number}.wav"
                    archive.writestr(name, wav(clip(words[word], voice, draw)))


def pretrain(folder, steps):
    """A model that knows twelve other words, by voices around ann's and bob's."""
    from spotter import Kwt  # beside this file

    from regrow_inputs import AudioPreprocessor

    torch.manual_seed(0)
    prepare = AudioPreprocessor.from_folder(Path(__file__).parent)
    words, draw = melodies(12, seed=0), np.random.default_rng(3)
    labels = np.tile(np.arange(12), 60)
    voices = draw.uniform((0.8, 0.85, 0.0, 0.0), (1.15, 1.2, 0.6, 0.04), (len(labels), 4))
    audio = [clip(words[y], v, draw) for y, v in zip(labels, voices, strict=True)]
    mfcc = torch.from_numpy(prepare(audio)["values"])
    model = Kwt(blank())
    for layer in model.layers:
        for part in layer.parameters():
            if part.dim() == 2:
                nn.init.xavier_uniform_(part)
    fit(model, mfcc, torch.from_numpy(labels), steps)
    save_file(model.state_dict(), folder / "kwt1.safetensors")
    (folder / "labels.txt").write_text("".join(f"other{i}\n" for i in range(12)))
    return model, mfcc, torch.from_numpy(labels)


def blank():
    """Weights to start from, by their names and shapes."""
    square, wide = torch.zeros(WIDTH, WIDTH), torch.zeros(4 * WIDTH, WIDTH)
    layer = {f"{n}.weight": square for n in ("wq", "wk", "wv", "wo")} | {
        "wo.bias": torch.zeros(WIDTH), "fc1.weight": wide, "fc1.bias": torch.zeros(4 * WIDTH),
        "fc2.weight": wide.T, "fc2.bias": torch.zeros(WIDTH),
        **{f"{n}.weight": torch.ones(WIDTH) for n in ("ln1", "ln2")},
        **{f"{n}.bias": torch.zeros(WIDTH) for n in ("ln1", "ln2")},
    }  # fmt: skip
    return {
        "embed.weight": torch.randn(WIDTH, 40) / 40, "embed.bias": torch.zeros(WIDTH),
        "class_emb": torch.zeros(1, 1, WIDTH), "pos_emb": 0.02 * torch.randn(1, 99, WIDTH),
        "head.weight": 0.02 * torch.randn(12, WIDTH), "head.bias": torch.zeros(12),
        **{f"layers.{i}.{n}": x for i in range(LAYERS) for n, x in layer.items()},
    }  # fmt: skip


def fit(model, mfcc, labels, steps):
    """Adam with a cosine, on all weights."""
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(labels), (32,))
        loss = nn.functional.cross_entropy(model(mfcc[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--small", action="store_true", help="shapes only, seconds")
    given = parser.parse_args()
    (given.folder / "model").mkdir(parents=True, exist_ok=True)
    record(given.folder / "recordings.zip", clips=16 if given.small else CLIPS)
    model, mfcc, labels = pretrain(given.folder / "model", steps=3 if given.small else 200)
    with torch.no_grad():
        right = (model.eval()(mfcc).argmax(1) == labels).float().mean()
    print(f"wrote {given.folder}: a model that is right on {100 * right:.0f} % of its own words")


if __name__ == "__main__":
    main()
