"""`adapter_config.json` of a PEFT adapter: what is read, what changes nothing, what is refused.

Meanings are those of PEFT 0.21. A field that is set and not known is an error: an adapter that
computes something else must not come in as if it did not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from regrow_format.errors import FormatError, UsageError
from regrow_format.fields import Fields, parse_json
from regrow_format.files import read_bytes

from .method import PeftKind

__all__ = [
    "ANY_END",
    "CONFIG",
    "MERGE",
    "Patterns",
    "flag",
    "pattern",
    "patterns",
    "read_config",
    "take_any",
]

T = TypeVar("T")
# By pattern over module paths, in the file's order: the first that fits counts.
Patterns = tuple[tuple[re.Pattern[str], T], ...]

CONFIG = "adapter_config.json"
MERGE = "or merge it into the model with PEFT's merge_and_unload"
# How PEFT asks whether a pattern fits the end of a path (`peft.utils.other.get_pattern_key`).
ANY_END = r"(.*\.)?({})$"

_MAX_JSON = 16 << 20
_MAX_PATTERNS = 1 << 12
_MAX_PATTERN = 500
_MAX_REPEATS = 4  # and groups

# Of every method.
_NEUTRAL = frozenset({
    "auto_mapping", "base_model_name_or_path", "exclude_modules", "fan_in_fan_out",
    "inference_mode", "layers_pattern", "layers_to_transform", "peft_version", "revision",
    "target_modules", "task_type",
})  # fmt: skip


def read_config(folder: Path, kinds: Sequence[type[PeftKind]]) -> PeftKind:
    """Read and check the config of a PEFT directory.

    Raises:
        UsageError: there is none.
        FormatError: it is broken, of another method, or asks for what regrow cannot do.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise UsageError(f"PEFT directory must have {CONFIG}, got {folder}: {_found(folder)}")
    fields = parse_json(read_bytes(path, limit=_MAX_JSON, what="a PEFT config"), str(path))
    kind = _kind(fields, kinds)
    _check_refused(fields, kind)
    saved = fields.strings("modules_to_save") if fields.has("modules_to_save") else ()
    config = kind.read(fields, saved)
    _check_rest(fields, kind)
    return config


def _found(folder: Path) -> str:
    if not folder.is_dir():
        return "it is a file" if folder.exists() else "no such folder"
    inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    return f"give one of its folders, {', '.join(inner[:5])}" if inner else "it has none"


def _kind(fields: Fields, kinds: Sequence[type[PeftKind]]) -> type[PeftKind]:
    name = fields.take("peft_type", str)
    for kind in kinds:
        if kind.claims(name, fields):
            return kind
    known = dict.fromkeys(kind.peft_type for kind in kinds)
    raise FormatError(
        f"{fields.where}: peft_type must be one of {', '.join(known)}, got {name!r:.40}: "
        f"train one of these, {MERGE}"
    )


def _check_refused(fields: Fields, kind: type[PeftKind]) -> None:
    for name, reason in kind.refused.items():
        if _is_set(value := take_any(fields, name)):
            raise FormatError(
                f"{fields.where}: {name} must not be set, got {value!r:.60}: {reason}; train "
                f"without it, {MERGE}"
            )
    if (bias := take_any(fields, "bias")) not in (None, "none"):
        raise FormatError(
            f"{fields.where}: bias must be 'none', got {bias!r:.40}: an adapter of one method "
            f"cannot change the backbone's biases too; train without it, {MERGE}"
        )


def _check_rest(fields: Fields, kind: type[PeftKind]) -> None:
    neutral = _NEUTRAL | kind.neutral
    left = [n for n in fields.names() if n not in neutral and _is_set(take_any(fields, n))]
    if left:
        raise FormatError(
            f"{fields.where}: fields that are set must be those of PEFT 0.21, got "
            f"{', '.join(sorted(left))!r:.200}: save it with that version, {MERGE}"
        )


def _is_set(value: object) -> bool:
    return value not in (None, False, "", 0) and value != [] and value != {}


def take_any(fields: Fields, name: str) -> Any:
    """The field whatever its type; None if it is not there."""
    for kind in (bool, int, float, str, list, dict):
        if fields.holds(name, kind):
            return fields.take(name, kind)
    return None


def flag(fields: Fields, name: str, default: bool = False) -> bool:
    """A bool; `default` if it is null or not there."""
    return fields.take(name, bool) if fields.has(name) else default


def patterns(
    fields: Fields, name: str, take: Callable[[Fields, str], T], form: str = ANY_END
) -> Patterns[T]:
    """An object of values by pattern; `form` is the expression around a pattern."""
    part = fields.optional(name)
    names = part.names() if part else ()
    if part is None or not names:
        return ()
    if len(names) > _MAX_PATTERNS:
        raise FormatError(f"{part.where}: must have at most {_MAX_PATTERNS} patterns")
    return tuple((pattern(text, part.where, form), take(part, text)) for text in names)


def pattern(text: str, where: str, form: str = "{}") -> re.Pattern[str]:
    """An expression; those that may take for ever are refused: the file comes from a stranger."""
    most = max(len(re.findall(r"[*+{]|(?<!\()\?", text)), text.count("("))
    if len(text) > _MAX_PATTERN or most > _MAX_REPEATS or re.search(r"\)[*+{]", text):
        raise FormatError(
            f"{where}: a pattern must be a name or a short expression without repeated groups, "
            f"got {text!r:.80}: name the layers"
        )
    try:
        return re.compile(form.format(text))
    except (re.error, RecursionError, OverflowError) as error:
        raise FormatError(
            f"{where}: a pattern must be a regular expression, got {text!r:.80}: {error}"
        ) from None
