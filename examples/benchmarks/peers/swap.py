"""Changing the user: regrow beside ONNX Runtime, PEFT and optimum, the same change for all.

    python examples/benchmarks/peers/swap.py [--small] [--room FOLDER]

One model, two users in turns, one thread, each way in a process of its own. `change` is the time
until the next run may start, `first` that of the run after it, `run` of a run in between. Every
way's answers are held against regrow's. Ends in one line of JSON.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from models import (  # fmt: skip
    USERS,
    Room,
    arguments,
    finish,
    in_own_process,
    machine,
    pixels,
    plain_session,
    spread,
    times,
    torch_model,
)

Way = tuple[Callable[[int], object], Callable[[], np.ndarray]]


def regrow(room: Room, kind: str) -> Way:
    from regrow import Bundle

    bundle, x = Bundle.open(room.bundle(), threads=1), {"pixel_values": pixels(room.small)}
    files = {user: room.adapter(user) for user in USERS}
    for file in files.values():
        bundle.load(file)
    if kind == "resident":
        return lambda user: bundle.swap(files[user].stem), lambda: bundle.run(x)["logits"]

    def change(user: int) -> None:
        if kind == "cold":
            bundle.basis.clear()
        bundle.swap(files[user])

    return change, lambda: bundle.run(x)["logits"]


def lora_adapter(room: Room, kind: str) -> Way:
    """ONNX Runtime's own: from a file, or loaded before."""
    import onnxruntime as ort

    session = plain_session(room.bundle() / "backbone.onnx")
    x, state = {"pixel_values": pixels(room.small)}, {}
    loaded = {}
    for user in USERS:
        loaded[user] = ort.LoraAdapter()
        loaded[user].Load(str(room.onnx_adapter(user)))

    def change(user: int) -> None:
        adapter = loaded[user]
        if kind == "file":
            adapter = ort.LoraAdapter()
            adapter.Load(str(room.onnx_adapter(user)))
        options = ort.RunOptions()
        options.add_active_adapter(adapter)
        state["options"], state["adapter"] = options, adapter  # options keep no adapter alive

    return change, lambda: session.run(["logits"], x, state["options"])[0]


def session_again(room: Room, kind: str) -> Way:
    """A new session of a model with the user's weights in it."""
    x, state = {"pixel_values": pixels(room.small)}, {}
    files = {user: room.bundle(mode="merged", user=user) / "backbone.onnx" for user in USERS}

    def change(user: int) -> None:
        state.clear()
        state["session"] = plain_session(files[user])

    return change, lambda: state["session"].run(["logits"], x)[0]


def optimum_reload(room: Room, kind: str) -> Way:
    import onnxruntime as ort
    import torch
    from optimum.onnxruntime import ORTModelForImageClassification

    x, state = torch.from_numpy(pixels(room.small)), {}
    folders = {user: room.bundle(mode="merged", user=user) for user in USERS}
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1

    def change(user: int) -> None:
        state.clear()
        state["model"] = ORTModelForImageClassification.from_pretrained(
            folders[user], file_name="backbone.onnx", session_options=options
        )

    return change, lambda: state["model"](pixel_values=x).logits.numpy()


def peft(room: Room, kind: str) -> Way:
    """In torch: both users loaded (`set_adapter`), or the weights of one replaced from a file."""
    import torch
    from peft import PeftModel
    from peft.utils.hotswap import hotswap_adapter

    folders = {user: str(room.peft(user)) for user in USERS}
    model = PeftModel.from_pretrained(torch_model(room.dense()), folders[USERS[0]], "default")
    if kind == "set_adapter":
        for user in USERS:
            model.load_adapter(folders[user], str(user))
    model.eval()
    x = torch.from_numpy(pixels(room.small))

    def change(user: int) -> None:
        if kind == "set_adapter":
            model.set_adapter(str(user))
        else:
            hotswap_adapter(model, folders[user], "default", torch_device="cpu")

    def run() -> np.ndarray:
        with torch.no_grad():
            return model(pixel_values=x).logits.numpy()

    return change, run


WAYS: dict[str, tuple[Callable[[Room, str], Way], str]] = {
    "regrow, cold": (regrow, "cold"),
    "regrow, cached basis": (regrow, "cached"),
    "regrow, resident": (regrow, "resident"),
    "ORT LoraAdapter, from file": (lora_adapter, "file"),
    "ORT LoraAdapter, loaded before": (lora_adapter, "loaded"),
    "PEFT set_adapter, loaded before": (peft, "set_adapter"),
    "PEFT hot-swap, from file": (peft, "hotswap"),
    "ORT session again, merged weights": (session_again, ""),
    "optimum ORTModel again": (optimum_reload, ""),
}


def measure(room: Room, name: str) -> dict[str, Any]:
    make, kind = WAYS[name]
    change, run = make(room, kind)
    answers = []
    for user in USERS:
        change(user)
        answers.append(run().tolist())
    users, firsts = itertools.cycle(USERS), []
    few = 3 if room.small else 12

    def turn() -> None:
        change(next(users))

    found = times(turn, few if kind in ("", "hotswap") else 3 * few)
    for _ in range(few):
        turn()
        firsts.append(times(run, 1, warm=0)["p50"])
    steady = times(run, few)
    return {"change": found, "first": float(np.median(firsts)), "run": steady, "answers": answers}


def main() -> None:
    with arguments(__doc__) as (given, room):
        if given.case:
            return finish(**measure(room, given.case))
        for user in USERS:
            room.adapter(user), room.onnx_adapter(user), room.peft(user)
            room.bundle(mode="merged", user=user)
        found = {name: in_own_process(sys.argv[0], name, room) for name in WAYS}
        wanted = np.array(next(iter(found.values()))["answers"])
        for name, row in found.items():
            row["differs"] = float(np.abs(np.array(row.pop("answers")) - wanted).max())
            print(f"{name:34} {spread(row['change'])}  first {row['first']:.1f} ms, run "
                  f"{row['run']['p50']:.1f} ms, answers within {row['differs']:.1e}")  # fmt: skip
        lora = room.peft(USERS[0]).glob("*.safetensors")
        sizes = {
            "regrow": room.adapter().stat().st_size,
            "onnx_adapter": room.onnx_adapter(USERS[0]).stat().st_size,
            "PEFT": sum(file.stat().st_size for file in lora),
        }
        finish(task="swap", model=room.folder.name, bytes=sizes, ways=found, machine=machine())


if __name__ == "__main__":
    main()
