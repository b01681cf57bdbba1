"""Runs during swaps: every output belongs to exactly one adapter."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from regrow_runtime import Adapter, UsageError

STEPS = 400


def test_eight_threads_run_and_swap(bundle, pixels, make_adapter, tmp_path):
    paths, expected = [], {}
    for draw in range(4):
        # Two have heads of their own: a run that mixed adapters would show it in its shape too.
        adapter: Adapter = make_adapter(draw=draw, classes=draw if draw > 1 else 0)
        paths.append(tmp_path / f"user-{draw}.safetensors")
        adapter.save(paths[-1])
        bundle.swap(paths[-1])
        expected[f"user-{draw}"] = bundle.run({"pixel_values": pixels})["logits"]
    bundle.swap(None)
    expected[None] = bundle.run({"pixel_values": pixels})["logits"]
    start = threading.Barrier(8)

    def one_of_them(found: np.ndarray) -> int:
        return sum(
            found.shape == logits.shape and np.allclose(found, logits, rtol=1e-4, atol=1e-5)
            for logits in expected.values()
        )

    def work(thread: int) -> int:
        rng, good = np.random.default_rng(thread), 0
        start.wait()
        for step in range(STEPS):
            if thread < 5:
                good += one_of_them(bundle.run({"pixel_values": pixels})["logits"]) == 1
                continue
            choice = int(rng.integers(5))
            if choice == 4:
                bundle.swap(None)
            elif step % 4 == 0:
                bundle.swap(paths[choice])
            else:
                bundle.swap(f"user-{choice}")
            good += 1
        return good

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 8 * STEPS


def test_forgetting_while_others_run(bundle, pixels, make_adapter):
    """A run per sample gets the adapter whole, or says that it is not resident."""
    adapter = make_adapter()
    bundle.load(adapter, name="a")
    names = ["a", None, "a", None, "a"]
    expected = bundle.run({"pixel_values": pixels}, names)["logits"]
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            bundle.unload("a")
            bundle.load(adapter, name="a")
            stop.wait(0.001)

    def run(_: int) -> int:
        served, deadline = 0, time.monotonic() + 20
        while served < STEPS and time.monotonic() < deadline:
            try:
                found = bundle.run({"pixel_values": pixels}, names)["logits"]
            except UsageError:
                continue
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            served += 1
        return served

    with ThreadPoolExecutor(4) as pool:
        churner = pool.submit(churn)
        try:
            assert sum(pool.map(run, range(3))) == 3 * STEPS
        finally:
            stop.set()
        churner.result()
