"""Starting a worker and reading what it says, whatever becomes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import regrow_runtime
from regrow_format.errors import RegrowError, UsageError

__all__ = ["Outcome", "run_case"]

_PACKAGE = Path(__file__).parents[1]
_BLAS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass
class Outcome:
    """What a worker said.

    Attributes:
        stages: as they were reached, each with `name`, `ms` and `memory`.
        result: None if it failed.
        failed: the stage that was not reached, and why; None if it worked.
    """

    stages: list[dict[str, Any]] = field(default_factory=list)
    result: dict[str, Any] | None = None
    failed: dict[str, Any] | None = None

    def check(self) -> dict[str, Any]:
        """The result, or `RegrowError`."""
        if self.result is None:
            failed = self.failed or {}
            kind = UsageError if failed.get("code") == 2 else RegrowError
            raise kind(str(failed.get("message", "a measuring process ended early")))
        return self.result


def run_case(
    case: Mapping[str, Any],
    *,
    before_exec: Callable[[], None] | None = None,
    progress: Callable[[Mapping[str, Any]], None] | None = None,
    timeout: float | None = None,
) -> Outcome:
    """Run a case (see `cases/`) in a fresh process, with a `room` for files that goes with it.

    Args:
        before_exec: called in the child before Python starts, to set limits.
        progress: called with the worker's lines as they come.
        timeout: seconds after which it counts as failed; None waits for good.
    """
    outcome = Outcome()
    with (
        tempfile.TemporaryDirectory(prefix="regrow-profile-") as scratch,
        tempfile.TemporaryFile() as errors,
        _started({**case, "room": scratch}, before_exec, errors) as worker,
    ):
        deadline = _Deadline(worker, timeout)
        for line in worker.stdout or ():
            _take(outcome, line, progress)
        worker.wait()
        deadline.cancel()
        if outcome.result is None and outcome.failed is None:
            outcome.failed = _silent_end(worker.returncode, errors, deadline.reached)
    return outcome


@contextmanager
def _started(
    case: Mapping[str, Any], before_exec: Callable[[], None] | None, errors: IO[bytes]
) -> Iterator[subprocess.Popen[str]]:
    """The worker, with its case on stdin; gone when the block ends."""
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "regrow_toolchain.profiling.worker"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
        env=_environment(case["threads"]), preexec_fn=before_exec,
    )  # fmt: skip
    try:
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps({**case, "started": time.perf_counter()}) + "\n")
            worker.stdin.close()
        except OSError:  # it ended before it read: what it said tells why
            pass
        yield worker
    finally:
        worker.kill()
        worker.wait()
        if worker.stdout:
            worker.stdout.close()


def _environment(threads: int) -> dict[str, str]:
    """NumPy's own threads as many as ONNX Runtime's, unless told otherwise; packages as here."""
    here = [str(Path(file).parents[1]) for file in (regrow_runtime.__file__, _PACKAGE / "x")]
    paths = [*here, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **dict.fromkeys(_BLAS, str(threads)),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(path for path in paths if path)),
        "PYTHONIOENCODING": "utf-8",
        "ORT_DISABLE_TELEMETRY": "1",
    }


class _Deadline:
    """Kills the worker when the time is over."""

    def __init__(self, worker: subprocess.Popen[str], seconds: float | None) -> None:
        import threading

        self.reached = False
        self._worker = worker
        self._timer = threading.Timer(seconds, self._end) if seconds else None
        if self._timer:
            self._timer.daemon = True
            self._timer.start()

    def _end(self) -> None:
        self.reached = True
        self._worker.kill()

    def cancel(self) -> None:
        if self._timer:
            self._timer.cancel()


def _take(
    outcome: Outcome, line: str, progress: Callable[[Mapping[str, Any]], None] | None
) -> None:
    try:
        said = json.loads(line)
    except ValueError:  # cut off by a kill
        return
    event = said.pop("event", None)
    if event == "stage":
        outcome.stages.append(said)
    elif event == "result":
        outcome.result = said
    elif event == "error":
        outcome.failed = said
    if progress:
        progress({"event": event, **said})


def _silent_end(code: int, errors: IO[bytes], late: bool) -> dict[str, Any]:
    """Why a worker ended that said nothing of it."""
    errors.seek(0)
    lines = errors.read()[-2000:].decode("utf-8", "replace").strip().splitlines()
    told = f": {lines[-1]}" if lines else ""
    if late:
        why = "it did not come to an end"
    elif code < 0:
        why = f"killed by signal {-code}"
    else:
        why = f"exit code {code}"
    return {"stage": None, "message": f"the measuring process ended early, {why}{told}"}
