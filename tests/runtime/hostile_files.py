"""Mutated adapters and manifests: each is read, or refused with one clean error, and costs little.

    python hostile_files.py FOLDER COUNT SEED

FOLDER has a bundle `bundle` and good adapters: they are what is mutated. Case number i follows
from SEED and i alone. What an adapter or a manifest that is still valid does next (fit, expand,
open, run) must go well or fail as cleanly. Prints a line of JSON; a case that goes wrong is written
to FOLDER/wrong and told on stderr.
"""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import struct
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from regrow_format.basis import BasisCache
from regrow_inputs import InputReader
from regrow_runtime import Adapter, Bundle, Manifest, RegrowError
from regrow_runtime.fit import check_fit
from regrow_runtime.slots import HEAD_FILE, expand, load_head

MAX_GROWTH = 48 << 20  # bytes of RAM over what good files take
MAX_MESSAGE = 3000


class Raw(str):
    """Text that stands in the JSON as it is."""


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**53, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0,
    1e308, 1e-320, Raw("1e999"), Raw("-1e999"), Raw("NaN"), Raw("Infinity"), Raw("9" * 5000),
    Raw("0x10"),
    "", " ", "0", "-1", "nola", "lora", "head", "fp32", "int2", "stored", "peft-mt19937",
    "a" * 5000,
    "../../x", "/etc/passwd", "C:\\x", "\0", "\n", "\x1b[2J", "\u202e", "é", "e\u0301", "🙂",
    Raw('"\\ud800"'), Raw('"\\udc00\\ud800"'), Raw('"\\u0000"'), [], {}, [[]], [None], {"": None},
    {"a": {"a": {"a": 1}}}, [0] * 1000, [["a", 1, 1]] * 300, Raw("[" * 3000 + "]" * 3000),
    Raw("[" * 100_000), Raw('{"a":' * 3000 + "1" + "}" * 3000), Raw(""), Raw("tru"), Raw("{"),
    "bfloat16", "float16", "float64", "object", "O", "V8", "S3", ">f4", "datetime64",
]  # fmt: skip


def dumps(value: Any) -> str:
    """JSON in which `Raw` stands as it is, and pairs of a list subclass `Pairs` make an object."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in value) + "}"
    if isinstance(value, dict):
        return dumps(Pairs(value.items()))
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


class Pairs(list):
    """An object as a list of pairs: a name may stand in it twice."""


def as_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs([k, as_pairs(v)] for k, v in value.items())
    return [as_pairs(item) for item in value] if isinstance(value, list) else value


def places(value: Any) -> list[tuple[list, int]]:
    """Every place in a tree: a list and an index into it."""
    found = []
    if isinstance(value, Pairs):
        for pair in value:
            found += [(pair, 1), *places(pair[1])]
    elif isinstance(value, list):
        for index, item in enumerate(value):
            found += [(value, index), *places(item)]
    return found


def objects(value: Any) -> list[Pairs]:
    inner = [v for holder, index in places(value) for v in [holder[index]] if isinstance(v, Pairs)]
    return [value, *inner]


def mutate_tree(tree: Pairs, rng: random.Random) -> None:
    spots = places(tree)
    if not spots:
        return
    (holder, index), (other, at) = rng.choice(spots), rng.choice(spots)
    target = rng.choice(objects(tree))
    kind = rng.randrange(9)
    if kind <= 3:
        holder[index] = as_pairs(rng.choice(ODD))
    elif kind == 4 and isinstance(holder[index], float | int) and abs(holder[index]) < 2**64:
        nearby = [-holder[index], holder[index] + 1, holder[index] * 2**20, holder[index] / 3]
        holder[index] = rng.choice(nearby)
    elif kind == 5 and type(other[at]) not in (list, Pairs):
        holder[index] = other[at]
    elif kind == 6 and target:
        target.pop(rng.randrange(len(target)))
    elif kind == 7 and target:
        target.append([rng.choice(target)[0], as_pairs(rng.choice(ODD))])  # a name twice
    elif kind == 8:
        target.append(
            [rng.choice(["surprise", "", "format", "\ud800", "a" * 5000, "\n\x1b[2J"]), 1]
        )


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(data) + 1), rng.randrange(1, 9)
    kind = rng.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + rng.randbytes(size) + data[at:]
    if kind == 2:
        return data[:at] + data[at + size :]
    if kind == 3:
        length = rng.choice([0, 1, 7, 8, at, len(data), len(data) - 8, 2**31, 2**63, 2**64 - 1])
        return struct.pack("<Q", length) + data[8:]
    if kind == 4:
        return data[:at] + b"\xff" * size + data[at + size :]
    changed = bytearray(data)
    for _ in range(size):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def split(data: bytes) -> tuple[dict, bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def mutate_adapter(data: bytes, rng: random.Random) -> bytes:
    kind = rng.randrange(3)
    if kind == 0:
        for _ in range(rng.randrange(1, 4)):
            data = mutate_bytes(data, rng) or b"\0"
        return data
    header, body = split(data)
    if kind == 1 and "__metadata__" in header:  # the metadata, in a file that is whole
        tree = as_pairs(json.loads(header["__metadata__"]["regrow"]))
        for _ in range(rng.randrange(1, 4)):
            mutate_tree(tree, rng)
        header["__metadata__"]["regrow"] = dumps(tree)
        text = json.dumps(header)
    else:  # what the header says of the tensors
        whole = as_pairs(header)
        for _ in range(rng.randrange(1, 4)):
            mutate_tree(whole, rng)
        text = dumps(whole)
    head = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(head)) + head + body


def mutate_manifest(data: bytes, rng: random.Random) -> bytes:
    if rng.randrange(5) == 0:
        return mutate_bytes(data, rng)
    tree = as_pairs(json.loads(data))
    for _ in range(rng.randrange(1, 4)):
        mutate_tree(tree, rng)
    return dumps(tree).encode("utf-8", "surrogatepass")


class Cases:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.adapters = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
        self.bundle = folder / "mutated"
        shutil.copytree(folder / "bundle", self.bundle)
        self.manifest = (self.bundle / "manifest.json").read_bytes()
        self.head = (self.bundle / HEAD_FILE).read_bytes()
        self.fits = Manifest.load(folder / "bundle")
        self.good = Adapter.from_bytes(self.adapters[0])
        self.counts: Counter[str] = Counter()

    def run(self, number: int) -> None:
        rng = random.Random(self.seed * 10**9 + number)
        if rng.randrange(20) == 0:
            self.check("head", number, mutate_adapter(self.head, rng), self.loaded)
        elif rng.randrange(10) < 6:
            data = mutate_adapter(rng.choice(self.adapters), rng)
            self.check("adapter", number, data, self.adapter)
        else:
            data = mutate_manifest(self.manifest, rng)
            self.check("manifest", number, data, self.opened)

    def check(self, what: str, number: int, data: bytes, use: Callable[[bytes], str]) -> None:
        try:
            self.counts[f"{what} {use(data)}"] += 1
        except RegrowError as error:
            message = str(error)
            first, *more = message.split("\n")
            clean = all(line.isprintable() for line in (first, *more)) and first
            if not clean or len(message) > MAX_MESSAGE or (more and not first.endswith(":")):
                self.wrong(what, number, data, f"message: {message:.4000}")
            self.counts[f"{what} refused"] += 1
        except BaseException:
            self.wrong(what, number, data, traceback.format_exc())

    def wrong(self, what: str, number: int, data: bytes, why: str) -> None:
        path = self.folder / "wrong"
        path.mkdir(exist_ok=True)
        (path / f"{what}-{number}").write_bytes(data)
        sys.stderr.write(f"{what} {number} of seed {self.seed}: {why}\n")
        self.counts["wrong"] += 1

    def adapter(self, data: bytes) -> str:
        adapter = Adapter.from_bytes(data, "mutated")
        adapter.to_bytes()  # what was read can be written
        try:
            check_fit(adapter, self.fits)
        except RegrowError:
            return "read"
        feeds = expand(adapter, self.fits, BasisCache(), self.bundle)
        assert all(np.isfinite(array).all() for array in feeds.values())
        return "fits"

    def loaded(self, data: bytes) -> str:
        (self.bundle / HEAD_FILE).write_bytes(data)
        return f"of {len(load_head(self.bundle, self.fits))} arrays"

    def opened(self, data: bytes) -> str:
        (self.bundle / HEAD_FILE).write_bytes(self.head)
        (self.bundle / "manifest.json").write_bytes(data)
        manifest = Manifest.load(self.bundle)
        manifest.to_json().encode()
        bundle = Bundle.open(self.bundle, threads=1)
        pixels = np.ones((2, 1, 4, 4), np.float32)
        bundle.run({"pixel_values": pixels})
        bundle.swap(self.good, name="good")
        bundle.run({"pixel_values": pixels})
        bundle.run({"pixel_values": pixels}, ["good", None])
        InputReader.from_bundle(bundle)
        bundle.labels()
        return "runs"


def peak() -> int:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def main() -> None:
    folder, count, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    cases = Cases(folder, seed)
    for data in cases.adapters:
        cases.check("good adapter", -1, data, cases.adapter)
    cases.check("good manifest", -1, cases.manifest, cases.opened)
    before = peak()
    for number in range(count):
        cases.run(number)
    growth = peak() - before
    if growth > MAX_GROWTH:
        sys.stderr.write(f"peak memory grew by {growth} bytes\n")
        cases.counts["wrong"] += 1
    sys.stdout.write(json.dumps({**cases.counts, "peak_growth_mb": math.ceil(growth / 1e6)}))
    sys.exit(bool(cases.counts["wrong"]))


if __name__ == "__main__":
    main()
