"""The generator against Random123's known answers, and what a seed may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow_format.errors import UsageError
from regrow_format.philox import check_seed, key_of, philox4x32

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((ONES,) * 4, (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter, key, expected):
    words = philox4x32(*counter, key)
    assert words.dtype == np.uint32
    assert " ".join(f"{word:08x}" for word in words) == expected


def _one(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """The definition, with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & ONES, (p0 >> 32) ^ c3 ^ k1, p0 & ONES
        k0, k1 = (k0 + 0x9E3779B9) & ONES, (k1 + 0xBB67AE85) & ONES
    return [c0, c1, c2, c3]


WORD = st.integers(0, ONES)


@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_every_counter_is_the_definition(counter, key):
    assert philox4x32(*counter, key).tolist() == _one(counter, key)


def test_counters_broadcast():
    words = philox4x32(np.arange(3)[:, None], np.arange(5), 7, 9, (1, 2))
    assert words.shape == (3, 5, 4)
    assert words[2, 4].tolist() == _one((2, 4, 7, 9), (1, 2))


def test_a_key_has_its_low_word_first():
    assert key_of(0x0123456789ABCDEF) == (0x89ABCDEF, 0x01234567)


@pytest.mark.parametrize("seed", [-1, 2**64, True, 1.0, "1", None])
def test_a_seed_is_a_uint64(seed):
    with pytest.raises(UsageError, match=r"seed must be an integer from 0 to 2\*\*64 - 1, got"):
        check_seed(seed)


def test_the_largest_seed_is_one():
    assert check_seed(2**64 - 1) == 2**64 - 1
