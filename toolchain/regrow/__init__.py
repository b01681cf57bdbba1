"""Compress a model once, give every user an adapter of a few kilobytes, swap it on the device.

    import regrow

    bundle = regrow.Bundle.open("digits-bundle")
    bundle.swap("user-17.safetensors")
    bundle.run({"pixel_values": x})

Importing this loads nothing: a name is loaded when it is first used. What a device needs (`Bundle`,
`Store`, `InputReader`, …) works in the base install; the others raise `MissingExtra`, which says
what to install.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from regrow_format import Adapter as Adapter
    from regrow_format import Manifest as Manifest
    from regrow_format import RegrowError as RegrowError
    from regrow_inputs import InputReader as InputReader
    from regrow_inputs import answer as answer
    from regrow_runtime import Bundle as Bundle
    from regrow_runtime import SwapStats as SwapStats
    from regrow_runtime.store import Store as Store
    from regrow_toolchain.adapters import adapt as adapt
    from regrow_toolchain.adapters import adapt_users as adapt_users
    from regrow_toolchain.compress import compress as compress
    from regrow_toolchain.config import AdaptConfig as AdaptConfig
    from regrow_toolchain.config import CompressConfig as CompressConfig
    from regrow_toolchain.config import ExportConfig as ExportConfig
    from regrow_toolchain.config import ImportConfig as ImportConfig
    from regrow_toolchain.config import ProfileConfig as ProfileConfig
    from regrow_toolchain.data import Dataset as Dataset
    from regrow_toolchain.data import load_data as load_data
    from regrow_toolchain.extras import MissingExtra as MissingExtra
    from regrow_toolchain.interop import convert as convert
    from regrow_toolchain.interop import export_backbone as _export_backbone
    from regrow_toolchain.interop import import_peft as import_peft
    from regrow_toolchain.models import Backbone as Backbone
    from regrow_toolchain.models import load_backbone as load_backbone
    from regrow_toolchain.models import save_backbone as save_backbone
    from regrow_toolchain.verification import verify as verify

    export = _export_backbone
    __version__: str

# By name: the module that has it, and the extra that it needs ("" for the base install).
_CONTENTS = {
    "AdaptConfig": ("regrow_toolchain.config", ""),
    "Adapter": ("regrow_format", ""),
    "Backbone": ("regrow_toolchain.models", "export"),
    "Bundle": ("regrow_runtime", ""),
    "CompressConfig": ("regrow_toolchain.config", ""),
    "Dataset": ("regrow_toolchain.data", ""),
    "ExportConfig": ("regrow_toolchain.config", ""),
    "ImportConfig": ("regrow_toolchain.config", ""),
    "InputReader": ("regrow_inputs", ""),
    "Manifest": ("regrow_format", ""),
    "MissingExtra": ("regrow_toolchain.extras", ""),
    "ProfileConfig": ("regrow_toolchain.config", ""),
    "RegrowError": ("regrow_format", ""),
    "Store": ("regrow_runtime.store", ""),
    "SwapStats": ("regrow_runtime", ""),
    "adapt": ("regrow_toolchain.adapters", "export"),
    "adapt_users": ("regrow_toolchain.adapters", "export"),
    "answer": ("regrow_inputs", ""),
    "compress": ("regrow_toolchain.compress", "export"),
    "convert": ("regrow_toolchain.interop", ""),
    "export": ("regrow_toolchain.interop", "export"),
    "import_peft": ("regrow_toolchain.interop", ""),
    "load_backbone": ("regrow_toolchain.models", "export"),
    "load_data": ("regrow_toolchain.data", ""),
    "save_backbone": ("regrow_toolchain.models", "export"),
    "verify": ("regrow_toolchain.verification", ""),
}
# Those that are called otherwise where they are.
_THERE = {"export": "export_backbone"}


if not TYPE_CHECKING:  # to which every name would be there

    def __getattr__(name: str) -> object:
        if name == "__version__":
            from importlib.metadata import version

            found = version("regrow")
        elif name in _CONTENTS:
            module, extra = _CONTENTS[name]
            if extra:
                from regrow_toolchain.extras import require_extra

                require_extra(extra, f"regrow.{name}")
            found = getattr(import_module(module), _THERE.get(name, name))
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found  # the next use finds it without asking
        return found


def __dir__() -> list[str]:
    return sorted([*_CONTENTS, "__version__"])
