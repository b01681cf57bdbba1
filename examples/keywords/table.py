"""Both roads on the same speakers and clips: regrow's commands beside PEFT and ONNX Runtime.

    python examples/keywords/table.py MODEL RECORDINGS.zip OUT [--seeds 0 1 …] [--peers PYTHON]

Every speaker in turn is new: the head for the words is trained on the others (`peers.py words`, and
both roads start from it), clips 5 to 14 of each word adapt, the others test. All is measured in
int8, one thread, one clip at a time, in processes that have numpy and onnxruntime alone. What is in
OUT already is not made again. Ends in one line of JSON.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEPS = ["--steps", "60", "--batch-size", "32", "--label-smoothing", "0.1"]
ALL = ["--holdout", "0", "--keep-anyway"]  # all clips train, as the peers' do
WAYS = {  # regrow's: arguments of `regrow adapt`
    "regrow NOLA k=l=64": ["--target", "wo", "--target", "fc1", "--target", "fc2", "--set", "k=64",
                           "--set", "l=64", "--set", "rank=4", "--set", "c=4", "--lr", "0.1"],
}  # fmt: skip
RANKS = (1, 4)


def run(arguments, **environment):
    """Seconds of one command; its output is shown when it fails."""
    start = time.perf_counter()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [str(x) for x in arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout)
    return time.perf_counter() - start


def regrow(*arguments, **environment):
    command = "import sys; from regrow_toolchain.cli import main; sys.exit(main())"
    return run([sys.executable, "-c", command, *arguments], **environment)


class Table:
    def __init__(self, given):
        self.given, self.out = given, given.out.resolve()
        self.times = self.out / "seconds.json"
        self.seconds = json.loads(self.times.read_text()) if self.times.is_file() else {}
        self.clips = self.out / "clips"

    def once(self, path, call):
        """Make `path` unless it is there, and note how long it took."""
        if not path.exists():
            print("making", path.relative_to(self.out), flush=True)
            self.seconds[str(path.relative_to(self.out))] = round(call(), 1)
            self.times.write_text(json.dumps(self.seconds))
        return path

    def speakers(self):
        names = self.given.speakers
        self.once(self.clips, lambda: run(
            [sys.executable, HERE / "spotter.py", self.given.recordings, self.clips, *names],
            PYTHONPATH=str(ROOT / "runtime")))  # fmt: skip
        return names

    def base(self, new, names):
        folders = [self.clips / part / s for s in names if s != new for part in ("owners", "test")]
        path, script = self.out / "base" / new, [self.given.peers, HERE / "peers.py", "words"]
        return self.once(path, lambda: run([*script, self.given.model, path, *folders]))

    def bundle(self, new, base):
        path = self.out / "bundle" / new
        path.parent.mkdir(exist_ok=True)
        words = sorted(x.name for x in (self.clips / "test" / new).iterdir())
        (self.out / "words.txt").write_text("\n".join(words))
        return self.once(path, lambda: regrow(
            "export", "examples.keywords.spotter:published", "-o", path, "--precision", "int8",
            "--preprocessor", HERE, "--labels", self.out / "words.txt", KWT=str(base)))  # fmt: skip

    def adapter(self, new, base, way, seed):
        path = self.out / "adapters" / f"{new}-{list(WAYS).index(way)}-{seed}.safetensors"
        path.parent.mkdir(exist_ok=True)
        return self.once(path, lambda: regrow(
            "adapt", "examples.keywords.spotter:published", "--data", self.clips / "owners" / new,
            "--preprocessor", HERE, "--labels", self.out / "words.txt", "--seed", seed,
            "--threads", 1, "--head", "keep", *STEPS, *ALL, *WAYS[way], "-o", path,
            KWT=str(base)))  # fmt: skip

    def peer(self, new, base, rank, seed):
        path = self.out / "peers" / f"{new}-r{rank}-{seed}"
        return self.once(path, lambda: run(
            [self.given.peers, HERE / "peers.py", "adapt", base, self.clips / "owners" / new, path,
             "--rank", rank, "--seed", seed]))  # fmt: skip

    def cases(self):
        """(row, new speaker, seed, how to measure it)."""
        names = self.speakers()
        for seed in self.given.seeds:
            for new in names:
                base = self.base(new, names)
                bundle = self.bundle(new, base)
                for way in WAYS:
                    adapter = self.adapter(new, base, way, seed)
                    yield way, new, seed, ["bundle", bundle, adapter]
                for rank in RANKS:
                    files = self.peer(new, base, rank, seed)
                    slots = ["slots", files / "slots.onnx", files / "user.onnx_adapter"]
                    yield f"PEFT r={rank}, LoraAdapter", new, seed, slots
                    merged = ["merged", files / "slots.onnx", files / "merged.onnx"]
                    yield f"PEFT r={rank}, merged", new, seed, merged

    def measured(self, new, seed, row, case):
        """What a fresh process found, kept."""
        path = self.out / "measured" / f"{row.replace(' ', '_')}-{new}-{seed}.json"
        path.parent.mkdir(exist_ok=True)
        features = self.features(new)
        self.once(path, lambda: run([sys.executable, __file__, "--measure", *case, features, path]))
        return json.loads(path.read_text())

    def features(self, new):
        """The test clips as MFCCs, the same for all."""
        path = self.out / "test" / f"{new}.npz"
        path.parent.mkdir(exist_ok=True)
        folder = self.clips / "test" / new
        self.once(path, lambda: run([sys.executable, __file__, "--features", folder, path]))
        return path


def features(folder, path):
    from regrow_inputs import SoundPreprocessor, read_wav

    files = sorted(Path(folder).glob("*/*.wav"))
    words = sorted({file.parent.name for file in files})
    prepare = SoundPreprocessor.from_folder(HERE)
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
        from regrow_runtime import Bundle

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


def timed(call, repeat):
    found = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def measure(kind, base, user, features, path):
    with np.load(features) as arrays:
        mfcc, labels = arrays["mfcc"], arrays["labels"]
    swap, call = users(kind, base, user)
    before = accuracy(call, mfcc, labels)
    first = timed(swap, 1)[0]
    result = {"before": before, "after": accuracy(call, mfcc, labels), "first_swap": first}
    one = iter(np.resize(np.arange(len(mfcc)), 10**6))
    runs = timed(lambda: call(mfcc[[next(one)]]), 200)
    result |= {"swap": float(np.median(timed(swap, 20))), "bytes": os.stat(user).st_size}
    result |= {"p50": float(np.percentile(runs, 50)), "p99": float(np.percentile(runs, 99))}
    status = Path("/proc/self/status").read_text().split()
    result["peak_mb"] = int(status[status.index("VmHWM:") + 1]) / 1024
    Path(path).write_text(json.dumps(result))


def summary(found):
    """One row: means over speakers and seeds, but medians of times, since others share the machine;
    the 10th percentile is over speakers, per seed."""
    after = {seed: [x["after"] for (_, s), x in found.items() if s == seed] for _, s in found
             for seed in [s]}  # fmt: skip
    times = ("swap", "first_swap", "p50", "p99")
    row = {
        name: float((np.median if name in times else np.mean)([x[name] for x in found.values()]))
        for name in ("before", "after", "bytes", "peak_mb", *times)
    }
    row["p10"] = float(np.mean([np.percentile(x, 10) for x in after.values()]))
    harmed = sum(x["after"] < x["before"] for x in found.values())
    return row | {"harmed": f"{harmed} of {len(found)}", "seeds": len(after)}


def main():
    if sys.argv[1:2] == ["--measure"]:
        return measure(*sys.argv[2:])
    if sys.argv[1:2] == ["--features"]:
        return features(*sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "recordings", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--peers", default=sys.executable, help="Python of the peers' environment")
    parser.add_argument("--speakers", nargs="+", default=["george", "jackson", "lucas", "nicolas"])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows, table = {}, Table(given)
    for row, new, seed, case in table.cases():
        rows.setdefault(row, {})[new, seed] = table.measured(new, seed, row, case)
    found = {row: summary(runs) for row, runs in rows.items()}
    print(
        "\n| | accuracy | 10th percentile | before | harmed | bytes per user "
        "| swap, first and later, ms | latency p50, p99, ms | peak RAM, MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, x in found.items():
        print(
            f"| {name} | {100 * x['after']:.1f} | {100 * x['p10']:.1f} | {100 * x['before']:.1f} "
            f"| {x['harmed']} | {x['bytes']:,.0f} | {x['first_swap']:.2f}, {x['swap']:.2f} "
            f"| {x['p50']:.2f}, {x['p99']:.2f} | {x['peak_mb']:.0f} |"
        )
    each = {row: {f"{s} {seed}": x for (s, seed), x in runs.items()} for row, runs in rows.items()}
    print(json.dumps({"rows": found, "seconds": table.seconds, "each": each}))
    return None


if __name__ == "__main__":
    sys.exit(main())
