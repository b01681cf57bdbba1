"""Causal language models: prefill, time to the first token, decode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regrow_runtime import Bundle

from ..feeds import Feeds
from ..worker import Reporter
from .common import Case, Stopwatch, calibrate, feeds_of, open_bundle, warm_up

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
    prefill, first, rest = Stopwatch(), Stopwatch(), Stopwatch()
    for _ in range(_REPEATS):
        prefill.time(lambda: bundle.run(feeds))
    report.stage = "decode"
    decode = _generate if cached else _forward
    for _ in range(_REPEATS):
        tokens = Stopwatch()
        tokens.laps(lambda told: decode(bundle, feeds, case["tokens"], told))
        first.add(tokens, slice(0, 1))
        rest.add(tokens, slice(1, None))
    return {
        "cache": cached,
        "prompt": int(_ids(feeds).shape[1]),
        "tokens": case["tokens"],
        "prefill": prefill.found(),
        "first_token": first.found(),
        "decode": rest.found() if rest.ms else None,
        "calibration_ms": calibration,
    }


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
