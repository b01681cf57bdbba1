"""Does an adapter do what it did at training? The bundle's probe, run on the device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from regrow_format.adapter import Probe
from regrow_format.errors import FormatError, MismatchError
from regrow_format.files import read_bytes
from regrow_format.manifest import Manifest
from regrow_format.record import Record

from .slots import Feeds, LoadedAdapter

__all__ = ["EXPECTED_FILE", "KEPT", "PROBE_FILE", "Check", "Prober", "load_tensors"]

PROBE_FILE, EXPECTED_FILE = "probe.safetensors", "expected.safetensors"
KEPT = 4096  # numbers of an output that a bundle keeps
_MAX_BYTES = 1 << 28
_RTOL, _ATOL = 1e-3, 1e-4  # as an export is held to
_NOTHING = 1e-6  # a change of less than this share of the outputs is rounding


class Check(Record):
    """What the probe found.

    Attributes:
        name: of the adapter; None for the base.
        finding: "fine", "no effect" (outputs are the base's), "differs" (from those at training,
            or for the base at export) or "no probe" (there is nothing to compare with).
        effect: largest |with the adapter - without|; infinite where it has classes of its own, None
            for the base and where an adapter is built in.
        difference: largest |found - expected|, None without expected outputs.
        allowed: what `difference` may be.
    """

    name: str | None
    finding: str
    effect: float | None = None
    difference: float | None = None
    allowed: float | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the adapter."""
        return self.finding in ("fine", "no probe")

    def require(self) -> None:
        """Raise `MismatchError` unless `ok`."""
        if self.finding == "no effect":
            raise MismatchError(
                f"adapter {self.name} must change the model's answers, got the same as without it "
                "on the bundle's probe: its numbers are zeros or spoilt; get it again, or train it "
                "anew"
            )
        if self.finding == "differs":
            base = self.name is None
            who, when = ("base", "export") if base else (f"adapter {self.name}", "training")
            raise MismatchError(
                f"{who} must give on the bundle's probe what it gave at {when}, within "
                f"{self.allowed:.2g}, got a difference of {self.difference:.2g}: the file is not "
                "what was made then, or was made for another model; get it again"
            )


class Prober:
    """A bundle's probe; its files are read when they are needed first."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._base: Feeds = {}

    def inputs(self) -> Feeds:
        """The first sample's, by input name; empty if the bundle has no probe."""
        if not self._has(PROBE_FILE):
            return {}
        stored = load_tensors(self.folder / PROBE_FILE)
        names = [spec.name for spec in self.manifest.graphs[0].inputs]
        if lost := [name for name in names if name not in stored]:
            raise FormatError(f"{self.folder / PROBE_FILE} must have {lost[0]}, got none")
        return {name: stored[name][:1] for name in names}

    def check(
        self, run: Callable[[Feeds, LoadedAdapter | None], Feeds], new: LoadedAdapter | None
    ) -> Check:
        """Run the probe with an adapter, or None for the base.

        Args:
            run: outputs by name, of inputs and an adapter.
        """
        if not (inputs := self.inputs()):
            return Check(new.name if new else None, "no probe")
        if new is None:
            return self._check_base(run(inputs, None))
        if not self._base:
            self._base = run(inputs, None)
        outputs = run(inputs, new)
        effect = self._effect(outputs)
        probe = new.probe
        known = self.manifest.checks.probe if self.manifest.checks else ""
        if probe is not None and probe.input not in ("", known):
            probe = None  # outputs for another input say nothing
        found, difference, allowed = "no probe", None, None
        if probe is not None:
            difference, allowed = self._compared(probe, outputs)
            found = "fine" if difference <= allowed else "differs"  # NaN differs
        size = max(float(np.abs(value).max(initial=0)) for value in self._base.values())
        if effect is not None and effect <= _NOTHING * size:
            found = "no effect"
        return Check(new.name, found, effect, difference, allowed)

    def _effect(self, outputs: Feeds) -> float | None:
        if self.manifest.mode != "swappable":
            return None
        return max(_distance(value, self._base[name]) for name, value in outputs.items())

    def _compared(self, probe: Probe, outputs: Feeds) -> tuple[float, float]:
        """The difference to what is expected, and what it may be.

        A variant that rounds is far from exact outputs, with an adapter and without: there the
        changes that the adapter makes are compared, where both sides know the base.
        """
        name, spread = self.manifest.graphs[0].outputs[0].name, self._spread()
        expected = probe.expected.astype(np.float32)
        found = _last(outputs[name], expected.size)
        now = exact = np.zeros_like(expected)
        if not spread:
            return _distance(found, expected), probe.tolerance
        stored = load_tensors(self.folder / EXPECTED_FILE) if self._has(EXPECTED_FILE) else {}
        base = self._base[name] if outputs[name].shape == self._base[name].shape else outputs[name]
        if f"{name}.exact" in stored and base is self._base[name]:
            now, exact = _last(base, expected.size), stored[f"{name}.exact"][-expected.size :]
        change = expected - exact
        noise = spread * float(np.abs(base).max()), float(np.abs(change).max())
        allowed = probe.tolerance + 1.25 * noise[0] + 0.25 * noise[1]
        return _distance(found - now, change), allowed

    def _spread(self) -> float:
        return self.manifest.checks.spread if self.manifest.checks else 0.0

    def _has(self, name: str) -> bool:
        return name in self.manifest.files

    def _check_base(self, outputs: Feeds) -> Check:
        """Against what the bundle gave at export."""
        if not self._has(EXPECTED_FILE):
            return Check(None, "no probe")
        stored, worst, allowed = load_tensors(self.folder / EXPECTED_FILE), 0.0, _ATOL
        for name, value in outputs.items():
            if name not in stored:
                raise FormatError(f"{self.folder / EXPECTED_FILE} must have {name}, got none")
            size = float(np.abs(stored[name]).max(initial=0))
            limit = _ATOL * max(1.0, size) + (_RTOL + self._spread()) * size
            distance = _distance(_last(value, stored[name].size), stored[name])
            if not distance <= limit:
                return Check(None, "differs", None, distance, limit)
            worst, allowed = max((worst, allowed), (distance, limit))
        return Check(None, "fine", None, worst, allowed)


def _last(values: NDArray[Any], count: int) -> NDArray[Any]:
    """The last numbers of the first sample's output, without classes that only fill it up."""
    flat = values[:1].reshape(-1)
    return flat[flat != -np.inf][-count:] if count else flat[:0]


def _distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Largest absolute difference; infinite where shapes differ."""
    if one.shape != other.shape:
        return np.inf
    return float(np.abs(one.astype(np.float64) - other).max(initial=0.0))


def load_tensors(path: Path) -> Feeds:
    """The arrays of a safetensors file of the bundle."""
    try:
        found: Feeds = load_safetensors(read_bytes(path, limit=_MAX_BYTES, what="a probe"))
    except (SafetensorError, KeyError) as error:
        raise FormatError(f"{path} must be a whole safetensors file, got: {error}") from None
    return found
