"""Energy of the processor's packages from RAPL (Linux powercap), where the machine tells it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["EnergyMeter"]

_POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counters of whole packages: what other programs use is in them.

    `reason` says why there is nothing to read, else it is None.
    """

    def __init__(self, root: Path = _POWERCAP) -> None:
        self._counters: list[tuple[Path, int]] = []
        self.reason: str | None = None
        try:
            for folder in sorted(root.glob("intel-rapl:*")):
                if folder.name.count(":") == 1:  # a package; its parts have one more
                    top = int((folder / "max_energy_range_uj").read_text())
                    int((folder / "energy_uj").read_text())
                    self._counters.append((folder / "energy_uj", top))
        except PermissionError:
            self._counters, self.reason = [], f"no permission to read {root}/intel-rapl:*/energy_uj"
        except (OSError, ValueError):
            self._counters = []
        if not self._counters and self.reason is None:
            self.reason = "this machine has no RAPL counters that can be read"

    def read(self) -> list[int] | None:
        """Microjoules by package; None if there is nothing to read."""
        try:
            return [int(path.read_text()) for path, _ in self._counters] or None
        except (OSError, ValueError):
            return None

    def joules(self, before: list[int] | None, after: list[int] | None) -> float | None:
        """Between two readings; a counter may have started anew once."""
        if before is None or after is None:
            return None
        parts = zip(before, after, self._counters, strict=True)
        return sum((b - a) % (top + 1) for a, b, (_, top) in parts) / 1e6
