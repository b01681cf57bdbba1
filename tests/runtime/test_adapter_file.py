"""The adapter file: what is written is read again, to the byte, and nothing broken is read."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from regrow_format.adapter import FORMAT, STORAGE, Adapter, Coefficients, Target, Validated
from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.methods import METHODS

# The smallest file: NOLA with k = l = rank = 1 on one layer of 1 x 1. docs/adapter-format.md walks
# through it byte by byte.
GOLDEN_SIZE = 538
GOLDEN_SHA256 = "dcd673c685efc873dbb864eab701a6da363cb78b94ee4380619175f4d60998fd"


@pytest.fixture(scope="module")
def smallest() -> Adapter:
    return Adapter(
        method="nola",
        config={"k": 1, "l": 1, "rank": 1, "c": 1.0, "shared": True},
        seed=1,
        backbone_id="sha256:00",
        targets=(Target("a", 1, 1),),
        coefficients={
            "alpha": Coefficients(np.array([[127]], np.int8), np.array([0.5], np.float32)),
            "beta": Coefficients(np.array([[-127]], np.int8), np.array([2.0], np.float32)),
        },
        storage="int8",
    )


@pytest.fixture(scope="module")
def good(make_adapter) -> bytes:
    """A file with everything in it."""
    adapter = make_adapter("nola", "int4", classes=2)
    scores = (Validated("fp32", "accuracy", 0.5, 0.75, 40),)
    return replace(adapter, validated=scores, user={"name": "Zoë"}).to_bytes()


def _same(a: Adapter, b: Adapter) -> None:
    plain = ("method", "config", "seed", "backbone_id", "targets", "storage", "basis", "validated")
    for name in (*plain, "user", "group"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.coefficients.keys() == b.coefficients.keys()
    for name, part in a.coefficients.items():
        np.testing.assert_array_equal(part.values, b.coefficients[name].values)
        np.testing.assert_array_equal(part.scale, b.coefficients[name].scale)
        assert part.group == b.coefficients[name].group
        assert part.values.dtype == b.coefficients[name].values.dtype
    for some, others in ((a.stored_basis, b.stored_basis), (a.extra, b.extra)):
        assert some.keys() == others.keys()
        for name, array in some.items():
            np.testing.assert_array_equal(array, others[name], strict=True)
    assert (a.probe is None) == (b.probe is None)
    if a.probe is not None:
        assert a.probe.tolerance == b.probe.tolerance
        np.testing.assert_array_equal(a.probe.expected, b.probe.expected, strict=True)
    assert (a.head is None) == (b.head is None)
    if a.head is not None:
        assert a.head.labels == b.head.labels
        for one, other in zip(a.head.layers, b.head.layers, strict=True):
            assert one.name == other.name
            np.testing.assert_array_equal(one.weight, other.weight)
            np.testing.assert_array_equal(one.bias, other.bias)


@pytest.mark.parametrize("group", [None, 8])
@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("storage", sorted(STORAGE))
def test_what_is_written_is_read_again(make_adapter, tmp_path, method, storage, group):
    adapter = make_adapter(method, storage, classes=3, group=group)
    adapter = replace(
        adapter,
        validated=(Validated("int8", "accuracy", 0.25, 1.0, 7),),
        user={"name": "Zoë 🐝", "empty": ""},
    )
    path = tmp_path / "user.safetensors"
    size = adapter.save(path)
    assert size == path.stat().st_size
    found = Adapter.load(path)
    _same(found, adapter)
    assert found.to_bytes() == path.read_bytes()
    assert found.digest() == hashlib.sha256(path.read_bytes()).hexdigest() == adapter.digest()


def test_a_head_in_fp32_keeps_every_number(make_adapter):
    adapter = make_adapter(classes=3)
    layer = adapter.head.layers[0]
    fine = replace(layer, weight=layer.weight + np.float32(1e-6), bias=layer.bias / np.float32(3))
    adapter = replace(adapter, head=replace(adapter.head, layers=(fine,), storage="fp32"))
    found = Adapter.from_bytes(adapter.to_bytes())
    _same(found, adapter)
    assert found.head.storage == "fp32"
    assert found.digest() == adapter.digest()


@pytest.mark.parametrize("seed", [0, 1, 2**53 + 1, 2**63, 2**64 - 1])
def test_every_seed_survives(make_adapter, seed):
    assert Adapter.from_bytes(make_adapter(seed=seed).to_bytes()).seed == seed


def test_fewer_bits_make_a_smaller_file(make_adapter):
    sizes = [
        len(make_adapter(storage=storage, k=1000, l=1000).to_bytes())
        for storage in ("fp32", "fp16", "int8", "int7", "int6", "int5", "int4", "int3", "int2")
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == len(sizes)


def test_an_adapter_may_be_a_head_alone(make_adapter):
    adapter = make_adapter(targets=(), classes=2)
    _same(Adapter.from_bytes(adapter.to_bytes()), adapter)


# -- golden bytes ----------------------------------------------------------------------------------


def test_golden_bytes(smallest):
    data = smallest.to_bytes()
    size = int.from_bytes(data[:8], "little")
    assert data[8:24] == b'{"__metadata__":'
    assert data[8 + size :].hex() == "0000003f" + "00000040" + "7f" + "81"
    assert (len(data), hashlib.sha256(data).hexdigest()) == (GOLDEN_SIZE, GOLDEN_SHA256)


def test_the_golden_file_is_the_documents():
    page = Path(__file__).parents[2] / "docs" / "adapter-format.md"
    text = page.read_text(encoding="utf-8")
    assert f"sha256 {GOLDEN_SHA256}" in text
    assert f"{GOLDEN_SIZE} bytes" in text


def test_golden_metadata(smallest):
    data = smallest.to_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header.pop("__metadata__") == {
        "regrow": '{"backbone_id":"sha256:00","basis":{"kind":"philox-sign","version":1},'
        '"config":{"c":1.0,"k":1,"l":1,"rank":1,"shared":true},"format":1,"method":"nola",'
        '"seed":"1","storage":"int8","targets":[["a",1,1]]}'
    }
    assert header == {
        "alpha.scale": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "beta.scale": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        "alpha": {"dtype": "I8", "shape": [1, 1], "data_offsets": [8, 9]},
        "beta": {"dtype": "I8", "shape": [1, 1], "data_offsets": [9, 10]},
    }


def test_the_same_adapter_is_the_same_bytes(make_adapter):
    a = make_adapter()
    b = replace(a, config=dict(reversed(a.config.items())))
    assert a.to_bytes() == b.to_bytes()


# -- broken files ----------------------------------------------------------------------------------


def test_every_truncation_is_refused(smallest):
    data = smallest.to_bytes()
    for length in range(len(data)):
        with pytest.raises(FormatError, match=r"^cut must be a whole safetensors file, got a br"):
            Adapter.from_bytes(data[:length], "cut")


def test_a_longer_file_is_refused(smallest):
    with pytest.raises(FormatError, match="must be a whole safetensors file"):
        Adapter.from_bytes(smallest.to_bytes() + b"\0")


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"\0" * 8, b"\xff" * 64, b"PK\x03\x04" + b"\0" * 40, b"{}" * 50]
)
def test_what_is_no_safetensors_is_refused(data):
    with pytest.raises(FormatError, match=r"^file must be a whole safetensors file"):
        Adapter.from_bytes(data, "file")


def test_safetensors_of_others_are_refused():
    from safetensors.numpy import save

    for metadata in (None, {"format": "pt"}):
        data = save({"x": np.zeros(3, np.float32)}, metadata)
        with pytest.raises(
            FormatError, match=r"^file must be a regrow adapter, got safetensors wi"
        ):
            Adapter.from_bytes(data, "file")


def test_a_path_that_is_no_file(tmp_path):
    with pytest.raises(UsageError, match=r"an adapter must be a file, got .*: no such file"):
        Adapter.load(tmp_path / "none")
    with pytest.raises(UsageError, match=r"an adapter must be a file, got .*: it is a folder"):
        Adapter.load(tmp_path)


def test_a_message_names_the_file(tmp_path, good):
    path = tmp_path / "user-17.safetensors"
    path.write_bytes(good[:-1])
    with pytest.raises(FormatError, match=r"^.*user-17\.safetensors must be a whole"):
        Adapter.load(path)


def test_a_file_beyond_the_limit_is_not_read(tmp_path, monkeypatch, good):
    from regrow_format import adapter

    monkeypatch.setattr(adapter, "MAX_FILE_BYTES", len(good) - 1)
    path = tmp_path / "large"
    path.write_bytes(good)
    with pytest.raises(FormatError, match=f"must be at most {len(good) - 1} bytes"):
        Adapter.load(path)


def _set(**fields):
    return lambda data: data.update(fields)


def _config(**fields):
    return lambda data: data["config"].update(fields)


BROKEN = {
    "version": (_set(format=FORMAT + 1), f"format must be {FORMAT}, the version read here, got 2"),
    "version 0": (_set(format=0), "format must be 1"),
    "version text": (_set(format="1"), "format must be of type int, got '1'"),
    "version bool": (_set(format=True), "format must be of type int, got True"),
    "no version": (lambda d: d.pop("format"), "format must be of type int, got nothing"),
    "method": (_set(method="magic"), "method must be one of nola, vera, fourierft, l"),
    "storage": (_set(storage="int1"), "storage must be one of fp32, fp16, int8, int2"),
    "other storage": (_set(storage="int8"), "tensor alpha must be I8 [2, 12], got U8 [2, 6]"),
    "seed number": (_set(seed=5), "seed must be of type str, got 5"),
    "seed large": (_set(seed=str(2**64)), "seed must be a uint64 in a string, got '1844"),
    "seed negative": (_set(seed="-1"), "seed must be a uint64"),
    "seed float": (_set(seed="1.0"), "seed must be a uint64"),
    "seed empty": (_set(seed=""), "seed must be a uint64"),
    "seed in other digits": (_set(seed="١"), "seed must be a uint64"),
    "seed of many digits": (_set(seed="0" * 21), "seed must be a uint64"),
    "basis": (_set(basis={"kind": "mt19937", "version": 1}), "basis of nola must be philox-sign"),
    "basis version": (_set(basis={"kind": "philox-sign", "version": 2}), "got 'philox-sign' ver"),
    "basis field": (
        _set(basis={"kind": "philox-sign", "version": 1, "x": 1}), "basis: unknown fields x",
    ),
    "backbone": (_set(backbone_id=None), "backbone_id must be of type str, got nothing"),
    "unknown field": (_set(surprise=1), "unknown fields surprise"),
    "k": (_config(k=2**40), "config: k must be from 1 to 65536, got 1099511627776"),
    "k of many digits": (_config(k=10**400), "config: k must be from 1 to 65536, got 1000"),
    "k, not that of the tensors": (_config(k=13), "tensor alpha must be U8 [2, 7], got U8 [2, 6]"),
    "k at the bound": (_config(k=65536), "tensor alpha must be U8 [2, 32768], got U8 [2, 6]"),
    "rank": (_config(rank=2**31), "config: rank must be from 1 to 4096"),
    "c": (_config(c=10**400), "config: c must be a finite number"),
    "no targets": (_set(targets=[]), "tensor alpha must be U8 [0, 6], got U8 [2, 6]"),
    "targets unsorted": (
        _set(targets=[["fc2", 8, 8], ["fc1", 16, 8]]), "targets must be sorted, each named once",
    ),
    "targets twice": (
        _set(targets=[["fc1", 16, 8], ["fc1", 16, 8]]), "targets must be sorted, each named once",
    ),
    "a target short": (_set(targets=[["fc1", 16]]), "a target must be [name, in, out]"),
    "a pattern without a star": (_set(targets=[["fc", 16, 8, 0, 1]]), "pattern with one *"),
    "a pattern of two stars": (_set(targets=[["*.*", 16, 8, 0, 1]]), "pattern with one *"),
    "a pattern of one number": (_set(targets=[["fc*", 16, 8, 1, 1]]), "first < last"),
    "a pattern backwards": (_set(targets=[["fc*", 16, 8, 2, 1]]), "first < last"),
    "a pattern below 0": (_set(targets=[["fc*", 16, 8, -1, 1]]), "first < last"),
    "a pattern of floats": (_set(targets=[["fc*", 16, 8, 0.0, 1.0]]), "first < last"),
    "a pattern of bools": (_set(targets=[["fc*", 16, 8, False, True]]), "first < last"),
    "a pattern of no width": (_set(targets=[["fc*", 16, 0, 0, 1]]), "a target must be"),
    "a pattern of very many": (_set(targets=[["*", 1, 1, 0, 10**6]]), "first < last"),
    "patterns of very many": (
        _set(targets=[["*", 1, 1, 0, 60_000], ["a*", 1, 1, 0, 60_000]]),
        "targets must be at most 100000",
    ),
    "a long pattern of very many": (
        _set(targets=[["a" * 10_000 + "*", 1, 1, 0, 99_000]]), "of 16777216 characters",
    ),
    "a pattern and one of its own": (
        _set(targets=[["fc*", 8, 8, 0, 2], ["fc1", 16, 8]]), "each named once",
    ),
    "patterns unsorted": (
        _set(targets=[["fc*", 8, 8, 5, 6], ["fc*", 8, 8, 1, 2]]), "targets must be sorted",
    ),
    "a target of no width": (_set(targets=[["fc1", 0, 8]]), "a target must be"),
    "a target too wide": (_set(targets=[["fc1", 2**24 + 1, 8]]), "a target must be"),
    "a target of bools": (_set(targets=[["a", True, True]]), "a target must be"),
    "a target of floats": (_set(targets=[["a", 1.0, 1.0]]), "a target must be"),
    "a target that rings": (_set(targets=[["\x1b[31m", 1, 1]]), "in characters that print"),
    "targets as text": (_set(targets="fc1"), "targets must be of type list"),
    "very many targets": (_set(targets=[["a", 1, 1]] * 100_001), "targets must be at most 100000"),
    "head of no layers": (_set(head={"layers": [], "labels": ["a"]}), "head must have layers and"),
    "head of no labels": (_set(head={"layers": ["head"], "labels": []}), "head must have layers"),
    "head of other labels": (
        _set(head={"layers": ["head"], "labels": ["a"]}), "got 2 outputs and 1 labels",
    ),
    "head of another name": (
        _set(head={"layers": ["top"], "labels": ["a"]}), "tensor head.top.weight is missing",
    ),
    "head twice": (
        _set(head={"layers": ["head", "head"], "labels": ["a", "b"]}), "head.head.weight is missi",
    ),
    "head as text": (_set(head="head"), "head must be an object, got str"),
    "head removed": (lambda d: d.pop("head"), "unknown tensors head.head.bias, head.head.weight"),
    "label as a number": (
        _set(head={"layers": ["head"], "labels": [1, 2]}), "labels must be a list of strings",
    ),
    "score": (_set(validated=[{"variant": "x"}]), "validated[0]: metric must be of type str"),
    "score as text": (_set(validated=["good"]), "validated[0] must be an object, got str"),
    "user": (_set(user={"a": 1}), "user metadata must be strings"),
    "user as a list": (_set(user=[]), "user must be of type dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_broken_metadata(good, edit, name):
    change, message = BROKEN[name]
    with pytest.raises(FormatError) as caught:
        Adapter.from_bytes(edit(good, change), "some.safetensors")
    assert str(caught.value).startswith("some.safetensors")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("[]", "must be an object, got list"),
        ("null", "must be an object, got NoneType"),
        ("{", "must be JSON"),
        ('{"format": NaN}', "NaN is no JSON number"),
        ('{"format": -Infinity}', "-Infinity is no JSON number"),
        ('{"a":' * 100_000, "must be JSON"),
        ("[" * 100_000, "must be JSON"),
        ('{"format": ' + "9" * 5000 + "}", "must be JSON"),
        ('{"format": ' + "9" * 400 + "}", "format must be 1, the version read here"),
        ('{"format": 1, "user": {"name": "\\ud800"}}', "surrogates not allowed"),
    ],
)
def test_hostile_json(good, edit, text, message):
    with pytest.raises(FormatError, match=r"^some\.safetensors") as caught:
        Adapter.from_bytes(edit(good, text), "some.safetensors")
    assert message in str(caught.value)


def _part(which, **change):
    def apply(parts):
        part = next(p for p in parts if p[0] == which)
        for index, key in enumerate(("name", "dtype", "shape", "data")):
            part[index] = change.get(key, part[index])

    return apply


def _remove(name):
    return lambda parts: parts.remove(next(p for p in parts if p[0] == name))


NAN, INF = np.array([np.nan, 1], "<f4").tobytes(), np.array([1, np.inf], "<f4").tobytes()
TENSORS = {
    "missing": (_remove("alpha"), "tensor alpha is missing"),
    "scale missing": (_remove("beta.scale"), "tensor beta.scale is missing"),
    "bias missing": (_remove("head.head.bias"), "tensor head.head.bias is missing"),
    "unknown": (_part("beta", name="gamma"), "tensor beta is missing"),
    "one more": (
        lambda parts: parts.append(["more", "U8", [1], b"\0"]), "unknown tensors more",
    ),
    "dtype": (_part("alpha", dtype="I8"), "tensor alpha must be U8 [2, 6], got I8 [2, 6]"),
    "dtype unknown here": (
        _part("alpha.scale", dtype="I64", shape=[1]),
        "tensor alpha.scale must be F32 [2], got I64 [1]",
    ),
    "shape": (_part("alpha", shape=[6, 2]), "tensor alpha must be U8 [2, 6], got U8 [6, 2]"),
    "rank": (_part("alpha", shape=[12]), "tensor alpha must be U8 [2, 6], got U8 [12]"),
    "NaN": (_part("alpha.scale", data=NAN), "tensor alpha.scale must be finite, got NaN or inf"),
    "infinity": (_part("beta.scale", data=INF), "tensor beta.scale must be finite"),
    "head of one dimension": (
        _part("head.head.weight", shape=[16]), "tensor head.head.weight must be 2, got 1",
    ),
    "head NaN": (
        _part("head.head.bias", data=b"\xff\x7f\0\0"), "tensor head.head.bias must be finite",
    ),
    "head of other dtype": (
        _part("head.head.bias", dtype="BF16"), "head.head.bias must be F16/F32 [2], got BF16 [2]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_broken_tensors(good, edit, name):
    change, message = TENSORS[name]
    with pytest.raises(FormatError, match=r"^file: ") as caught:
        Adapter.from_bytes(edit(good, tensors=change), "file")
    assert message in str(caught.value)


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_coefficients_are_finite(make_adapter, edit, storage, value):
    def spoil(parts):
        part = next(p for p in parts if p[0] == "alpha")
        dtype = "<f4" if storage == "fp32" else "<f2"
        part[3] = np.array([value], dtype).tobytes() + part[3][np.dtype(dtype).itemsize :]

    data = edit(make_adapter(storage=storage).to_bytes(), tensors=spoil)
    with pytest.raises(FormatError, match="file: tensor alpha must be finite, got NaN or infinity"):
        Adapter.from_bytes(data, "file")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_file_is_written_that_could_not_be_read(make_adapter, tmp_path, value):
    adapter = make_adapter(storage="fp32")
    adapter.coefficients["alpha"].values[0, 0] = value
    with pytest.raises(RegrowError, match="tensor alpha must be finite"):
        adapter.save(tmp_path / "x")
    assert os.listdir(tmp_path) == []


def test_a_head_too_large_for_fp16_is_not_written(make_adapter):
    adapter = make_adapter(classes=2)
    adapter.head.layers[0].weight[0, 0] = 1e6
    with pytest.raises(RegrowError, match=r"tensor head\.head\.weight must be finite"):
        adapter.to_bytes()


@pytest.mark.parametrize(
    "change",
    [
        _config(k=65536, l=65536, rank=4096),
        _set(targets=[[f"{i:06}", 2**24, 2**24] for i in range(10_000)]),
    ],
    ids=["config", "targets"],
)
def test_a_small_hostile_file_allocates_little(good, edit, change):
    data = edit(good, change)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError):
            Adapter.from_bytes(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_large_packed_tensors_take_little_more_than_their_codes(make_adapter):
    data = make_adapter(storage="int2", targets=(Target("a", 1, 1),), k=65536).to_bytes()
    data_many = make_adapter(
        storage="int2", targets=tuple(Target(f"{i:02}", 1, 1) for i in range(64)), k=65536, l=1
    ).to_bytes()
    assert len(data_many) > 32 * len(data)
    tracemalloc.start()
    try:
        Adapter.from_bytes(data_many)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * 64 * 65536  # 4 MiB of codes, and the file twice


# -- mutations -------------------------------------------------------------------------------------


def _adapter_or_regrow_error(data: bytes) -> None:
    try:
        found = Adapter.from_bytes(data, "mutated")
    except RegrowError as error:
        message = str(error)
    else:
        found.to_bytes()  # what was read can be written
        return
    assert message.startswith("mutated")
    assert "\n" not in message


MUTATION = st.tuples(
    st.sampled_from(["flip", "insert", "delete", "text"]), st.floats(0, 1, exclude_max=True),
    st.binary(min_size=1, max_size=8),
)  # fmt: skip
TEXTS = (b"1e999", b"null", b"[]", b"{}", b'"', b"-1", b"NaN", b"\\ud800", b"9" * 30, b"true")


def _mutate(data: bytes, mutations) -> bytes:
    for kind, place, piece in mutations:
        at = int(place * len(data))
        if kind == "text":
            piece = TEXTS[piece[0] % len(TEXTS)]
        if kind in ("flip", "text"):
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        else:
            data = data[:at] + data[at + len(piece) :]
    return data


@given(st.lists(MUTATION, min_size=1, max_size=4))
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_files(smallest, mutations):
    _adapter_or_regrow_error(_mutate(smallest.to_bytes(), mutations))


@given(st.lists(MUTATION, min_size=1, max_size=3))
@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_metadata(good, edit, mutations):
    """The JSON alone, in a safetensors file that stays whole."""
    size = int.from_bytes(good[:8], "little")
    text = json.loads(good[8 : 8 + size])["__metadata__"]["regrow"]
    changed = _mutate(text.encode(), mutations).decode(errors="replace")
    _adapter_or_regrow_error(edit(good, changed))


def _flipped(data: bytes, count: int, draw: int) -> None:
    rng = np.random.default_rng(draw)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(len(data))] = rng.integers(256)
        _adapter_or_regrow_error(bytes(changed))


def test_flipped_bytes(smallest, good):
    _flipped(smallest.to_bytes(), 2000, 0)
    _flipped(good, 1000, 1)


@pytest.mark.slow
def test_many_flipped_bytes(smallest, good):
    _flipped(smallest.to_bytes(), 10_000, 2)
    _flipped(good, 10_000, 3)
