"""What ONNX Runtime is asked for: profiles, session options, and a session of a bundle's graph."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# ONNX Runtime sends telemetry by default since 1.29; a device has not asked for that. So no other
# module of this package imports it: this would be too late then.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.integers import SAFE_CODES, saturates
from regrow_format.manifest import Manifest
from regrow_format.record import Record

__all__ = [
    "PROFILES",
    "VERSION",
    "Profile",
    "first_line",
    "open_session",
    "profile_of",
    "run_options",
    "session_options",
]

VERSION: str = ort.__version__

if os.environ["ORT_DISABLE_TELEMETRY"] != "0":  # on Windows, or if it was imported before
    ort.disable_telemetry_events()


class Profile(Record):
    """What to spend RAM on.

    Attributes:
        basis_cache_bytes: how much of a basis may be kept between swaps.
        prepack: let ONNX Runtime keep a second, faster copy of the weights, and widen those of
            fewer bits once. Without it weights stay in the file, of which the system maps pages.
        arena: let ONNX Runtime keep what a run freed for the next one; else it is given back.
        resident_bytes: how much RAM resident adapters may take. Beyond, those that were not used
            for longest are dropped, but never the active one, nor one that has just been loaded.
        batch: samples that `run_all` gives to a run.
    """

    basis_cache_bytes: int
    prepack: bool
    arena: bool
    resident_bytes: int = 256 << 20
    batch: int = 64


PROFILES = {
    "speed": Profile(basis_cache_bytes=64 << 20, prepack=True, arena=True),
    "memory": Profile(
        basis_cache_bytes=0, prepack=False, arena=False, resident_bytes=64 << 20, batch=4
    ),
}

# Variants whose weights are widened to be computed with.
_NARROW = ("fp16", "int4")


def profile_of(profile: str | Profile) -> Profile:
    """The profile of that name, or the settings themselves; `UsageError` if there is none."""
    if isinstance(profile, Profile):
        return profile
    if profile not in PROFILES:
        raise UsageError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    return PROFILES[profile]


def session_options(profile: str | Profile, threads: int | None = None) -> ort.SessionOptions:
    """What `Bundle.open` gives ONNX Runtime: to be changed, then given as `session_options`."""
    return _session_options(profile_of(profile), threads, narrow=False, entries={})


def _session_options(
    settings: Profile, threads: int | None, narrow: bool, entries: Mapping[str, str]
) -> ort.SessionOptions:
    if threads is not None and threads < 1:
        raise UsageError(f"threads must be at least 1, got {threads}")
    options = ort.SessionOptions()
    # ONNX Runtime warns once per overridable initializer, and prints errors that it also raises.
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or 0
    # Its planner reserves room for all weights, though they are mapped: RLIMIT_DATA counts that.
    options.enable_mem_pattern = settings.arena
    if narrow:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    if not settings.prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    for name, value in entries.items():
        if not (isinstance(name, str) and name and isinstance(value, str)):
            raise UsageError(f"options must be strings by name, got {name!r:.40}: {value!r:.40}")
        options.add_session_config_entry(name, value)
    return options


def run_options(settings: Profile, session: ort.InferenceSession) -> ort.RunOptions | None:
    """That an arena is given back after a run: less than what the C library keeps without one."""
    if settings.arena or not session.get_session_options().enable_cpu_mem_arena:
        return None
    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def open_session(
    folder: Path,
    manifest: Manifest,
    settings: Profile,
    threads: int | None,
    providers: Sequence[str],
    entries: Mapping[str, str],
    own: ort.SessionOptions | None,
) -> ort.InferenceSession:
    """A session of the bundle's first graph; arguments are those of `Bundle.open`.

    Raises:
        UsageError: an option makes no sense.
        FormatError: ONNX Runtime does not open the graph.
        RegrowError: its weights make this processor's products wrong.
    """
    check_products(manifest, str(folder))
    path = folder / manifest.graphs[0].file
    narrow = not settings.prepack and manifest.variant in _NARROW and not own
    options = own or _session_options(settings, threads, narrow, entries)
    # Folding would make float32 of weights that are stored in fewer bits, for good.
    disabled = ["ConstantFolding"] if narrow else []
    try:
        return ort.InferenceSession(
            str(path), options, providers=list(providers), disabled_optimizers=disabled
        )
    except Exception as error:
        raise FormatError(f"{path} could not be opened: {first_line(error)}") from error


def check_products(manifest: Manifest, where: str) -> None:
    """Raise `RegrowError` if int8 weights have codes that saturate on this processor."""
    if (rounding := manifest.rounding) and not rounding.safe and saturates():
        low, high = rounding.range
        raise RegrowError(
            f"{where}: int8 weights must have codes from {SAFE_CODES[0]} to {SAFE_CODES[1]} on "
            "this processor, where ONNX Runtime's integer products saturate (it has no VNNI), got "
            f"{low} to {high}: export it again"
        )


def first_line(error: Exception) -> str:
    """What an exception says first, at most 1,000 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:1000]
