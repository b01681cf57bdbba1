"""Text from a causal language model, token by token; the cache is tied to its adapters."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regrow_format.basis import Role
from regrow_format.errors import RegrowError, UsageError
from regrow_format.kv_cache import positions
from regrow_format.philox import check_seed, key_of, philox_words
from regrow_format.record import Record

if TYPE_CHECKING:
    from regrow_format.manifest import Manifest

    from .slots import Feeds, LoadedAdapter

__all__ = ["Generated", "Generation", "Settings", "choose"]

Ids = NDArray[np.int64]


class Settings(TypedDict, total=False):
    """How `Generation` chooses tokens; its docstring says what each is."""

    adapters: Sequence[str | None] | None
    temperature: float
    top_p: float
    seed: int
    stop: Sequence[int] | None


class CausalModel(Protocol):
    """What a conversation asks of a bundle."""

    manifest: Manifest

    def adapter_feeds(
        self, adapters: Sequence[str | None] | None, samples: int
    ) -> tuple[list[LoadedAdapter | None], Feeds]:
        """The adapters that serve a batch now, and what they put into the slots."""

    def run_graph(self, names: Sequence[str], feeds: Feeds) -> list[NDArray[Any]]:
        """The outputs called `names`, in their order."""


class Generated(Record):
    """What a call made, and what it cost.

    Attributes:
        tokens: new ids by sample, the one that ended it included.
        first_token_ms: from the call to the first token.
        tokens_per_s: of all samples together, after the first token; 0 if there were no more.
        recomputed: tokens of the conversation, padding included, that had to be run again.
    """

    tokens: tuple[Ids, ...]
    first_token_ms: float
    tokens_per_s: float
    recomputed: int = 0


class Generation:
    """A conversation, or a batch of them: every token so far, and the cache that goes with them.

    A call uses one adapter, whole, from its first token to its last, whatever other threads swap.
    If the adapter is another one at the next call, the cache is of no use to it, and everything so
    far is run again. One thread at a time may use a conversation.

    Args:
        bundle: the `Bundle` that runs it.
        adapters: a resident adapter's name, or None for the base, per sample; without it, whichever
            is active at a call serves the whole batch.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: samples among the fewest likeliest tokens that have this share of the probability.
        seed: uint64. The draw for a token depends on it, the sample's row, and the token's place
            alone (Philox, role 5), so the same logits give the same text.
        stop: ids that end a text; by default the bundle's.

    Raises:
        UsageError: the bundle has no key-value cache, or a setting is out of range.
    """

    def __init__(
        self,
        bundle: CausalModel,
        *,
        adapters: Sequence[str | None] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: Sequence[int] | None = None,
    ) -> None:
        spec = bundle.manifest.cache
        if spec is None:
            raise UsageError(
                "bundle must have a key-value cache to generate text, got none: export a causal "
                "language model, without --no-cache"
            )
        if not 0 <= temperature < np.inf:
            raise UsageError(f"temperature must be a number from 0, got {temperature}")
        if not 0 < top_p <= 1:
            raise UsageError(f"top_p must be above 0 and at most 1, got {top_p}")
        self.adapters, self.temperature, self.top_p = adapters, temperature, top_p
        self.seed, self.stop = check_seed(seed), list(spec.stop if stop is None else stop)
        self.ids: Ids = np.zeros((0, 0), dtype=np.int64)  # [samples, tokens], of all calls
        self.mask: Ids = self.ids  # 0 where a sample is padded
        self._bundle, self._spec = bundle, spec
        self._cached, self._past = 0, dict[str, NDArray[Any]]()  # tokens in the cache, and it
        self._owners: list[LoadedAdapter | None] = []

    def generate(
        self,
        input_ids: ArrayLike | Sequence[ArrayLike],
        *,
        attention_mask: ArrayLike | None = None,
        max_new_tokens: int | None = None,
        on_tokens: Callable[[Ids], object] | None = None,
    ) -> Generated:
        """Go on with the conversation; arguments and errors are those of `stream`.

        Args:
            on_tokens: called with what `stream` yields, as it comes.
        """
        start = first = last = time.perf_counter()
        cached, steps = self._cached, list[Ids]()
        for tokens in self.stream(input_ids, attention_mask, max_new_tokens):
            last = time.perf_counter()
            first = first if steps else last
            steps.append(tokens)
            if on_tokens is not None:
                on_tokens(tokens)
        rows = np.stack(steps, axis=1)
        later = np.count_nonzero(rows[:, 1:] >= 0)
        return Generated(
            tokens=tuple(row[row >= 0] for row in rows),
            first_token_ms=(first - start) * 1e3,
            tokens_per_s=later / (last - first) if later else 0.0,
            recomputed=cached if self._began == 0 else 0,
        )

    def stream(
        self,
        input_ids: ArrayLike | Sequence[ArrayLike],
        attention_mask: ArrayLike | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[Ids]:
        """Go on with the conversation, token by token.

        Args:
            input_ids: of one sample, or of each; samples may have different lengths.
            attention_mask: 0 for padding among `input_ids` [samples, length].
            max_new_tokens: at most so many; never more than the model's context takes.

        Yields:
            int64 [samples], -1 for a sample that has ended. Leaving off early loses nothing.

        Raises:
            UsageError: an argument or an adapter is none that serves.
            RegrowError: ONNX Runtime failed, or a logit is not a number.
        """
        ids, mask = _padded(_rows(input_ids, attention_mask))
        if self.ids.size and len(ids) != len(self.ids):
            raise UsageError(
                f"input_ids must be of the conversation's {len(self.ids)} samples, got {len(ids)}"
            )
        if self.ids.size:
            ids, mask = np.hstack([self.ids, ids]), np.hstack([self.mask, mask])
        return self._steps(ids, mask, self._limit(mask, max_new_tokens), self._adapt(len(ids)))

    def _limit(self, mask: Ids, asked: int | None) -> int:
        used, context = int(mask.sum(axis=1).max()), self._spec.context
        if asked is None and context is None:
            raise UsageError("max_new_tokens must be given for a model without a context, got None")
        if asked is not None and asked < 1:
            raise UsageError(f"max_new_tokens must be at least 1, got {asked}")
        if context is not None and used >= context:
            raise UsageError(
                f"input_ids must leave room in the model's context of {context} tokens, got {used}"
            )
        rooms = (asked, context and context - used)
        return min(scratch for scratch in rooms if scratch is not None)

    def _adapt(self, samples: int) -> Feeds:
        """What the slots take during one call; another adapter than before empties the cache."""
        owners, feeds = self._bundle.adapter_feeds(self.adapters, samples)
        if [id(owner) for owner in owners] != [id(owner) for owner in self._owners]:
            self._cached, self._past = 0, self._spec.empty(samples)
        self._owners, self._began = owners, self._cached
        return feeds

    def _steps(self, ids: Ids, mask: Ids, limit: int, slots: Feeds) -> Iterator[Ids]:
        live = np.ones(len(ids), dtype=bool)
        for _ in range(limit):
            logits = self._forward(ids, mask, slots)
            drawn = choose(logits, self.mask.sum(axis=1), self.seed, self.temperature, self.top_p)
            ids = np.hstack([ids, np.where(live, drawn, 0)[:, None]])
            mask = np.hstack([mask, live[:, None].astype(np.int64)])
            self.ids, self.mask = ids, mask
            yield np.where(live, drawn, -1)
            live &= ~np.isin(drawn, self.stop)
            if not live.any():
                return

    def _forward(self, ids: Ids, mask: Ids, slots: Feeds) -> NDArray[np.float32]:
        """Logits [samples, vocabulary] after the last token; what is not in the cache is run."""
        spec, start = self._spec, self._cached
        roles = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(mask)}
        feeds = {
            name: roles[role] if role == "attention_mask" else roles[role][:, start:]
            for role, name in spec.inputs.items()
        }
        outputs = [spec.logits, *(tensor.present for tensor in spec.tensors)]
        logits, *presents = self._bundle.run_graph(outputs, {**feeds, **self._past, **slots})
        pasts = (tensor.past for tensor in spec.tensors)
        self._past, self._cached = dict(zip(pasts, presents, strict=True)), ids.shape[1]
        self.ids, self.mask = ids, mask
        last: NDArray[np.float32] = logits[:, -1]
        return last


def _rows(ids: Any, mask: ArrayLike | None) -> list[Ids]:
    """The ids of each sample, without padding."""
    several = isinstance(ids, Sequence | np.ndarray) and np.ndim(ids[:1]) > 1
    rows = [np.asarray(row) for row in (ids if several and len(ids) else [ids])]
    if mask is not None:
        kept = np.atleast_2d(np.asarray(mask))
        if [row.shape for row in rows] != [row.shape for row in kept]:
            raise UsageError(f"attention_mask must be as input_ids, got {list(kept.shape)}")
        rows = [row[keep != 0] for row, keep in zip(rows, kept, strict=True)]
    for row in rows:
        if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
            raise UsageError(
                "input_ids must be at least one integer per sample, got "
                f"{row.dtype} {list(row.shape)}"
            )
    return [row.astype(np.int64) for row in rows]


def _padded(rows: Sequence[Ids]) -> tuple[Ids, Ids]:
    """Ids and mask [samples, length], padded on the left: the last column is everybody's last."""
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    mask = np.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, -len(row) :], mask[index, -len(row) :] = row, 1
    return ids, mask


def choose(
    logits: NDArray[np.float32], place: Ids, seed: int, temperature: float, top_p: float
) -> Ids:
    """One token per row of `logits` [samples, vocabulary]; `place` [samples] counts those before.

    Top-p is the nucleus of Holtzman et al. 2020, section 3.1, by inversion: tokens in falling order
    of probability, equal ones by id, and the first whose cumulated probability is above the draw.
    """
    if np.isnan(logits).any():
        raise RegrowError("logits must be numbers, got NaN: the adapter or the model overflows")
    if temperature == 0:
        likeliest: Ids = logits.argmax(axis=1)
        return likeliest
    order = np.argsort(-logits, axis=1, kind="stable")
    falling = np.take_along_axis(logits, order, axis=1).astype(np.float64)
    with np.errstate(over="ignore"):
        share = np.exp((falling - falling[:, :1]) / temperature)
    above = np.cumsum(share, axis=1)
    kept = ((above - share) < top_p * above[:, -1:]).sum(axis=1)
    rows = np.arange(len(logits))
    high, low, *_ = philox_words(place, rows, Role.SAMPLING, 0, key_of(seed))
    draw = ((high >> np.uint64(5)) * 2.0**26 + (low >> np.uint64(6))) / 2.0**53  # below 1
    index = (above <= (draw * above[rows, kept - 1])[:, None]).sum(axis=1)
    found: Ids = order[rows, np.minimum(index, kept - 1)]
    return found
