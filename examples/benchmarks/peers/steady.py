"""What a model costs while it runs: latency, RAM, bytes; and with 1 to 1,000 adapters.

    python examples/benchmarks/peers/steady.py [--small] [--room FOLDER]

Dense, dense in int8 (ONNX Runtime's `quantize_dynamic`: what one would pick instead), PELA at half
the parameters, PELA in int8; merged, and swappable with an adapter in; PEFT in torch. One sample,
one thread, each in a process of its own. Ends in one line of JSON.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from models import (  # fmt: skip
    USERS,
    Room,
    arguments,
    finish,
    folder_bytes,
    in_own_process,
    machine,
    memory,
    pixels,
    plain_session,
    spread,
    times,
    torch_model,
)

COUNTS = (1, 10, 100, 1000)
FORMS = {
    "dense": ("dense", "fp32"),
    "dense, regrow int8": ("dense", "int8"),
    "PELA": ("pela", "fp32"),
    "PELA, int8": ("pela", "int8"),
}


def form(room: Room, name: str) -> dict[str, Any]:
    """One of FORMS, merged or swappable."""
    kind, mode = name.rsplit(", ", 1)
    source, precision = FORMS[kind]
    folder, x = room.bundle(source, mode, precision), {"pixel_values": pixels(room.small)}
    from regrow import Bundle

    bundle = Bundle.open(folder, threads=1)
    if mode == "swappable":
        bundle.swap(room.adapter(source=source))
    return _figures(lambda: bundle.run(x), room.small, folder_bytes(folder))


def stock_int8(room: Room, _name: str) -> dict[str, Any]:
    folder, x = room.stock_int8(), {"pixel_values": pixels(room.small)}
    session = plain_session(folder / "model.onnx")
    return _figures(lambda: session.run(["logits"], x), room.small, folder_bytes(folder))


def torch_peft(room: Room, _name: str) -> dict[str, Any]:
    import torch
    from peft import PeftModel

    model = PeftModel.from_pretrained(torch_model(room.dense()), str(room.peft(USERS[0]))).eval()
    x = torch.from_numpy(pixels(room.small))

    @torch.no_grad()
    def run() -> object:
        return model(pixel_values=x)

    size = sum(file.stat().st_size for file in room.dense().glob("*.safetensors"))
    return _figures(run, room.small, size)


def _figures(run: Callable[[], object], small: bool, size: int) -> dict[str, Any]:
    found = times(run, 5 if small else 25, warm=3)
    return {"ms": found, "bytes": size, **memory()}


def regrow_many(room: Room, _name: str) -> dict[str, Any]:
    """Resident adapters: RAM, and the time of a swap between them."""
    from dataclasses import replace

    from regrow import Bundle
    from regrow_runtime.sessions import PROFILES

    counts = COUNTS[:2] if room.small else COUNTS
    files = _copies(room.adapter(), max(counts), room)
    bundle = Bundle.open(
        room.bundle(), threads=1, profile=replace(PROFILES["speed"], resident_bytes=4 << 30)
    )
    bundle.run({"pixel_values": pixels(room.small)})
    before, rows, bound = memory(), [], [0]
    for count in counts:
        start, bound[0] = time.perf_counter(), count
        for file in files[len(bundle.residents) : count]:
            bundle.load(file)
        seconds = time.perf_counter() - start
        swaps = times(lambda: bundle.swap(files[int(draw.integers(bound[0]))].stem), 200)
        rows.append({"count": count, **memory(), "load_s": seconds, "swap": swaps})
    shutil.rmtree(files[0].parent)
    return {"before": before, "rows": rows, "each_on_disk": room.adapter().stat().st_size}


def lora_many(room: Room, _name: str) -> dict[str, Any]:
    """ONNX Runtime's LoraAdapter objects, all loaded."""
    import onnxruntime as ort

    counts = COUNTS[:2] if room.small else COUNTS
    session = plain_session(room.bundle() / "backbone.onnx")
    session.run(["logits"], {"pixel_values": pixels(room.small)})
    file = room.onnx_adapter(USERS[0])
    files = _copies(file, max(counts), room)
    before, rows, loaded = memory(), [], []
    for count in counts:
        start = time.perf_counter()
        while len(loaded) < count:
            loaded.append(ort.LoraAdapter())
            loaded[-1].Load(str(files[len(loaded) - 1]))
        seconds = time.perf_counter() - start

        def swap() -> None:
            ort.RunOptions().add_active_adapter(loaded[int(draw.integers(len(loaded)))])

        rows.append({"count": count, **memory(), "load_s": seconds, "swap": times(swap, 200)})
    shutil.rmtree(files[0].parent)
    return {"before": before, "rows": rows, "each_on_disk": file.stat().st_size}


def peft_many(room: Room, _name: str) -> dict[str, Any]:
    """PEFT in torch, all loaded; 1,000 would take minutes."""
    from peft import PeftModel

    counts = COUNTS[:2] if room.small else (1, 10, 50)
    base = torch_model(room.dense())
    before, rows, folder = memory(), [], str(room.peft(USERS[0]))
    model = PeftModel.from_pretrained(base, folder, "0")
    loaded = ["0"]
    for count in counts:
        start = time.perf_counter()
        while len(loaded) < count:
            model.load_adapter(folder, name := str(len(loaded)))
            loaded.append(name)
        seconds = time.perf_counter() - start
        swaps = times(lambda: model.set_adapter(loaded[int(draw.integers(len(loaded)))]), 10)
        rows.append({"count": count, **memory(), "load_s": seconds, "swap": swaps})
    size = sum(file.stat().st_size for file in room.peft(USERS[0]).glob("*.safetensors"))
    return {"before": before, "rows": rows, "each_on_disk": size}


def _copies(path: Path, count: int, room: Room) -> list[Path]:
    """Files of their own for so many users; hard links would share the system's cache."""
    folder = room.folder / f"users-{path.suffix[1:]}"
    folder.mkdir(exist_ok=True)
    files = [folder / f"user-{number:04}{path.suffix}" for number in range(count)]
    for file in files:
        shutil.copyfile(path, file)
    return files


draw = np.random.default_rng(0)
MODELS: dict[str, Callable[[Room, str], dict[str, Any]]] = {
    **{f"{name}, {mode}": form for name in FORMS for mode in ("merged", "swappable")},
    "dense, stock int8": stock_int8,
    "torch + PEFT": torch_peft,
}
MANY = {"regrow": regrow_many, "ORT LoraAdapter": lora_many, "torch + PEFT ": peft_many}


def main() -> None:
    with arguments(__doc__) as (given, room):
        if given.case:
            return finish(**{**MODELS, **MANY}[given.case](room, given.case))
        for source, precision in FORMS.values():
            for mode in ("merged", "swappable"):
                room.bundle(source, mode, precision)
        room.adapter(), room.adapter(source="pela"), room.stock_int8()
        room.peft(USERS[0]), room.onnx_adapter(USERS[0])
        models = {name: in_own_process(sys.argv[0], name, room) for name in MODELS}
        for name, row in models.items():
            disk, private, peak = ((row[key] or 0) / 1e6 for key in ("bytes", "private", "peak"))
            print(
                f"{name:30} {spread(row['ms'])} {disk:8.1f} MB on disk {private:8.1f} MB private "
                f"{peak:8.1f} MB peak"
            )
        many = {name.strip(): in_own_process(sys.argv[0], name, room) for name in MANY}
        for name, found in many.items():
            for row in found["rows"]:
                more = ((row["private"] or 0) - (found["before"]["private"] or 0)) / 1e6
                print(f"{name:16} {row['count']:5} adapters {more:8.1f} MB more, swap "
                      f"{spread(row['swap'])}, loaded in {row['load_s']:.2f} s")  # fmt: skip
        finish(task="steady", model=room.folder.name, models=models, many=many, machine=machine())


if __name__ == "__main__":
    main()
