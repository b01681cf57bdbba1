"""What a model gives: logits or features, whatever it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from regrow_format.errors import RegrowError

__all__ = ["features_of", "logits_of", "outputs_of"]


def outputs_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """What the model gives, or `RegrowError` if it does not take the inputs."""
    try:
        return model(**inputs)
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in inputs.items())
        reason = str(error).strip().partition("\n")[0]
        raise RegrowError(f"model must take the data's inputs, got {shapes}: {reason}") from error


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[batch, classes] from a transformers model or from one that returns a tensor."""
    result = outputs_of(model, inputs)
    logits = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if logits is None:
        raise RegrowError(
            f"model must return logits, got {type(result).__name__}: load it as a classifier"
        )
    return logits


def features_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """[batch, d] from a model that gives embeddings, or tokens, of which the mean is taken.

    Padding, as `attention_mask` has it, is left out of the mean (sentence-transformers' pooling).
    """
    result = outputs_of(model, inputs)
    for name in ("sentence_embedding", "image_embeds", "text_embeds", "last_hidden_state"):
        found = result if isinstance(result, Tensor) else getattr(result, name, None)
        if found is not None:
            break
    else:
        raise RegrowError(f"model must return embeddings, got {type(result).__name__}")
    if found.dim() == 2:
        return found
    tokens = found.flatten(1, -2)
    mask = inputs.get("attention_mask")
    if mask is None or mask.shape != tokens.shape[:2]:
        return tokens.mean(1)
    weight = mask.unsqueeze(-1).to(tokens.dtype)
    return (tokens * weight).sum(1) / weight.sum(1).clamp(min=1)
