"""Running a process under a limit of memory: cgroup v2 where it can be had, else RLIMIT_DATA.

Never the address space: importing ONNX Runtime maps three times what it uses.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from regrow_format.errors import RegrowError

__all__ = ["Limit", "make_group", "memory_limit", "own_groups"]

_ROOT = Path("/sys/fs/cgroup")
_TRIAL = 64 << 20  # enough to see whether a process may enter at all


@dataclass(frozen=True)
class Limit:
    """A limit that holds for whoever enters.

    Attributes:
        kind: what holds it.
        enter: to be called in the child before it starts the program.
        peak: the most bytes that were counted so far; None where that is not told.
    """

    kind: str
    enter: Callable[[], None]
    peak: Callable[[], int | None]


@contextmanager
def memory_limit(count: int, root: Path = _ROOT) -> Iterator[Limit]:
    """A limit of `count` bytes for one process.

    Raises:
        RegrowError: this system has no such limit.
    """
    group = make_group(count, root)
    if group is not None:
        try:
            yield Limit("cgroup v2 memory.max", partial(_join, group), partial(_peak, group))
        finally:
            group.rmdir()
        return
    if sys.platform != "linux":
        raise RegrowError(
            f"memory limit must be held by Linux, got {sys.platform}: "
            "compare the peak in the memory table"
        )
    yield Limit("RLIMIT_DATA", partial(_set_data, count), lambda: None)


def make_group(count: int, root: Path) -> Path | None:
    """A new group with the limit, or None where none can be made and entered."""
    for parent in own_groups(root):
        group = None
        try:
            if "memory" not in (parent / "cgroup.subtree_control").read_text().split():
                continue
            group = Path(tempfile.mkdtemp(prefix="regrow-", dir=parent))
            (group / "memory.swap.max").write_text("0")
            (group / "memory.max").write_text(str(max(count, _TRIAL)))
            subprocess.run([sys.executable, "-S", "-c", ""], check=True,
                           capture_output=True, preexec_fn=partial(_join, group))  # fmt: skip
            (group / "memory.max").write_text(str(count))
        except (OSError, subprocess.SubprocessError):
            if group is not None:
                group.rmdir()
            continue
        return group
    return None


def own_groups(root: Path) -> list[Path]:
    """This process's group and those around it, nearest first."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    path = next((line[3:] for line in lines if line.startswith("0::")), "/")
    own = root / path.lstrip("/")
    return [own, *(parent for parent in own.parents if root in (parent, *parent.parents))]


def _join(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def _peak(group: Path) -> int | None:
    try:
        return int((group / "memory.peak").read_text())
    except (OSError, ValueError):  # before Linux 5.19
        return None


def _set_data(count: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (count, count))
