"""Training adapters on a frozen backbone: for one user, or for many in one pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_export.rounding import rounded_weights
from regrow_format.adapter import STORAGE, Adapter, Coefficients, Target, Validated
from regrow_format.errors import RegrowError, UsageError
from regrow_format.methods import get_method
from regrow_format.philox import check_seed

from .applying import applied
from .backbone import Backbone
from .checkpoint import Checkpoint
from .cohort import Augmentation, Cohort
from .config import AdaptConfig
from .data import Dataset
from .devices import accelerated
from .fitting import Fitting, Stopped
from .heads import Heads
from .methods import Trained, get_trainable
from .people import Person, prepare
from .probing import Prober
from .settings import check_settings
from .targets import find_targets
from .tasks import Loss, Task, choose_task
from .threads import step_threads, torch_threads
from .training import deterministic, frozen, measured

__all__ = ["Adapted", "TrainingStopped", "adapt", "adapt_each", "adapt_users", "training_threads"]

# Users in one pass: together they have about as many samples as keep two cores busy.
_SAMPLES_AT_ONCE = 256


@dataclass(frozen=True)
class Adapted:
    """A trained adapter with its scores on held-back samples (NaN if none were held back).

    Attributes:
        floor: the score of the best constant answer, for a head with classes of the user's own.
        stopped: why training ended before its last step, if the loss was not finite.
    """

    adapter: Adapter
    before: float
    after: float
    samples: int
    metric: str = "accuracy"
    higher_is_better: bool = True
    floor: float = math.nan
    stopped: Stopped | None = None

    @property
    def helps(self) -> bool:
        """Whether it is better than no adapter; without samples nobody knows: then it counts."""
        if math.isnan(self.after):
            return self.samples == 0
        sign = 1 if self.higher_is_better else -1
        return all(math.isnan(s) or sign * self.after > sign * s for s in (self.before, self.floor))


class TrainingStopped(RegrowError):
    """The loss became NaN or infinite.

    Attributes:
        adapted: the last good adapter; None if there was none before the first step.
    """

    def __init__(self, message: str, adapted: Adapted | None) -> None:
        super().__init__(message)
        self.adapted = adapted


def adapt(
    backbone: Backbone,
    data: Dataset,
    config: AdaptConfig | None = None,
    *,
    targets: Sequence[str] = (),
    held: Dataset | None = None,
    loss: Loss | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
) -> Adapted:
    """Train one adapter for one user.

    Args:
        backbone: dense or compressed; its weights do not change.
        data: the user's labelled samples; a share of them is held back for the scores.
        targets: names or patterns of the layers to adapt; every linear layer of the blocks if none.
        held: samples to score on, instead of a share of `data`.
        loss: `loss(outputs, labels)`, one per sample or one for all, instead of the task's.
        checkpoint: a file for the state of training, written every ten seconds and removed in the
            end; with `resume` training goes on from it, to the same result.

    Raises:
        UsageError: labels, targets or settings make no sense.
        TrainingStopped: the loss became NaN or infinite.
    """
    data = replace(data, users=None)
    held = replace(held, users=None) if held is not None else None
    ((_, done),) = adapt_each(
        backbone, data, config, targets=targets, held=held, loss=loss, checkpoint=checkpoint,
        resume=resume,
    )  # fmt: skip
    if done.stopped:
        kept = done if done.stopped.step else None
        raise TrainingStopped(str(done.stopped), kept)
    return done


def adapt_users(
    backbone: Backbone,
    data: Dataset,
    config: AdaptConfig | None = None,
    *,
    targets: Sequence[str] = (),
    held: Dataset | None = None,
    loss: Loss | None = None,
) -> dict[str, Adapted]:
    """Train an adapter for each user of `data`, several in one pass over the backbone.

    Each gets what training alone would give, within rounding. Arguments and errors are those of
    `adapt`; a user whose loss is not finite has `stopped` set, the others go on.
    """
    if data.users is None:
        raise UsageError("data must say whose each sample is, got no users")
    return dict(adapt_each(backbone, data, config, targets=targets, held=held, loss=loss))


def adapt_each(
    backbone: Backbone,
    data: Dataset,
    config: AdaptConfig | None = None,
    *,
    targets: Sequence[str] = (),
    held: Dataset | None = None,
    loss: Loss | None = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    began: Callable[[], object] = lambda: None,
) -> Iterator[tuple[str, Adapted]]:
    """As `adapt_users`, one after another as they are ready.

    Args:
        began: called before a state is written: whatever can be wrong before the first step is not.
    """
    config = config or AdaptConfig()
    _check(config, backbone)
    task = choose_task(config, data, backbone.task, loss)
    layers = find_targets(backbone.model, targets, method=config.method)
    people = prepare(backbone, data, held, task, config)
    if any(person.head != "keep" for person in people) and not backbone.head:
        raise UsageError("backbone must have a head to train one, got none")
    if any(person.head != "keep" for person in people):
        _check_apart(layers, backbone)
    config = replace(config, threads=training_threads(backbone, data, config))
    prober = Prober(backbone.model, data.inputs)
    with ExitStack() as stack:
        stack.enter_context(torch_threads(config.threads))
        stack.enter_context(deterministic(config.seed))
        stack.enter_context(frozen(backbone.model))
        stack.enter_context(rounded_weights(backbone.model, config.precision))
        accelerator = stack.enter_context(accelerated(backbone.model, config))
        groups = list(_groups(people, config))
        for group in groups:
            several = data.users is not None
            state = _checkpoint(
                checkpoint, backbone, group, layers, task, config, several=several, began=began
            )
            job = _Job(backbone, task, layers, group, config, accelerator, prober)
            yield from job.run(state, resume=resume)


def training_threads(backbone: Backbone, data: Dataset, config: AdaptConfig) -> int:
    """The config's threads, or what the work of a step makes of it.

    Args:
        data: everybody's samples; whom of many users are still to be trained makes no difference.
    """
    if config.threads:
        return config.threads
    samples = config.batch_size
    if data.users is not None:
        samples = samples * config.users_at_once or max(samples, _SAMPLES_AT_ONCE)
    pieces = min(config.accumulate, samples)
    at_once = math.ceil(min(samples, len(data)) / pieces)
    return step_threads(backbone.model, data, at_once, config.device)


def _check(config: AdaptConfig, backbone: Backbone) -> None:
    check_seed(config.seed)
    check_settings(config)
    if not backbone.backbone_id:
        raise UsageError("backbone must be saved before adapters are trained for it: save_backbone")
    if config.group and (config.group < 8 or STORAGE[config.storage] > 8):
        raise UsageError(
            "group must be 0, or 8 or more with a storage of 8 bits or fewer, "
            f"got {config.group} with {config.storage}"
        )
    if config.method == "head" and config.head == "keep":
        raise UsageError("head must be auto, new or tune for method head, got keep")


def _check_apart(layers: Sequence[Target], backbone: Backbone) -> None:
    """Raise `UsageError` if a target is a layer of the head, which is replaced as a whole."""
    if both := [target.name for target in layers if target.name in backbone.head]:
        raise UsageError(f"targets must not be layers of a head that is trained, got {both[0]}")


def _groups(people: Sequence[Person], config: AdaptConfig) -> Iterator[list[Person]]:
    """Users that are trained together: their heads are dealt with alike, and they fit in RAM."""
    for head in ("keep", "tune", "new"):
        alike = [person for person in people if person.head == head]
        largest = max((min(config.batch_size, len(p.train)) for p in alike), default=1)
        size = config.users_at_once or max(1, _SAMPLES_AT_ONCE // largest)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _checkpoint(
    path: str | Path | None,
    backbone: Backbone,
    people: Sequence[Person],
    layers: Sequence[Target],
    task: Task,
    config: AdaptConfig,
    *,
    several: bool,
    began: Callable[[], object],
) -> Checkpoint | None:
    """Where the state of one pass is kept; of several, each has a file named by what it is of."""
    if path is None:
        return None
    digest = hashlib.sha256()
    settings = {
        k: v for k, v in asdict(config).items() if k not in ("device", "threads", "method_settings")
    }
    own = {name: str(value) for name, value in sorted(config.method_settings.items())}
    names = [target.name for target in layers]
    kind = [task.name, getattr(getattr(task, "loss", None), "__qualname__", "")]
    digest.update(repr([settings, own, names, kind, backbone.backbone_id]).encode())
    for person in people:
        for part in (person.train, person.validation):
            arrays = {} if part is None else {"": part.labels, **part.inputs}
            for name, array in arrays.items():
                digest.update(f"{person.id} {person.head} {name} {array.shape}".encode())
                digest.update(np.ascontiguousarray(array).tobytes())
    identity = digest.hexdigest()
    place = Path(f"{path}.{identity[:16]}" if several else path)
    return Checkpoint(place, identity, threads=config.threads, began=began)


class _Job:
    """One pass: users that are trained together, and what becomes of each."""

    def __init__(
        self,
        backbone: Backbone,
        task: Task,
        layers: tuple[Target, ...],
        people: Sequence[Person],
        config: AdaptConfig,
        accelerator: Any,
        prober: Prober,
    ) -> None:
        self.backbone, self.task, self.layers, self.prober = backbone, task, layers, prober
        self.people, self.config, self.accelerator = people, config, accelerator

    def run(self, checkpoint: Checkpoint | None, *, resume: bool) -> Iterator[tuple[str, Adapted]]:
        """Train, then score each as its file stores it."""
        config, people = self.config, self.people
        method = get_trainable(config.method)
        users = len(people)
        trained = method.start(self.layers, config.method_settings, config.seed, users)
        trained.storage, trained.group = config.storage, config.group
        heads = self._heads()
        fitting = Fitting(
            self.backbone.model, trained, heads, self.task, self._cohort("train"), config,
            accelerator=self.accelerator, lr=config.lr or method.default_lr,
            validation=self._cohort("validation") if config.patience else None,
        )  # fmt: skip
        before = self._before()
        count = "" if users == 1 else f", {users} users"
        fitting.run(f"adapt ({config.method}{count})", checkpoint, resume=resume)
        for user, person in enumerate(people):
            adapter = self._adapter(trained, heads, user, person)
            done = self._scored(adapter, person, before[user])
            yield person.id, replace(done, stopped=fitting.stopped.get(user))
        if checkpoint:
            checkpoint.remove()

    def _heads(self) -> Heads | None:
        kind = self.people[0].head
        if kind == "keep":
            return None
        counts = [person.outputs for person in self.people]
        return Heads(self.backbone, counts, fresh=kind == "new", seed=self.config.seed)

    def _cohort(self, part: str) -> Cohort:
        config = self.config
        parts = [getattr(person, part) for person in self.people]
        device = self.accelerator.device
        if part == "validation":
            return Cohort(parts, size=max(map(len, parts)), seed=config.seed, device=device)
        augmentation = Augmentation(config.shift, config.noise)
        return Cohort(
            parts, size=config.batch_size, seed=config.seed, device=device,
            augmentation=augmentation,
        )  # fmt: skip

    # -- scores -----------------------------------------------------------------------------------

    def _measured(self, data: Dataset) -> NDArray[np.float32]:
        return measured(self.backbone.model, self.task, data)

    def _before(self) -> list[float]:
        """Each user's score without an adapter."""
        return [self._score_before(person) for person in self.people]

    def _score_before(self, person: Person) -> float:
        held = person.held
        if not len(held):
            return math.nan
        if self.task.name == "regression" and person.head == "new":
            return self._constant(person)
        found = self._measured(held)
        if person.head != "new":
            return self.task.score(found, held.labels)
        # By class names: labels that the backbone does not know are missed.
        known = dict(enumerate(self.backbone.labels))
        pairs = zip(found[:, 0], held.labels, strict=True)
        return sum(known.get(int(a)) == person.names[int(t)] for a, t in pairs) / len(held)

    def _constant(self, person: Person) -> float:
        """The score of the best answer that does not look; NaN where there is no such thing."""
        train, held = person.train.labels, person.held.labels
        if person.head != "new" or not len(held):
            return math.nan
        if self.task.name == "classification":
            return float((held == np.bincount(train).argmax()).mean())
        return float(np.sqrt(np.square(held - train.mean(axis=0)).mean()))

    def _scored(self, adapter: Adapter, person: Person, before: float) -> Adapted:
        after = math.nan
        with applied(self.backbone.model, adapter):
            adapter = replace(
                adapter, probe=self.prober.probe(rounded=self.config.precision != "fp32")
            )
            if len(person.held):
                after = self.task.score(self._measured(person.held), person.held.labels)
        if len(person.held):
            found = Validated(
                self.config.precision, self.task.metric, before, after, len(person.held)
            )
            if math.isfinite(before) and math.isfinite(after):
                adapter = replace(adapter, validated=(found,))
        return Adapted(
            adapter, before, after, len(person.held), self.task.metric,
            self.task.higher_is_better, self._constant(person),
        )  # fmt: skip

    # -- the file ---------------------------------------------------------------------------------

    def _adapter(self, trained: Trained, heads: Heads | None, user: int, person: Person) -> Adapter:
        config = self.config
        constants = get_method(config.method).constants(trained.config, trained.targets)
        return Adapter(
            method=config.method,
            config=trained.config,
            seed=config.seed,
            backbone_id=self.backbone.backbone_id,
            targets=trained.targets,
            coefficients=_stored(trained.values(user), constants, config),
            storage=config.storage,
            group=config.group or None,
            basis=trained.basis,
            stored_basis=trained.stored_basis,
            head=heads.stored(user, person.names) if heads else None,
        )


def _stored(
    values: Mapping[str, NDArray[np.float32]],
    constants: Mapping[str, NDArray[np.float32]],
    config: AdaptConfig,
) -> dict[str, Coefficients]:
    return {
        name: Coefficients.store(rows, constants[name], config.storage, config.group or None)
        for name, rows in values.items()
    }
