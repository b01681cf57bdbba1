"""regrow run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow_toolchain.pages import table

from ..generation import generated, generated_lines, generation_options, goes_on, swap_lines
from ..options import check_npz, emit, json_option, path_argument
from ..samples import check_choice, read_samples, with_more
from ..tables import percent
from .store import store_options, swap_first

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from regrow_runtime import Bundle
    from regrow_runtime.bundle import SwapStats

    from ..samples import Samples

_SHOWN = 20


@click.command("run")
@path_argument("bundle")
@click.option(
    "--input",
    "arrays",
    type=click.Path(path_type=Path),
    help="An .npz: the graph's inputs by name, or `images` (uint8, or floats from 0 to 1), and "
    "`labels` if you have them.",
)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An image, or a folder of images (by class, for an accuracy); repeatable.",
)
@click.option(
    "--wav",
    "wavs",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A clip as a .wav file, or a folder of them (by class, for an accuracy); repeatable.",
)
@click.option(
    "--text",
    "texts",
    multiple=True,
    help="A text; repeatable. A language model goes on with it, others label it, or give its "
    "embedding. With --image: what an image may show, for a model of both.",
)
@click.option("--text-pair", "pairs", multiple=True, help="A second text for every --text.")
@click.argument("more", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--top", type=click.IntRange(1), default=1, show_default=True, help="Labels per sample."
)
@generation_options
@click.option("--adapter", type=click.Path(path_type=Path), help="Adapter file to swap in first.")
@store_options
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="Write the outputs (logits) by name to this file, whose name ends in .npz.",
)
@click.option(
    "--profile",
    type=click.Choice(["speed", "memory"]),
    default="speed",
    show_default=True,
    help="What to save: time, or RAM.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads; by default one per core.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@json_option
def run_command(
    bundle: Path,
    arrays: Path | None,
    images: tuple[Path, ...],
    wavs: tuple[Path, ...],
    texts: tuple[str, ...],
    pairs: tuple[str, ...],
    more: tuple[Path, ...],
    adapter: Path | None,
    store: Path | None,
    user: str | None,
    out: Path | None,
    profile: str,
    threads: int | None,
    force: bool,
    as_json: bool,
    top: int,
    **generation: Any,
) -> None:
    """Run BUNDLE on images, audio, text or arrays; torch is not needed.

    Prints a label and its probability per sample where the model is a classifier. MORE are further
    files for --image or --wav, as a shell makes them of `*`.
    """
    images, wavs = with_more(images, wavs, more)
    check_choice(arrays, images, wavs, texts, pairs)
    from regrow_format.files import check_output
    from regrow_runtime import Bundle

    if out is not None:
        check_npz(out)
        check_output(out, force=force)
    opened = Bundle.open(bundle, profile=profile, threads=threads)
    cost = swap_first(opened, adapter, store, user)
    if texts and not images and goes_on(opened, out):
        result = generated(opened, texts, generation, cost)
        emit(result, generated_lines(result), as_json=as_json)
        return
    samples = read_samples(opened, arrays, images, wavs, texts, pairs)
    if samples.labels is not None:
        _check_labels(samples.labels, len(samples.names))
    outputs = samples.run(opened)
    result = _result(opened, samples, outputs, cost, top)
    if out is not None:
        _write(out, outputs | samples.embeddings(outputs))
    emit(result, _lines(result), as_json=as_json)


def _write(out: Path, outputs: dict[str, NDArray[Any]]) -> None:
    from io import BytesIO

    import numpy as np

    from regrow_format.files import write_bytes

    buffer = BytesIO()
    np.savez(buffer, **outputs)  # type: ignore[arg-type]
    write_bytes(out, buffer.getvalue())


def _result(
    bundle: Bundle,
    samples: Samples,
    outputs: dict[str, NDArray[Any]],
    cost: SwapStats | None,
    top: int,
) -> dict[str, Any]:
    from regrow_inputs.predictions import class_logits

    result: dict[str, Any] = {
        "samples": len(samples.names),
        "adapter": bundle.active,
        "swap": vars(cost) if cost else None,
        "outputs": {name: list(array.shape) for name, array in outputs.items()},
    }
    names = samples.choices or bundle.labels()
    answers = samples.answers(bundle, outputs, names, top)
    if answers is not None:
        result["answers"] = [
            _answer(name, best, top) for name, best in zip(samples.names, answers, strict=True)
        ]
        logits = class_logits(outputs)
        if samples.labels is not None and logits is not None:
            result["accuracy"] = _accuracy(logits, names, samples.labels)
            for answer, label in zip(result["answers"], _names(samples.labels, names), strict=True):
                answer["true"] = label
    if found := samples.embeddings(outputs):
        vectors = found["embedding"]
        result["embedding"] = list(vectors.shape)
        result["similarity"] = (vectors @ vectors.T).tolist()
    return result


def _answer(name: str, best: list[tuple[str, float]], top: int) -> dict[str, Any]:
    found: dict[str, Any] = {"sample": name, "label": best[0][0], "probability": best[0][1]}
    if top > 1:
        found["top"] = [{"label": label, "probability": share} for label, share in best]
    return found


def _names(labels: NDArray[Any], names: tuple[str, ...]) -> list[str]:
    """Labels as people know them: outputs by number become names, if the model has them all."""
    told = [str(label) for label in labels]
    if set(told) <= set(names) or labels.dtype.kind in "US" or labels.max() >= len(names):
        return told
    return [names[int(label)] for label in labels]


def _accuracy(
    logits: NDArray[np.float32], names: tuple[str, ...], labels: NDArray[Any]
) -> float | None:
    """Share of samples whose label is the answer; None if the head does not know the labels.

    Labels are class names, or outputs by number; integers that are names count as names.
    """
    wanted = [str(label) for label in labels]
    best = logits.argmax(axis=1)
    if set(wanted) <= set(names):
        right = sum(names[int(b)] == w for b, w in zip(best, wanted, strict=True))
        return right / len(wanted)
    if labels.dtype.kind in "US" or labels.max() >= len(names):
        return None
    return float((best == labels).mean())


def _check_labels(labels: NDArray[Any], count: int) -> None:
    from regrow_format.errors import UsageError

    if labels.shape != (count,):
        raise UsageError(
            f"labels must be one per sample, got {list(labels.shape)} for {count} samples"
        )
    if labels.dtype.kind not in "iuUS" or (labels.dtype.kind == "i" and labels.min() < 0):
        raise UsageError(f"labels must be integers from 0 or names, got {labels.dtype}")


def _lines(result: dict[str, Any]) -> list[str]:
    lines = []
    if "answers" in result:
        shown = result["answers"][:_SHOWN]
        head = ["sample", "label", "probability", *(["true"] if "accuracy" in result else [])]
        lines += table(head, [row for answer in shown for row in _rows(answer)])
        if (more := len(result["answers"]) - _SHOWN) > 0:
            lines.append(f"… {more} more (--json lists all)")
    else:
        lines += [f"{name}: {shape}" for name, shape in result["outputs"].items()]
    if "embedding" in result:
        lines.append(f"embedding: {result['embedding']}, the mean over tokens, length 1")
        if 1 < (count := len(result["similarity"])) <= _SHOWN:
            cells = [[f"{i + 1}", *(f"{v:.3f}" for v in row)]
                     for i, row in enumerate(result["similarity"])]  # fmt: skip
            lines += table(["cosine", *(str(i + 1) for i in range(count))], cells)
    if "accuracy" in result:
        share = result["accuracy"]
        told = percent(share) if share is not None else "none, this head does not know the labels"
        lines.append(f"accuracy on {result['samples']} samples: {told}")
    return lines + swap_lines(result)


def _rows(answer: dict[str, Any]) -> list[list[str]]:
    """One for each of the best labels; only the first has the sample's name."""
    best = answer.get("top", [answer])
    rows = [["", one["label"], _score(one["probability"])] for one in best]
    rows[0][0] = answer["sample"]
    return [[*row, answer["true"]] if "true" in answer else row for row in rows]


def _score(value: float) -> str:
    """A probability; a model of one output gives any value."""
    return percent(value) if 0 <= value <= 1 else f"{value:.4g}"
