"""From texts to a graph's input_ids, by the bundle's tokenizer.json; needs `tokenizers`.

Its results equal those of transformers' fast tokenizers (tested). Files are read as data: a
tokenizer.json holds no code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.fields import Fields, parse_json
from regrow_format.files import read_bytes

from .extras import pip_line

__all__ = ["TOKENIZER", "TextPreprocessor"]

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_BYTES = 128 << 20
_MAX_TEXT = 1 << 20  # characters
_LONGEST = 1 << 17  # tokens, where no file says how many the model takes


@dataclass(frozen=True)
class TextPreprocessor:
    """Tokens, special ones among them, cut to what the model takes and filled up.

    Attributes:
        tokenizer: of the `tokenizers` package.
        length: tokens of a text, or of a pair, at most.
        pad: the token of the padding.
        pad_left, cut_left: at which side.
    """

    tokenizer: Any
    length: int
    pad: int
    pad_left: bool = False
    cut_left: bool = False

    @classmethod
    def from_folder(cls, folder: Path, *, length: int | None = None) -> TextPreprocessor:
        """Read `folder`/tokenizer.json, and from tokenizer_config.json what it does not say.

        Args:
            length: tokens at most, where that is less than the files say.

        Raises:
            UsageError: there is no tokenizer.json.
            FormatError: it is broken.
            RegrowError: `tokenizers` is not installed.
        """
        tokenizer = _tokenizer(folder / TOKENIZER)
        fields = _config(folder / TOKENIZER_CONFIG)
        most = fields.plain("model_max_length", int) or _LONGEST
        found = cls(
            tokenizer,
            min(max(most, 1), _LONGEST, length or _LONGEST),
            _pad(tokenizer, fields),
            fields.plain("padding_side", str) == "left",
            fields.plain("truncation_side", str) == "left",
        )
        return found

    def __call__(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, fill: int | None = None
    ) -> dict[str, NDArray[np.int64]]:
        """int64 [batch, tokens] `input_ids`, `attention_mask` and `token_type_ids`.

        Args:
            pairs: a second text for each.
            fill: how many tokens to fill up to; the longest sample's if None.

        Raises:
            UsageError: a text is empty or has more than 1,048,576 characters, or the model takes
                too few tokens for any text.
        """
        _check(texts, "text")
        if pairs is not None:
            _check(pairs, "text pair")
            if len(pairs) != len(texts):
                raise UsageError(
                    f"text pairs must be one per text, got {len(pairs)} for {len(texts)}"
                )
        found = self._encoded(
            list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
        )
        return self._filled(found, fill or max(len(one.ids) for one in found))

    def prompt(self, text: str) -> NDArray[np.int64]:
        """int64 [1, tokens], for a language model to go on with; never cut.

        Raises:
            UsageError: the text is empty, or leaves the model no room.
        """
        _check([text], "text")
        self.tokenizer.no_truncation()
        ids = self.tokenizer.encode(text).ids
        if not 0 < len(ids) < self.length:
            raise UsageError(f"text must be 1 to {self.length - 1} tokens, got {len(ids)}")
        return np.array([ids], np.int64)

    def decode(self, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
        """The text of `tokens`, that follow `after`; special ones are left out."""
        # Some decoders drop a space at the beginning: what comes after needs what was before.
        before: str = self.tokenizer.decode(list(after))
        whole: str = self.tokenizer.decode([*after, *(int(token) for token in tokens)])
        return whole[len(before) :] if whole.startswith(before) else whole

    def _encoded(self, texts: list[Any]) -> list[Any]:
        special = self.tokenizer.num_special_tokens_to_add(isinstance(texts[0], tuple))
        if self.length <= special:
            raise UsageError(
                f"model must take more than {special} tokens, all of them special, "
                f"got {self.length}"
            )
        side = "left" if self.cut_left else "right"
        self.tokenizer.enable_truncation(self.length, direction=side)
        found: list[Any] = self.tokenizer.encode_batch(texts)
        if empty := [i for i, one in enumerate(found) if not one.ids]:
            raise UsageError(f"a text must give tokens, got none from {texts[empty[0]]!r:.60}")
        return found

    def _filled(self, found: list[Any], length: int) -> dict[str, NDArray[np.int64]]:
        made = {
            "input_ids": np.full((len(found), length), self.pad, np.int64),
            "attention_mask": np.zeros((len(found), length), np.int64),
            "token_type_ids": np.zeros((len(found), length), np.int64),
        }
        for row, one in enumerate(found):
            place = slice(length - len(one.ids), None) if self.pad_left else slice(len(one.ids))
            made["input_ids"][row, place] = one.ids
            made["attention_mask"][row, place] = 1
            made["token_type_ids"][row, place] = one.type_ids
        return made


def _check(texts: Sequence[str], what: str) -> None:
    if isinstance(texts, str) or not len(texts):
        found = "one string" if isinstance(texts, str) else "none"
        raise UsageError(f"{what} must be a list of at least one, got {found}")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise UsageError(f"{what} must not be empty, got {text!r:.60}")
        if len(text) > _MAX_TEXT:
            raise UsageError(f"{what} must be at most {_MAX_TEXT} characters, got {len(text)}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{what} must be Unicode, got bytes of another encoding") from None


def _tokenizer(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"model must have {TOKENIZER} to take text, got none in {path.parent}")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise RegrowError(f"texts need tokenizers: {pip_line('run')}") from None
    data = read_bytes(path, limit=MAX_BYTES, what="a tokenizer")
    try:
        found = Tokenizer.from_buffer(data)
        found.no_padding()
        return found
    except BaseException as error:  # a panic inside of it is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{path} must be a whole tokenizer.json: {reason:.200}") from None


def _config(path: Path) -> Fields:
    if not path.is_file():
        return Fields({}, str(path))
    return parse_json(read_bytes(path, limit=MAX_BYTES, what="a tokenizer's config"), str(path))


def _pad(tokenizer: Any, fields: Fields) -> int:
    """The padding's token; the end of a text where there is none, as in training."""
    for name in ("pad_token", "eos_token"):
        token = fields.plain(name, str) if fields.holds(name, str) else _content(fields, name)
        if token is not None and (number := tokenizer.token_to_id(token)) is not None:
            return int(number)
    return 0


def _content(fields: Fields, name: str) -> str | None:
    part = fields.optional(name) if fields.holds(name, dict) else None
    return part.plain("content", str) if part else None
