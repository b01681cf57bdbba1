"""Adapter methods inside a graph. A further one is one file here and a line in `registry.py`."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .expander import adapter_inputs as adapter_inputs
    from .expander import build_expander as build_expander
    from .expander import check_graph as check_graph
    from .expander import graph_storage as graph_storage
    from .expander import input_types as input_types
    from .expander import splice as splice
    from .sign_basis import round_keys as round_keys
    from .sign_basis import sign_bits as sign_bits
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".expander": (
                "adapter_inputs",
                "build_expander",
                "check_graph",
                "graph_storage",
                "input_types",
                "splice",
            ),
            ".sign_basis": ("round_keys", "sign_bits"),
        },
    )
