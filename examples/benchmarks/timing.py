"""Times ONNX models against each other: each in a process of its own, in turns of a few runs.

A machine that grows slower does so for all, so ratios hold where times do not. With one thread the
time is the processor's, not the clock's, so that what waits for other programs does not count.
`--without-amx` measures a server's processor as one whose int8 products are those of smaller
machines: the kernel refuses the tiles of AMX to the process, so that ONNX Runtime takes AVX-512's
or AVX2's products (Linux on x86-64).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

# Refuses AMX (arch_prctl 158, ARCH_REQ_XCOMP_PERM) by a filter of system calls.
WITHOUT_AMX = """
import ctypes, errno, struct
def step(code, yes, no, value): return struct.pack("HBBI", code, yes, no, value)
program = (step(0x20, 0, 0, 0) + step(0x15, 0, 3, 158) + step(0x20, 0, 0, 16)
           + step(0x15, 0, 1, 0x1023) + step(0x06, 0, 0, 0x50000 | errno.EPERM)
           + step(0x06, 0, 0, 0x7fff0000))
steps = ctypes.create_string_buffer(program, len(program))
class Program(ctypes.Structure):
    _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(
        22, 2, ctypes.byref(Program(len(program) // 8, ctypes.addressof(steps))), 0, 0):
    raise SystemExit("--without-amx needs Linux with filters of system calls")
"""

# A process with nothing but ONNX Runtime in it: milliseconds of so many runs as a line asks for.
TIMED = """
import json, sys, time
import numpy as np, onnxruntime
from regrow_toolchain.measurement import read_memory
graph, feeds, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = threads, 3
clock = time.process_time if threads == 1 else time.perf_counter
session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
with np.load(feeds) as stored:
    feed = {name: stored[name] for name in stored.files}
for line in sys.stdin:
    times = []
    for _ in range(int(line)):
        start = clock()
        session.run(None, feed)
        times.append((clock() - start) * 1e3)
    memory = read_memory()
    megabytes = [round((part or 0) / 1e6) for part in (memory.rss_anon, memory.peak)]
    print(json.dumps({"ms": times, "rss_mb": megabytes[0], "peak_mb": megabytes[1]}), flush=True)
"""


class Timed:
    """A model in its process, which sleeps until it is asked.

    Args:
        feeds: an .npz file with the inputs by name.
    """

    def __init__(
        self, graph: Path, feeds: Path, threads: int = 1, without_amx: bool = False
    ) -> None:
        code = WITHOUT_AMX + TIMED if without_amx else TIMED
        command = [sys.executable, "-c", code, str(graph), str(feeds), str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.medians: list[float] = []
        self.memory: dict[str, int] = {}
        self.ask(5)

    def ask(self, runs: int) -> float:
        """The median of so many runs, in milliseconds, after one that is not counted."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{runs + 1}\n")
        self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise SystemExit("a model's process ended early: its error stands above")
        found = json.loads(line)
        self.memory = {part: found[part] for part in ("rss_mb", "peak_mb")}
        return float(np.median(found["ms"][1:]))

    def turn(self, runs: int) -> None:
        self.medians.append(self.ask(runs))

    def close(self) -> None:
        self.process.communicate()

    def ms(self) -> dict[str, float]:
        """The median over turns, and the least."""
        return {
            "ms": round(float(np.median(self.medians)), 3),
            "least_ms": round(min(self.medians), 3),
        }

    def against(self, other: Timed) -> dict[str, float]:
        """Over turns: the median of the ratio, its 10th and 90th percentile, and the ratio of the
        two least medians of a turn."""
        turns = np.array(self.medians) / np.array(other.medians)
        low, middle, high = np.percentile(turns, (10, 50, 90)).round(3).tolist()
        least = round(min(self.medians) / min(other.medians), 3)
        return {"latency": middle, "p10": low, "p90": high, "least": least}


def time_in_turns(models: Sequence[Timed], turns: int, runs: int) -> None:
    for _ in range(turns):
        for model in models:
            model.turn(runs)
    for model in models:
        model.close()


def save_feeds(path: Path, feeds: dict[str, np.ndarray[Any, Any]]) -> Path:
    np.savez(path, **feeds)
    return path
