"""The documents' code and golden values are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from regrow_format.basis import locations, signs
from regrow_format.methods.fourierft import inverse_transform
from regrow_format.mt19937 import permutation_head, uniform_kaiming
from regrow_format.philox import philox4x32

DOCS = Path(__file__).parents[2] / "docs"
BASIS = (DOCS / "basis.md").read_text(encoding="utf-8")


def _rows(columns: int) -> list[list[str]]:
    """The rows of the tables that have so many columns, without heads."""
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in BASIS.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if len(row) == columns and row[0][:1].isalnum()][1:]


def test_known_answers():
    rows = [[[int(w, 16) for w in cell.split()] for cell in row] for row in _rows(3)]
    assert len(rows) == 3
    for counter, key, words in rows:
        assert philox4x32(*counter, key=tuple(key)).tolist() == words


def test_signs():
    rows = _rows(6)
    assert len(rows) == 4
    for row in rows:
        seed, role, vector, layer = map(int, row[:4])
        found = signs(seed, role, vector, 10_000, layer=layer)
        assert "".join("+" if s > 0 else "-" for s in found[:40]) == row[4]
        assert int(found.sum()) == int(row[5].replace("−", "-"))


def test_locations():
    found = re.search(r"768 × 768, layer 0: ([\d ]+) … the 1000th is (\d+)", BASIS)
    places = locations(777, 1000, 768, 768).tolist()
    assert places[:6] == [int(z) for z in found[1].split()]
    assert places[999] == int(found[2])


def test_streams_of_peft():
    a, b = (r" begins? ([0-9a-f ]+) and", r"and B' ([0-9a-f ]+)\.")
    made = uniform_kaiming(0, 4, 6, 5)
    for pattern, matrix in zip((a, b), made, strict=True):
        words = re.search(pattern, BASIS)[1].split()
        assert [f"{w:08x}" for w in matrix.reshape(-1)[:3].view(np.uint32)] == words
    found = re.search(r"768 × 768 ([\d ]+); `out` 3072, `in` 768 ([\d ]+)\.", BASIS)
    for text, total in zip(found.groups(), (768 * 768, 3072 * 768), strict=True):
        assert permutation_head(777, 6, total).tolist() == [int(z) for z in text.split()]


def test_the_fast_way_of_fourierft():
    """As the page has it, against the runtime's."""
    wide, high = 10, 7
    places, values = locations(5, 30, high, wide), np.linspace(-1, 2, 30)
    grid = np.zeros((high, wide // 2 + 1))
    for z, v in zip(places.tolist(), values, strict=True):
        j, k = z // wide, z % wide
        if 2 * k > wide:
            j, k = -j % high, wide - k
        grid[j, k] += v if k == 0 or 2 * k == wide else v / 2
    delta = np.fft.irfft2(grid, (high, wide), norm="forward")
    found = inverse_transform(values.astype(np.float32), places, wide, high).T
    np.testing.assert_allclose(found, delta, atol=1e-6 * np.abs(delta).max())


@pytest.mark.parametrize(("seed", "role", "vector", "layer"), [(5, 0, 0, 0), (2**64 - 1, 1, 9, 3)])
def test_the_code_of_the_definition(seed, role, vector, layer):
    code = re.search(r"```python\n(.*?)```", BASIS, re.DOTALL)[1]
    defined: dict = {}
    exec(code, defined)  # noqa: S102 - the page's own code is what is tested
    expected = signs(seed, role, vector, 300, layer=layer)
    found = [defined["sign"](seed, role, vector, p, layer) for p in range(300)]
    np.testing.assert_array_equal(found, expected)


def test_links_lead_somewhere():
    pages = [*DOCS.glob("*.md"), DOCS.parent / "runtime" / "README.md"]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert "://" in link or (page.parent / link).exists(), f"{page.name}: {link}"
