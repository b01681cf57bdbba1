"""Text through the backbone's own tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.files import read_bytes

from .dataset import Dataset
from .labels import IGNORED, no_labels
from .source import Source

if TYPE_CHECKING:
    from regrow_toolchain.models import Backbone

__all__ = ["Encoder", "has_tokenizer", "next_tokens", "read_text", "read_utf8"]

_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
AT_ONCE = 1024
_MAX_TEXT = 64 << 20
MAX_VALUES = 1 << 30  # tokens of a dataset, padding included: 8 GiB

Inputs = dict[str, NDArray[np.int64]]


class Encoder:
    """The backbone's tokenizer: texts, or pairs of them, to int64 arrays [samples, tokens].

    Texts are cut to `max_length` tokens, or to what the backbone takes if that is less, and padded
    on the right to the longest; padding has no attention.

    Raises:
        UsageError: the backbone has no tokenizer, or `max_length` leaves no room for text.
        FormatError: the tokenizer's files are broken, or it is not this backbone's.
    """

    def __init__(self, backbone: Backbone, max_length: int) -> None:
        self.tokenizer, self.folder = _tokenizer(backbone)
        self.length = min(max_length, _positions(backbone.model), self._own_length())
        self.words = _vocabulary(backbone.model)
        self.types = getattr(getattr(backbone.model, "config", None), "type_vocab_size", None)

    def _own_length(self) -> int:
        own = getattr(self.tokenizer, "model_max_length", None)
        return own if isinstance(own, int) and own > 0 else 1 << 30

    def __call__(self, *texts: Sequence[str]) -> tuple[Inputs, NDArray[np.int64]]:
        """Arrays by the tokenizer's names, always with `attention_mask`, and lengths [samples]."""
        scratch = self.length - self.tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
        if scratch < len(texts):
            raise UsageError(
                f"max_length must leave room for text, got {self.length} tokens, "
                f"{self.length - scratch} of them special"
            )
        pieces: dict[str, list[NDArray[np.int64]]] = {}
        for start in range(0, len(texts[0]), AT_ONCE):
            part = [list(column[start : start + AT_ONCE]) for column in texts]
            made = self._tokens(*part, truncation=True, max_length=self.length)
            for name, rows in made.items():
                pieces.setdefault(name, []).extend(np.array(row, dtype=np.int64) for row in rows)
        return self._padded(pieces)

    def whole(self, text: str) -> NDArray[np.int64]:
        """All tokens of a text, without special ones."""
        made = self._tokens(text, add_special_tokens=False)
        tokens = np.array(made["input_ids"], dtype=np.int64)
        self._check(tokens)
        return tokens

    def taken(self, inputs: Inputs, arguments: Sequence[str]) -> dict[str, NDArray[Any]]:
        """What of it the model takes. Kinds of tokens are left out where it knows only one:
        GPT-2 would add a word's embedding for them.
        """
        left_out = {"token_type_ids"} if self.types is None or self.types < 2 else set()
        found = {n: a for n, a in inputs.items() if n in arguments and n not in left_out}
        if "input_ids" not in found:
            raise UsageError(
                f"backbone must take text (input_ids), got one of {', '.join(arguments)}"
            )
        return found

    def _tokens(self, *texts: Any, **options: Any) -> dict[str, Any]:
        from regrow_toolchain.models import quiet_transformers

        with quiet_transformers():
            try:
                made = self.tokenizer(*texts, return_attention_mask=False, **options)
            except Exception as error:  # whatever comes up inside the tokenizer
                raise RegrowError(
                    f"the tokenizer of {self.folder} failed: {_line(error)}"
                ) from error
        return {str(name): rows for name, rows in made.items()}

    def _padded(
        self, pieces: dict[str, list[NDArray[np.int64]]]
    ) -> tuple[Inputs, NDArray[np.int64]]:
        lengths = np.array([len(row) for row in pieces["input_ids"]])
        shape = (len(lengths), int(lengths.max()))
        if shape[0] * shape[1] > MAX_VALUES:
            raise UsageError(f"data must come to at most {MAX_VALUES} tokens, got {shape}")
        fill = {"input_ids": self._pad(), "token_type_ids": self.tokenizer.pad_token_type_id}
        inputs = {}
        for name, rows in pieces.items():
            array = np.full(shape, fill.get(name, 0), dtype=np.int64)
            for into, row in zip(array, rows, strict=True):
                into[: len(row)] = row
            inputs[name] = array
        inputs["attention_mask"] = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        self._check(inputs["input_ids"])
        return inputs, lengths

    def _pad(self) -> int:
        """The token of the padding; the end of a text where the tokenizer has none."""
        choices = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in choices if token is not None)

    def _check(self, tokens: NDArray[np.int64]) -> None:
        if self.words is not None and tokens.size and int(tokens.max()) >= self.words:
            raise FormatError(
                f"the tokenizer of {self.folder} must give tokens below the backbone's "
                f"{self.words}, got {int(tokens.max())}: it belongs to another model"
            )


def next_tokens(tokens: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """A language model's labels: the tokens themselves, the padding left out."""
    return np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, IGNORED)


def read_text(source: Source) -> Dataset:
    """A `.txt` for a language model: consecutive windows of `max_length` tokens.

    Raises:
        UsageError: the backbone is no language model, or the text is too short.
        FormatError: it is no UTF-8, or has more than 64 MiB.
    """
    source.refuse("users", "text", "label")
    if not source.language_model and source.labels != "needed":
        return _read_lines(source)
    if not source.language_model:
        raise UsageError(
            f"backbone must be a language model (text-generation) to take {source.path}, "
            f"got one for {source.backbone.task}: give a table with labels"
        )
    text = read_utf8(source.path, _MAX_TEXT)
    encoder = Encoder(source.backbone, source.max_length)
    tokens, size = encoder.whole(text), encoder.length
    starts = range(0, len(tokens) - 1, size)  # a window of one token has nothing to predict
    if not starts:
        raise UsageError(f"{source.path} must have two tokens or more, got {len(tokens)}")
    windows = [tokens[start : start + size] for start in starts]
    inputs, lengths = encoder._padded({"input_ids": windows})
    labels = next_tokens(inputs["input_ids"], lengths)
    return Dataset(encoder.taken(inputs, source.arguments()), labels)


def _read_lines(source: Source) -> Dataset:
    """Every line that is not blank is a sample without a label."""
    lines = [line for line in read_utf8(source.path, _MAX_TEXT).splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"{source.path} must have a line of text or more, got none")
    encoder = Encoder(source.backbone, source.max_length)
    inputs, _ = encoder(lines)
    labels = no_labels(len(lines))
    return Dataset(
        encoder.taken(inputs, source.arguments()), labels.values, labels.names, labels.named
    )


def read_utf8(path: Path, limit: int) -> str:
    """The whole of a UTF-8 file of at most `limit` bytes, without a byte order mark.

    Raises:
        FormatError: it is no UTF-8, or larger.
    """
    data = read_bytes(path, limit=limit, what="text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise FormatError(
            f"{path}, line {line} must be UTF-8, got byte {data[error.start]:#04x}"
        ) from None


def has_tokenizer(backbone: Backbone) -> bool:
    """Whether files of a tokenizer lie beside it."""
    folder = backbone.folder
    return folder is not None and any((folder / name).is_file() for name in _FILES)


def _tokenizer(backbone: Backbone) -> tuple[Any, Path]:
    folder = backbone.folder
    if folder is None or not has_tokenizer(backbone):
        raise UsageError(
            "backbone must have a tokenizer (tokenizer.json) to take text, got none: save it "
            "beside the model, or give ready input_ids in an .npz"
        )
    from transformers import AutoTokenizer

    from regrow_toolchain.models import quiet_transformers

    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(  # type: ignore[no-untyped-call]
                folder, local_files_only=True, trust_remote_code=False
            ), folder
        except Exception as error:  # transformers raises many kinds on broken files
            raise FormatError(f"{folder} must have a whole tokenizer: {_line(error)}") from error


def _positions(model: Any) -> int:
    """How many tokens the model takes at most."""
    config = getattr(model, "config", None)
    config = getattr(config, "text_config", config)  # of a model of images and texts
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return 1 << 30
    # RoBERTa's kind counts positions from behind the padding's.
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
            return most - int(module.padding_idx) - 1
    return most


def _vocabulary(model: Any) -> int | None:
    """How many tokens the model knows."""
    try:
        embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # a model of images and texts has several
        return None
    rows = getattr(embeddings, "num_embeddings", None)
    return rows if isinstance(rows, int) else None


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
