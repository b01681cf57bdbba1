"""Spoken digits of a speaker whom the model has never heard: KWT-1 and the FSDD recordings.

    python examples/benchmarks/keyword_speakers.py DATA MODELS [--all-speakers] [--small]

DATA has `fsdd/recordings.zip`, MODELS has `kwt1/`. KWT-1 knows other words, so the base is KWT-1
with a head for digits, trained on three speakers; recordings 5 to 14 of each digit of the fourth
adapt, 0 to 4 and 15 to 49 test. That is nicolas, or with `--all-speakers` each of the four in turn.
Recordings of 8 kHz are resampled to 16 kHz and padded to one second. Ends in one line of JSON.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Task, Variant, choose, compare, finish, fp32, parser, print_table, smallest
from kwt1 import FRAMES, MFCCS, Kwt, Mfcc, kwt1, read_wav
from numpy.typing import NDArray
from scipy.signal import resample_poly
from torch import nn

from regrow import Backbone, Dataset

SPEAKERS = ("nicolas", "george", "jackson", "lucas")
NAMES = tuple(str(digit) for digit in range(10))
QV, MLP = ("wq", "wv"), ("wo", "fc1", "fc2")  # MLP: the attention's output too
SETTINGS = {"steps": 60, "batch_size": 32, "label_smoothing": 0.1, "shift": 0.0, "noise": 0.0}
# Peak learning rates, chosen on nicolas: docs/tuning.md.
RATES = {"lora": 2e-2, "nola": 1e-1, "vera": 5e-2, "fourierft": 1.5e-1, "bitfit": 1e-2,
         "ia3": 1e-1, "ssf": 1e-2}  # fmt: skip


def recordings(data: Path, front: Mfcc) -> tuple[Dataset, NDArray[np.int64]]:
    """Every clip as MFCCs, users = speakers, and the numbers of the recordings."""
    mfcc, labels, users, numbers = [], [], [], []
    with zipfile.ZipFile(data / "fsdd" / "recordings.zip") as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".wav"):
                continue
            digit, speaker, number = Path(name).stem.split("_")
            sound = read_wav(io.BytesIO(archive.read(name)))
            mfcc.append(front(resample_poly(sound, 2, 1).astype(np.float32)))
            labels.append(int(digit))
            users.append(speaker)
            numbers.append(int(number))
    found = Dataset({"mfcc": np.stack(mfcc)}, np.array(labels), NAMES, users=np.array(users))
    return found, np.array(numbers)


def synthetic() -> tuple[Dataset, NDArray[np.int64]]:
    """Ten noisy patterns, shifted for every speaker."""
    draw = np.random.default_rng(0)
    labels, numbers = np.tile(np.arange(10), 4 * 20), np.tile(np.repeat(np.arange(20), 10), 4)
    speaker = np.repeat(np.arange(4), 200)
    patterns = draw.standard_normal((10, FRAMES, MFCCS)) + draw.standard_normal((4, 1, FRAMES, 1))
    mfcc = patterns[speaker, labels] + draw.standard_normal((800, FRAMES, MFCCS))
    users = np.array(SPEAKERS)[speaker]
    return Dataset({"mfcc": mfcc.astype(np.float32)}, labels, NAMES, users=users), numbers


@torch.no_grad()
def features(model: Kwt, data: Dataset) -> torch.Tensor:
    """[clips, 64]: what the head sees."""
    seen: list[torch.Tensor] = []
    hook = model.head.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    for start in range(0, len(data), 128):
        model(torch.from_numpy(data.inputs["mfcc"][start : start + 128]))
    hook.remove()
    return torch.cat(seen)


def digit_head(x: torch.Tensor, labels: torch.Tensor, steps: int) -> nn.Linear:
    """Logistic regression with a little weight decay, on standardised features."""
    torch.manual_seed(0)
    mean, spread = x.mean(0), x.std(0) + 1e-6
    head = nn.Linear(x.shape[1], 10)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(head((x - mean) / spread), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # fold the standardisation into the head
        head.bias -= head.weight @ (mean / spread)
        head.weight /= spread
    return head


def make_task(
    model: Kwt, speaker: str, data: Dataset, numbers: NDArray[np.int64], x: torch.Tensor, steps: int
) -> Task:
    """The base for everybody but `speaker`, and that speaker's recordings."""
    theirs = data.users == speaker
    others = np.flatnonzero(~theirs)
    base = Kwt(len(model.layers))
    base.load_state_dict(model.state_dict())
    base.head = digit_head(x[others], torch.from_numpy(data.labels[others]), 10 * steps)
    early = (numbers >= 5) & (numbers < 15)
    adapt, test = (data.take(np.flatnonzero(theirs & part)) for part in (early, ~early))
    backbone = Backbone(
        base.eval(), f"sha256:kwt1-{speaker}", "audio-classification", ("head",), NAMES, ()
    )
    return Task(backbone, adapt, test, {**SETTINGS, "steps": steps})


def make_tasks(args: Any) -> list[Task]:
    torch.manual_seed(0)
    if args.small:
        model, (data, numbers) = Kwt(layers=2).eval(), synthetic()
    else:
        model = kwt1(args.models / "kwt1")
        data, numbers = recordings(args.data, Mfcc(args.models / "kwt1"))
    steps = 3 if args.small else args.steps or SETTINGS["steps"]
    x = features(model, data)
    chosen = SPEAKERS if args.all_speakers else SPEAKERS[:1]
    return [make_task(model, speaker, data, numbers, x, steps) for speaker in chosen]


def variants() -> list[Variant]:
    head = {"head": "tune", "head_lr": 1e-2}
    found = [Variant("head only", "head", config=head), variant("BitFit", "bitfit", ())]
    found += [variant("IA3 all", "ia3", ()), variant("SSF all", "ssf", ())]
    for rank in (1, 2, 4, 8):
        lora = {"rank": rank, "alpha": float(rank)}
        found.append(variant(f"LoRA r={rank} QV", "lora", QV, **lora))
    for rank in (1, 4):
        lora = {"rank": rank, "alpha": float(rank)}
        found.append(variant(f"LoRA r={rank} MLP", "lora", MLP, **lora))
    for place, targets in (("QV", QV), ("MLP", MLP)):
        for k in (16, 32, 64):
            nola = {"k": k, "l": k, "rank": 4, "c": 4.0}
            found.append(variant(f"NOLA k=l={k} {place}", "nola", targets, **nola))
    found.append(variant("VeRA r=64 MLP", "vera", MLP, rank=64))
    for n in (16, 32, 64, 128):
        found.append(variant(f"FourierFT n={n} MLP", "fourierft", MLP, n=n))
    found.append(variant("FourierFT n=64 QV", "fourierft", QV, n=64))
    chosen = ("LoRA r=4 QV", "NOLA k=l=32 MLP", "FourierFT n=64 MLP")
    found += [fp32(one) for one in found if one.label in chosen]
    return [*found, Variant("full fine-tuning", "full", config={"lr": 3e-4})]


def variant(label: str, method: str, targets: tuple[str, ...], **settings: Any) -> Variant:
    return Variant(label, method, settings, targets, {"lr": RATES[method]})


def main() -> None:
    options = parser(__doc__, "data", "models")
    options.add_argument("--all-speakers", action="store_true")
    args = options.parse_args()
    chosen = choose(variants(), args.only)
    if args.small:
        chosen = choose(chosen, ["head only", "LoRA r=1 QV", "NOLA k=l=16 MLP", "full*"])
    rows = compare(make_tasks(args), chosen, args.seeds, args.cache)
    print_table(rows)
    finish(task="keyword-speakers", smallest=smallest(rows), rows=rows)


if __name__ == "__main__":
    main()
