"""From a torch module to an ONNX graph, its key-value cache, and decisions that no trace keeps."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .kv_cache import cache_names as cache_names
    from .kv_cache import decoded as decoded
    from .kv_cache import padded_inputs as padded_inputs
    from .model_inputs import completed as completed
    from .tracer import Traced as Traced
    from .tracer import called_modules as called_modules
    from .tracer import inputs_by_name as inputs_by_name
    from .tracer import run_torch as run_torch
    from .tracer import trace as trace
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".kv_cache": ("cache_names", "decoded", "padded_inputs"),
            ".model_inputs": ("completed",),
            ".tracer": ("Traced", "called_modules", "inputs_by_name", "run_torch", "trace"),
        },
    )
