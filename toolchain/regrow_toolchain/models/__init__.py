"""What a backbone is: load, save, identify; its layers by name, and pairs of low rank in it."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .backbone import COMPANIONS as COMPANIONS
    from .backbone import Backbone as Backbone
    from .huggingface import quiet_if_loaded as quiet_if_loaded
    from .huggingface import quiet_transformers as quiet_transformers
    from .identity import StoredTensor as StoredTensor
    from .identity import stored_tensors as stored_tensors
    from .layer_names import role_of as role_of
    from .loading import load_backbone as load_backbone
    from .loading import load_structure as load_structure
    from .low_rank import LowRankPair as LowRankPair
    from .low_rank import Plan as Plan
    from .low_rank import apply_plan as apply_plan
    from .low_rank import empty_pair as empty_pair
    from .low_rank import factorize as factorize
    from .low_rank import finite_weight as finite_weight
    from .low_rank import pair_of as pair_of
    from .low_rank import rank_for as rank_for
    from .low_rank import weight_of as weight_of
    from .macs import count_macs as count_macs
    from .macs import example_inputs as example_inputs
    from .module_factory import function_called as function_called
    from .outputs import features_of as features_of
    from .outputs import logits_of as logits_of
    from .outputs import outputs_of as outputs_of
    from .saving import save_backbone as save_backbone
    from .targets import find_targets as find_targets
    from .targets import matching as matching
    from .weights import WEIGHTS as WEIGHTS
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".backbone": ("Backbone", "COMPANIONS"),
            ".huggingface": ("quiet_if_loaded", "quiet_transformers"),
            ".identity": ("StoredTensor", "stored_tensors"),
            ".loading": ("load_backbone", "load_structure"),
            ".layer_names": ("role_of",),
            ".low_rank": (
                "LowRankPair",
                "Plan",
                "apply_plan",
                "empty_pair",
                "weight_of",
                "finite_weight",
                "pair_of",
                "rank_for",
                "factorize",
            ),
            ".macs": ("count_macs", "example_inputs"),
            ".module_factory": ("function_called",),
            ".outputs": ("features_of", "logits_of", "outputs_of"),
            ".saving": ("save_backbone",),
            ".targets": ("find_targets", "matching"),
            ".weights": ("WEIGHTS",),
        },
    )
