"""Says which pip line adds what a command lacks."""

from __future__ import annotations

from importlib.util import find_spec

from regrow_format.errors import RegrowError
from regrow_inputs.extras import pip_line

__all__ = ["MissingExtra", "require_extra"]

# One module of each extra that the base install does not have.
_SIGNS = {
    "run": ("PIL", "tokenizers"),
    "export": ("torch", "onnx", "optimum", "transformers", "accelerate", "rich"),
    "train": ("torch", "transformers", "accelerate", "rich", "sklearn"),
}


class MissingExtra(RegrowError, ImportError):
    """Packages of an extra are not installed; the message has the pip line that brings them."""


def require_extra(extra: str, command: str) -> None:
    """Raise `MissingExtra` if the extra's packages are not installed."""
    missing = [name for name in _SIGNS[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtra(f"{command} needs {', '.join(missing)}: {pip_line(extra)}")
