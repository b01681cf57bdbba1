"""Adapters in training: methods, heads, many users in one pass, and computing with one in torch."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .acceptance import FEWEST_GROUPS as FEWEST_GROUPS
    from .acceptance import SIGNIFICANCE as SIGNIFICANCE
    from .acceptance import Verdict as Verdict
    from .adaptation import TrainingStopped as TrainingStopped
    from .adaptation import adapt as adapt
    from .adaptation import adapt_each as adapt_each
    from .adaptation import adapt_users as adapt_users
    from .adaptation import training_threads as training_threads
    from .group import Adapted as Adapted
    from .hooks import Hooks as Hooks
    from .hooks import applied as applied
    from .methods import TrainableAdapter as TrainableAdapter
    from .methods import get_trainable as get_trainable
    from .parameter_count import count_parameters as count_parameters
    from .probe_record import probe_of as probe_of
    from .prober import Prober as Prober
    from .trainer import AdapterTrainer as AdapterTrainer
    from .user_folder import UserFolder as UserFolder
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".acceptance": ("FEWEST_GROUPS", "SIGNIFICANCE", "Verdict"),
            ".adaptation": (
                "TrainingStopped",
                "adapt",
                "adapt_each",
                "adapt_users",
                "training_threads",
            ),
            ".group": ("Adapted",),
            ".hooks": ("Hooks", "applied"),
            ".methods": ("TrainableAdapter", "get_trainable"),
            ".parameter_count": ("count_parameters",),
            ".probe_record": ("probe_of",),
            ".prober": ("Prober",),
            ".trainer": ("AdapterTrainer",),
            ".user_folder": ("UserFolder",),
        },
    )
