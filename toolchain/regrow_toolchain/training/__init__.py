"""What compression and adaptation share: batches, schedules, checkpoints, determinism, scores."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .accelerator import accelerated as accelerated
    from .batching import augment as augment
    from .batching import batches as batches
    from .batching import shifted as shifted
    from .batching import trimmed as trimmed
    from .checkpoint import Checkpoint as Checkpoint
    from .checkpoint import State as State
    from .checkpoint import StateFile as StateFile
    from .determinism import deterministic as deterministic
    from .determinism import frozen as frozen
    from .evaluation import accuracy as accuracy
    from .evaluation import evaluate as evaluate
    from .evaluation import predict as predict
    from .evaluation import teacher_labelled as teacher_labelled
    from .identity import TrainingIdentity as TrainingIdentity
    from .identity import training_identity as training_identity
    from .progress_bar import progress as progress
    from .schedule import check_loss as check_loss
    from .schedule import cosine as cosine
    from .schedule import cosine_factor as cosine_factor
    from .task_choice import compression_task as compression_task
    from .threads import step_threads as step_threads
    from .threads import torch_threads as torch_threads
    from .user_batches import Augmentation as Augmentation
    from .user_batches import Batch as Batch
    from .user_batches import MultiUserBatches as MultiUserBatches
    from .user_batches import mixed as mixed
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".accelerator": ("accelerated",),
            ".batching": ("augment", "batches", "shifted", "trimmed"),
            ".checkpoint": ("Checkpoint", "State", "StateFile"),
            ".determinism": ("deterministic", "frozen"),
            ".identity": ("TrainingIdentity", "training_identity"),
            ".evaluation": ("accuracy", "evaluate", "predict", "teacher_labelled"),
            ".progress_bar": ("progress",),
            ".schedule": ("check_loss", "cosine", "cosine_factor"),
            ".task_choice": ("compression_task",),
            ".threads": ("step_threads", "torch_threads"),
            ".user_batches": ("Augmentation", "Batch", "MultiUserBatches", "mixed"),
        },
    )
