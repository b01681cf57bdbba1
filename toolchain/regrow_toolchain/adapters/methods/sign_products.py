"""Linear combinations of seeded sign vectors with gradients, a block of entries at a time.

What is kept between forward and backward is one bit per sign; the signs themselves are widened to
floats for 2**20 entries at once, in either direction, so memory does not grow with k x in x r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["combine_signs", "ready_signs"]

FLOATS_AT_ONCE = 1 << 20
# A basis of at most this many signs is kept as floats (8 MB): unpacking it would take longer
# than a small model's whole step.
_KEPT_FLOATS = 1 << 21


def ready_signs(bits: Tensor, entries: int) -> Tensor:
    """What `combine_signs` takes: float32 [k, entries] of a small basis, else the bits."""
    small = bits.shape[0] * entries <= _KEPT_FLOATS
    return _signs(bits, 0, entries, torch.float32) if small else bits


def combine_signs(coefficients: Tensor, bits: Tensor, entries: int) -> Tensor:
    """[users, targets, entries]: sum over i of coefficients[u, t, i] times sign vector i.

    Users go through one product each, so that none changes another's rounding.

    Args:
        coefficients: float [users, targets, k].
        bits: uint8 [k, ceil(entries / 8)], as `regrow_format.basis.sign_bits` gives them, or what
            `ready_signs` made of them.
        entries: how many signs of each vector to use.
    """
    if bits.is_floating_point():
        return _product(coefficients, bits[:, :entries])
    result: Tensor = _Combine.apply(coefficients, bits, entries)  # type: ignore[no-untyped-call]
    return result


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """rows [users, n, k] times matrix [k, m] by user."""
    return torch.bmm(rows, matrix.to(rows.dtype).expand(len(rows), -1, -1))


def _signs(bits: Tensor, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """[k, stop - start] of +1 and -1; `start` is a multiple of 8."""
    part = bits[:, start // 8 : -(-stop // 8)]
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    ones = (part[:, :, None] >> shifts) & 1
    return ones.flatten(1)[:, : stop - start].to(dtype).mul_(2).sub_(1)


def _blocks(k: int, entries: int) -> list[tuple[int, int]]:
    step = max(8, FLOATS_AT_ONCE // max(k, 1) // 8 * 8)
    return [(start, min(start + step, entries)) for start in range(0, entries, step)]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, bits: Tensor, entries: int) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.entries = entries
        # Into one tensor: small results between large blocks would tear holes into the heap.
        total = coefficients.new_empty(*coefficients.shape[:2], entries)
        for start, stop in _blocks(bits.shape[0], entries):
            signs = _signs(bits, start, stop, coefficients.dtype)
            total[:, :, start:stop] = _product(coefficients, signs)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (bits,), (grad,) = ctx.saved_tensors, grads
        total = grad.new_zeros(*grad.shape[:2], bits.shape[0])
        for start, stop in _blocks(bits.shape[0], ctx.entries):
            total += _product(grad[:, :, start:stop], _signs(bits, start, stop, grad.dtype).T)
        return total, None, None
