"""How many numbers an adapter stores: what papers call its trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow_format.adapter import Target
from regrow_format.methods import get_method

__all__ = ["count_parameters"]


def count_parameters(method: str, config: Mapping[str, Any], targets: Sequence[Target]) -> int:
    """The coefficients of all targets, without scales and without a head.

    Args:
        config: the method's config as it stands in the file.

    Raises:
        FormatError: there is no such method, or the config is not one of it.
    """
    known = get_method(method)
    checked = known.check_config(config, method)
    shapes = known.layout(checked, targets).values()
    return sum(rows * length for rows, length in shapes)
