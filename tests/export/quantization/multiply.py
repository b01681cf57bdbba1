"""Runs one-product models and counts wrong sums: `python multiply.py FOLDER`, a line of JSON.

FOLDER has, for each product, NAME.onnx and NAME.npz: inputs `a` uint8 [rows, in] and exact sums `y`
int64 [rows, out]. Apart, so that it also runs on a processor that is emulated, where torch would
take minutes to load.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort

from regrow_format.integers import saturates

ALONE = 4  # rows that are multiplied one by one as well: a vector has a kernel of its own


def wrong(path: Path) -> int:
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    with np.load(path.with_suffix(".npz")) as stored:
        a, exact = stored["a"], stored["y"]
    count = int((session.run(None, {"a": a})[0] != exact).sum())
    for row in range(min(ALONE, len(a))):
        count += int((session.run(None, {"a": a[row : row + 1]})[0] != exact[row]).sum())
    return count


if __name__ == "__main__":
    found = {path.name: wrong(path) for path in sorted(Path(sys.argv[1]).glob("*.onnx"))}
    sys.stdout.write(json.dumps({"wrong": found, "saturates": saturates()}))
