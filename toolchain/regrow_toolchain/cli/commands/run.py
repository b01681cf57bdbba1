"""regrow run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow_toolchain.cli.commands.store import store_options, swap_first
from regrow_toolchain.cli.options import emit, json_option, path_argument
from regrow_toolchain.cli.tables import percent, table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from regrow_runtime import Bundle
    from regrow_runtime.bundle import SwapCost

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
    type=click.Path(path_type=Path),
    help="A picture, or a folder of pictures (by class, for an accuracy).",
)
@click.option("--adapter", type=click.Path(path_type=Path), help="Adapter file to swap in first.")
@store_options
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="Write the outputs (logits) to an .npz."
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
    image: Path | None,
    adapter: Path | None,
    store: Path | None,
    user: str | None,
    out: Path | None,
    profile: str,
    threads: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run BUNDLE on pictures or arrays; torch is not needed.

    Prints a label and its probability per sample where the model is a classifier.
    """
    if (arrays is None) == (image is None):
        raise click.UsageError("give one of --input and --image")
    from regrow_runtime import Bundle
    from regrow_runtime.files import check_output

    if out is not None:
        check_output(out, force=force)
    opened = Bundle.open(bundle, profile=profile, threads=threads)
    cost = swap_first(opened, adapter, store, user)
    samples = _samples(opened, arrays, image)
    if samples.labels is not None:
        _check_labels(samples.labels, len(samples.names))
    outputs = opened.run_all(samples.inputs)
    result = _result(opened, samples, outputs, cost)
    if out is not None:
        _write(out, outputs)
    emit(result, _lines(result), as_json=as_json)


class _Samples:
    """What to run, what to call each sample, and the labels if the file has them."""

    def __init__(
        self,
        inputs: dict[str, NDArray[Any]],
        names: list[str],
        labels: NDArray[Any] | None = None,
    ) -> None:
        self.inputs, self.names, self.labels = inputs, names, labels


def _samples(bundle: Bundle, arrays: Path | None, image: Path | None) -> _Samples:
    from regrow_runtime.arrays import as_pictures, read_arrays
    from regrow_runtime.preprocess import image_files, read_image

    if image is not None:
        files = image_files(image)
        pixels = bundle.preprocessor()([read_image(file) for file in files])
        inputs = {bundle.graph.inputs[0].name: pixels}
        return _Samples(inputs, [str(file) for file in files], _folders(image, files))
    if arrays is None:
        raise click.UsageError("give one of --input and --image")
    found = read_arrays(arrays)
    wanted = {spec.name for spec in bundle.graph.inputs}
    if wanted <= found.keys():
        inputs = {name: found[name] for name in wanted}
    elif wanted != {"pixel_values"} and len(bundle.graph.inputs[0].shape) != 4:
        missing = sorted(wanted - found.keys())
        raise click.UsageError(
            f"{arrays} must have the arrays {', '.join(sorted(wanted))}, got "
            f"{', '.join(sorted(found)) or 'none'}: {', '.join(missing)} missing"
        )
    else:
        inputs = {bundle.graph.inputs[0].name: as_pictures(found, arrays, bundle.preprocessor)}
    count = len(next(iter(inputs.values())))
    labels = next((found[n] for n in ("labels", "label", "y") if n in found), None)
    return _Samples(inputs, [str(i) for i in range(count)], labels)


def _folders(image: Path, files: list[Path]) -> NDArray[Any] | None:
    """Names of the folders that hold the pictures, if `image` is a folder of pictures by class."""
    import numpy as np

    if all(file.parent.parent == image for file in files):
        return np.array([file.parent.name for file in files])
    return None


def _write(out: Path, outputs: dict[str, NDArray[Any]]) -> None:
    from io import BytesIO

    import numpy as np

    from regrow_runtime.files import write_bytes

    buffer = BytesIO()
    np.savez(buffer, **outputs)  # type: ignore[arg-type]
    write_bytes(out, buffer.getvalue())


def _result(
    bundle: Bundle, samples: _Samples, outputs: dict[str, NDArray[Any]], cost: SwapCost | None
) -> dict[str, Any]:
    from regrow_runtime.answers import top_labels

    result: dict[str, Any] = {
        "samples": len(samples.names),
        "adapter": bundle.active,
        "swap": vars(cost) if cost else None,
        "outputs": {name: list(array.shape) for name, array in outputs.items()},
    }
    logits, names = outputs.get("logits"), bundle.labels()
    if logits is not None and logits.ndim == 2 and names:
        answers = top_labels(logits, names)
        result["answers"] = [
            {"sample": name, "label": label, "probability": probability}
            for name, (label, probability) in zip(samples.names, answers, strict=True)
        ]
        if samples.labels is not None:
            result["accuracy"] = _accuracy(logits, names, samples.labels)
            for answer, label in zip(result["answers"], samples.labels, strict=True):
                answer["true"] = str(label)
    return result


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
    from regrow_runtime.errors import UsageError

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
        rows = [[a["sample"], a["label"], percent(a["probability"])] for a in shown]
        head = ["sample", "label", "probability"]
        if "accuracy" in result:
            head, rows = (
                [*head, "true"],
                [[*r, a["true"]] for r, a in zip(rows, shown, strict=True)],
            )
        lines += table(head, rows)
        if (more := len(result["answers"]) - _SHOWN) > 0:
            lines.append(f"… {more} more (--json lists all)")
    else:
        lines += [f"{name}: {shape}" for name, shape in result["outputs"].items()]
    if "accuracy" in result:
        share = result["accuracy"]
        told = percent(share) if share is not None else "none, this head does not know the labels"
        lines.append(f"accuracy on {result['samples']} samples: {told}")
    if cost := result["swap"]:
        lines.append(f"adapter {result['adapter']} swapped in {cost['total_ms']:.2f} ms")
    return lines
