"""`InputReader`: images, audio and text to the arrays that a bundle's graph takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import UsageError
from regrow_format.manifest import TensorSpec
from regrow_runtime import Bundle, Manifest

from .audio import Audio, AudioPreprocessor, audio_input
from .audio_settings import is_audio
from .image_files import read_image
from .images import ImagePreprocessor
from .text import TOKENIZER, TextPreprocessor
from .wav import read_wav

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["InputReader"]

_PIXELS, _TOKENS, _MASK = "pixel_values", "input_ids", "attention_mask"
Feeds = dict[str, NDArray[Any]]


class InputReader:
    """What a bundle makes of raw input; use `InputReader.from_bundle`.

    Attributes:
        takes: which of "images", "audio" and "text" the model takes. A model of several, such
            as CLIP, gets what the methods return together: `images(…) | text(…)`.
    """

    def __init__(self, folder: Path, inputs: Sequence[TensorSpec]) -> None:
        self.folder = folder
        self._inputs = {spec.name: spec for spec in inputs}
        self.takes = tuple(self._kinds())

    @classmethod
    def from_bundle(cls, bundle: Bundle | str | Path) -> InputReader:
        """For an open bundle, or the folder of one.

        Raises:
            UsageError: there is no bundle.
            FormatError: its files are broken.
        """
        if isinstance(bundle, Bundle):
            return cls(bundle.folder, bundle.graph.inputs)
        return cls(Path(bundle), Manifest.load(bundle).graphs[0].inputs)

    def images(self, images: Sequence[str | Path | NDArray[Any] | Image]) -> Feeds:
        """From files (which need pillow), arrays uint8 [height, width(, channels)], or pillow's.

        Raises:
            UsageError: the model takes no images, or one has not the size that it takes.
            FormatError: a file is no image, or the preprocessing is broken.
            RegrowError: pillow is not installed.
        """
        self._check("images", images)
        opened = [read_image(Path(p)) if isinstance(p, str | Path) else p for p in images]
        return {self._pixels or _PIXELS: self.preprocessor(opened)}

    def audio(self, audio: Sequence[str | Path | Audio]) -> Feeds:
        """From `.wav` files, samples float [length] at the model's rate, or (samples, rate).

        Raises:
            UsageError: the model takes no audio, or one holds no samples.
            FormatError: a file is no `.wav`, or the preprocessing is broken.
        """
        self._check("audio", audio)
        heard = [read_wav(Path(s)) if isinstance(s, str | Path) else s for s in audio]
        return self._audio.feeds(heard, list(self._inputs))

    def text(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Feeds:
        """From texts, or with `pairs` from two for each sample.

        Raises:
            UsageError: the model takes no text, or one is empty.
            FormatError: the tokenizer is broken.
            RegrowError: `tokenizers` is not installed.
        """
        self._check("text", texts)
        made = self.tokens(texts, pairs, fill=self._length(_TOKENS))
        # Counted as optimum's export does: what fills up on the left does not move a text.
        made["position_ids"] = np.maximum(made[_MASK].cumsum(axis=1) - 1, 0)
        return {name: array for name, array in made.items() if name in self._inputs}

    @cached_property
    def tokens(self) -> TextPreprocessor:
        """The tokenizer alone, with `prompt` and `decode` for language models."""
        self._check("text", ("",))
        return TextPreprocessor.from_folder(self.folder, length=self._length(_TOKENS))

    # -- what the graph takes ----------------------------------------------------------------------

    def _kinds(self) -> list[str]:
        clip = is_audio(self.folder) and audio_input(list(self._inputs)) is not None
        found = {
            "images": self._pixels is not None and not clip,
            "audio": clip,
            "text": _TOKENS in self._inputs and (self.folder / TOKENIZER).is_file(),
        }
        return [kind for kind, there in found.items() if there]

    def _check(self, kind: str, items: Sequence[Any]) -> None:
        if kind not in self.takes:
            raise UsageError(f"model must take {kind}, got one that takes {self._told(kind)}")
        if isinstance(items, str | Path) or not len(items):
            raise UsageError(f"{kind} must be a list of at least one, got {items!r:.80}")

    def _told(self, kind: str) -> str:
        names = ", ".join(self._inputs)
        if self.takes:
            return f"{' and '.join(self.takes)} ({names})"
        file = TOKENIZER if kind == "text" else "preprocessor_config.json"
        return f"arrays ({names}) and has no {file} for {kind}: give it at export, or arrays"

    def _length(self, name: str) -> int | None:
        """How many tokens or samples the graph takes, if it takes one number of them."""
        spec = self._inputs.get(name)
        size = spec.shape[1] if spec is not None and len(spec.shape) > 1 else None
        return size if isinstance(size, int) else None

    @cached_property
    def _pixels(self) -> str | None:
        four = [name for name, spec in self._inputs.items() if len(spec.shape) == 4]
        return _PIXELS if _PIXELS in four else four[0] if four else None

    @cached_property
    def preprocessor(self) -> ImagePreprocessor:
        """The image preprocessing alone."""
        self._check("images", ("",))
        return ImagePreprocessor.from_folder(self.folder)

    @cached_property
    def _audio(self) -> AudioPreprocessor:
        found = AudioPreprocessor.from_folder(self.folder)
        length = self._length(audio_input(list(self._inputs)) or "")
        return replace(found, samples=length) if length and found.front is None else found
