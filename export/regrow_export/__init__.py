"""torch to ONNX: a backbone with slots for adapters, or one adapter built in.

    config = ExportConfig(targets=["layer.0.query", "layer.0.value"])
    manifest = export_bundle(source, "digits-bundle", ExportRequest(config))

Three modes: "swappable" (slots, many adapters), "merged" (one adapter in the weights, a plain ONNX
model), "seeded" (the basis is rebuilt inside the graph). Every bundle is run against torch before
it is kept. Importing this module loads neither torch nor onnx; exporting does.
"""

from typing import TYPE_CHECKING

from .lazy import load_on_use

if TYPE_CHECKING:
    from .bundle import export_bundle as export_bundle
    from .config import ExportConfig as ExportConfig
    from .config import ExportRequest as ExportRequest
    from .config import check_objects as check_objects
    from .config import targets_setting as targets_setting
    from .layers import find_biased as find_biased
    from .layers import find_linears as find_linears
    from .methods import build_expander as build_expander
    from .settings import check_settings as check_settings
    from .settings import default_of as default_of
    from .settings import setting as setting
    from .slots import kinds_for as kinds_for
    from .slots import slot_targets as slot_targets
    from .source import ExportSource as ExportSource
    from .validation import Measure as Measure
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".bundle": ("export_bundle",),
            ".config": ("ExportConfig", "ExportRequest", "check_objects", "targets_setting"),
            ".layers": ("find_biased", "find_linears"),
            ".methods": ("build_expander",),
            ".settings": ("check_settings", "default_of", "setting"),
            ".slots": ("kinds_for", "slot_targets"),
            ".source": ("ExportSource",),
            ".validation": ("Measure",),
        },
    )
