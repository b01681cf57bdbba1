"""The state of a training that was interrupted: a safetensors file beside the output."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from regrow_format.errors import UsageError
from regrow_format.files import write_bytes

from .identity import TrainingIdentity

__all__ = ["Checkpoint", "StateFile"]

State = dict[str, Tensor]

_SHARE = 20.0  # of the time that writing takes, that passes until the next


@dataclass(frozen=True)
class StateFile:
    """Where the state of a training is kept, and whether one that is there is gone on with.

    Attributes:
        began: called before the state is written for the first time: whatever can be wrong before
            the first step is not.
    """

    path: Path
    resume: bool = False
    began: Callable[[], object] = lambda: None


class Checkpoint:
    """Where a training's state is kept from time to time.

    Trainings that follow one another to one result share the file: `begin(1)` starts the second of
    them, and keeps how the first ended.

    Args:
        path: the file.
        identity: everything that decides the result.
        began: called before the state is written for the first time.
        seconds: how often to write; the state is that after a whole step.
    """

    def __init__(
        self,
        path: Path,
        identity: TrainingIdentity,
        *,
        began: Callable[[], object] = lambda: None,
        seconds: float = 10.0,
    ) -> None:
        self.path, self.identity, self.seconds = path, identity, seconds
        self.began = began
        self._last = time.monotonic()
        self._number = 0
        self._ended: dict[int, _Moment] = {}

    def begin(self, number: int) -> None:
        """From here on, states are those of training `number`, from 0 on."""
        self._number = number

    def end(self, step: int, state: Callable[[], State]) -> None:
        """How the training ended: kept with what is written of those after it."""
        self._ended[self._number] = _Moment(step, _stored(state()))

    def save(self, step: int, state: Callable[[], State], *, now: bool = False) -> None:
        """Write the state after `step` steps, if it is time to, or `now`.

        A state that takes long to write is written less often.
        """
        began = time.monotonic()
        if began - self._last < self.seconds and not now:
            return
        moments = {**self._ended, self._number: _Moment(step, _stored(state()))}
        tensors = {
            f"{number}:{name}": tensor
            for number, moment in moments.items()
            for name, tensor in moment.state.items()
        }
        steps = json.dumps([moments[number].step for number in range(len(moments))])
        about = {"steps": steps, **self.identity.to_fields()}
        self.began()
        write_bytes(self.path, save(tensors, about))
        self._last = time.monotonic()
        if self.seconds:  # 0 is after every step, whatever it takes
            self.seconds = max(self.seconds, _SHARE * (self._last - began))

    def load(self) -> tuple[int, State] | None:
        """(steps done, state) of the training that was begun; None if the file has none.

        Raises:
            UsageError: it is of another training, or broken.
        """
        if self._number == 0 and self.path.is_file():
            self._ended = self._read()
        found = self._ended.get(self._number)
        return None if found is None else (found.step, found.state)

    def _read(self) -> dict[int, _Moment]:
        way_out = f"remove {self.path} to start anew"
        try:
            with safe_open(self.path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UsageError(
                f"{self.path} must be a whole checkpoint: {error}; {way_out}"
            ) from None
        if "steps" not in metadata:
            raise UsageError(
                f"{self.path} must be a checkpoint of this version of regrow, got an older one; "
                f"{way_out}"
            )
        self.identity.check(self.path, metadata, of="samples, settings, backbone")
        moments = {n: _Moment(step, {}) for n, step in enumerate(json.loads(metadata["steps"]))}
        for name, tensor in tensors.items():
            number, _, key = name.partition(":")
            moments[int(number)].state[key] = tensor
        return moments

    def remove(self) -> None:
        """Forget the state: the training is done."""
        self.path.unlink(missing_ok=True)


class _Moment(NamedTuple):
    """A training after so many steps."""

    step: int
    state: State


def _stored(state: State) -> State:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
