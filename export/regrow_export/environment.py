"""The optional packages that an export takes, and quiet while they work."""

from __future__ import annotations

import ctypes
import gc
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from unittest import mock

from regrow_format.errors import RegrowError
from regrow_inputs.extras import pip_line

if TYPE_CHECKING:
    import torch

__all__ = ["deterministic_export", "quiet", "release_memory", "require_export", "require_module"]

# Their progress and hints are for people who call them by hand; findings reach us as exceptions.
_CHATTY = ("optimum", "transformers", "torch.onnx")
# Below this many parameters, torch's threads wait for each other longer than they compute; on a
# busy machine a forward pass of a small model takes ten times as long with two threads as with one.
_SMALL_MODEL = 10_000_000


def require_export() -> None:
    """Raise `RegrowError` with the pip line if a package of the `export` extra is missing."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when onnxruntime is first imported
    for name in ("torch", "onnx", "onnxruntime"):
        require_module(name)


def require_module(name: str) -> None:
    """Import a module of the `export` extra by name, or raise `RegrowError` with the pip line."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise RegrowError(
            f"export needs {name}, which could not be imported ({error}): {pip_line('export')}"
        ) from error


def release_memory() -> None:
    """Give freed memory back to the system, where the C library keeps it: before an exporter, which
    holds four copies of the weights at once.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:  # glibc's
        trim(0)


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no log lines below errors from the exporters, within the block.

    torch prints whole graphs to stdout when an export fails, whatever it is told: not so here.
    """
    import torch

    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with (
            warnings.catch_warnings(),
            mock.patch.object(torch._C, "_jit_onnx_log"),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def deterministic_export(model: torch.nn.Module) -> Iterator[None]:
    """Within the block: one torch thread for a small model, and no fused fast paths.

    torch's fast path for transformer layers reads the weights of inner layers and never calls
    them, so it would pass by a slot.
    """
    import torch

    threads, fast = torch.get_num_threads(), torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if sum(p.numel() for p in model.parameters()) < _SMALL_MODEL:
            torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.mha.set_fastpath_enabled(fast)
