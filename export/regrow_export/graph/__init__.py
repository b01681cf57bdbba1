"""Building and rewriting ONNX graphs, and writing them with their weights."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .builder import GraphBuilder as GraphBuilder
    from .external_data import GRAPH_FILE as GRAPH_FILE
    from .external_data import place_of as place_of
    from .external_data import save_graph as save_graph
    from .fusions import keep_gelu as keep_gelu
    from .passes import INT4_OPSET as INT4_OPSET
    from .passes import IR_VERSION as IR_VERSION
    from .passes import OPSET as OPSET
    from .passes import SlotTensor as SlotTensor
    from .passes import add_input as add_input
    from .passes import all_graphs as all_graphs
    from .passes import describe as describe
    from .passes import drop_initializers as drop_initializers
    from .passes import drop_unread as drop_unread
    from .passes import make_rank_dynamic as make_rank_dynamic
    from .passes import opset_of as opset_of
    from .passes import promote_to_inputs as promote_to_inputs
    from .passes import remove_initializers as remove_initializers
    from .passes import share_constants as share_constants
    from .passes import specs as specs
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".builder": ("GraphBuilder",),
            ".external_data": ("GRAPH_FILE", "place_of", "save_graph"),
            ".fusions": ("keep_gelu",),
            ".passes": (
                "INT4_OPSET",
                "IR_VERSION",
                "OPSET",
                "SlotTensor",
                "add_input",
                "all_graphs",
                "describe",
                "drop_initializers",
                "drop_unread",
                "make_rank_dynamic",
                "opset_of",
                "promote_to_inputs",
                "remove_initializers",
                "share_constants",
                "specs",
            ),
        },
    )
