"""The peers' road to the same device: PEFT's LoRA, then ONNX Runtime in int8. No regrow in it.

    python3 -m venv peers && peers/bin/pip install -r examples/keywords/peers.txt
    peers/bin/python examples/keywords/peers.py words MODEL BASE CLIPS ...
    peers/bin/python examples/keywords/peers.py adapt BASE CLIPS OUT --rank 4 --seed 0

`words` puts a head for the words of CLIPS (WORD/*.wav) on the model: BASE/kwt1.safetensors. `adapt`
trains a LoRA of query and value on a user's clips and writes OUT/merged.onnx in int8, a model of
the user's own; OUT/slots.onnx in int8, which takes any user's LoRA of that rank; and
OUT/user.onnx_adapter, the LoRA for it. The front end and the module come from benchmarks/kwt1.py.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from scipy.signal import resample_poly
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from kwt1 import Kwt, Mfcc, read_wav

STEPS, BATCH, LR = 60, 32, 2e-2
KWT = "kwt1.safetensors"


def clips(folders, front):
    """MFCCs [n, 98, 40] and labels [n] of WORD/*.wav, 8 kHz; words in the order of their names."""
    files = sorted(path for folder in folders for path in Path(folder).glob("*/*.wav"))
    words = sorted({path.parent.name for path in files})
    mfcc = [front(resample_poly(read_wav(path), 2, 1).astype(np.float32)) for path in files]
    labels = [words.index(path.parent.name) for path in files]
    return torch.from_numpy(np.stack(mfcc)), torch.tensor(labels)


def load(folder):
    state = {n: x for n, x in load_file(Path(folder) / KWT).items() if not n.startswith("feat.")}
    count = sum(name.endswith("wq.weight") for name in state)
    model = Kwt(count, classes=len(state["head.bias"]))
    model.load_state_dict(state)
    return model.eval()


def new_words(model, mfcc, labels, steps=600):
    """The model with a head for these words: logistic regression on what the old head sees."""
    classes, seen = int(labels.max()) + 1, []
    model.head.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    with torch.no_grad():
        for part in mfcc.split(128):
            model(part)
    x = torch.cat(seen)
    mean, spread = x.mean(0), x.std(0) + 1e-6
    torch.manual_seed(0)
    head = nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    for _ in range(steps):
        loss = nn.functional.cross_entropy(head((x - mean) / spread), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        head.bias -= head.weight @ (mean / spread)
        head.weight /= spread
    return {**model.state_dict(), "head.weight": head.weight.data, "head.bias": head.bias.data}


def configured(rank):
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=["wq", "wv"])


def lora(model, mfcc, labels, rank, seed):
    torch.manual_seed(seed)
    tuned = get_peft_model(model, configured(rank)).train()
    optimizer = torch.optim.Adam([p for p in tuned.parameters() if p.requires_grad], lr=LR)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.cat(
        [torch.randperm(len(labels)) for _ in range(1 + STEPS * BATCH // len(labels))]
    )
    for rows in order[: STEPS * BATCH].split(BATCH):
        loss = nn.functional.cross_entropy(tuned(mfcc[rows]), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return tuned.eval()


def graph(model, path, fold=False):
    """An ONNX file; without folding its initializers have the module's names."""
    torch.onnx.export(
        model, (torch.zeros(1, 98, 40),), path, input_names=["mfcc"], output_names=["logits"],
        dynamic_axes={"mfcc": {0: "batch"}, "logits": {0: "batch"}},
        dynamo=False, do_constant_folding=fold,
    )  # fmt: skip


def slots(tuned, path):
    """The graph with LoRA's matrices as inputs that are zero unless fed; in int8 but for those."""
    float_path = path.with_suffix(".fp32.onnx")
    graph(tuned, float_path)
    model = onnx.load(float_path)
    of_lora = [x for x in model.graph.initializer if "lora_" in x.name]
    for x in of_lora:
        model.graph.input.append(onnx.helper.make_tensor_value_info(x.name, x.data_type, x.dims))
        x.CopyFrom(onnx.numpy_helper.from_array(np.zeros(list(x.dims), np.float32), x.name))
    onnx.save(model, float_path)
    int8(float_path, path)


def int8(float_path, path):
    """Linear layers in int8, but not LoRA's; constants are folded first, or nothing would be."""
    quant_pre_process(float_path, float_path, skip_symbolic_shape=True)
    keep = [node.name for node in onnx.load(float_path).graph.node if "lora_" in node.name]
    quantize_dynamic(float_path, path, nodes_to_exclude=keep)
    float_path.unlink()


def adapter(tuned, path):
    found = {n: p.detach().numpy() for n, p in tuned.named_parameters() if "lora_" in n}
    made = ort.AdapterFormat()
    made.set_parameters({n: ort.OrtValue.ortvalue_from_numpy(x) for n, x in found.items()})
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.export_adapter(str(path))


def adapt(base, mfcc, labels, out, rank, seed):
    out.mkdir(parents=True, exist_ok=True)
    tuned = lora(load(base), mfcc, labels, rank, seed)
    slots(tuned, out / "slots.onnx")
    adapter(tuned, out / "user.onnx_adapter")
    graph(tuned.merge_and_unload(), out / "merged.fp32.onnx")
    int8(out / "merged.fp32.onnx", out / "merged.onnx")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ways = parser.add_subparsers(dest="way", required=True)
    words, user = ways.add_parser("words"), ways.add_parser("adapt")
    for name in ("model", "base"):
        words.add_argument(name, type=Path)
    words.add_argument("clips", type=Path, nargs="+")
    for name in ("base", "clips", "out"):
        user.add_argument(name, type=Path)
    for name in ("--rank", "--seed"):
        user.add_argument(name, type=int, default=1 if name == "--rank" else 0)
    given = parser.parse_args()
    if given.way == "words":
        given.base.mkdir(parents=True, exist_ok=True)
        mfcc, labels = clips(given.clips, Mfcc(given.model))
        feat = {n: x for n, x in load_file(given.model / KWT).items() if n.startswith("feat.")}
        save_file(new_words(load(given.model), mfcc, labels) | feat, given.base / KWT)
    else:
        mfcc, labels = clips([given.clips], Mfcc(given.base))
        adapt(given.base, mfcc, labels, given.out, given.rank, given.seed)


if __name__ == "__main__":
    main()
