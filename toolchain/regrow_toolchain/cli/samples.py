"""What `regrow run` runs on: arrays, images, audio or text, and what to call each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from regrow_inputs import InputReader
    from regrow_runtime import Bundle

__all__ = ["Samples", "check_choice", "read_samples", "with_more"]

Feeds = dict[str, Any]
_AT_ONCE = 64
_STATES, _MASK = "last_hidden_state", "attention_mask"


@dataclass
class Samples:
    """Names of samples, and feeds of a few of them at a time: files are read as they are run.

    Attributes:
        labels: the true ones, if they are known.
        choices: texts that stand for classes, for a model of images and texts.
        mask: the texts' attention_mask.
    """

    names: list[str]
    feeds: Callable[[], Iterator[Feeds]]
    labels: NDArray[Any] | None = None
    choices: tuple[str, ...] = ()
    mask: NDArray[Any] | None = field(default=None, repr=False)

    def run(self, bundle: Bundle) -> dict[str, NDArray[Any]]:
        """Outputs by name; those of audio whose shapes differ have a number behind the name."""
        import numpy as np

        parts = [bundle.run(f) if self.choices else bundle.run_all(f) for f in self.feeds()]
        found: dict[str, NDArray[Any]] = {}
        for name in parts[0]:
            arrays = [part[name] for part in parts]
            if len({array.shape[1:] for array in arrays}) == 1:
                found[name] = np.concatenate(arrays)
            else:
                found |= {f"{name}.{i}": array for i, array in enumerate(arrays)}
        return found

    def answers(
        self, bundle: Bundle, outputs: Mapping[str, NDArray[Any]], names: Sequence[str], top: int
    ) -> list[list[tuple[str, float]]] | None:
        """None if the model is no classifier."""
        from regrow_inputs.predictions import class_logits, labelled, top_labels

        if self.choices:
            if (logits := outputs.get("logits_per_image")) is None:
                return None
            return top_labels(logits, names, top)
        if class_logits(outputs) is None or not names:
            return None
        return labelled(bundle, outputs, names, top)

    def embeddings(self, outputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Of texts, where the model gives hidden states."""
        from regrow_inputs import mean_embeddings

        states = outputs.get(_STATES)
        if self.mask is None or states is None or states.shape[:2] != self.mask.shape:
            return {}
        return {"embedding": mean_embeddings(states, self.mask)}


def with_more(
    images: tuple[Path, ...], wavs: tuple[Path, ...], more: tuple[Path, ...]
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Further files go to the option that has some."""
    if more and bool(images) == bool(wavs):
        raise click.UsageError(f"got {more[0]}: name files with --image or --wav")
    return (images + more, wavs) if images else (images, wavs + more)


def check_choice(
    arrays: Path | None,
    images: tuple[Path, ...],
    wavs: tuple[Path, ...],
    texts: tuple[str, ...],
    pairs: tuple[str, ...],
) -> None:
    """Raise `click.UsageError` unless one kind of input is given, or images with texts."""
    given = [arrays is not None, bool(images), bool(wavs), bool(texts)]
    if sum(given) != 1 and given != [False, True, False, True]:
        raise click.UsageError("give one of --input, --image, --wav and --text")
    if pairs and (len(pairs) != len(texts) or images):
        raise click.UsageError(
            f"--text-pair must be given once for every --text, got {len(pairs)} for {len(texts)}"
        )


def read_samples(
    bundle: Bundle,
    arrays: Path | None,
    images: tuple[Path, ...],
    wavs: tuple[Path, ...],
    texts: tuple[str, ...],
    pairs: tuple[str, ...],
) -> Samples:
    """Of the one kind that is given."""
    from regrow_inputs import InputReader

    reader = InputReader.from_bundle(bundle)
    if arrays is not None:
        return _arrays(bundle, reader, arrays)
    if images:
        return _pictures(reader, images, texts)
    return _audio(bundle, reader, wavs) if wavs else _texts(reader, texts, pairs)


def _pictures(reader: InputReader, images: tuple[Path, ...], texts: tuple[str, ...]) -> Samples:
    from regrow_inputs import IMAGE_ENDINGS

    files, labels = _files(images, IMAGE_ENDINGS, "image")
    if not texts:
        return Samples(_told(files), lambda: _each(files, reader.images, _AT_ONCE), labels)
    words = reader.text(texts)  # every image beside every text
    return Samples(
        _told(files), lambda: ({**f, **words} for f in _each(files, reader.images, _AT_ONCE)),
        choices=texts,
    )  # fmt: skip


def _audio(bundle: Bundle, reader: InputReader, wavs: tuple[Path, ...]) -> Samples:
    from regrow_inputs import WAV_ENDINGS

    files, labels = _files(wavs, WAV_ENDINGS, "wav")
    # Of any length, one at a time: what fills up a shorter one would change its answer.
    fixed = all(isinstance(size, int) for spec in bundle.graph.inputs for size in spec.shape[1:])
    return Samples(
        _told(files), lambda: _each(files, reader.audio, _AT_ONCE if fixed else 1), labels
    )


def _texts(reader: InputReader, texts: tuple[str, ...], pairs: tuple[str, ...]) -> Samples:
    feeds = reader.text(texts, pairs or None)
    names = [f"{a} | {b}" for a, b in zip(texts, pairs, strict=True)] if pairs else list(texts)
    return Samples(names, lambda: iter([feeds]), mask=feeds.get(_MASK))


def _each(files: list[Path], read: Callable[[list[Path]], Feeds], at_once: int) -> Iterator[Feeds]:
    for start in range(0, len(files), at_once):
        yield read(files[start : start + at_once])


def _told(files: list[Path]) -> list[str]:
    return [str(file) for file in files]


def _files(
    paths: Sequence[Path], endings: tuple[str, ...], what: str
) -> tuple[list[Path], NDArray[Any] | None]:
    """All files, and the names of the folders that hold them if it is one folder by class."""
    import numpy as np

    files = [file for path in paths for file in _below(path, endings, what)]
    if len(paths) == 1 and all(file.parent.parent == paths[0] for file in files):
        return files, np.array([file.parent.name for file in files])
    return files, None


def _below(path: Path, endings: tuple[str, ...], what: str) -> list[Path]:
    """The file at `path`, or those in and below the folder `path`, sorted."""
    from regrow_format.errors import UsageError

    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings)
        if not found:
            kind = "images" if what == "image" else "audio"
            raise UsageError(f"{path} must have {kind} ({', '.join(endings)}), got none")
        return found
    if not path.is_file():
        raise UsageError(f"{what} must be a file or a folder, got {path}: no such file")
    return [path]


def _arrays(bundle: Bundle, reader: InputReader, arrays: Path) -> Samples:
    from regrow_inputs import as_images
    from regrow_runtime.arrays import read_arrays

    found = read_arrays(arrays)
    if bundle.manifest.cache is not None:
        found = bundle.manifest.cache.filled(found)
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
        pixels = as_images(found, arrays, lambda: reader.preprocessor)
        inputs = {bundle.graph.inputs[0].name: pixels}
    count = len(next(iter(inputs.values())))
    labels = next((found[n] for n in ("labels", "label", "y") if n in found), None)
    return Samples([str(i) for i in range(count)], lambda: iter([inputs]), labels)
