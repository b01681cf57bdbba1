"""`regrow run --text` on a language model that was exported with a cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from regrow_runtime import Bundle
    from regrow_runtime.bundle import SwapStats

__all__ = ["generated", "generated_lines", "generation_options", "goes_on", "swap_lines"]

F = TypeVar("F", bound=Callable[..., Any])


def generation_options(function: F) -> F:
    """--max-tokens, --temperature, --top-p and --seed."""
    for option in (
        click.option("--seed", type=click.IntRange(0), default=0, show_default=True,
                     help="Of the draws, for language models."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0,
                     show_default=True, help="Draw among the likeliest tokens of this share."),
        click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True,
                     help="0 takes the likeliest token; more draws more freely."),
        click.option("--max-tokens", type=click.IntRange(1), default=64, show_default=True,
                     help="Tokens that a language model adds at most."),
    ):  # fmt: skip
        function = option(function)
    return function


def goes_on(bundle: Bundle, out: Path | None) -> bool:
    """Whether to go on with texts: a language model with a cache does.

    Raises:
        UsageError: it has none, and nobody asked for its logits.
    """
    from regrow_format.errors import UsageError

    cached = getattr(bundle.manifest, "cache", None) is not None
    if bundle.manifest.task == "text-generation" and not cached and out is None:
        raise UsageError(
            "bundle must have a key-value cache to go on with a text, got none: export it again "
            "with one, or write its logits with -o"
        )
    return cached


def generated(
    bundle: Bundle, texts: Sequence[str], options: Mapping[str, Any], cost: SwapStats | None
) -> dict[str, Any]:
    """What the model goes on with after each text, with what `Bundle.generate` reports."""
    from regrow_inputs import InputReader

    model: Any = bundle
    tokens = InputReader.from_bundle(bundle).tokens
    found = []
    for text in texts:
        prompt = tokens.prompt(text)
        made = model.generate(
            prompt, max_new_tokens=options["max_tokens"], temperature=options["temperature"],
            top_p=options["top_p"], seed=options["seed"],
        )  # fmt: skip
        new = [int(token) for token in made.tokens[0]]
        after = [int(token) for token in prompt[0]]
        found.append({
            "sample": text, "text": tokens.decode(new, after), "tokens": len(new),
            "first_token_ms": made.first_token_ms, "tokens_per_s": made.tokens_per_s,
        })  # fmt: skip
    return {
        "samples": len(texts),
        "adapter": bundle.active,
        "swap": vars(cost) if cost else None,
        "generated": found,
    }


def generated_lines(result: Mapping[str, Any]) -> list[str]:
    lines = []
    for one in result["generated"]:
        lines += f"{one['sample']}{one['text']}".splitlines()
    return lines + swap_lines(result)


def swap_lines(result: Mapping[str, Any]) -> list[str]:
    """What swapping cost, if an adapter was swapped in."""
    if not (cost := result["swap"]):
        return []
    return [f"adapter {result['adapter']} swapped in {cost['total_ms']:.2f} ms"]
