"""The seeded basis: the format's vectors, random access, exact sums, and the cache."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrow_format import basis
from regrow_format.basis import (
    BasisCache,
    Role,
    combine,
    locations,
    sign_bits,
    sign_rows,
    signs,
)
from regrow_format.errors import UsageError

# seed, role, vector, layer, the first signs, the sum of the first 10,000
VECTORS = [
    (0, 0, 0, 0, "+-+-+-++---+-++++++--+---++--++-+-++---+", -60),
    (2024, 1, 3, 0, "+-++-+--++++-+--++------+--+++-+---+-+--", -148),
    (2**63 + 5, 0, 0, 7, "---+++-+++---++++--+-+++--+--++--------+", -132),
    (12345678901234567890, 2, 999, 24, "--+++-+--++-+-----+++++----+-+-----+++++", 142),
]


@pytest.mark.parametrize(("seed", "role", "vector", "layer", "first", "total"), VECTORS)
def test_signs(seed, role, vector, layer, first, total):
    found = signs(seed, role, vector, 10_000, layer=layer)
    assert found.dtype == np.int8
    assert set(found.tolist()) == {-1, 1}
    assert "".join("+" if s > 0 else "-" for s in found[:40]) == first
    assert int(found.sum()) == total


def test_locations():
    found = locations(777, 1000, 768, 768)
    assert found[:6].tolist() == [118266, 323366, 516935, 94064, 498952, 96710]
    assert found[999] == 301035
    assert len(set(found.tolist())) == 1000


def test_locations_come_in_the_order_of_the_words():
    """As the definition has it: one word at a time, repeats dropped."""
    from regrow_format.philox import key_of, philox4x32

    words = philox4x32(np.arange(400), 0, Role.FOURIER_LOCATIONS, 3, key_of(9)).reshape(-1)
    expected = list(dict.fromkeys(int(w) * 77 >> 32 for w in words))
    assert locations(9, 77, 7, 11, layer=3).tolist() == expected
    assert sorted(expected) == list(range(77))


@pytest.mark.parametrize("count", [0, 1, 5, 60, 77])
def test_fewer_locations_are_the_first_of_more(count):
    assert locations(9, count, 7, 11).tolist() == locations(9, 77, 7, 11)[:count].tolist()


def test_more_locations_than_places():
    with pytest.raises(UsageError, match=r"count must be at most 12 \(3 x 4\), got 13"):
        locations(0, 13, 3, 4)
    with pytest.raises(UsageError, match="count must be"):
        locations(0, -1, 3, 4)


@pytest.mark.parametrize(("rows", "columns"), [(2**16, 2**16), (0, 5), (-1, -1)])
def test_a_grid_has_less_than_2_to_the_32_places(rows, columns):
    with pytest.raises(UsageError, match=r"rows x columns must be from 1 to 2\*\*32 - 1, got"):
        locations(0, 1, rows, columns)


def test_the_largest_grid():
    found = locations(0, 50, 65535, 65537)  # 2**32 - 1
    assert found.min() >= 0
    assert found.max() < 2**32 - 1


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1),
    st.integers(1, 40), st.integers(0, 700),
)  # fmt: skip
def test_one_vector_alone_is_the_one_among_many(seed, role, layer, vectors, entries):
    bits = sign_bits(seed, role, vectors, entries, layer=layer)
    assert bits.shape == (vectors, -(-entries // 8))
    many = np.unpackbits(bits, axis=1, bitorder="little")[:, :entries].astype(np.int8) * 2 - 1
    alone = signs(seed, role, vectors - 1, entries, layer=layer)
    np.testing.assert_array_equal(many[-1], alone)


def test_vectors_made_in_several_parts_are_the_same(monkeypatch):
    whole = sign_bits(1, 0, 50, 1000)
    monkeypatch.setattr(basis, "COUNTERS_AT_ONCE", 30)
    np.testing.assert_array_equal(sign_bits(1, 0, 50, 1000), whole)


def test_a_longer_vector_begins_with_the_shorter_one():
    np.testing.assert_array_equal(signs(3, 1, 4, 5000)[:77], signs(3, 1, 4, 77))


@pytest.mark.parametrize("change", [{"seed": 2}, {"role": 1}, {"vector": 1}, {"layer": 1}])
def test_every_index_has_a_stream_of_its_own(change):
    base = {"seed": 1, "role": 0, "vector": 0, "layer": 0}
    a, b = (
        signs(v["seed"], v["role"], v["vector"], 10_000, layer=v["layer"]).astype(int)
        for v in (base, {**base, **change})
    )
    assert abs(int((a * b).sum())) < 500  # five standard deviations of uncorrelated signs


def test_roles_are_those_of_the_format():
    assert {role.name: role.value for role in Role} == {
        "NOLA_A": 0, "NOLA_B": 1, "VERA_A": 2, "VERA_B": 3, "FOURIER_LOCATIONS": 4, "SAMPLING": 5,
    }  # fmt: skip


# -- combine ---------------------------------------------------------------------------------------


def _integers(codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return codes.astype(np.int64) @ (2 * rows.T.astype(np.int64) - 1)


def _rows(seed: int, role: int, vectors: int, entries: int) -> np.ndarray:
    """uint8 [entries, vectors] of ones and zeros."""
    bits = sign_bits(seed, role, vectors, entries)
    return np.unpackbits(bits, axis=1, bitorder="little")[:, :entries].T.copy()


@pytest.fixture(params=["integers", "floats"])
def codes_as(request, monkeypatch):
    """What turns codes into `combine`'s values, by the way in which they are then multiplied."""
    if request.param == "floats":  # as where ONNX Runtime was built without the operator
        monkeypatch.setattr(basis, "integer_product", lambda codes: None)
    return lambda codes: np.asarray(codes).astype(np.int8)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 300), st.integers(0, 400), st.integers(0, 2**32))
def test_combining_codes_is_integer_arithmetic(targets, k, entries, draw):
    codes = np.random.default_rng(draw).integers(-128, 128, (targets, k))
    rows = _rows(draw, 0, k, entries)
    for values in (codes.astype(np.int8), codes.astype(np.float32)):
        found = combine(values, sign_rows(draw, 0, k, entries), entries)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found.astype(np.int64), _integers(codes, rows))


@pytest.mark.parametrize("code", [127, -127, -128])
def test_the_largest_k_is_exact(code, codes_as):
    k = 2**16
    rows = _rows(4, 1, k, 9)
    rows[0] = 1  # the largest sum there is
    codes = np.full((1, k), code)
    found = combine(codes_as(codes), [rows], 9)
    assert found[0, 0] == code * k
    np.testing.assert_array_equal(found.astype(np.int64), _integers(codes, rows))


def test_random_codes_at_the_largest_k_are_exact(codes_as):
    codes = np.random.default_rng(0).integers(-127, 128, (3, 2**16))
    found = combine(codes_as(codes), sign_rows(4, 1, 2**16, 130), 130)
    np.testing.assert_array_equal(found.astype(np.int64), _integers(codes, _rows(4, 1, 2**16, 130)))


@pytest.mark.parametrize("entries", [0, 1, 7, 8, 9, 127, 128, 129, 255, 257, 1000])
def test_blocks_of_entries_meet_without_a_seam(monkeypatch, entries, codes_as):
    codes = np.random.default_rng(1).integers(-127, 128, (2, 10))
    monkeypatch.setattr(basis, "FLOATS_AT_ONCE", 160)  # 16 entries at once
    monkeypatch.setattr(basis, "COUNTERS_AT_ONCE", 7)  # one block, some of its vectors
    found = combine(codes_as(codes), sign_rows(8, 0, 10, entries), entries)
    np.testing.assert_array_equal(
        found.astype(np.int64), _integers(codes, _rows(8, 0, 10, entries))
    )


def test_fewer_entries_than_the_rows_hold(codes_as):
    codes = codes_as(np.random.default_rng(1).integers(-127, 128, (2, 10)))
    rows = _rows(8, 0, 10, 300)
    np.testing.assert_array_equal(combine(codes, [rows], 11), combine(codes, [rows], 300)[:, :11])


def test_floats_are_combined_within_rounding():
    values = np.random.default_rng(2).standard_normal((2, 500)).astype(np.float32)
    expected = values.astype(np.float64) @ (2 * _rows(8, 0, 500, 90).T.astype(np.float64) - 1)
    found = combine(values, sign_rows(8, 0, 500, 90), 90)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_blocks_of_rows_are_bounded_whatever_k_is():
    for vectors, entries in ((1, 2**21), (1000, 6144), (2**16, 200)):
        blocks = sign_rows(3, 0, vectors, entries)
        sizes = [block.shape for block in blocks]
        assert all(wide == vectors for _, wide in sizes)
        assert max(high * wide for high, wide in sizes) <= max(1 << 20, 128 * vectors)
        assert 0 <= sum(high for high, _ in sizes) - entries < 8


# -- the cache -------------------------------------------------------------------------------------


def test_the_cache_gives_what_it_was_asked_for():
    cache = BasisCache()
    np.testing.assert_array_equal(cache.bits(5, 1, 4, 99, layer=2), sign_bits(5, 1, 4, 99, layer=2))
    assert cache.misses == 1
    assert cache.bits(5, 1, 4, 99, layer=2) is cache.bits(5, 1, 4, 99, layer=2)
    assert cache.misses == 1
    assert cache.nbytes == 4 * 13


@pytest.mark.parametrize("index", range(5))
def test_the_cache_tells_apart_whatever_differs(index):
    cache, key = BasisCache(), [5, 1, 4, 99, 2]
    cache.bits(*key[:4], layer=key[4])
    key[index] += 1
    found = cache.bits(*key[:4], layer=key[4])
    np.testing.assert_array_equal(found, sign_bits(*key[:4], layer=key[4]))
    assert cache.misses == 2


def test_the_cache_drops_what_was_used_longest_ago():
    cache = BasisCache(max_bytes=20)  # two of 10 bytes
    for seed in (1, 2, 1, 3):
        cache.bits(seed, 0, 1, 80)
    assert cache.nbytes == 20
    cache.bits(1, 0, 1, 80)
    assert cache.misses == 3  # 1 was kept
    cache.bits(2, 0, 1, 80)
    assert cache.misses == 4  # 2 was not


def test_a_cache_of_no_bytes_keeps_nothing():
    cache = BasisCache(max_bytes=0)
    assert cache.bits(1, 0, 3, 80).shape == (3, 10)
    assert cache.nbytes == 0
    cache.bits(1, 0, 3, 80)
    assert cache.misses == 2


def test_what_is_larger_than_the_cache_is_not_kept():
    cache = BasisCache(max_bytes=5)
    assert cache.bits(1, 0, 1, 80).nbytes == 10
    assert cache.nbytes == 0


def test_a_cleared_cache_is_cold():
    cache = BasisCache()
    cache.bits(1, 0, 3, 80)
    cache.clear()
    assert cache.nbytes == 0
    cache.bits(1, 0, 3, 80)
    assert cache.misses == 2


def test_threads_share_a_cache():
    cache, expected = BasisCache(max_bytes=60), {s: sign_bits(s, 0, 2, 80) for s in range(6)}
    start = threading.Barrier(8)

    def use(thread: int) -> bool:
        start.wait()
        seeds = [(thread + step) % 6 for step in range(200)]
        return all(np.array_equal(cache.bits(s, 0, 2, 80), expected[s]) for s in seeds)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(8)))
    assert cache.nbytes <= 60


@pytest.mark.parametrize(("max_bytes", "kept"), [(900, 12 * 38), (899, 0), (0, 0)])
def test_rows_are_kept_as_bits_or_not(max_bytes, kept):
    cache, expected = BasisCache(max_bytes), _rows(5, 1, 12, 300)
    for uses in (1, 2):
        rows = np.concatenate(list(cache.rows(5, 1, 12, 300)))[:300]
        np.testing.assert_array_equal(rows, expected)
        assert cache.nbytes == kept
        assert cache.misses == (1 if kept else uses)


def test_rows_of_layers_with_a_basis_each():
    rows = np.concatenate(list(BasisCache().rows(5, 1, 12, 300, layer=2)))[:300]
    bits = sign_bits(5, 1, 12, 300, layer=2)
    np.testing.assert_array_equal(rows.T, np.unpackbits(bits, axis=1, bitorder="little")[:, :300])


# -- packed signs ----------------------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch):
    """Packs small bases too."""
    monkeypatch.setattr(basis, "LEAST_PACKED", 0)


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(np.uint32)


@pytest.mark.parametrize("top", [1, 7, 127])
@pytest.mark.parametrize(("k", "entries"), [(1, 1), (3, 17), (63, 130), (64, 64), (500, 1001)])
def test_packed_signs_give_the_same_bits(eager, k, entries, top):
    cache, draw = BasisCache(), np.random.default_rng(k)
    codes = draw.integers(-top - 1, top + 1, (5, k)).astype(np.int8)
    scale = draw.uniform(1e-40, 1e-3, 5).astype(np.float32) * [1, 1, -1, 1e-35, 1e30]
    scale = scale.astype(np.float32)
    expected = combine(codes, list(cache.rows(9, 1, k, entries)), entries, scale)
    packed = cache.packed(9, 1, k, entries)
    for most in (entries, -(-entries // 2)):
        found = combine(codes, packed, most, scale)
        np.testing.assert_array_equal(_bits(found), _bits(expected[:, :most].copy()))


def test_packed_signs_are_exact_at_the_largest_k(eager):
    cache, k = BasisCache(), 2**16
    list(cache.rows(4, 1, k, 9))
    for code in (127, -128):
        codes = np.full((1, k), code, dtype=np.int8)
        found = combine(codes, cache.packed(4, 1, k, 9), 9)
        np.testing.assert_array_equal(found.astype(np.int64), _integers(codes, _rows(4, 1, k, 9)))


def test_many_targets_go_through_packed_signs_in_parts(eager, monkeypatch):
    cache = BasisCache()
    codes = np.random.default_rng(1).integers(-8, 8, (7, 20)).astype(np.int8)
    expected = combine(codes, cache.rows(1, 0, 20, 40), 40)
    packed = cache.packed(1, 0, 20, 40)
    monkeypatch.setattr(basis, "FLOATS_AT_ONCE", 80)  # two targets at once
    np.testing.assert_array_equal(combine(codes, packed, 40), expected)


def test_signs_are_packed_at_their_second_use_and_counted():
    cache, k, entries = BasisCache(), 1024, 1024
    assert cache.packed(2, 0, k, entries) is None
    list(cache.rows(2, 0, k, entries))
    assert (cache.misses, cache.nbytes) == (1, k * entries // 8)
    packed = cache.packed(2, 0, k, entries)
    assert (cache.misses, cache.nbytes) == (2, k * entries // 8 + k * entries)
    assert cache.packed(2, 0, k, entries) is packed
    assert cache.misses == 2
    list(cache.rows(2, 0, k, entries - 1))
    assert cache.packed(2, 0, k, entries - 1) is None  # too few
    cache.clear()
    assert cache.packed(2, 0, k, entries) is None


def test_signs_that_would_fill_the_cache_are_not_packed(eager):
    cache = BasisCache(max_bytes=8 * 12 * 300 - 1)
    list(cache.rows(5, 1, 12, 300))
    assert cache.packed(5, 1, 12, 300) is None


def test_without_onnxruntime_nothing_is_packed(eager, monkeypatch):
    cache = BasisCache()
    list(cache.rows(5, 1, 12, 300))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert cache.packed(5, 1, 12, 300) is None
    assert cache.packed(5, 1, 12, 300) is None
    assert (cache.misses, cache.nbytes) == (2, 12 * 38)


def test_threads_pack_and_multiply_together(eager):
    cache, k, entries = BasisCache(max_bytes=1 << 20), 50, 200
    codes = np.random.default_rng(1).integers(-8, 8, (3, k)).astype(np.int8)
    expected = {s: combine(codes, sign_rows(s, 0, k, entries), entries) for s in range(4)}

    def use(thread: int) -> bool:
        found = []
        for step in range(20):
            seed = (thread + step) % 4
            signs = cache.packed(seed, 0, k, entries) or cache.rows(seed, 0, k, entries)
            found.append(np.array_equal(combine(codes, signs, entries), expected[seed]))
        return all(found)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(8)))
