"""What a kind of training must say: which labels it takes, its loss, its score, its head."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_toolchain.data import Dataset
from regrow_toolchain.models import Backbone, logits_of

__all__ = ["FEATURES", "Fitted", "Inputs", "Task", "TaskSettings"]

FEATURES = "feature-extraction"  # the task of a backbone that gives embeddings

Inputs = Mapping[str, Tensor]


class TaskSettings(Protocol):
    """What of a config tasks look at."""

    @property
    def task(self) -> str:
        """A name in the registry, or "auto"."""
        ...

    @property
    def label_smoothing(self) -> float:
        """From 0 to 1."""
        ...


@dataclass(frozen=True, eq=False)
class Fitted:
    """Samples whose labels are what a task's losses and scores take.

    Attributes:
        data: to train on; batches have its labels in their dtype.
        eval_data: to judge by, if there were such samples.
        names: of the outputs that a head for these labels has; empty if nothing says what they are.
        known: whether the backbone's own head has these outputs.
    """

    data: Dataset
    eval_data: Dataset | None = None
    names: tuple[str, ...] = ()
    known: bool = True


class Task(ABC):
    """A kind of training. `U` users stand in a batch with `S` samples each; nothing mixes users.

    What is measured of a sample, [N, m], is small; scores and the losses of samples held back are
    made of it. By default that is the sample's loss, and the score is its mean.

    Attributes:
        name: as on the command line.
        label_words: what labels are, in errors.
        label_kind: which of `Dataset.kind` it takes, unless `takes` says otherwise.
        metric: what the score is called; one that is a share stands in the registry.
        higher_is_better: whether a larger score, and gate score, is the better one.
        heads: what heads it can train beside keeping the backbone's: "new", "tune".
        learns_from_teacher: whether labels in training are a teacher's outputs; what the samples
            have is not looked at.
    """

    name: ClassVar[str]
    label_words: ClassVar[str]
    label_kind: ClassVar[str] = ""
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool]
    heads: ClassVar[tuple[str, ...]] = ()
    learns_from_teacher: ClassVar[bool] = False

    @classmethod
    def from_settings(cls, settings: TaskSettings) -> Self:
        """The task as a config asks for it."""
        return cls()

    # -- labels -----------------------------------------------------------------------------------

    @classmethod
    def takes(cls, data: Dataset) -> bool:
        """Whether labels are of the kind that the task learns from."""
        return data.kind == cls.label_kind

    @classmethod
    def suits(cls, data: Dataset, model_task: str) -> bool:
        """Whether the task is what these labels and model mean, if nobody says what is learnt.

        Args:
            model_task: the backbone's, such as "text-classification".
        """
        return cls.takes(data)

    def fit(
        self,
        data: Dataset,
        eval_data: Dataset | None,
        backbone: Backbone,
        head: str = "keep",
        way_out: str = "",
    ) -> Fitted:
        """Make labels ready, which may be outputs by number; by default they stay as they are.

        Args:
            head: "keep" the backbone's, a "new" one, or "auto": by the labels.
            way_out: what the error for labels that do not fit ends with.

        Raises:
            UsageError: the labels do not fit.
        """
        return Fitted(data, eval_data)

    def teacher_labels(self, outputs: Tensor) -> NDArray[Any]:
        """[N, ...]: labels to score by, from a teacher's `outputs`."""
        return outputs.float().cpu().numpy()

    # -- training ---------------------------------------------------------------------------------

    def outputs(self, model: nn.Module, inputs: Inputs) -> Tensor:
        """[N, ...]: what the losses and the score are made of; by default the model's logits."""
        return logits_of(model, inputs)

    @abstractmethod
    def losses(
        self,
        outputs: Tensor,
        labels: Tensor,
        classes: Tensor | None = None,
        used: Tensor | None = None,
    ) -> Tensor:
        """[U, S] from outputs [U, S, ...] and labels [U, S, ...].

        Args:
            classes: bool [U, 1, C], which outputs a user has; None if all have all.
            used: bool [U, S], False for rows that only fill up a batch, whose losses nobody reads;
                None if there are none.
        """

    # -- scores -----------------------------------------------------------------------------------

    def measure(self, outputs: Tensor, labels: Tensor) -> NDArray[np.float32]:
        """[N, m]: what scores and losses need of each sample, small; by default its loss.

        Args:
            outputs: [N, ...].
            labels: [N, ...]; a class of -1 is one that the model does not know.
        """
        found = self.losses(outputs.unsqueeze(0), labels.unsqueeze(0))[0]
        return found.float().unsqueeze(-1).cpu().numpy()

    def score(self, measured: NDArray[np.float32], labels: NDArray[Any]) -> float:
        """The score of samples together; NaN without any."""
        return float(measured.mean()) if len(labels) else math.nan

    # -- what decides whether an adapter is written: see adapters/acceptance.py ------------------

    def sample_losses(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """[N]: each sample's loss without smoothing; infinite or NaN where there is none.

        Args:
            folds: [N], equal for samples that were measured with the same adapter.
        """
        return measured[:, 0].astype(np.float64)

    @property
    def gate_metric(self) -> str:
        """What `gate_score` is called."""
        return self.metric

    def gate_score(
        self, measured: NDArray[np.float32], labels: NDArray[Any], folds: NDArray[np.int64]
    ) -> float:
        """The score that must not fall; arguments as of `sample_losses`."""
        return self.score(measured, labels)

    def constants(
        self, train: NDArray[Any], labels: NDArray[Any]
    ) -> dict[str, NDArray[np.float32]]:
        """By name, [N, m] for `labels`: measured of answers that do not look at samples.

        Args:
            train: the labels that such an answer may be made from.
        """
        return {}

    def measure_base(
        self,
        eval_data: Dataset,
        names: tuple[str, ...],
        backbone: Backbone,
        measure: Callable[[Dataset], NDArray[np.float32]],
    ) -> NDArray[np.float32] | None:
        """[N, m]: what the backbone answers by its own head, for labels of a new one.

        Args:
            names: the new head's outputs, of which `eval_data` has the labels.
            measure: of samples with labels by the backbone's outputs.

        Returns:
            None if its outputs mean nothing for these labels.
        """
        return None
