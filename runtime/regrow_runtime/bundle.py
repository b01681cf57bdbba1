"""Open a bundle, swap adapters, run. The part that an application calls."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regrow_format.adapter import Adapter
from regrow_format.basis import BasisCache
from regrow_format.errors import UsageError
from regrow_format.kv_cache import CacheSpec
from regrow_format.manifest import GraphSpec, Manifest

from .adapter_loader import AdapterLoader, Source
from .checks import Check, Prober
from .graph_runner import GraphRunner
from .health import History, SwapStats, recorded, report
from .loaded_adapters import LoadedAdapters
from .mixed_batches import BaseHead, MixedBatches
from .sessions import PROFILES, Profile, open_session, profile_of, run_options
from .slots import Feeds, LoadedAdapter

if TYPE_CHECKING:
    import onnxruntime as ort

    from .generate import Generated, Generation, Ids, Settings

__all__ = ["Bundle", "SwapStats"]


class Bundle:
    """A model on the device with adapters that can be swapped; use `Bundle.open`.

    Any number of threads may call `run` during any number of swaps: a run sees one adapter, whole,
    from start to end. A failed swap leaves the old adapter active.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, session: ort.InferenceSession, profile: Profile
    ) -> None:
        self.folder, self.manifest = folder, manifest
        self.basis = BasisCache(profile.basis_cache_bytes)
        self.history = History()
        self._profile = profile
        self._swap_lock = threading.Lock()
        self._loaded = LoadedAdapters(profile.resident_bytes)
        self._runner = GraphRunner(manifest, session, run_options(profile, session))
        self._prober = Prober(folder, manifest)
        base_head = BaseHead(folder, manifest)
        self._loader = AdapterLoader(folder, manifest, self.basis, self._loaded, base_head)
        self._mixed = MixedBatches(manifest, self._loaded, base_head)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        profile: str | Profile = "speed",
        threads: int | None = None,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        options: Mapping[str, str] | None = None,
        session_options: ort.SessionOptions | None = None,
    ) -> Bundle:
        """Open the bundle in the folder `path`.

        Args:
            profile: "speed" or "memory", or settings of your own.
            threads: intra-op threads; ONNX Runtime's default if None.
            providers: ONNX Runtime execution providers, best first.
            options: further config entries of ONNX Runtime's session, such as
                {"session.intra_op.allow_spinning": "0"}.
            session_options: yours, used as they are; `profile`, `threads` and `options` then only
                set what lies outside of the session.

        Raises:
            UsageError: there is no bundle at `path`, or no such profile.
            FormatError: its files are not those that were exported.
        """
        folder = Path(path)
        settings = profile_of(profile)
        manifest = Manifest.load(folder)
        manifest.check_files(folder)
        session = open_session(
            folder, manifest, settings, threads, providers, options or {}, session_options
        )
        if manifest.cache is not None:
            _check_cache(manifest.cache, session, folder / manifest.graphs[0].file)
        return cls(folder, manifest, session, settings)

    # -- adapters --------------------------------------------------------------------------------

    @property
    def active(self) -> str | None:
        """Name of the active adapter, None for the base."""
        active = self._loaded.active
        return active.name if active else None

    @property
    def residents(self) -> dict[str, int]:
        """Bytes of RAM by adapter that `swap` activates without reading a file."""
        return {name: loaded.nbytes for name, loaded in self._loaded.snapshot().items()}

    def holds(self, name: str) -> bool:
        """Whether an adapter of this name is resident."""
        return name in self._loaded

    def labels(self, adapter: str | None = None) -> tuple[str, ...]:
        """Class names of a resident adapter, or of the active one (the base's if none is)."""
        loaded = self._loaded.get(adapter) if adapter is not None else self._loaded.active
        return loaded.labels if loaded else self.manifest.labels

    @recorded
    def load(
        self,
        adapter: Source,
        *,
        name: str | None = None,
        any_backbone: bool = False,
        check: bool = False,
        scale: float = 1.0,
    ) -> SwapStats:
        """Check and expand an adapter and keep it resident, without activating it.

        Others may be dropped for it: see `Profile.resident_bytes`.

        Args:
            adapter: a file; or an adapter in memory, or a blend: weights by the names of resident
                adapters, {"user-17": 0.7, "user-42": 0.3}. Those two need a `name`.
            name: what to call it; by default the file's name without its ending.
            any_backbone: allow an adapter that was trained on another backbone.
            check: run the bundle's probe with it first (see `check`), which takes two runs.
            scale: how strongly it changes the weights; a head of its own stays as it is.

        Raises:
            MismatchError: it does not fit, every reason is listed; or the probe found that it does
                nothing, or something else than at training.
            FormatError, UsageError: the file is broken, or there is none.
        """
        with self._swap_lock:
            loaded, cost = self._loader.load(adapter, name, any_backbone=any_backbone, scale=scale)
            if check:
                self._require(loaded)
            self._loaded.add(loaded)
        return cost

    @recorded
    def swap(
        self,
        adapter: Source | None,
        *,
        name: str | None = None,
        any_backbone: bool = False,
        check: bool = False,
        scale: float = 1.0,
    ) -> SwapStats:
        """Make another adapter the active one; None is the base.

        A string that names a resident adapter activates that one; any other string is a path. The
        adapter stays resident under its name. Arguments and errors are those of `load`.
        """
        start = time.perf_counter()
        with self._swap_lock:
            if adapter is None:
                self._loaded.active = None
                return SwapStats("base", None, _ms(start))
            if isinstance(adapter, str) and (loaded := self._loaded.find(adapter)):
                if scale != 1:
                    raise UsageError(_asked_as_blend(adapter, scale))
                if check:
                    self._require(loaded)
                self._loaded.active = loaded
                return SwapStats("resident", adapter, _ms(start), resident_bytes=loaded.nbytes)
            loaded, cost = self._loader.load(adapter, name, any_backbone=any_backbone, scale=scale)
            if check:
                self._require(loaded)
            self._loaded.active = loaded
            self._loaded.add(loaded)
        return cost

    def unload(self, name: str) -> None:
        """Free a resident adapter's RAM; if it is active it stays so until the next swap."""
        with self._swap_lock:
            self._loaded.remove(name)

    def check(self, adapter: str | Adapter | None = None) -> Check:
        """Run the bundle's probe with a resident adapter, the active one, or the base if none is.

        One in memory is expanded for it and not kept. What the probe finds is returned, not raised:
        see `Check`; that an adapter does not fit is raised as by `load`.
        """
        loaded = self._loaded.active
        if isinstance(adapter, Adapter):
            with self._swap_lock:
                loaded, _ = self._loader.load(adapter, "in memory")
        elif adapter is not None:
            loaded = self._loaded.get(adapter)
        return self._prober.check(self._run, loaded)

    def _require(self, loaded: LoadedAdapter) -> None:
        self._prober.check(self._run, loaded).require()

    def health(self) -> dict[str, Any]:
        """What is active and resident, what swaps there were, and what all of it takes.

        Returns:
            For JSON: `active`; `residents`, by name `bytes` and `idle_s`; `swaps` by kind, and
            `failures` with the text of the `last_failure`; `file_bytes`, `basis_bytes`;
            `onnxruntime`, `profile`, `threads` (0: one per core), `providers`.
        """
        profile = next((n for n, p in PROFILES.items() if p == self._profile), "own")
        return report(self, self._loaded.snapshot(), self._runner.session, profile)

    # -- running ---------------------------------------------------------------------------------

    @property
    def graph(self) -> GraphSpec:
        """The graph's inputs and outputs, without the slots."""
        return self._runner.graph

    def run(
        self,
        inputs: Mapping[str, ArrayLike],
        adapters: Sequence[str | None] | None = None,
        *,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Run the model.

        Args:
            inputs: an array per graph input, the batch first.
            adapters: a resident adapter's name, or None for the base, per sample; without it the
                active adapter serves the whole batch.
            outputs: names of the outputs to compute; all by default.

        Returns:
            Arrays by output name. With `adapters` of different class counts, classes that a sample
            does not have are -inf.

        Raises:
            UsageError: inputs or adapters are not those that the manifest asks for.
            RegrowError: ONNX Runtime failed; its reason is in the message.
        """
        if adapters is None:
            return self._run(inputs, self._loaded.active, outputs)
        feeds = self._runner.checked(inputs)
        samples = {array.shape[0] for array in feeds.values() if array.ndim}
        feeds.update(self._mixed.feeds(self._mixed.adapters(adapters, samples)))
        return self._runner.run(feeds, outputs)

    def _run(
        self,
        inputs: Mapping[str, ArrayLike],
        active: LoadedAdapter | None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        feeds = self._runner.checked(inputs)
        if active is not None:
            active.last_use = time.time()
            feeds.update(active.feeds)
        return self._runner.run(feeds, outputs)

    def run_all(
        self, inputs: Mapping[str, ArrayLike], *, batch: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """As `run` with the active adapter, `batch` samples at a time, so that RAM is bounded.

        By default as many as the profile says: 64, or 4 for "memory".

        A swap meanwhile serves the next call: all samples of this one see one adapter.
        """
        active, batch = self._loaded.active, batch or self._profile.batch
        arrays = {name: np.asarray(array) for name, array in inputs.items()}
        counts = {array.shape[0] if array.ndim else 0 for array in arrays.values()}
        if len(counts) != 1 or 0 in counts:
            raise UsageError(f"inputs must have one number of samples, not 0, got {sorted(counts)}")
        parts = [
            self._run(
                {name: array[start : start + batch] for name, array in arrays.items()}, active
            )
            for start in range(0, counts.pop(), batch)
        ]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def generate(
        self,
        input_ids: ArrayLike | Sequence[ArrayLike],
        *,
        attention_mask: ArrayLike | None = None,
        max_new_tokens: int | None = None,
        on_tokens: Callable[[Ids], object] | None = None,
        **settings: Unpack[Settings],
    ) -> Generated:
        """Go on with a text, or with a batch of them, from a causal language model.

        Args:
            input_ids: of one sample, or of each; samples may have different lengths.
            settings: adapters, temperature, top_p, seed, stop; see `Generation`, whose `generate`
                has the other arguments, and errors.
        """
        return self.chat(**settings).generate(
            input_ids, attention_mask=attention_mask, max_new_tokens=max_new_tokens,
            on_tokens=on_tokens,
        )  # fmt: skip

    def chat(self, **settings: Unpack[Settings]) -> Generation:
        """A conversation: its `generate` goes on where the last call ended; see `Generation`."""
        from .generate import Generation  # not above: most bundles are no language models

        return Generation(self, **settings)

    # -- for `Generation`, and for loops of one's own ----------------------------------------------

    def adapter_feeds(
        self, adapters: Sequence[str | None] | None, samples: int
    ) -> tuple[list[LoadedAdapter | None], Feeds]:
        """The adapters that serve a batch now, and what they put into the slots.

        Args:
            adapters: as `run` takes them.
            samples: how many the batch has.

        Returns:
            The active adapter alone, or one per sample, None for the base; and arrays by graph
            input. They stay as they are whatever is swapped later.
        """
        if adapters is None:
            active = self._loaded.active  # one look: another thread may swap
            return [active], active.feeds if active else {}
        found = self._mixed.adapters(adapters, {samples})
        return found, self._mixed.feeds(found)

    def run_graph(self, names: Sequence[str], feeds: Feeds) -> list[NDArray[Any]]:
        """The outputs called `names`, in their order, of the graph's inputs as they are fed.

        Nothing is checked or filled in: neither inputs, slots nor the key-value cache.

        Raises:
            RegrowError: ONNX Runtime failed; its reason is in the message.
        """
        return self._runner.call(names, feeds)


def _ms(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _asked_as_blend(name: str, scale: float) -> str:
    return (
        "scale of a resident adapter must be asked for as a blend, which has a name of its own, "
        f"got {scale}: swap({{{name!r}: {scale}}}, name=...)"
    )


def _check_cache(cache: CacheSpec, session: ort.InferenceSession, path: Path) -> None:
    given, made = (
        {value.name: value.shape for value in values}
        for values in (session.get_inputs(), session.get_outputs())
    )
    cache.check_graph(given, made, str(path))
