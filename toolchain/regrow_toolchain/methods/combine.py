"""Linear combinations of seeded sign vectors with gradients, a block of entries at a time.

What is kept between forward and backward is one bit per sign; the signs themselves are widened to
floats for 2**20 entries at once, in either direction, so memory does not grow with k x in x r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["combine_signs"]

_FLOATS_AT_ONCE = 1 << 20


def combine_signs(coefficients: Tensor, bits: Tensor, entries: int) -> Tensor:
    """[targets, entries]: sum over i of coefficients[t, i] times sign vector i.

    Args:
        coefficients: float [targets, k].
        bits: uint8 [k, ceil(entries / 8)], as `regrow_runtime.basis.sign_bits` gives them.
        entries: how many signs of each vector to use.
    """
    result: Tensor = _Combine.apply(coefficients, bits, entries)  # type: ignore[no-untyped-call]
    return result


def _signs(bits: Tensor, start: int, stop: int, like: Tensor) -> Tensor:
    """[k, stop - start] of +1 and -1; `start` is a multiple of 8."""
    part = bits[:, start // 8 : -(-stop // 8)]
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones = (part[:, :, None] >> shifts) & 1
    return ones.flatten(1)[:, : stop - start].to(like.dtype) * 2 - 1


def _blocks(k: int, entries: int) -> list[tuple[int, int]]:
    step = max(8, _FLOATS_AT_ONCE // max(k, 1) // 8 * 8)
    return [(start, min(start + step, entries)) for start in range(0, entries, step)]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, bits: Tensor, entries: int) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.entries = entries
        parts = [
            coefficients @ _signs(bits, start, stop, coefficients)
            for start, stop in _blocks(bits.shape[0], entries)
        ]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (bits,), (grad,) = ctx.saved_tensors, grads
        total = grad.new_zeros(grad.shape[0], bits.shape[0])
        for start, stop in _blocks(bits.shape[0], ctx.entries):
            total += grad[:, start:stop] @ _signs(bits, start, stop, grad).T
        return total, None, None
