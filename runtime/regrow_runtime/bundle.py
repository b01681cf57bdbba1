"""Open a bundle, swap adapters, run. The part that an application calls."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from regrow_format.adapter import Adapter
from regrow_format.basis import BasisCache
from regrow_format.errors import RegrowError, UsageError
from regrow_format.kv_cache import CacheSpec
from regrow_format.manifest import GraphSpec, Manifest, TensorSpec

from .blend import as_weight, blend
from .checks import Check, Prober
from .fit import check_fit
from .generate import Generated, Generation, Ids, Settings
from .health import History, SwapStats, recorded, report
from .sessions import PROFILES, Profile, first_line, open_session, profile_of, run_options
from .slots import Feeds, LoadedAdapter, expand, load_head, stack

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["Bundle", "SwapStats"]


class Bundle:
    """A model on the device with adapters that can be swapped; use `Bundle.open`.

    Any number of threads may call `run` during any number of swaps: a run sees one adapter, whole,
    from start to end. A failed swap leaves the old adapter active.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, session: ort.InferenceSession, profile: Profile
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.basis = BasisCache(profile.basis_cache_bytes)
        self._session = session
        self._run_options = run_options(profile, session)
        self._swap_lock = threading.Lock()
        self._residents: dict[str, LoadedAdapter] = {}
        self._resident_bytes, self._batch = profile.resident_bytes, profile.batch
        self._uses = itertools.count()
        self._active: LoadedAdapter | None = None
        self._base_head: Feeds | None = None
        self.history, self._prober, self._profile = History(), Prober(folder, manifest), profile

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
        active = self._active
        return active.name if active else None

    @property
    def residents(self) -> dict[str, int]:
        """Bytes of RAM by adapter that `swap` activates without reading a file."""
        return {name: resident.nbytes for name, resident in list(self._residents.items())}

    def holds(self, name: str) -> bool:
        """Whether an adapter of this name is resident."""
        return name in self._residents

    def labels(self, adapter: str | None = None) -> tuple[str, ...]:
        """Class names of a resident adapter, or of the active one (the base's if none is)."""
        resident = self._resident(adapter) if adapter is not None else self._active
        return resident.labels if resident else self.manifest.labels

    @recorded
    def load(
        self,
        adapter: str | Path | Adapter | Mapping[str, float],
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
            resident, cost = self._expand(adapter, name, any_backbone, scale)
            self._require(resident, check)
            self._keep(resident)
        return cost

    @recorded
    def swap(
        self,
        adapter: str | Path | Adapter | Mapping[str, float] | None,
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
                self._active = None
                return SwapStats("base", None, _ms(start))
            if isinstance(adapter, str) and adapter in self._residents:
                if scale != 1:
                    raise UsageError(
                        "scale of a resident adapter must be asked for as a blend, which has a "
                        f"name of its own, got {scale}: swap({{{adapter!r}: {scale}}}, name=...)"
                    )
                resident = self._resident(adapter)
                self._require(resident, check)
                self._active = resident
                return SwapStats("resident", adapter, _ms(start), resident_bytes=resident.nbytes)
            resident, cost = self._expand(adapter, name, any_backbone, scale)
            self._require(resident, check)
            self._active = resident
            self._keep(resident)
        return cost

    def unload(self, name: str) -> None:
        """Free a resident adapter's RAM; if it is active it stays so until the next swap."""
        with self._swap_lock:
            self._resident(name)
            del self._residents[name]

    def check(self, adapter: str | Adapter | None = None) -> Check:
        """Run the bundle's probe with a resident adapter, the active one, or the base if none is.

        One in memory is expanded for it and not kept. What the probe finds is returned, not raised:
        see `Check`; that an adapter does not fit is raised as by `load`.
        """
        resident = self._active
        if isinstance(adapter, Adapter):
            with self._swap_lock:
                resident = self._expand(adapter, "in memory", False, 1.0)[0]
        elif adapter is not None:
            resident = self._resident(adapter)
        return self._prober.check(self._run, resident)

    def _require(self, resident: LoadedAdapter, check: bool) -> None:
        if check:
            self._prober.check(self._run, resident).require()

    def health(self) -> dict[str, Any]:
        """What is active and resident, what swaps there were, and what all of it takes.

        Returns:
            For JSON: `active`; `residents`, by name `bytes` and `idle_s`; `swaps` by kind, and
            `failures` with the text of the `last_failure`; `file_bytes`, `basis_bytes`;
            `onnxruntime`, `profile`, `threads` (0: one per core), `providers`.
        """
        profile = next((n for n, p in PROFILES.items() if p == self._profile), "own")
        return report(self, dict(self._residents), self._session, profile)

    def _resident(self, name: str) -> LoadedAdapter:
        resident = self._residents.get(name)  # one look-up: another thread may forget it
        if resident is None:
            known = ", ".join(sorted(self._residents)) or "none"
            raise UsageError(
                f"adapter must be resident ({known}), got {name!r}: load or swap it first"
            )
        resident.used, resident.last_use = next(self._uses), time.time()
        return resident

    def _keep(self, resident: LoadedAdapter) -> None:
        """Make it resident, and drop others that are too many bytes together."""
        resident.used, resident.last_use = next(self._uses), time.time()
        self._residents[resident.name] = resident
        others = sorted(self._residents.values(), key=lambda other: other.used)
        left = sum(other.nbytes for other in others) - self._resident_bytes
        for other in others:
            if left > 0 and other not in (resident, self._active):
                del self._residents[other.name]
                left -= other.nbytes

    def _expand(
        self,
        source: str | Path | Adapter | Mapping[str, float],
        name: str | None,
        any_backbone: bool,
        scale: float,
    ) -> tuple[LoadedAdapter, SwapStats]:
        start, scale = time.perf_counter(), as_weight(scale, "scale")
        if isinstance(source, Mapping):
            weights = {key: as_weight(w, f"weight of {key}") for key, w in source.items()}
            return self._blend({key: scale * w for key, w in weights.items()}, name, start)
        adapter, name = _read(source, name)
        read = time.perf_counter()
        check_fit(adapter, self.manifest, any_backbone=any_backbone)
        checked = time.perf_counter()
        misses = self.basis.misses
        feeds = expand(adapter, self.manifest, self.basis, self.folder)
        labels = adapter.head.labels if adapter.head else self.manifest.labels
        resident = LoadedAdapter(name, feeds, labels, probe=adapter.probe)
        if scale != 1:
            resident = blend(name, [(resident, scale)], self.manifest, {})
        cost = SwapStats(
            kind="cached" if self.basis.misses == misses else "cold",
            name=name,
            total_ms=_ms(start),
            read_ms=(read - start) * 1e3,
            check_ms=(checked - read) * 1e3,
            expand_ms=_ms(checked),
            resident_bytes=resident.nbytes,
        )
        return resident, cost

    def _blend(
        self, weights: Mapping[str, float], name: str | None, start: float
    ) -> tuple[LoadedAdapter, SwapStats]:
        if name is None:
            raise UsageError("name must be given with a blend, got None")
        if name in weights:
            raise UsageError(f"name of a blend must not be that of one of its adapters, got {name}")
        parts = [(self._resident(key), weight) for key, weight in weights.items()]
        head = self._head([resident for resident, _ in parts])
        resident = blend(name, parts, self.manifest, head)
        return resident, SwapStats("blend", name, _ms(start), resident_bytes=resident.nbytes)

    # -- running ---------------------------------------------------------------------------------

    @property
    def graph(self) -> GraphSpec:
        """The graph's inputs and outputs, without the slots."""
        return self.manifest.graphs[0]

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
        return self._run(inputs, self._active, adapters, outputs)

    def _run(
        self,
        inputs: Mapping[str, ArrayLike],
        active: LoadedAdapter | None,
        adapters: Sequence[str | None] | None = None,
        outputs: Sequence[str] | None = None,
    ) -> dict[str, NDArray[Any]]:
        cache = self.manifest.cache
        inputs = inputs if cache is None else cache.filled(inputs)
        feeds = {spec.name: _checked(inputs, spec) for spec in self.graph.inputs}
        unknown = set(inputs) - set(feeds)
        if unknown:
            raise UsageError(f"inputs must be {sorted(feeds)}, got also {sorted(unknown)}")
        if adapters is not None:
            feeds.update(self._per_sample(adapters, feeds))
        elif active is not None:
            active.last_use = time.time()
            feeds.update(active.feeds)
        known = [spec.name for spec in self.graph.outputs]
        names = known if outputs is None else list(outputs)
        if not names or not set(names) <= set(known):
            raise UsageError(f"outputs must be among {known}, got {names}")
        if cache is not None:
            feeds |= cache.empty(len(feeds[cache.inputs["input_ids"]]))
        return dict(zip(names, self._call(names, feeds), strict=True))

    def _call(self, names: Sequence[str], feeds: Feeds) -> list[NDArray[Any]]:
        try:
            values: list[NDArray[Any]] = self._session.run(names, feeds, self._run_options)
        except Exception as error:
            shapes = ", ".join(f"{s.name} {list(feeds[s.name].shape)}" for s in self.graph.inputs)
            reason = first_line(error)
            if "allocate" in reason:  # as ONNX Runtime says it
                raise RegrowError(
                    f"memory must suffice for {shapes}, got less: run fewer samples at once, or "
                    f'open the bundle with profile="memory" ({reason})'
                ) from error
            if "out of data bounds" in reason:
                reason = f"ids must lie below the size of the vocabulary ({reason})"
            raise RegrowError(f"model must take these inputs, got {shapes}: {reason}") from error
        return values

    def run_all(
        self, inputs: Mapping[str, ArrayLike], *, batch: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """As `run` with the active adapter, `batch` samples at a time, so that RAM is bounded.

        By default as many as the profile says: 64, or 4 for "memory".

        A swap meanwhile serves the next call: all samples of this one see one adapter.
        """
        active, batch = self._active, batch or self._batch
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
        return Generation(self, **settings)

    def _adapted(
        self, adapters: Sequence[str | None] | None, samples: int
    ) -> tuple[list[LoadedAdapter | None], Feeds]:
        """The adapters that serve a batch now, and what they put into the slots."""
        if adapters is None:
            active = self._active  # one look: another thread may swap
            return [active], active.feeds if active else {}
        residents = self._named(adapters, {samples})
        return residents, stack(residents, self.manifest.slots, self._head(residents))

    def _per_sample(self, adapters: Sequence[str | None], feeds: Feeds) -> Feeds:
        batch = {array.shape[0] for array in feeds.values() if array.ndim}
        residents = self._named(adapters, batch)
        return stack(residents, self.manifest.slots, self._head(residents))

    def _named(self, adapters: Sequence[str | None], batch: set[int]) -> list[LoadedAdapter | None]:
        if self.manifest.mode != "swappable":
            raise UsageError(
                f"adapters per sample need a swappable bundle, got {self.manifest.mode}"
            )
        if fixed := next((slot for slot in self.manifest.slots if slot.fixed), None):
            raise UsageError(
                "adapters per sample need slots whose n is the batch size, got fixed ones (such as "
                f"{fixed.target}, {fixed.kind}): run the samples of each adapter by themselves"
            )
        if batch != {len(adapters)}:
            raise UsageError(
                f"adapters must be one per sample ({sorted(batch)}), got {len(adapters)}"
            )
        return [None if name is None else self._resident(name) for name in adapters]

    def _head(self, residents: Sequence[LoadedAdapter | None]) -> Feeds:
        """The base's head, read once, and only if a batch mixes it with others."""
        slots = {v for s in self.manifest.head_slots for v in s.inputs.values()}
        with_head = [bool(r and slots & r.feeds.keys()) for r in residents]
        if not any(with_head) or all(with_head):
            return {}
        if self._base_head is None:
            self._base_head = load_head(self.folder, self.manifest)
        return self._base_head


def _ms(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _check_cache(cache: CacheSpec, session: ort.InferenceSession, path: Path) -> None:
    given, made = (
        {value.name: value.shape for value in values}
        for values in (session.get_inputs(), session.get_outputs())
    )
    cache.check_graph(given, made, str(path))


def _read(source: str | Path | Adapter, name: str | None) -> tuple[Adapter, str]:
    if isinstance(source, Adapter):
        if name is None:
            raise UsageError("name must be given with an adapter in memory, got None")
        return source, name
    return Adapter.load(source), name or Path(source).stem


def _checked(inputs: Mapping[str, ArrayLike], spec: TensorSpec) -> NDArray[Any]:
    """The array for one graph input, in its dtype, if its shape fits."""
    if spec.name not in inputs:
        raise UsageError(f"inputs must have {spec.name}, got {sorted(inputs)}")
    array = np.asarray(inputs[spec.name])
    wanted = np.dtype(spec.dtype)
    if array.dtype != wanted:
        if not np.can_cast(array.dtype, wanted, casting="same_kind"):
            raise UsageError(f"{spec.name} must be {wanted}, got {array.dtype}")
        array = array.astype(wanted)
    fits = len(array.shape) == len(spec.shape) and all(
        isinstance(want, str) or want == got
        for want, got in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"{spec.name} must be of shape {list(spec.shape)}, got {list(array.shape)}"
        )
    return array
