"""One case in a fresh process: `python -m regrow_toolchain.profiling.worker`.

Reads one JSON object from stdin, writes JSON lines to stdout: {"event": "stage", "name", "ms",
"own_ms" (without waiting for a core), "memory"} as each stage is reached, then {"event": "result",
...}, or {"event": "error", "stage", "message"}. Nothing but Python's own modules is imported above,
so that what each stage takes can be told apart.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any

from regrow_toolchain.measurement import CoreWait, Reading, own_ms, read_memory

__all__ = ["Reporter", "main"]

STAGES = ("interpreter", "numpy", "onnxruntime", "regrow", "open", "first run", "result")


class Reporter:
    """Sends lines to the process that started this one.

    Attributes:
        stage: what is being worked at, for the message if it fails.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._wait = stream, CoreWait()
        self._before = Reading(0.0, 0.0)  # the start of the process
        self.stage, self._start = "interpreter", time.perf_counter()

    def begin(self, name: str, start: float | None = None) -> None:
        """From here on a stage is worked at; `start`, in seconds, if it began earlier."""
        self.stage = name
        if start is None:
            self._before, start = self._wait.read(), time.perf_counter()
        self._start = start

    def send(self, event: str, **fields: Any) -> None:
        """One line."""
        self._stream.write(json.dumps({"event": event, **fields}) + "\n")
        self._stream.flush()

    def reached(self, **fields: Any) -> None:
        """The stage is done: its time, the same less waiting for a core, and the memory after it.

        Args:
            fields: what else to tell.
        """
        ms = (time.perf_counter() - self._start) * 1e3
        own = own_ms(ms, self._before, self._wait.read())
        memory = asdict(read_memory())
        self.send("stage", name=self.stage, ms=ms, own_ms=own, memory=memory, **fields)


def main() -> int:
    """Run the case on stdin; 0 if it worked."""
    report = Reporter(_quiet_stdout())
    try:
        case = json.loads(sys.stdin.readline())
        # perf_counter is the same clock in all processes of a machine.
        report.begin("interpreter", case["started"])
        report.reached()
        for module in ("numpy", "onnxruntime", "regrow"):
            _import(module, report)
        report.stage = "case"
        run = import_module(f"regrow_toolchain.profiling.cases.{case['case']}").run
        report.send("result", **_plain(run(case, report)))
    except MemoryError:
        report.send("error", stage=report.stage, message="out of memory", kind="MemoryError")
        return 1
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        kind = type(error).__name__
        code = getattr(error, "exit_code", 1)
        report.send("error", stage=report.stage, message="\n".join(lines), kind=kind, code=code)
        return 1
    return 0


def _quiet_stdout() -> Any:
    """A stream to the real stdout; what libraries print goes to stderr instead."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def _import(name: str, report: Reporter) -> None:
    report.begin(name)
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import_module("regrow_runtime" if name == "regrow" else name)
    report.reached()


def _plain(result: Mapping[str, Any]) -> dict[str, Any]:
    """Times to a tenth of a microsecond are enough."""
    return {name: _rounded(value) for name, value in result.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if abs(value) > 1e-2 else float(f"{value:.4g}")
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _rounded(part) for name, part in value.items()}
    return value


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
