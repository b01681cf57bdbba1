"""torch to ONNX: a backbone with slots for adapters, or one adapter built in.

    manifest = export_bundle(source, "digits-bundle", targets=["layer.0.query", "layer.0.value"])

Three modes: "swappable" (slots, many adapters), "merged" (one adapter in the weights, a plain ONNX
model), "seeded" (the basis is rebuilt inside the graph). Every bundle is run against torch before
it is kept. Importing this module loads neither torch nor onnx; exporting does.
"""

from .bundle import export_bundle
from .expander import build_expander
from .measure import Measure
from .source import ExportSource
from .targets import find_biased, find_linears, kinds_for, slot_targets

__all__ = [
    "ExportSource",
    "Measure",
    "build_expander",
    "export_bundle",
    "find_biased",
    "find_linears",
    "kinds_for",
    "slot_targets",
]
