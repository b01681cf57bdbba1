"""Where training runs, and in which precision: accelerate's job."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from regrow_format.errors import UsageError

if TYPE_CHECKING:
    from regrow_toolchain.config import AdaptConfig, CompressConfig

__all__ = ["accelerated"]


@contextmanager
def accelerated(model: nn.Module, config: AdaptConfig | CompressConfig) -> Iterator[Any]:
    """An `accelerate.Accelerator`; within the block the model is on its device.

    Raises:
        UsageError: there is no such device or precision on this machine.
    """
    # What cuBLAS needs to give the same result twice; it is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # another training's settings
    if config.device not in ("auto", "cpu"):
        raise UsageError(f"device must be auto or cpu, got {config.device!r}")
    try:
        accelerator = Accelerator(
            cpu=config.device == "cpu", mixed_precision=config.mixed_precision
        )
    except (ValueError, NotImplementedError) as error:
        raise UsageError(
            f"mixed_precision must be one that this machine has, got {config.mixed_precision}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    if config.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("mixed_precision must be no or bf16 on a CPU, got fp16")
    try:
        model.to(accelerator.device)
        yield accelerator
    finally:
        model.to("cpu")
