"""Integer products of ONNX files, read without onnx; tests/export holds it against onnx."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import regrow_runtime.sessions
from regrow_format.errors import FormatError, RegrowError
from regrow_format.integers import (
    PACKED_MODEL,
    PRODUCT_MODEL,
    SAFE_CODES,
    product_session,
    saturates,
    varint,
)
from regrow_format.manifest import Manifest
from regrow_format.products import IntegerProduct, integer_products
from regrow_format.rounding import Rounding
from regrow_runtime import Bundle


def _number(value: int) -> bytes:
    value &= (1 << 64) - 1
    found = b""
    while value > 127:
        found += bytes([value & 127 | 128])
        value >>= 7
    return found + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    data = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | 2) + _number(len(data)) + data


def _node(operator: str, inputs: str, output: str, *graphs: bytes) -> bytes:
    """Of a graph; attributes have the graphs."""
    parts = [_field(1, name) for name in inputs] + [_field(2, output), _field(4, operator)]
    parts += [_field(5, _field(1, "body") + _field(6, graph)) for graph in graphs]
    return _field(1, b"".join(parts))


def _tensor(name: str, *values: bytes, kind: int = 3) -> bytes:
    return _field(5, _field(2, kind) + _field(8, name) + b"".join(values))


def _external(name: str, **about: object) -> bytes:
    entries = [_field(13, _field(1, key) + _field(2, str(value))) for key, value in about.items()]
    return _tensor(name, *entries, _field(14, 1))


def _raw(*codes: int) -> bytes:
    return _field(9, np.array(codes, np.int8).tobytes())


@pytest.fixture
def read(tmp_path):
    """read(graph): its products, by the name of the node, as (operator, weight, codes)."""

    def call(*graph: bytes):
        path = tmp_path / "x.onnx"
        path.write_bytes(_field(1, 9) + _field(7, b"".join(graph)) + _field(2, "somebody"))
        return {p.node: (p.operator, p.weight, p.codes) for p in integer_products(path)}

    return call


def test_the_runtimes_own_models(tmp_path):
    path = tmp_path / "x.onnx"
    path.write_bytes(PRODUCT_MODEL)
    assert integer_products(path) == [IntegerProduct("y", "MatMulInteger", "b", None)]
    path.write_bytes(PACKED_MODEL % (varint(4), varint(8)))
    with pytest.raises(FormatError, match=r"x\.onnx must be an ONNX graph, got something else"):
        integer_products(path)  # its signs are given when it is loaded


def test_every_operator_and_where_its_weight_is(read):
    w = _tensor("w", _raw(-3, 5, 0))
    found = read(
        w, _node("MatMulInteger", "aw", "1"), _node("ConvInteger", "aw", "2"),
        _node("QLinearMatMul", "abcw", "3"), _node("QLinearConv", "abcw", "4"),
        _node("MatMul", "aw", "5"),
    )  # fmt: skip
    assert {output: rest for output, (_, *rest) in found.items()} == {
        "1": ["w", (-3, 5)], "2": ["w", (-3, 5)], "3": ["w", (-3, 5)], "4": ["w", (-3, 5)],
    }  # fmt: skip


@pytest.mark.parametrize(
    "values",
    [
        _raw(-127, 3, 64),
        _field(5, b"".join(map(_number, (-127, 3, 64)))),
        _field(5, -127) + _field(5, 3) + _field(5, 64),
    ],
    ids=["raw", "packed", "one by one"],
)
def test_every_way_to_store_codes(read, values):
    assert read(_tensor("w", values), _node("MatMulInteger", "aw", "y"))["y"][2] == (-127, 64)


def test_codes_in_another_file(read, tmp_path):
    codes = np.array([99, -99, -7, 6, 2, 99], np.int8)
    codes.tofile(tmp_path / "x.data")
    node = _node("MatMulInteger", "aw", "y")
    whole = read(_external("w", location="x.data"), node)
    part = read(_external("w", location="x.data", offset=2, length=3), node)
    assert (whole["y"][2], part["y"][2]) == ((-99, 99), (-7, 6))


def test_what_is_not_constant_or_unsigned_has_no_codes(read):
    u8 = _tensor("w", _raw(5), kind=2)
    assert read(u8, _node("MatMulInteger", "aw", "y"))["y"][2] is None
    assert read(_node("MatMulInteger", "aw", "y"))["y"][2] is None


def test_graphs_in_graphs(read):
    """The weight may stand outside."""
    inner = _node("MatMulInteger", "aw", "y") + _tensor("v", _raw(9))
    inner += _node("If", "c", "z", _node("MatMulInteger", "av", "x"))
    found = read(_tensor("w", _raw(-1)), _node("Loop", "n", "o", inner))
    assert {name: codes for name, (_, _, codes) in found.items()} == {"y": (-1, 0), "x": (0, 9)}


def test_files_that_are_broken(read, tmp_path):
    """Every beginning of one, and bytes changed: an error of ours, or an answer."""
    read(_tensor("w", _raw(1, 2)), _node("MatMulInteger", "aw", "y"))
    path = tmp_path / "x.onnx"
    good = path.read_bytes()
    spoilt = [good[:end] for end in range(len(good))]
    spoilt += [
        good[:at] + bytes([byte]) + good[at + 1 :] for at in range(len(good)) for byte in (0, 255)
    ]
    refused = 0
    for data in spoilt:
        path.write_bytes(data)
        try:
            integer_products(path)
        except FormatError:
            refused += 1
    assert refused > len(spoilt) / 3


DEEP = b""
for _ in range(40):
    DEEP = _node("Loop", "n", "o", DEEP)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (_external("w", location="../x"), "w must lie in the bundle, got '../x'"),
        (_external("w", location="/etc/passwd"), "w must lie in the bundle"),
        (_external("w"), "w must lie in the bundle, got '.'"),
        (_external("w", location="x.onnx", offset=10**9), "w must end within x.onnx"),
        (_external("w", location="x.onnx", length=10**9), "w must end within x.onnx"),
        (_external("w", location="x.onnx", offset=-1), "w must end within x.onnx"),
        (_external("w", location="x.onnx", length="many"), "invalid literal"),
        (_external("w", location="none"), "No such file"),
        (_tensor("w", kind=b"x"), "field 2 must be an integer"),
        (_field(1, 7), "field 1 must be a message"),
        (DEEP, "more than 32 deep"),
    ],
)
def test_files_from_strangers(read, graph, message):
    with pytest.raises(FormatError, match="must be an ONNX graph") as caught:
        read(graph, _node("MatMulInteger", "aw", "y"))
    assert message in str(caught.value)


# -- what this processor computes ----------------------------------------------------------------


def test_saturation_is_found():
    """Pairs of codes up to 64 are exact; beyond, they are where `saturates` says so."""
    draw = np.random.default_rng(0)
    for most, exact in ((SAFE_CODES[1], True), (127, not saturates())):
        codes = draw.choice([-most, most], (96, 32)).astype(np.int8)
        inputs = draw.integers(0, 256, (9, 96)).astype(np.uint8)
        inputs[0] = 255
        found = product_session().run(None, {"a": inputs, "b": codes})[0]
        wanted = inputs.astype(np.int64) @ codes.astype(np.int64)
        assert np.array_equal(found, wanted) == exact


@pytest.mark.parametrize("here", [False, True])
@pytest.mark.parametrize(("low", "high"), [(-64, 64), (-7, 64), (-65, 64), (-127, 127)])
def test_bundles_that_saturate_are_not_opened(bundle_copy, monkeypatch, here, low, high):
    monkeypatch.setattr(regrow_runtime.sessions, "saturates", lambda: here)
    changed = replace(
        Manifest.load(bundle_copy), variant="int8",
        rounding=Rounding("symmetric", (low, high), "out"),
    )  # fmt: skip
    (bundle_copy / "manifest.json").write_text(changed.to_json(), encoding="utf-8")
    if here and (low < -64 or high > 64):
        text = f"codes from -64 to 64 on this processor, .*, got {low} to {high}: export it again"
        with pytest.raises(RegrowError, match=text):
            Bundle.open(bundle_copy)
    else:
        Bundle.open(bundle_copy)
