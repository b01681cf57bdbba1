"""What a backbone carries to the device besides weights: preprocessing, tokenizer, class names."""

from __future__ import annotations

import atexit
import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, UsageError
from regrow_format.fields import dump_json
from regrow_format.files import read_bytes
from regrow_inputs import PREPROCESSOR, AudioPreprocessor, ImagePreprocessor
from regrow_inputs.audio_settings import is_audio
from regrow_toolchain.models import COMPANIONS, Backbone

from .source import arguments
from .text import Encoder, has_tokenizer

__all__ = ["attach_assets", "dummy_inputs", "for_device", "read_labels"]

_CONFIG, _TOKENIZER, _TOKENIZER_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
_MAX_BYTES = 64 << 20
_MAX_LABELS = 1 << 20
_NO_LIMIT = 1 << 30  # how `Encoder` says that a model has none


def attach_assets(
    backbone: Backbone, *, preprocessor: Path | None = None, labels: Path | None = None
) -> Backbone:
    """The backbone with preprocessing and class names that its directory or function lacks.

    Args:
        preprocessor: a preprocessor_config.json by any name, or a folder that has one, a tokenizer,
            or both.
        labels: class names in the order of the outputs; see `read_labels`.

    Raises:
        UsageError: there is no such file, or not one label per output.
        FormatError: a file is broken.
    """
    if labels is not None:
        backbone = _named(backbone, read_labels(labels), str(labels))
    if preprocessor is None and (labels is None or not backbone.files):
        return backbone
    folder = _scratch()
    for file in (*backbone.files, *_given(preprocessor)):
        shutil.copyfile(file, folder / (file.name if file.name in COMPANIONS else PREPROCESSOR))
    if labels is not None and (folder / _CONFIG).is_file():
        _write_names(folder / _CONFIG, backbone.labels)
    if (folder / PREPROCESSOR).is_file():
        (AudioPreprocessor if is_audio(folder) else ImagePreprocessor).from_folder(folder)
    files = tuple(folder / name for name in COMPANIONS if (folder / name).is_file())
    return replace(backbone, files=files)


def _scratch() -> Path:
    """A temporary folder, until the process ends: backbones made of this one name its files."""
    folder = Path(mkdtemp(prefix="regrow-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def read_labels(path: Path) -> tuple[str, ...]:
    """Class names: a line each of a text file, or a JSON list, or an object like `id2label`.

    Raises:
        UsageError: there is no such file.
        FormatError: it holds something else, or a name twice.
    """
    try:
        text = read_bytes(path, limit=_MAX_BYTES, what="labels").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} must be UTF-8, got another encoding: {error.reason}") from None
    names = _of_json(text, path) if path.suffix.lower() == ".json" else text.split("\n")
    found = [name.strip() if isinstance(name, str) else name for name in names]
    while found and found[-1] == "":
        found.pop()
    if not found or not all(isinstance(name, str) and name for name in found):
        raise FormatError(
            f"{path} must have a class name per line or entry, got none or an empty one"
        )
    if len(set(found)) < len(found) or len(found) > _MAX_LABELS:
        twice = next((name for name in found if found.count(name) > 1), f"{len(found)} names")
        raise FormatError(f"{path} must name every class once, got {twice!r:.60}")
    return tuple(found)


def _of_json(text: str, path: Path) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{path} must be JSON, got something else: {error}") from None
    if isinstance(value, dict):
        value = value.get("id2label", value)
        if sorted(value) == sorted(str(i) for i in range(len(value))):
            return [value[str(i)] for i in range(len(value))]
    if not isinstance(value, list):
        raise FormatError(f"{path} must be a list of names, or an object of them by number")
    return value


def _named(backbone: Backbone, labels: tuple[str, ...], where: str) -> Backbone:
    if backbone.head:
        weight = backbone.model.get_submodule(backbone.head[-1]).get_parameter("weight")
        if len(weight) != len(labels):
            raise UsageError(
                f"{where} must have one label per output of {backbone.head[-1]}, "
                f"got {len(labels)} for {len(weight)}"
            )
    return replace(backbone, labels=labels)


def _given(path: Path | None) -> list[Path]:
    if path is None or path.is_file():
        return [] if path is None else [path]
    if not path.is_dir():
        raise UsageError(f"preprocessor must be a file or a folder, got {path}: no such file")
    found = [path / name for name in COMPANIONS if name != _CONFIG and (path / name).is_file()]
    if not found:
        raise UsageError(f"preprocessor must be a folder with {PREPROCESSOR}, got {path} without")
    return found


def _write_names(path: Path, labels: tuple[str, ...]) -> None:
    """Where Hugging Face's classes look for them."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["id2label"] = {str(index): label for index, label in enumerate(labels)}
    config["label2id"] = {label: index for index, label in enumerate(labels)}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def dummy_inputs(backbone: Backbone) -> dict[str, NDArray[Any]] | None:
    """Three noises or images through its preprocessing, to trace a plain module with.

    None where it has no preprocessing, or one that does not say how large images are.
    """
    folder = backbone.folder
    if not backbone.function or folder is None or not (folder / PREPROCESSOR).is_file():
        return None
    wanted, draw = arguments(backbone.model), np.random.default_rng(0)
    if is_audio(folder):
        audio = AudioPreprocessor.from_folder(folder)
        noise = draw.normal(0, 0.1, (3, audio.sampling_rate)).astype(np.float32)
        return audio.feeds(list(noise), wanted)
    images = ImagePreprocessor.from_folder(folder)
    size = images.crop or images.size
    if size is None or not wanted:
        return None
    pixels = draw.integers(0, 256, (3, *size, images.channels)).astype(np.uint8)
    return {"pixel_values" if "pixel_values" in wanted else wanted[0]: images(list(pixels))}


def for_device(backbone: Backbone) -> Backbone:
    """The backbone with the tokenizer's files that a device reads.

    That is tokenizer.json alone, and from tokenizer_config.json how many tokens the model takes.
    transformers may change a tokenizer as it loads it, or make it of other files: what it would use
    is what is given on.
    """
    if not (backbone.function == "" and has_tokenizer(backbone)):
        return backbone
    encoder = Encoder(backbone, _NO_LIMIT)
    if (backend := getattr(encoder.tokenizer, "backend_tokenizer", None)) is None:
        return backbone  # a slow one, which has no such file
    files, scratch = {file.name: file for file in backbone.files}, _scratch()
    text = backend.to_str()
    there = files.get(_TOKENIZER)
    if there is None or _settings(text) != _settings(there.read_text(encoding="utf-8")):
        files[_TOKENIZER] = scratch / _TOKENIZER
        files[_TOKENIZER].write_text(text, encoding="utf-8")
    config = _tokenizer_config(files.get(_TOKENIZER_CONFIG), encoder)
    if config is not None:
        files[_TOKENIZER_CONFIG] = scratch / _TOKENIZER_CONFIG
        files[_TOKENIZER_CONFIG].write_text(dump_json(config, indent=2) + "\n", encoding="utf-8")
    return replace(backbone, files=tuple(files.values()))


def _settings(text: str) -> dict[str, Any]:
    """A tokenizer.json without what every call sets anew."""
    value = json.loads(text)
    return {k: v for k, v in value.items() if k not in ("truncation", "padding")}


def _tokenizer_config(path: Path | None, encoder: Encoder) -> dict[str, Any] | None:
    """With what transformers knows by the tokenizer's class, if anything has to be changed."""
    tokenizer, length = encoder.tokenizer, encoder.length
    config = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    tokens = {"pad_token": tokenizer.pad_token, "eos_token": tokenizer.eos_token}
    said = {name: str(token) for name, token in tokens.items() if token is not None}
    said |= {side: getattr(tokenizer, side) for side in ("padding_side", "truncation_side")}
    found = {**said, **{name: value for name, value in config.items() if value is not None}}
    if length < _NO_LIMIT:
        found["model_max_length"] = length
    return None if found == config else found
