"""PEFT's streams without torch. The numbers are torch's own; tests/toolchain asks torch again."""

from __future__ import annotations

import numpy as np
import pytest

from regrow_format import UsageError, mt19937
from regrow_format.mt19937 import permutation_head, uniform_kaiming


def _words(values: np.ndarray) -> list[str]:
    return [f"{word:08x}" for word in values.ravel()[:3].view(np.uint32)]


def test_kaiming_golden() -> None:
    a, b = uniform_kaiming(0, 4, 6, 5)
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((4, 6), (5, 4), np.float32, np.float32)
    assert _words(a) == ["bbf55400", "3f09545e", "bf52b316"]
    assert _words(b) == ["be4a2574", "3e04b4a0", "3f8df2f9"]


@pytest.mark.parametrize(
    ("dtype", "a", "b"),
    [
        ("bfloat16", ["bbf50000", "3f090000", "bf530000"], ["be4a0000", "3e050000", "3f8e0000"]),
        ("float16", ["bbf56000", "3f096000", "bf52c000"], ["be4a2000", "3e04c000", "3f8e0000"]),
    ],
)
def test_kaiming_of_a_base_in_half(dtype: str, a: list[str], b: list[str]) -> None:
    found = uniform_kaiming(0, 4, 6, 5, dtype)
    assert [_words(part) for part in found] == [a, b]


def test_kaiming_does_not_depend_on_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = uniform_kaiming(5, 7, 100, 90)
    monkeypatch.setattr(mt19937, "WORDS_AT_ONCE", 33)
    for part, again in zip(whole, uniform_kaiming(5, 7, 100, 90), strict=True):
        assert np.array_equal(part, again)


@pytest.mark.parametrize("seed", [1, 2**32 - 1, 2**32, 2**63 + 5])
def test_seeds_count_by_their_low_half(seed: int) -> None:
    assert np.array_equal(permutation_head(seed, 9, 99), permutation_head(seed % 2**32, 9, 99))
    assert np.array_equal(
        uniform_kaiming(seed, 2, 3, 4)[0], uniform_kaiming(seed % 2**32, 2, 3, 4)[0]
    )


@pytest.mark.parametrize(
    ("seed", "total", "wanted"),
    [
        (777, 768 * 768, [391271, 183699, 413551, 384200, 435559, 59955]),
        (777, 3072 * 768, [2160743, 1949640, 1000073, 970736, 2203675, 632404]),
    ],
)
def test_permutation_golden(seed: int, total: int, wanted: list[int]) -> None:
    assert permutation_head(seed, 6, total).tolist() == wanted
    assert permutation_head(seed, 1000, total)[:6].tolist() == wanted


def test_a_whole_permutation() -> None:
    for total in (1, 2, 50):
        assert sorted(permutation_head(3, total, total)) == list(range(total))
    assert permutation_head(3, 0, 5).size == 0


def test_the_other_shuffle(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch does from LONG on, here for few numbers, against the same written plainly."""
    monkeypatch.setattr(mt19937, "LONG", 10)
    monkeypatch.setattr(mt19937, "WORDS_AT_ONCE", 7)
    words = np.random.RandomState(4).randint(0, 2**32, size=2 * 60, dtype=np.uint32).tolist()
    wanted: list[int] = []
    for step in range(60):
        place = (words[2 * step] << 32 | words[2 * step + 1]) % (step + 1)
        wanted.append(step)
        wanted[step], wanted[place] = wanted[place], step
    for count in (0, 1, 13, 60):
        assert permutation_head(4, count, 60).tolist() == wanted[:count]


@pytest.mark.slow
def test_the_other_shuffle_golden() -> None:
    found = permutation_head(2024, 4, 214748364 + 12345)
    assert found.tolist() == [164882242, 2761308, 91605633, 192464579]


@pytest.mark.parametrize(
    ("count", "total", "words"),
    [
        (6, 5, "count must be from 0 to 5, got 6"),
        (-1, 5, "count must be from 0 to 5, got -1"),
        (1, 2**30 + 1, "total must be at most 1073741824, got 1073741825"),
    ],
)
def test_places_that_there_are_not(count: int, total: int, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        permutation_head(0, count, total)


def test_shapes_and_dtypes_that_there_are_not() -> None:
    with pytest.raises(UsageError, match="rank and widths must be at least 1, got 0, 3 and 4"):
        uniform_kaiming(0, 0, 3, 4)
    with pytest.raises(UsageError, match="dtype must be one of float32, bfloat16, float16"):
        uniform_kaiming(0, 1, 3, 4, "float64")
