"""Settings of `regrow import`."""

from __future__ import annotations

from dataclasses import dataclass

from regrow_export import setting

from .shared import Checked

__all__ = ["ImportConfig"]


@dataclass(frozen=True)
class ImportConfig(Checked):
    """Bringing in an adapter that another library trained."""

    coefficient_dtype: str = setting(
        "fp32",
        "How coefficients are stored; fp32 keeps every number.",
        choices=("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2"),
    )
    base_dtype: str = setting(
        "float32",
        "What the base was loaded in when VeRA was trained without saving its projections.",
        choices=("float32", "bfloat16", "float16"),
    )
