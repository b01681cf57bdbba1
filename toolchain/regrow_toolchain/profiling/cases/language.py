"""Causal language models: prefill, time to the first token, decode."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_runtime import Bundle

from ..feeds import Feeds
from ..worker import Reporter
from .common import Case, calibrate, feeds_of, open_bundle, timed, warm_up

__all__ = ["run"]

_REPEATS = 5

Told = Callable[[Any], None]


def run(case: Case, report: Reporter) -> dict[str, Any]:
    """Milliseconds: `prefill` of the prompt, `first_token`, `decode` per token after it.

    A bundle with a key-value cache decodes with `Bundle.generate`; without one every token is a
    run over all tokens so far, and `cache` is false.
    """
    calibration = calibrate()
    report.stage = "open"
    bundle = open_bundle(case)
    feeds = feeds_of(case, bundle.manifest)
    if case["adapters"]:
        bundle.swap(case["adapters"][0][1])
    cached = getattr(bundle.manifest, "cache", None) is not None
    report.stage = "prefill"
    warm_up(lambda: bundle.run(feeds))
    prefill = [timed(lambda: bundle.run(feeds)) for _ in range(_REPEATS)]
    report.stage = "decode"
    decode = _generate if cached else _forward
    tokens = [_token_times(decode, bundle, feeds, case["tokens"]) for _ in range(_REPEATS)]
    return {
        "cache": cached,
        "prompt": int(_ids(feeds).shape[1]),
        "tokens": case["tokens"],
        "prefill": prefill,
        "first_token": [times[0] for times in tokens],
        "decode": [value for times in tokens for value in times[1:]],
        "calibration_ms": calibration,
    }


def _token_times(
    decode: Callable[[Bundle, Feeds, int, Told], None], bundle: Bundle, feeds: Feeds, count: int
) -> list[float]:
    """Milliseconds to the first token, and from each to the next."""
    moments = [time.perf_counter()]
    decode(bundle, feeds, count, lambda _: moments.append(time.perf_counter()))
    return [1e3 * (after - before) for before, after in pairwise(moments)]


def _ids(feeds: Feeds) -> NDArray[Any]:
    return feeds["input_ids"] if "input_ids" in feeds else next(iter(feeds.values()))


def _generate(bundle: Bundle, feeds: Feeds, count: int, told: Told) -> None:
    """With the bundle's cache."""
    generate: Any = vars(type(bundle))["generate"]
    generate(bundle, _ids(feeds), max_new_tokens=count, on_tokens=told, stop=())


def _forward(bundle: Bundle, feeds: Feeds, count: int, told: Told) -> None:
    """Greedy tokens without a cache: the whole sequence again for each."""
    name = bundle.graph.outputs[0].name
    for _ in range(count):
        token = bundle.run(feeds, outputs=[name])[name][:, -1].argmax(axis=-1)
        told(token)
        feeds = {key: _longer(key, value, token) for key, value in feeds.items()}


def _longer(name: str, value: NDArray[Any], token: NDArray[Any]) -> NDArray[Any]:
    if value.ndim != 2:
        return value
    last = value[:, -1:] + 1 if "position" in name else value[:, -1:]
    if name == "input_ids":
        last = token[:, None].astype(value.dtype)
    return np.concatenate([value, last], axis=1)
