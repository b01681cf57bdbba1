"""The conformance vectors in tests/vectors: the runtime gives them, and make.py writes them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from expansions import flat
from safetensors.numpy import load_file

from regrow_format.methods import METHODS, get_method
from regrow_format.mt19937 import permutation_head, uniform_kaiming
from regrow_format.philox import philox4x32
from regrow_format.quantize import pack, unpack
from regrow_runtime import Adapter, BasisCache, locations, sign_bits, signs

FOLDER = Path(__file__).parents[1] / "vectors"


def _json(name: str) -> Any:
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


INDEX = _json("index.json")
ENTRIES = {entry["name"]: entry for entry in INDEX["adapters"]}


def _expansion(adapter: Adapter) -> dict[str, np.ndarray]:
    """`<target>.<part>` of the slots, and `<layer>.weight` and `.bias` of the head."""
    found = {
        f"{target}.{part}": array
        for target, parts in flat(get_method(adapter.method).expand(adapter, BasisCache(0))).items()
        for part, array in parts.items()
    }
    for layer in adapter.head.layers if adapter.head else ():
        found |= {f"{layer.name}.weight": layer.weight.T, f"{layer.name}.bias": layer.bias}
    return found


def test_the_files_are_those_that_make_writes():
    spec = importlib.util.spec_from_file_location("make_vectors", FOLDER / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.files()
    for name, data in made.items():
        assert (FOLDER / name).read_bytes() == data, f"{name}: run tests/vectors/make.py"
    found = {p.relative_to(FOLDER).as_posix() for p in FOLDER.rglob("*.*") if p.is_file()}
    assert {f for f in found if "__pycache__" not in f} == {*made, "make.py", "README.md"}


def test_they_are_small_and_every_method_has_some():
    files = [*FOLDER.rglob("*.json"), *FOLDER.rglob("*.safetensors")]
    assert 100 < sum(path.stat().st_size for path in files) / 1e3 < 180
    assert {entry["method"] for entry in ENTRIES.values()} == set(METHODS)


def test_philox():
    for row in _json("philox.json"):
        assert philox4x32(*row["counter"], key=tuple(row["key"])).tolist() == row["words"]


def test_signs():
    for row in _json("signs.json"):
        place = int(row["seed"]), row["role"]
        found = signs(*place, row["vector"], row["entries"], layer=row["layer"])
        assert np.packbits(found > 0, bitorder="little").tobytes().hex() == row["bits"]
        assert found.sum() == row["sum"]
        bits = sign_bits(*place, row["vector"] + 1, row["entries"], layer=row["layer"])[-1]
        ones = np.unpackbits(bits, count=row["entries"], bitorder="little")
        np.testing.assert_array_equal(ones, found > 0)


def test_locations():
    for row in _json("locations.json"):
        found = locations(int(row["seed"]), row["n"], row["out"], row["in"])
        assert found.tolist() == row["places"]


def test_streams_of_peft():
    rows = _json("mt19937.json")
    for row in rows["words"]:
        words = np.random.RandomState(int(row["seed"]) % 2**32).randint(
            0, 2**32, size=1300, dtype=np.uint32
        )
        assert words[:8].tolist() == row["first"]
        assert words[620:628].tolist() == row["from 620"]
        assert words[1290:].tolist() == row["from 1290"]
    for row in rows["vera"]:
        sizes = row["rank"], row["in"], row["out"], row["dtype"]
        for matrix, part in zip(uniform_kaiming(int(row["seed"]), *sizes), "AB", strict=True):
            assert matrix.astype("<f4").tobytes().hex() == row[part]
    for row in rows["fourierft"]:
        found = permutation_head(int(row["seed"]), row["n"], row["out"] * row["in"])
        assert found.tolist() == row["places"]


def test_packing():
    for row in _json("packing.json"):
        codes = np.array(row["codes"], dtype=np.int8)
        packed = pack(codes, row["bits"])
        assert [line.tobytes().hex() for line in packed] == row["packed"]
        np.testing.assert_array_equal(unpack(packed, codes.shape[1], row["bits"]), codes)


@pytest.mark.parametrize("name", ENTRIES)
def test_adapters_expand_to_what_the_vectors_say(name):
    entry = ENTRIES[name]
    adapter = Adapter.load(FOLDER / entry["adapter"])
    assert (adapter.method, adapter.storage) == (entry["method"], entry["storage"])
    assert adapter.to_bytes() == (FOLDER / entry["adapter"]).read_bytes()
    expected, found = load_file(FOLDER / entry["expansion"]), _expansion(adapter)
    assert found.keys() == expected.keys() == entry["tensors"].keys()
    for part, array in found.items():
        about, data = entry["tensors"][part], expected[part].astype("<f4").tobytes()
        assert (list(array.shape), array.dtype) == (about["shape"], np.float32)
        assert hashlib.sha256(data).hexdigest() == about["sha256"]
        if entry["match"] == "exact":
            assert array.astype("<f4").tobytes() == data, part
        else:
            limit = INDEX["tolerance"] * np.abs(expected[part]).max()
            np.testing.assert_allclose(array, expected[part], rtol=0, atol=limit, err_msg=part)
