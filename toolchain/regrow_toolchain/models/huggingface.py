"""transformers as regrow takes it: imported without what it does not use here, and quiet."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

__all__ = ["import_transformers", "quiet_if_loaded", "quiet_transformers"]


@cache
def import_transformers() -> Any:
    """The package, as if scikit-learn were not installed where neither is imported yet.

    It needs that for a kind of generation which is not used here, and scikit-learn imports pandas
    and pyarrow where it finds them: up to 190 MB, which an export has better uses for.
    """
    spare = {"sklearn", "transformers"}.isdisjoint(sys.modules)
    if spare:
        sys.modules["sklearn"] = None  # type: ignore[assignment] # how Python says: not to be had
    try:
        import transformers.utils.import_utils
    finally:
        if spare:
            del sys.modules["sklearn"]
    return transformers


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice and bars off the terminal; its errors still come."""
    import_transformers()
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)


@contextmanager
def quiet_if_loaded() -> Iterator[None]:
    """The same around what a model does, which may be none of transformers."""
    with quiet_transformers() if "transformers" in sys.modules else nullcontext():
        yield
