"""regrow's workshop: compress a model, train adapters, and the command line.

Importing this package imports nothing heavy: a name is loaded when it is first used, so that the
command line answers at once and the light parts work where torch is not installed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapting import adapt as adapt
    from .adapting import adapt_users as adapt_users
    from .backbone import Backbone as Backbone
    from .backbone import load_backbone as load_backbone
    from .backbone import save_backbone as save_backbone
    from .compressing import compress as compress
    from .config import AdaptConfig as AdaptConfig
    from .config import CompressConfig as CompressConfig
    from .config import ImportConfig as ImportConfig
    from .converting import convert as convert
    from .data import Dataset as Dataset
    from .data import load_data as load_data
    from .exporting import export_backbone as export_backbone
    from .importing import import_peft as import_peft
    from .lowrank import LowRankLinear as LowRankLinear

_HOMES = {
    "AdaptConfig": "config",
    "Backbone": "backbone",
    "CompressConfig": "config",
    "Dataset": "data",
    "ImportConfig": "config",
    "LowRankLinear": "lowrank",
    "adapt": "adapting",
    "adapt_users": "adapting",
    "compress": "compressing",
    "convert": "converting",
    "export_backbone": "exporting",
    "import_peft": "importing",
    "load_backbone": "backbone",
    "load_data": "data",
    "save_backbone": "backbone",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
