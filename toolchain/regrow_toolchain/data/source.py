"""What `load_data` was asked for, as every reader gets it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrow_format.errors import UsageError

from .formats import LABEL_NAMES

if TYPE_CHECKING:
    from regrow_toolchain.models import Backbone

__all__ = ["LABEL_NAMES", "Source", "arguments"]

# Arguments of forward that are no data, and options of transformers' models.
_NO_DATA = {"labels", "label", "return_dict", "use_cache", "head_mask"}


@dataclass(frozen=True)
class Source:
    """A path with the options of `load_data`, and what of the backbone readers ask for."""

    path: Path
    backbone: Backbone
    users: str | None = None
    text: str | None = None
    label: str | None = None
    max_length: int = 128
    labels: str = "needed"  # or "optional", or "none"

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise UsageError(f"max_length must be at least 2, got {self.max_length}")

    @property
    def language_model(self) -> bool:
        """Whether labels are the next tokens of the text itself."""
        return self.backbone.task == "text-generation"

    @property
    def one_value(self) -> bool:
        """Whether the backbone gives one number: then integers are values, not classes."""
        return len(self.backbone.labels) == 1

    def refuse(self, *options: str) -> None:
        """Raise `UsageError` for options that this kind of source has no use for."""
        for option in options:
            if (given := getattr(self, option)) is not None:
                raise UsageError(
                    f"{option} must be left out for {self.path}, which has no such part; "
                    f"got {given!r}"
                )

    def arguments(self) -> tuple[str, ...]:
        """Names of the arguments of forward that may be data."""
        return arguments(self.backbone.model)

    def takes_any(self) -> bool:
        """Whether forward takes nothing but `**inputs`."""
        kinds = {p.kind for p in inspect.signature(self.backbone.model.forward).parameters.values()}
        return kinds == {inspect.Parameter.VAR_KEYWORD}


def arguments(model: Any) -> tuple[str, ...]:
    """Names of the arguments of forward that may be data."""
    return tuple(
        name
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        and name not in _NO_DATA
        and not name.startswith(("output_", "past_"))
    )
