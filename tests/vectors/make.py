"""Writes the conformance vectors in this folder; the same bytes every time and everywhere.

    python tests/vectors/make.py

Numbers come from the formulas in docs/basis.md, written out once more below, the slow and plain
way. The runtime only packs the adapter files: it is what these vectors test, not their source.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from regrow_format.adapter import (
    STORAGE,
    Adapter,
    Coefficients,
    Head,
    HeadLayer,
    Probe,
    Target,
    Validated,
)
from regrow_format.basis import PHILOX_SIGN, BasisSpec
from regrow_format.methods import get_method

FOLDER = Path(__file__).parent
TOLERANCE = 1e-6
BIG = 12345678901234567890
SEEDS = (0, 1, 2**32, 2**63 + 5, BIG, 2**64 - 1)
BACKBONE = "sha256:" + "5e" * 32

# A down projection passes a block of 128 signs; no width fills its last byte, word or block.
TARGETS = (Target("0.down", 130, 9), Target("0.key", 9, 9), Target("0.up", 9, 130))
# In UTF-8 the last name comes last, in UTF-16 it does not.
NAMES = (Target("a", 130, 9), Target("ﬀ", 9, 9), Target("😀", 9, 130))
# Twelve blocks take one row a layer; sorted by bytes, block 10 stands before block 2.
BLOCKS = tuple(
    Target(f"b.{block}.{part}", 9, width)
    for block in sorted(range(12), key=str)
    for part, width in (("q", 9), ("up", 13))
)
GRIDS = (Target("even", 12, 8), Target("odd", 7, 11), Target("same", 12, 8), Target("wide", 40, 3))

Arrays = dict[str, np.ndarray]


# -- the basis, as in docs/basis.md ---------------------------------------------------------------


def philox(counter: Iterable[int], key: Iterable[int]) -> tuple[int, int, int, int]:
    """Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1 = (p1 >> 32) ^ c1 ^ k0, p1 & 0xFFFFFFFF
        c2, c3 = (p0 >> 32) ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def block(seed: int, role: int, vector: int, index: int, layer: int) -> tuple[int, ...]:
    """The four words of a block of a basis vector."""
    return philox((index, vector, role, layer), (seed & 0xFFFFFFFF, seed >> 32))


def signs(seed: int, role: int, vectors: range, entries: int, layer: int = 0) -> np.ndarray:
    """int64 [len(vectors), entries] of +1 and -1."""
    rows = []
    for vector in vectors:
        blocks = (block(seed, role, vector, b, layer) for b in range(-(-entries // 128)))
        words = [word for some in blocks for word in some]
        rows.append([2 * (words[p // 32] >> p % 32 & 1) - 1 for p in range(entries)])
    return np.array(rows, dtype=np.int64)


def locations(seed: int, count: int, grid: int) -> list[int]:
    """The first `count` different places of a grid."""
    found: dict[int, None] = {}
    index = 0
    while len(found) < count:
        words = block(seed, 4, 0, index, 0)
        found.update(dict.fromkeys(word * grid >> 32 for word in words))
        index += 1
    return list(found)[:count]


def mt19937(seed: int) -> Callable[[], int]:
    """Outputs of 32 bits, one a call; Python's own generator, its state set by `init_genrand`."""
    words = [seed % 2**32]
    for i in range(1, 624):
        words.append((1812433253 * (words[-1] ^ words[-1] >> 30) + i) % 2**32)
    generator = random.Random()
    generator.setstate((3, (*words, 624), None))
    return lambda: generator.getrandbits(32)


def uniform(word: Callable[[], int], rows: int, columns: int, fan: int, dtype: str) -> np.ndarray:
    """PEFT's matrix, float32 [rows, columns]."""
    h = float(np.float32(math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan))))
    entries = [word() % 2**24 * 2.0**-24 * (2 * h) - h for _ in range(rows * columns)]
    single = np.array(entries, dtype=np.float64).astype(np.float32)
    if dtype == "float16":
        single = np.array([struct.unpack("<e", struct.pack("<e", x))[0] for x in single.tolist()])
    if dtype == "bfloat16":  # the nearer of two neighbours, the even one in the middle
        bits = single.view(np.uint32).astype(np.uint64)
        low, half = bits & 0xFFFF, 0x8000
        up = (low > half) | ((low == half) & (bits >> 16 & 1 == 1))
        single = (((bits >> 16) + up << 16).astype(np.uint32)).view(np.float32)
    return single.astype(np.float32).reshape(rows, columns)


def shuffled(seed: int, count: int, grid: int) -> list[int]:
    """The first `count` numbers of PEFT's shuffle of a grid."""
    word, numbers = mt19937(seed), list(range(grid))
    for i in range(count):
        other = i + word() % (grid - i)
        numbers[i], numbers[other] = numbers[other], numbers[i]
    return numbers[:count]


# -- expansions, as in docs/basis.md --------------------------------------------------------------


def values(part: Coefficients) -> np.ndarray:
    """float32 [rows, length]: stored numbers times their scales, one rounding each."""
    rows, length = part.values.shape
    groups = part.scale.reshape(rows, -1)
    group = part.group or max(length, 1)
    return part.values.astype(np.float32) * groups[:, np.arange(length) // group]


def stacked(adapter: Adapter, part: str, widths: list[int], each: int) -> list[np.ndarray]:
    """By target, its float32 [each, width] rows of the tensors `<part>.<width>`."""
    found, used = [], dict.fromkeys(widths, 0)
    for width in widths:
        rows = values(adapter.coefficients[f"{part}.{width}"])
        found.append(rows[used[width] : used[width] + each])
        used[width] += each
    return found


def nola(adapter: Adapter) -> Arrays:
    rank, found = adapter.config["rank"], {}
    for index, target in enumerate(adapter.targets):
        layer = 0 if adapter.config["shared"] else 1 + index
        shapes = {"A": (target.in_features, rank), "B": (rank, target.out_features)}
        for role, (name, tensor) in enumerate({"A": "alpha", "B": "beta"}.items()):
            part = adapter.coefficients[tensor]
            vectors, entries = part.values.shape[1], math.prod(shapes[name])
            basis = signs(adapter.seed, role, range(vectors), entries, layer)
            if part.group:
                sums = values(part)[index].astype(np.float64) @ basis
                factor = sums.astype(np.float32)
            elif part.values.dtype == np.int8:
                sums = part.values[index].astype(np.int64) @ basis
                factor = sums.astype(np.float32) * part.scale[index]
            else:
                sums = part.values[index].astype(np.float64) @ basis
                factor = (sums * part.scale[index]).astype(np.float32)
            found[f"{target.name}.{name}"] = factor.reshape(shapes[name])
    return found


def vera(adapter: Adapter) -> Arrays:
    rank, targets = adapter.config["rank"], adapter.targets
    wide, high = max(t.in_features for t in targets), max(t.out_features for t in targets)
    if adapter.basis.kind == "stored":
        a, b = (adapter.stored_basis[f"basis.{name}"] for name in "AB")
    elif adapter.basis.kind == "peft-mt19937":
        fields, word = adapter.basis.fields, mt19937(adapter.seed)
        a = uniform(word, rank, fields["in"], fields["in"], fields["dtype"])
        b = uniform(word, fields["out"], rank, rank, fields["dtype"])
    else:
        a = signs(adapter.seed, 2, range(rank), wide)
        b = signs(adapter.seed, 3, range(high), rank)
    a, b = a.astype(np.float32), b.astype(np.float32)
    d = values(adapter.coefficients["d"])
    rows = stacked(adapter, "b", [t.out_features for t in targets], 1)
    found = {}
    for index, t in enumerate(targets):
        found[f"{t.name}.A"] = a[:, : t.in_features].T * d[index]
        found[f"{t.name}.B"] = b[: t.out_features].T * rows[index]
    return found


def lora(adapter: Adapter) -> Arrays:
    rank, targets = adapter.config["rank"], adapter.targets
    a = stacked(adapter, "A", [t.in_features for t in targets], rank)
    b = stacked(adapter, "B", [t.out_features for t in targets], rank)
    found = {}
    for index, t in enumerate(targets):
        found |= {f"{t.name}.A": a[index].T, f"{t.name}.B": b[index]}
    return found


def places_of(adapter: Adapter, target: Target) -> list[int]:
    """Where a target's coefficients stand on its grid."""
    high, wide, count = target.out_features, target.in_features, adapter.config["n"]
    if adapter.basis.kind == "stored":
        return adapter.stored_basis[f"places.{high}x{wide}"].tolist()
    draw = shuffled if adapter.basis.kind == "peft-mt19937" else locations
    return draw(adapter.seed, count, high * wide)


def fourierft(adapter: Adapter) -> Arrays:
    found = {}
    for t, row in zip(adapter.targets, values(adapter.coefficients["c"]).tolist(), strict=True):
        high, wide, delta = t.out_features, t.in_features, np.zeros((t.in_features, t.out_features))
        places = [divmod(z, wide) for z in places_of(adapter, t)]
        for b, a in np.ndindex(wide, high):
            turns = [a * j % high / high + b * k % wide / wide for j, k in places]
            # To 12 places, so that libraries that differ in the 16th write the same file.
            waves = [round(math.cos(2 * math.pi * turn), 12) for turn in turns]
            delta[b, a] = math.fsum(v * w for v, w in zip(row, waves, strict=True))
        found[f"{t.name}.D"] = delta.astype(np.float32)
    return found


def ia3(adapter: Adapter) -> Arrays:
    ends = tuple(f".{ending}" for ending in adapter.config["feedforward"])
    forward = [t for t in adapter.targets if f".{t.name}".endswith(ends)]
    others = [t for t in adapter.targets if t not in forward]
    t_rows = stacked(adapter, "t", [t.in_features for t in forward], 1)
    s_rows = stacked(adapter, "s", [t.out_features for t in others], 1)
    found = {f"{t.name}.t": row for t, row in zip(forward, t_rows, strict=True)}
    return found | {f"{t.name}.s": row for t, row in zip(others, s_rows, strict=True)}


def ssf(adapter: Adapter) -> Arrays:
    widths = [t.out_features for t in adapter.targets]
    found = {}
    for part in "sb":
        rows = stacked(adapter, part, widths, 1)
        found |= {f"{t.name}.{part}": row for t, row in zip(adapter.targets, rows, strict=True)}
    return found


def bitfit(adapter: Adapter) -> Arrays:
    targets = adapter.targets
    rows = stacked(adapter, "b", [t.out_features for t in targets], 1)
    return {f"{t.name}.b": row[0] for t, row in zip(targets, rows, strict=True)}


EXPAND: dict[str, Callable[[Adapter], Arrays]] = {
    "nola": nola, "vera": vera, "lora": lora, "fourierft": fourierft, "ia3": ia3,
    "ssf": ssf,
    "bitfit": bitfit,
    "head": lambda adapter: {},
}  # fmt: skip


def expansion(adapter: Adapter) -> Arrays:
    """What slots take, without the leading n: `<target>.<part>`, and the head's layers."""
    found = EXPAND[adapter.method](adapter)
    for layer in adapter.head.layers if adapter.head else ():
        found[f"{layer.name}.weight"] = layer.weight.T
        found[f"{layer.name}.bias"] = layer.bias
    return {name: np.ascontiguousarray(array, dtype="<f4") for name, array in found.items()}


# -- adapters -------------------------------------------------------------------------------------


def drawn(rng: random.Random, count: int, top: int) -> np.ndarray:
    """int64 [count] from -top to top."""
    return np.array([rng.getrandbits(32) % (2 * top + 1) - top for _ in range(count)])


def adapter(
    method: str, storage: str, config: Mapping[str, Any], targets: tuple[Target, ...], **more: Any
) -> Adapter:
    """With random numbers and scales that use all bits of a float32."""
    rng = random.Random(f"{method} {storage} {sorted(config.items())}")
    group, coefficients = more.get("group"), {}
    for name, (rows, length) in get_method(method).layout(config, targets).items():
        bits = STORAGE[storage]
        codes = drawn(rng, rows * length, 2 ** (bits - 1) - 1 if bits <= 8 else 1000)
        numbers = codes.astype(np.int8) if bits <= 8 else (codes / 256).astype(np.float32)
        groups = -(-length // group) if group else 1
        scale = [(1 + rng.getrandbits(23) * 2.0**-23) / 128 for _ in range(rows * groups)]
        coefficients[name] = Coefficients(
            numbers.reshape(rows, length),
            np.array(scale, dtype=np.float32).reshape((rows, groups) if group else (rows,)),
            group,
        )
    more = {"seed": BIG, "backbone_id": BACKBONE, "basis": PHILOX_SIGN, **more}
    return Adapter(method, config, more.pop("seed"), more.pop("backbone_id"), targets,
                   coefficients, storage, **more)  # fmt: skip


def own_head(storage: str) -> Head:
    """Two layers, 3 classes."""
    rng, layers = random.Random("head"), []
    for name, wide, high in (("head.dense", 9, 5), ("head.out", 5, 3)):
        weight = (drawn(rng, high * wide, 1000) / 256).astype(np.float32)
        bias = (drawn(rng, high, 1000) / 256).astype(np.float32)
        layers.append(HeadLayer(name, weight.reshape(high, wide), bias))
    return Head(tuple(layers), ("no", "naïve", "猫"), storage)


def stored_matrices(rank: int) -> Arrays:
    rng = random.Random("matrices")
    shapes = {"basis.A": (rank, 130), "basis.B": (130, rank)}
    return {
        name: (drawn(rng, math.prod(shape), 1000) / 512).astype(np.float16).reshape(shape)
        for name, shape in shapes.items()
    }


def adapters() -> dict[str, tuple[Adapter, bool]]:
    """By name, an adapter and whether its expansion is exact."""
    wide = {"k": 37, "l": 21, "rank": 3, "c": 2.0, "shared": True}
    peft = {"in": 140, "out": 133}
    grids = {t.out_features * t.in_features: t for t in GRIDS}
    places = {
        f"places.{t.out_features}x{t.in_features}": np.array(shuffled(9, 25, size), dtype=np.uint32)
        for size, t in grids.items()
    }
    waves = {"n": 25, "alpha": 12.5}
    return {
        "nola-int4": (adapter("nola", "int4", wide, TARGETS), True),
        "nola-int8": (adapter("nola", "int8", {**wide, "k": 300}, TARGETS, seed=2**63 + 5), True),
        "nola-layers-int5": (adapter("nola", "int5", {**wide, "shared": False}, NAMES), True),
        "nola-rows-int4": (
            adapter("nola", "int4", {**wide, "rank": 2, "shared": False}, BLOCKS), True),
        "nola-grouped-int6": (adapter("nola", "int6", wide, TARGETS, group=8), False),
        "nola-fp16": (adapter("nola", "fp16", wide, TARGETS), False),
        "vera-int8": (adapter("vera", "int8", {"rank": 5}, TARGETS), True),
        "vera-grouped-int3": (adapter("vera", "int3", {"rank": 9}, TARGETS, group=8), True),
        "vera-peft-float32": (
            adapter("vera", "fp32", {"rank": 4}, TARGETS, seed=0,
                    basis=BasisSpec("peft-mt19937", 1, {**peft, "dtype": "float32"})), False),
        "vera-peft-bfloat16": (
            adapter("vera", "int8", {"rank": 4}, TARGETS, seed=2**32 + 7,
                    basis=BasisSpec("peft-mt19937", 1, {**peft, "dtype": "bfloat16"})), False),
        "vera-stored": (
            adapter("vera", "fp16", {"rank": 4}, TARGETS, basis=BasisSpec("stored"),
                    stored_basis=stored_matrices(4)), False),
        "fourierft-int8": (adapter("fourierft", "int8", waves, GRIDS), False),
        "fourierft-peft-fp16": (
            adapter("fourierft", "fp16", waves, GRIDS, seed=777,
                    basis=BasisSpec("peft-mt19937")), False),
        "fourierft-stored-int4": (
            adapter("fourierft", "int4", waves, GRIDS, basis=BasisSpec("stored"),
                    stored_basis=places), False),
        "lora-int4": (
            adapter("lora", "int4", {"rank": 3, "alpha": 6.0, "rslora": True}, TARGETS,
                    head=own_head("fp32"), user={"name": "naïve 猫"},
                    validated=(Validated("fp32", "accuracy", 0.5, 0.75, 40),),
                    probe=Probe(np.array([0.5, -1.25], dtype=np.float16), 0.01)), True),
        "lora-int7": (
            adapter("lora", "int7", {"rank": 2, "alpha": 2.0, "rslora": False}, TARGETS), True),
        "ia3-int3": (adapter("ia3", "int3", {"feedforward": ["0.down", "ﬀ"]}, TARGETS), True),
        "ia3-blocks-fp16": (adapter("ia3", "fp16", {"feedforward": ["up"]}, BLOCKS), True),
        "ssf-int8": (adapter("ssf", "int8", {}, TARGETS), True),
        "bitfit-fp16": (
            adapter("bitfit", "fp16", {}, TARGETS,
                    extra={"norm.weight": np.ones(9, dtype=np.float32)}), True),
        "bitfit-int2": (adapter("bitfit", "int2", {}, TARGETS), True),
        "head": (adapter("head", "fp16", {}, (), head=own_head("fp16")), True),
    }  # fmt: skip


# -- files ----------------------------------------------------------------------------------------


def lines(rows: Iterable[object]) -> bytes:
    """A JSON array, an entry a line."""
    text = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    return f"[\n{text}\n]\n".encode()


def philox_file() -> bytes:
    counters = [(0,) * 4, (2**32 - 1,) * 4, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)]
    keys = [(0, 0), (2**32 - 1,) * 2, (0xA4093822, 0x299F31D0)]
    rng = random.Random(0)
    for _ in range(13):
        counters.append(tuple(rng.getrandbits(32) for _ in range(4)))
        keys.append(tuple(rng.getrandbits(32) for _ in range(2)))
    return lines(
        {"counter": c, "key": k, "words": philox(c, k)} for c, k in zip(counters, keys, strict=True)
    )


def signs_file() -> bytes:
    rows = []
    for number, seed in enumerate(SEEDS):
        role, vector, layer, entries = number % 4, 3**number, 11 * number, 1 + 101 * number
        found = signs(seed, role, range(vector, vector + 1), entries, layer)[0]
        bits = np.packbits(found > 0, bitorder="little").tobytes().hex()
        rows.append({"seed": str(seed), "role": role, "vector": vector, "layer": layer,
                     "entries": entries, "bits": bits, "sum": int(found.sum())})  # fmt: skip
    return lines(rows)


def locations_file() -> bytes:
    large = [(60, 768, 768), (60, 3072, 768), (60, 65535, 65537)]
    sizes = [(20, 5, 4), (1, 1, 1), (50, 12, 8), *large]
    return lines(
        {"seed": str(seed), "n": n, "out": high, "in": wide,
         "places": locations(seed, n, high * wide)}
        for seed, (n, high, wide) in zip((*SEEDS[:3], 777, *SEEDS[4:]), sizes, strict=True)
    )  # fmt: skip


def hexed(array: np.ndarray) -> str:
    return array.astype("<f4").tobytes().hex()


def mt19937_file() -> bytes:
    words, matrices, places = [], [], []
    for seed in SEEDS:
        word = mt19937(seed)
        stream = [word() for _ in range(1300)]
        words.append({"seed": str(seed), "first": stream[:8], "from 620": stream[620:628],
                      "from 1290": stream[1290:1300]})  # fmt: skip
    for seed, dtype in ((0, "float32"), (2**32 + 7, "bfloat16"), (BIG, "float16")):
        rank, wide, high, word = 4, 29, 23, mt19937(seed)
        a, b = uniform(word, rank, wide, wide, dtype), uniform(word, high, rank, rank, dtype)
        matrices.append({"seed": str(seed), "rank": rank, "in": wide, "out": high, "dtype": dtype,
                         "A": hexed(a), "B": hexed(b)})  # fmt: skip
    for seed, n, high, wide in ((777, 60, 768, 768), (777, 60, 3072, 768), (BIG, 20, 5, 4)):
        places.append({"seed": str(seed), "n": n, "out": high, "in": wide,
                       "places": shuffled(seed, n, high * wide)})  # fmt: skip
    rows = {"words": words, "vera": matrices, "fourierft": places}
    text = ",\n".join(f'"{name}": {lines(part).decode().strip()}' for name, part in rows.items())
    return f"{{\n{text}\n}}\n".encode()


def packing_file() -> bytes:
    rng, found = random.Random(1), []
    for bits in range(2, 8):
        lowest = -(2 ** (bits - 1))
        for length in (1, 8, 11):
            rows = [[lowest + rng.getrandbits(bits) for _ in range(length)] for _ in range(2)]
            packed = []
            for row in rows:
                number = sum(code % 2**bits << i * bits for i, code in enumerate(row))
                packed.append(number.to_bytes(-(-length * bits // 8), "little").hex())
            found.append({"bits": bits, "codes": rows, "packed": packed})
    return lines(found)


def files() -> dict[str, bytes]:
    """Every file of this folder that is made, by its path in it."""
    found = {
        "philox.json": philox_file(),
        "signs.json": signs_file(),
        "locations.json": locations_file(),
        "mt19937.json": mt19937_file(),
        "packing.json": packing_file(),
    }
    rows = []
    for name, (made, exact) in adapters().items():
        tensors = expansion(made)
        paths = {"adapter": f"adapters/{name}.safetensors",
                 "expansion": f"expansions/{name}.safetensors"}  # fmt: skip
        found |= {paths["adapter"]: made.to_bytes(), paths["expansion"]: save(tensors)}
        rows.append({
            "name": name, **paths, "method": made.method, "storage": made.storage,
            "match": "exact" if exact else "tolerance",
            "tensors": {
                part: {"shape": array.shape, "sha256": hashlib.sha256(array.tobytes()).hexdigest()}
                for part, array in tensors.items()
            },
        })  # fmt: skip
    text = f'{{"tolerance": {TOLERANCE}, "adapters": {lines(rows).decode().strip()}}}\n'
    return {**found, "index.json": text.encode()}


def main() -> None:
    for name, data in files().items():
        path = FOLDER / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
