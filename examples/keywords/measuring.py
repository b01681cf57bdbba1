"""What one user's file does in a process of its own, which has numpy and onnxruntime alone.

    measuring.py features CLIPS OUT              clips WORD/*.wav as MFCCs, the same for all
    measuring.py measure KIND BASE USER FEATURES OUT
    measuring.py latency CASES FEATURES OUT      CASES: {row: [KIND, BASE, USER]} as JSON

KIND is bundle (regrow's), slots (a graph that takes a LoraAdapter) or merged (a graph of the
user's own). OUT is JSON; `table.py` runs these.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent


def features(folder, path):
    from regrow_inputs import AudioPreprocessor, read_wav

    files = sorted(Path(folder).glob("*/*.wav"))
    words = sorted({file.parent.name for file in files})
    prepare = AudioPreprocessor.from_folder(HERE)
    mfcc = prepare([read_wav(file) for file in files])["values"]
    np.savez(path, mfcc=mfcc, labels=[words.index(file.parent.name) for file in files])


def session(path):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def users(kind, base, user):
    """(swap, run): `swap()` puts the user in place, `swap(None)` nobody; run(mfcc) gives logits."""
    import onnxruntime as ort

    if kind == "bundle":
        from regrow import Bundle

        bundle = Bundle.open(base, threads=1)
        return (lambda path=user: bundle.swap(path)), lambda x: next(
            iter(bundle.run({"mfcc": x}).values())
        )
    now = {"session": session(base), "options": None}

    def swap(path=user):
        if path is None:
            now["options"] = None
        elif kind == "merged":
            now["session"] = session(path)
        else:
            adapter = ort.LoraAdapter()
            adapter.Load(str(path))
            options = ort.RunOptions()
            options.add_active_adapter(adapter)
            now.update(options=options, adapter=adapter)

    return swap, lambda x: now["session"].run(None, {"mfcc": x}, now["options"])[0]


def accuracy(call, mfcc, labels):
    parts = [call(mfcc[i : i + 20]).argmax(1) for i in range(0, len(mfcc), 20)]
    return float((np.concatenate(parts) == labels).mean())


def timed(call):
    """Milliseconds of CPU, all of this process: others may share the core."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def measure(kind, base, user, features, path):
    with np.load(features) as arrays:
        mfcc, labels = arrays["mfcc"], arrays["labels"]
    swap, call = users(kind, base, user)
    before = accuracy(call, mfcc, labels)
    first = timed(swap)
    result = {"before": before, "after": accuracy(call, mfcc, labels), "first_swap": first}
    for i in range(200):  # as a device does, before its peak is read
        call(mfcc[[i % len(mfcc)]])
    swaps = [timed(swap) for _ in range(20)]
    result |= {"swap": float(np.median(swaps)), "bytes": os.stat(user).st_size}
    status = Path("/proc/self/status").read_text().split()
    result["peak_mb"] = int(status[status.index("VmHWM:") + 1]) / 1024
    Path(path).write_text(json.dumps(result))


def latency(cases, features, path):
    """One clip at a time, the rows in turns."""
    with np.load(features) as arrays:
        mfcc = arrays["mfcc"]
    calls, found = {}, {}
    for row, case in json.loads(cases).items():
        swap, calls[row] = users(*case)
        swap()
        found[row] = []
    for i in range(220):
        clip = mfcc[[i % len(mfcc)]]
        for row, call in calls.items():
            found[row].append(timed(lambda call=call, clip=clip: call(clip)))
    kept = {row: np.percentile(x[20:], [50, 99]).tolist() for row, x in found.items()}
    Path(path).write_text(json.dumps(kept))


if __name__ == "__main__":
    ways = {"features": features, "measure": measure, "latency": latency}
    ways[sys.argv[1]](*sys.argv[2:])
