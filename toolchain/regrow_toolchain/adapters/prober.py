"""What an adapter's file says of the model with it: outputs for the probe that bundles carry."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from regrow_export.validation import fingerprint, first_output, standard_inputs
from regrow_format.adapter import Probe

from .probe_record import probe_of

__all__ = ["Prober"]


class Prober:
    """Makes the probes of adapters of one model.

    Args:
        model: with its exact weights; they may be rounded later.
        like: the data's inputs, for a module that does not say what it takes.
    """

    def __init__(self, model: nn.Module, like: Mapping[str, NDArray[Any]] | None = None) -> None:
        self.model = model
        self._inputs = standard_inputs(model, like)
        self._exact = [(parameter, parameter.data) for parameter in model.parameters()]

    def probe(self, *, rounded: bool = False) -> Probe | None:
        """What the model gives now, with an adapter in it; None if it cannot be said.

        Args:
            rounded: the weights are not exact now: they come back for this run.
        """
        if self._inputs is None:
            return None
        self.model.eval()
        with self._exact_weights(rounded):
            found = first_output(self.model, self._inputs)
        return probe_of(found[1], fingerprint(self._inputs, found[0])) if found else None

    @contextmanager
    def _exact_weights(self, rounded: bool) -> Iterator[None]:
        now: list[tuple[nn.Parameter, Tensor]] = []
        if rounded:
            for parameter, exact in self._exact:
                now.append((parameter, parameter.data))
                parameter.data = exact.to(parameter.device)
        try:
            yield
        finally:
            for parameter, data in now:
                parameter.data = data
