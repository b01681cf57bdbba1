"""The smallest file of every further method and field, to the byte. The documents have the same."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest

from regrow_format.adapter import Adapter, Coefficients, Head, HeadLayer, Probe, Target
from regrow_format.basis import BasisSpec
from regrow_format.errors import RegrowError

PAGE = Path(__file__).parents[2] / "docs" / "adapter-format.md"
CODE = Coefficients(np.array([[127]], np.int8), np.array([0.5], np.float32))
HEAD = Head((HeadLayer("h", np.ones((1, 1), np.float32), np.zeros(1, np.float32)),), ("x",))
GROUPED = Coefficients(np.array([[7] * 8 + [-7]], np.int8), np.array([[1, 2]], np.float32), 8)


def _smallest(method, config, coefficients, **more) -> Adapter:
    targets = (Target("a", 1, 1),) if coefficients else ()
    storage = more.pop("storage", "int8")
    return Adapter(method, config, 1, "sha256:00", targets, coefficients, storage, **more)


PEFT = BasisSpec("peft-mt19937", 1, {"in": 1, "out": 1, "dtype": "float32"})
PLACES = {"places.1x1": np.zeros(1, np.uint32)}
MATRICES = {"basis.A": np.ones((1, 1), np.float16), "basis.B": np.ones((1, 1), np.float16)}
SMALLEST = {
    "vera": _smallest("vera", {"rank": 1}, {"d": CODE, "b.1": CODE}),
    "vera, PEFT's basis": _smallest("vera", {"rank": 1}, {"d": CODE, "b.1": CODE}, basis=PEFT),
    "vera, stored basis": _smallest(
        "vera", {"rank": 1}, {"d": CODE, "b.1": CODE},
        basis=BasisSpec("stored"), stored_basis=MATRICES,
    ),
    "fourierft": _smallest("fourierft", {"n": 1, "alpha": 1.0}, {"c": CODE}),
    "fourierft, stored places": _smallest(
        "fourierft", {"n": 1, "alpha": 1.0}, {"c": CODE},
        basis=BasisSpec("stored"), stored_basis=PLACES,
    ),
    "ia3": _smallest("ia3", {"feedforward": []}, {"s.1": CODE}),
    "ia3, of inputs": _smallest("ia3", {"feedforward": ["a"]}, {"t.1": CODE}),
    "ssf": _smallest("ssf", {}, {"s.1": CODE, "b.1": CODE}),
    "bitfit": _smallest("bitfit", {}, {"b.1": CODE}),
    "bitfit, extra and probe": _smallest(
        "bitfit", {}, {"b.1": CODE},
        extra={"n.weight": np.ones(1, np.float16)}, probe=Probe(np.ones(1, np.float16), 0.5),
    ),
    "head": _smallest("head", {}, {}, head=HEAD, storage="fp32"),
    "vera, grouped": _smallest(
        "vera", {"rank": 9},
        {"d": GROUPED, "b.1": Coefficients(CODE.values, CODE.scale[:, None], 8)},
        group=8,
    ),
}  # fmt: skip


def _golden() -> dict[str, tuple[int, str]]:
    """The page's table: file, bytes, sha256."""
    rows = re.findall(r"\| ([^|]+) \| (\d+) \| `([0-9a-f]{64})` \|", PAGE.read_text("utf-8"))
    return {name: (int(size), digest) for name, size, digest in rows}


def test_the_page_has_them_all():
    assert _golden().keys() == SMALLEST.keys()


@pytest.mark.parametrize("name", SMALLEST)
def test_golden_bytes(name):
    data = SMALLEST[name].to_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == _golden()[name]
    assert Adapter.from_bytes(data).to_bytes() == data


@pytest.mark.parametrize("name", SMALLEST)
def test_flipped_bytes(name):
    """One error, or an adapter that can be written again."""
    data, rng = SMALLEST[name].to_bytes(), np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            changed[rng.integers(len(data))] = rng.integers(256)
        message = "flipped"
        try:
            Adapter.from_bytes(bytes(changed), "flipped").to_bytes()
        except RegrowError as error:
            message = str(error)
        assert re.fullmatch("flipped.*", message)
