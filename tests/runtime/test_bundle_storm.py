"""Eight threads that do everything at once to one bundle, while its adapter files are replaced."""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from regrow_format.files import write_bytes
from regrow_runtime import Bundle, Profile, RegrowError, UsageError
from regrow_runtime.store import Store

OPERATIONS = 20_000
THREADS = 8


class Storm:
    """What the threads share: the bundle, files of known adapters, and what each must give."""

    def __init__(self, folder, bundle_folder, pixels, make_adapter):
        # Four adapters fit into RAM, so loading one drops another.
        self.bundle = Bundle.open(bundle_folder, threads=1, profile=Profile(0, True, True, 7000))
        self.pixels, self.folder = pixels, folder
        methods = ("nola", "lora", "vera", "nola", "bitfit", "lora")
        self.adapters = [
            make_adapter(m, draw=i, classes=(0, 0, 2, 0, 4, 3)[i]) for i, m in enumerate(methods)
        ]
        self.expected = [self.alone(adapter) for adapter in [None, *self.adapters]]
        self.files = [folder / f"user-{i}.safetensors" for i in range(8)]
        for index, path in enumerate(self.files):
            self.adapters[index % 6].save(path)
        self.broken = self.break_files(make_adapter)
        self.store = Store(folder / "store")
        for index, adapter in enumerate(self.adapters):
            self.store.add(f"user {index}", adapter.to_bytes(), activate=True)
        self.counts: Counter[str] = Counter()
        self.numbers, self.lock = itertools.count(), threading.Lock()

    def alone(self, adapter):
        if adapter is not None:
            self.bundle.load(adapter, name="alone")
        names = [None if adapter is None else "alone"] * len(self.pixels)
        logits = self.bundle.run({"pixel_values": self.pixels}, names)["logits"]
        if adapter is not None:
            self.bundle.unload("alone")
        return logits

    def break_files(self, make_adapter):
        whole = self.adapters[0].to_bytes()
        other = replace(make_adapter(), backbone_id="sha256:" + "cd" * 32).to_bytes()
        huge = make_adapter("lora", "fp32")
        for part in huge.coefficients.values():
            part.scale[:] = 3e38  # finite in the file, not when expanded
        contents = (whole[:-1], b"", other, huge.to_bytes())
        for index, data in enumerate(contents):
            (self.folder / f"broken-{index}.safetensors").write_bytes(data)
        names = [f"broken-{index}.safetensors" for index in range(4)]
        return [self.folder / name for name in [*names, "none.safetensors"]]

    def belongs(self, logits, rows) -> bool:
        """Whether every row is what one adapter gives for this sample; extra classes are -inf."""
        return all(
            sum(_equal(found, expected[row]) for expected in self.expected) == 1
            for found, row in zip(logits, rows, strict=True)
        )

    def one_adapter(self, logits) -> bool:
        """Whether all rows are of the same one."""
        return sum(
            logits.shape == e.shape and np.allclose(logits, e, rtol=1e-4, atol=1e-5)
            for e in self.expected
        ) == 1  # fmt: skip


def _equal(found: np.ndarray, expected: np.ndarray) -> bool:
    width = len(expected)
    return (
        len(found) >= width
        and np.allclose(found[:width], expected, rtol=1e-4, atol=1e-5)
        and bool(np.isneginf(found[width:]).all())
    )


def _run(storm, rng):
    assert storm.one_adapter(storm.bundle.run({"pixel_values": storm.pixels})["logits"])


def _run_in_parts(storm, rng):
    assert storm.one_adapter(
        storm.bundle.run_all({"pixel_values": storm.pixels}, batch=2)["logits"]
    )


def _run_mixed(storm, rng):
    rows = rng.integers(len(storm.pixels), size=3)
    known = [None, *storm.bundle.residents]
    names = [known[i] for i in rng.integers(len(known), size=3)]
    try:
        logits = storm.bundle.run({"pixel_values": storm.pixels[rows]}, names)["logits"]
    except UsageError as error:
        assert "must be resident" in str(error)  # dropped meanwhile, and told  # noqa: PT017
        return "dropped"
    assert storm.belongs(logits, rows)
    for row, name, found in zip(rows, names, logits, strict=True):
        assert name is not None or _equal(found, storm.expected[0][row])
    return None


def _swap(storm, rng):
    storm.bundle.swap(storm.files[rng.integers(len(storm.files))])


def _swap_resident(storm, rng):
    names = list(storm.bundle.residents)
    if names:
        try:
            storm.bundle.swap(names[rng.integers(len(names))])
        except UsageError:  # dropped meanwhile: then the name is a path, where nothing is
            return "dropped"
    return None


def _swap_from_the_store(storm, rng):
    storm.store.swap(storm.bundle, f"user {rng.integers(6)}")


def _base(storm, rng):
    storm.bundle.swap(None)


def _load(storm, rng):
    storm.bundle.load(storm.files[rng.integers(len(storm.files))])


def _forget(storm, rng):
    names = list(storm.bundle.residents)
    if names:
        try:
            storm.bundle.unload(names[rng.integers(len(names))])
        except UsageError:
            return "dropped"
    return None


def _fail(storm, rng):
    path = storm.broken[rng.integers(len(storm.broken))]
    call = storm.bundle.swap if rng.integers(2) else storm.bundle.load
    with pytest.raises(RegrowError):
        call(path)
    assert path.stem not in storm.bundle.residents
    assert storm.bundle.active != path.stem


def _replace(storm, rng):
    adapter = storm.adapters[rng.integers(len(storm.adapters))]
    write_bytes(storm.files[rng.integers(len(storm.files))], adapter.to_bytes())


OFTEN = {
    _run: 40, _run_in_parts: 5, _run_mixed: 20, _swap: 8, _swap_resident: 6, _base: 3, _load: 5,
    _swap_from_the_store: 5, _forget: 3, _fail: 4, _replace: 1,
}  # fmt: skip


def _work(storm: Storm, thread: int, operations: int) -> None:
    rng = np.random.default_rng(thread)
    choices = [call for call, often in OFTEN.items() for _ in range(often)]
    while next(storm.numbers) < operations:
        call = choices[rng.integers(len(choices))]
        outcome = call(storm, rng)
        with storm.lock:
            storm.counts[outcome or call.__name__] += 1


def _storm(tmp_path, bundle_folder, pixels, make_adapter, monkeypatch, operations):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # replacing files waits for no disk
    storm = Storm(tmp_path, bundle_folder, pixels, make_adapter)
    assert all(storm.one_adapter(logits) for logits in storm.expected)  # they tell each other apart
    with ThreadPoolExecutor(THREADS) as pool, storm.store:
        for done in [pool.submit(_work, storm, i, operations) for i in range(THREADS)]:
            done.result()
    assert sum(storm.counts.values()) == operations
    assert min(storm.counts[call.__name__] for call in OFTEN) > 0
    return storm.counts


def test_a_small_storm(tmp_path, bundle_folder, pixels, make_adapter, monkeypatch):
    _storm(tmp_path, bundle_folder, pixels, make_adapter, monkeypatch, 1000)


@pytest.mark.slow
def test_20_000_operations(tmp_path, bundle_folder, pixels, make_adapter, monkeypatch):
    counts = _storm(tmp_path, bundle_folder, pixels, make_adapter, monkeypatch, OPERATIONS)
    assert counts["_run"] + counts["_run_in_parts"] + counts["_run_mixed"] > OPERATIONS / 2
    assert counts["dropped"] > 0


@pytest.mark.parametrize("number", range(5))
def test_a_failed_swap_changes_nothing(tmp_path, bundle_folder, pixels, make_adapter, number):
    storm = Storm(tmp_path, bundle_folder, pixels, make_adapter)
    with storm.store:
        storm.bundle.swap(storm.files[1])
        before = (storm.bundle.active, storm.bundle.residents)
        for call in (storm.bundle.swap, storm.bundle.load):
            with pytest.raises(RegrowError):
                call(storm.broken[number])
            with pytest.raises(RegrowError):
                call(storm.broken[number], name="user-1")  # of the active one's name
        assert (storm.bundle.active, storm.bundle.residents) == before
        logits = storm.bundle.run({"pixel_values": pixels})["logits"]
        np.testing.assert_allclose(logits, storm.expected[2], rtol=1e-4, atol=1e-5)
