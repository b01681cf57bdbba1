"""Both roads on the same speakers and clips: regrow's commands beside PEFT and ONNX Runtime.

    python examples/keywords/table.py MODEL RECORDINGS.zip OUT [--seeds 0 1 …] [--peers PYTHON]

Every speaker in turn is new: the head for the words is trained on the others (`peers.py words`, and
both roads start from it), clips 5 to 14 of each word adapt, the others test. All is measured in
int8, one thread, one clip at a time, in processes that have numpy and onnxruntime alone. What is in
OUT already is not made again: without OUT/measured, all is measured anew and nothing trained.
Prints the table of docs/keywords.md and ends in one line of JSON.
"""

import argparse
import ast
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KWT = ROOT / "examples" / "benchmarks" / "kwt1.py"  # the peers' module and front end
STEPS = ["--steps", "60", "--batch-size", "32", "--label-smoothing", "0.1"]
ALL = ["--holdout", "0", "--keep-anyway"]  # all clips train, as the peers' do
WAYS = {  # regrow's: arguments of `regrow adapt`
    "regrow NOLA k = l = 64": [
        "--target", "wo", "--target", "fc1", "--target", "fc2", "--set", "k=64", "--set", "l=64",
        "--set", "rank=4", "--set", "c=4", "--lr", "0.1",
    ],
}  # fmt: skip
RANKS = (1, 4)
OLIVE = "PEFT r = 4, Olive's extraction"
# What a person types from weights and clips to a label, for the first user and for a further one.
TYPED = {
    "regrow": ("sort, adapt --method head, ls, export, adapt, store add, run", "adapt, store add"),
    "PEFT": ("sort, words, adapt", "adapt"),
}


def run(arguments, **environment):
    """CPU seconds of one command: others may share the machine. Shows its output when it fails."""
    start = _children()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [str(x) for x in arguments], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        sys.exit(done.stdout)
    return _children() - start


def _children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
        """Make `path` unless it is there whole, and note what it took."""
        name = str(path.relative_to(self.out))
        if name not in self.seconds or not path.exists():
            print("making", name, flush=True)
            self.seconds[name] = round(call(), 1)
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

    def words(self, new):
        """regrow's head for the words, for what it costs: both roads go on from `base`."""
        clips, path = self.out / "others" / new, self.out / "words" / f"{new}.safetensors"
        path.parent.mkdir(exist_ok=True)
        self.once(clips, lambda: run(
            [sys.executable, HERE / "spotter.py", self.given.recordings, clips, new],
            PYTHONPATH=str(ROOT / "runtime")))  # fmt: skip
        self.once(path, lambda: regrow(
            "adapt", "examples.keywords.spotter:published", "--data", clips / "base", "--method",
            "head", "--head", "new", "--coefficient-dtype", "fp16", "--preprocessor", HERE,
            "--labels", self.given.model / "labels.txt", "--threads", 1, "-o", path,
            KWT=str(self.given.model)))  # fmt: skip

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
            "--threads", 1, "--resume", "--head", "keep", *STEPS, *ALL, *WAYS[way], "-o", path,
            KWT=str(base)))  # fmt: skip

    def peer(self, new, base, rank, seed):
        path = self.out / "peers" / f"{new}-r{rank}-{seed}"
        return self.once(path, lambda: run(
            [self.given.peers, HERE / "peers.py", "adapt", base, self.clips / "owners" / new, path,
             "--rank", rank, "--seed", seed]))  # fmt: skip

    def olive(self, base, files):
        return self.once(files / "olive.onnx_adapter", lambda: run(
            [self.given.peers, HERE / "peers_olive.py", base, files, "--rank", 4]))  # fmt: skip

    def cases(self):
        """(row, new speaker, seed, how to measure it)."""
        names = self.speakers()
        for seed in self.given.seeds:
            for new in names:
                base = self.base(new, names)
                self.words(new)
                bundle = self.bundle(new, base)
                for way in WAYS:
                    adapter = self.adapter(new, base, way, seed)
                    yield way, new, seed, ["bundle", bundle, adapter]
                for rank in RANKS:
                    files = self.peer(new, base, rank, seed)
                    slots = ["slots", files / "slots.onnx", files / "user.onnx_adapter"]
                    yield f"PEFT r = {rank}, `LoraAdapter`", new, seed, slots
                    merged = ["merged", files / "slots.onnx", files / "merged.onnx"]
                    yield f"PEFT r = {rank}, merged", new, seed, merged
                    if self.given.olive and rank == 4:
                        yield (
                            OLIVE,
                            new,
                            seed,
                            ["slots", files / "olive.onnx", self.olive(base, files)],
                        )

    def measured(self, new, seed, row, case):
        """What a fresh process found, kept."""
        kind = "".join(x for x in row if x.isalnum())
        path = self.out / "measured" / f"{kind}-{new}-{seed}.json"
        path.parent.mkdir(exist_ok=True)
        features = self.features(new)
        self.once(
            path,
            lambda: run([sys.executable, HERE / "measuring.py", "measure", *case, features, path]),
        )
        return json.loads(path.read_text())

    def latencies(self, new, seed, cases):
        """By row, p50 and p99 of one process that runs all of them in turns, kept."""
        path = self.out / "measured" / f"latency-{new}-{seed}.json"
        given = json.dumps({row: [str(x) for x in case] for row, case in cases.items()})
        features = self.features(new)
        self.once(
            path,
            lambda: run([sys.executable, HERE / "measuring.py", "latency", given, features, path]),
        )
        return json.loads(path.read_text())

    def features(self, new):
        """The test clips as MFCCs, the same for all."""
        path = self.out / "test" / f"{new}.npz"
        path.parent.mkdir(exist_ok=True)
        folder = self.clips / "test" / new
        self.once(
            path, lambda: run([sys.executable, HERE / "measuring.py", "features", folder, path])
        )
        return path


def summary(found):
    """One column: means over speakers and seeds, but medians of times; the 10th percentile is over
    speakers, per seed. Accuracies have the lowest and the highest seed beside them."""
    by_seed = {}
    for (_, seed), x in found.items():
        by_seed.setdefault(seed, []).append(x["after"])
    times = ("swap", "first_swap", "p50", "p99")
    row = {
        name: float((np.median if name in times else np.mean)([x[name] for x in found.values()]))
        for name in ("before", "bytes", "peak_mb", *times)
    }
    for name, of in (("after", np.mean), ("p10", lambda x: np.percentile(x, 10))):
        seeds = [float(of(x)) for x in by_seed.values()]
        row |= {name: float(np.mean(seeds)), f"{name}_seeds": [min(seeds), max(seeds)]}
    harmed = sum(x["after"] < x["before"] for x in found.values())
    return row | {"harmed": harmed, "cases": len(found), "seeds": len(by_seed)}


def costs(row, seconds):
    """What a column costs a person and a computer: medians of CPU seconds, lines, commands."""

    def median(prefix):
        return float(np.median([x for name, x in seconds.items() if name.startswith(prefix)]))

    if row.startswith("regrow"):
        spent = {
            "words": median("words/"),
            "export": median("bundle/"),
            "user": median("adapters/"),
        }
        lines = lines_of(HERE / "spotter.py")
    else:
        rank = row.split("r = ")[1][0]
        users = [x for name, x in seconds.items() if re.fullmatch(rf"peers/.*-r{rank}-\d+", name)]
        spent = {"words": median("base/"), "export": 0.0, "user": float(np.median(users))}
        lines = lines_of(HERE / "peers.py") + lines_of(KWT, "Block", "Kwt", "Mfcc", "read_wav")
        if row == OLIVE:
            spent["user"] += float(np.median([x for n, x in seconds.items() if "olive" in n]))
            lines += lines_of(HERE / "peers_olive.py")
    typed = [x.count(",") + 1 + (row == OLIVE) for x in TYPED[row.split()[0]]]
    minutes = [sum(spent.values()) / 60, spent["user"] / 60]
    return {"cpu_seconds": spent, "minutes": minutes, "lines": lines, "commands": typed}


def lines_of(path, *names):
    """Lines of code, without blank ones, comments and docstrings; of these definitions, or all."""
    text = path.read_text()
    tree = ast.parse(text)
    kept = [x for x in tree.body if not names or getattr(x, "name", "") in names]
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    strings = [x.body[0] for x in ast.walk(tree)
               if isinstance(x, documented) and ast.get_docstring(x) is not None]  # fmt: skip
    lines = enumerate(text.splitlines(), 1)
    code = {number for number, line in lines if line.strip() and line.strip()[0] != "#"}
    return len(code & _spans(kept) - _spans(strings))


def _spans(nodes):
    return {line for node in nodes for line in range(node.lineno, node.end_lineno + 1)}


ROWS = {  # as docs/keywords.md has them
    "accuracy before, in its own int8 graph, %": lambda x: f"{100 * x['before']:.1f}",
    "mean accuracy, % (lowest to highest seed)": lambda x: with_range(x, "after"),
    "10th percentile, % (lowest to highest seed)": lambda x: with_range(x, "p10"),
    "speakers harmed": lambda x: f"{x['harmed']} of {x['cases']}",
    "bytes per user": lambda x: f"{x['bytes']:,.0f}",
    "swap from a file: first, later, ms of CPU": lambda x: (
        f"{x['first_swap']:.2f}, {x['swap']:.2f}"
    ),
    "latency p50, p99, ms of CPU": lambda x: f"{x['p50']:.2f}, {x['p99']:.2f}",
    "peak RAM of the process, MB": lambda x: f"{x['peak_mb']:.0f}",
    "commands typed: first user, a further one": lambda x: "{}, {}".format(*x["commands"]),
    "lines of Python written": lambda x: str(x["lines"]),
    "new words, s of CPU": lambda x: f"{x['cpu_seconds']['words']:.0f}",
    "export, once, s of CPU": lambda x: f"{x['cpu_seconds']['export']:.0f}",
    "a user's training, s of CPU": lambda x: f"{x['cpu_seconds']['user']:.0f}",
    "weights to device, minutes of CPU: first user, a further one": lambda x: (
        "{:.1f}, {:.1f}".format(*x["minutes"])
    ),
}


def with_range(x, name):
    low, high = x[f"{name}_seeds"]
    return f"{100 * x[name]:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "recordings", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--peers", default=sys.executable, help="Python of the peers' environment")
    parser.add_argument(
        "--olive", action="store_true", help="also Olive, in the peers' environment"
    )
    parser.add_argument("--speakers", nargs="+", default=["george", "jackson", "lucas", "nicolas"])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    rows, turns, table = {}, {}, Table(given)
    for row, new, seed, case in table.cases():
        rows.setdefault(row, {})[new, seed] = table.measured(new, seed, row, case)
        turns.setdefault((new, seed), {})[row] = case
    for (new, seed), cases in turns.items():
        for row, (p50, p99) in table.latencies(new, seed, cases).items():
            rows[row][new, seed] |= {"p50": p50, "p99": p99}
    found = {row: summary(runs) | costs(row, table.seconds) for row, runs in rows.items()}
    print("\n| | " + " | ".join(found) + " |\n" + "|---" * (1 + len(found)) + "|")
    for name, shown in ROWS.items():
        print("| " + " | ".join([name, *map(shown, found.values())]) + " |")
    each = {row: {f"{s} {seed}": x for (s, seed), x in runs.items()} for row, runs in rows.items()}
    print(json.dumps({"rows": found, "seconds": table.seconds, "each": each}))
    return None


if __name__ == "__main__":
    sys.exit(main())
