"""The bundle's manifest: what the graph takes and gives, where adapters enter, what was checked.

A bundle is a folder: `manifest.json`, the ONNX graph with its external data, the model's config
and preprocessing files, and a probe. `docs/bundle-format.md` describes it for other clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import FormatError, UsageError
from .fields import Fields, dump_json, parse_json
from .files import no_folder, read_bytes, sha256_file
from .kv_cache import CacheSpec, parse_cache
from .record import Record
from .rounding import Rounding, parse_rounding
from .slot import Slot, StoredWeight
from .slot_fields import parse_slot
from .slot_kinds import SLOT_KINDS

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Checks",
    "ExpanderSpec",
    "FileEntry",
    "GraphSpec",
    "Manifest",
    "Score",
    "SeededSpec",
    "Slot",
    "StoredWeight",
    "TensorSpec",
]

FORMAT = 1
MANIFEST = "manifest.json"
MODES = ("swappable", "merged", "seeded")
VARIANTS = ("fp32", "fp16", "int8", "int4")

_MAX_BYTES = 64 << 20
_MAX_DIMENSIONS = 16
_MAX_PATH = 255
_DTYPES = ("bool", *(f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)),
           "float16", "float32", "float64")  # fmt: skip


class TensorSpec(Record):
    """A graph input or output; a dimension is a number, or a name if it is dynamic."""

    name: str
    dtype: str  # as NumPy names it, such as "float32"
    shape: tuple[int | str, ...]


class GraphSpec(Record):
    """One ONNX file; `inputs` are those that a caller must feed, slots are not among them."""

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


class SeededSpec(Record):
    """How a seeded graph takes an adapter: its method, config and targets are built in.

    `inputs` maps "seed" and every coefficient tensor (and "<tensor>.scale") to a graph input; it is
    empty where they are constants. `storage` is "int8" where codes of 2 to 8 bits are fed as int8,
    else "fp32".
    """

    method: str
    config: Mapping[str, Any]
    storage: str
    targets: tuple[str, ...]
    inputs: Mapping[str, str]


class ExpanderSpec(Record):
    """A graph that makes slots' tensors of adapters' numbers, for one method, config and targets.

    `inputs` are what a `SeededSpec` lists; `outputs` are names of slots' inputs.
    """

    method: str
    config: Mapping[str, Any]
    storage: str
    targets: tuple[str, ...]
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]


class FileEntry(Record):
    """Size in bytes and hex SHA-256 of a file of the bundle."""

    size: int
    sha256: str


class Checks(Record):
    """What the device's own checks need.

    Attributes:
        probe: fingerprint of the probe's input; "" if adapters cannot know that input.
        spread: largest difference of the variant's outputs to those of exact weights and inputs, as
            a share of the largest output.
        partitions: pieces that a mobile accelerator would cut the graph into, by accelerator.
    """

    probe: str = ""
    spread: float = 0.0
    partitions: Mapping[str, int] = field(default_factory=dict)


class Score(Record):
    """What the variant costs on samples: `fp32` is torch's score, `variant` the bundle's."""

    metric: str
    higher_is_better: bool
    samples: int
    fp32: float
    variant: float


class Manifest(Record):
    """`manifest.json`. `parity` holds what was measured against torch at export, by name."""

    mode: str
    task: str
    backbone_id: str
    opset: int
    ir_version: int
    graphs: tuple[GraphSpec, ...]
    slots: tuple[Slot, ...]
    labels: tuple[str, ...]
    files: Mapping[str, FileEntry]
    variant: str = "fp32"
    rounding: Rounding | None = None  # of the weights, if the variant is int8
    adapter: str | None = None  # sha256 of the adapter that is built in, if one is
    seeded: SeededSpec | None = None
    cache: CacheSpec | None = None  # of a causal language model
    expanders: tuple[ExpanderSpec, ...] = ()
    parity: Mapping[str, float] = field(default_factory=dict)
    score: Score | None = None
    checks: Checks | None = None

    def to_json(self) -> str:
        """The file's text; the same manifest always gives the same one."""
        return dump_json({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, folder: str | Path) -> Manifest:
        """Read and check `folder`/manifest.json.

        Raises:
            UsageError: `folder` is no bundle.
            FormatError: the manifest is broken, or names a path outside of the bundle.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            found = "a folder without manifest.json" if folder.is_dir() else no_folder(folder)
            raise UsageError(
                f"bundle must be a folder that regrow export made, got {folder}: {found}"
            )
        path = folder / MANIFEST
        data = read_bytes(path, limit=_MAX_BYTES, what="a manifest")
        way_out = "copy the bundle again, or export it again"
        return _parse(parse_json(data, str(path), way_out))

    @cached_property
    def head_slots(self) -> tuple[Slot, ...]:
        """Those around layers of the head; the others are around targets."""
        return tuple(slot for slot in self.slots if SLOT_KINDS[slot.kind].is_head)

    @cached_property
    def target_kinds(self) -> frozenset[str]:
        """The kinds of slot around targets."""
        return frozenset(slot.kind for slot in self.slots if not SLOT_KINDS[slot.kind].is_head)

    def slot_of(self, target: str, kind: str | None = None) -> Slot | None:
        """The slot of a target, of one kind or the first of any, if it has one."""
        return self._by_target.get((target, kind))

    @cached_property
    def _by_target(self) -> dict[tuple[str, str | None], Slot]:
        return {(s.target, kind): s for s in reversed(self.slots) for kind in (s.kind, None)}

    def check_files(self, folder: Path, *, hashes: bool = False) -> None:
        """Compare every file's size, and with `hashes` its content, to the manifest.

        Raises:
            FormatError: a file is missing or not the one that was exported.
        """
        for name, entry in self.files.items():
            path = folder / name
            if _is_linked(folder, name):
                raise FormatError(f"{path} must be a file of the bundle, got a link: copy the file")
            if not path.is_file():
                raise FormatError(f"{folder}: {name} is missing; export the bundle again")
            size = path.stat().st_size
            if size != entry.size:
                raise FormatError(f"{path} must have {entry.size} bytes, got {size}: copy it again")
            if hashes and sha256_file(path) != entry.sha256:
                raise FormatError(f"{path}: content must have the manifest's SHA-256, got another")


def _parse(fields: Fields) -> Manifest:
    version = fields.take("format", int)
    if version != FORMAT:
        raise FormatError(f"{fields.where}: format must be {FORMAT}, got {version}; see CHANGELOG")
    variant = fields.choice("variant", VARIANTS)
    seeded = fields.optional("seeded")
    cache = fields.optional("cache")
    manifest = Manifest(
        mode=fields.choice("mode", MODES),
        task=fields.take("task", str),
        backbone_id=fields.take("backbone_id", str),
        opset=fields.number("opset", 1, 1000),
        ir_version=fields.number("ir_version", 1, 1000),
        graphs=tuple(_graph(part) for part in fields.objects("graphs")),
        slots=tuple(parse_slot(part) for part in fields.objects("slots")),
        labels=fields.strings("labels"),
        files=_files(fields),
        variant=variant,
        rounding=_rounding(fields, variant),
        adapter=_text_or_none(fields, "adapter"),
        seeded=None if seeded is None else _seeded(seeded),
        expanders=tuple(_expander(part) for part in fields.objects("expanders")),
        parity=_numbers(fields, "parity"),
        score=_score(fields.optional("score")),
        checks=_checks(fields.optional("checks")),
    )
    fields.done()
    _check_parts(manifest, fields.where)
    return manifest if cache is None else replace(manifest, cache=_cache(cache, manifest.graphs[0]))


def _cache(part: Fields, graph: GraphSpec) -> CacheSpec:
    return parse_cache(part, *([spec.name for spec in s] for s in (graph.inputs, graph.outputs)))


def _check_parts(manifest: Manifest, where: str) -> None:
    if not manifest.graphs:
        raise FormatError(f"{where}: graphs must name at least one")
    for graph in manifest.graphs:
        if not graph.outputs:
            raise FormatError(f"{where}: outputs of {graph.name} must name at least one")
    named = [graph.file for graph in manifest.graphs] + [one.file for one in manifest.expanders]
    for file in named:
        if file not in manifest.files:
            raise FormatError(f"{where}: files must list {file}")
    for slot in manifest.slots:
        if slot.weight is not None:
            end = slot.weight.offset + 4 * slot.in_features * slot.out_features
            if (
                slot.weight.file not in manifest.files
                or end > manifest.files[slot.weight.file].size
            ):
                raise FormatError(f"{where}: {slot.target}: its weight must lie in a listed file")
    if len({(slot.target, slot.kind) for slot in manifest.slots}) < len(manifest.slots):
        raise FormatError(f"{where}: slots must be of one kind once for a target")


def _rounding(fields: Fields, variant: str) -> Rounding | None:
    """Bundles in int8 from before the field had codes that saturate: they are not read."""
    part = fields.optional("rounding")
    if part is None and variant == "int8":
        raise FormatError(
            f"{fields.where}: rounding must say how int8 weights were rounded, got nothing: older "
            "bundles compute wrong numbers on processors without VNNI; export it again"
        )
    if part is not None and variant != "int8":
        raise FormatError(f"{fields.where}: rounding must be null for {variant}, which has none")
    return None if part is None else parse_rounding(part)


def _score(part: Fields | None) -> Score | None:
    if part is None:
        return None
    score = Score(
        metric=part.take("metric", str),
        higher_is_better=part.take("higher_is_better", bool),
        samples=part.number("samples", 1, 2**53),
        fp32=part.take("fp32", float),
        variant=part.take("variant", float),
    )
    part.done()
    return score


def _checks(part: Fields | None) -> Checks | None:
    if part is None:
        return None
    counts = Fields(part.take("partitions", dict, {}), f"{part.where}: partitions")
    checks = Checks(
        probe=part.take("probe", str, ""),
        spread=part.take("spread", float, 0.0),
        partitions={name: counts.number(name, 0, 2**31) for name in counts.names()},
    )
    part.done()
    return checks


def _text_or_none(fields: Fields, name: str) -> str | None:
    return fields.take(name, str) if fields.has(name) else None


def _numbers(fields: Fields, name: str) -> dict[str, float]:
    part = Fields(fields.take(name, dict, {}), f"{fields.where}: {name}")
    return {key: part.take(key, float) for key in part.names()}


def _files(fields: Fields) -> dict[str, FileEntry]:
    part = Fields(fields.take("files", dict), f"{fields.where}: files")
    found = {}
    for name in part.names():
        _check_name(name, part.where)
        entry = Fields(part.take(name, dict), f"{part.where}: {name}")
        found[name] = FileEntry(entry.number("size", 0, 2**53), entry.take("sha256", str))
        entry.done()
    return found


def _check_name(name: str, where: str) -> None:
    """A path of the bundle stays in the bundle."""
    path = PurePosixPath(name)
    if (
        not 0 < len(name) <= _MAX_PATH
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or ":" in name
    ):
        raise FormatError(f"{where}: a file must lie in the bundle, got {name!r:.80}")


def _is_linked(folder: Path, name: str) -> bool:
    """Whether the file, or a folder between it and the bundle, is a symbolic link."""
    parts = (PurePosixPath(name), *PurePosixPath(name).parents[:-1])
    return any((folder / part).is_symlink() for part in parts)


def _tensor(part: Fields) -> TensorSpec:
    shape = part.take("shape", list)
    whole = all(isinstance(d, str) or (type(d) is int and d >= 0) for d in shape)
    if not whole or len(shape) > _MAX_DIMENSIONS:
        raise FormatError(f"{part.where}: shape must be numbers and names, got {shape!r:.80}")
    spec = TensorSpec(part.take("name", str), part.choice("dtype", _DTYPES), tuple(shape))
    part.done()
    return spec


def _graph(part: Fields) -> GraphSpec:
    spec = GraphSpec(
        name=part.take("name", str),
        file=part.take("file", str),
        inputs=tuple(_tensor(item) for item in part.objects("inputs")),
        outputs=tuple(_tensor(item) for item in part.objects("outputs")),
    )
    part.done()
    return spec


def _seeded(part: Fields) -> SeededSpec:
    inputs = part.take("inputs", dict)
    named = all(isinstance(v, str) for v in inputs.values())
    if not named or (inputs and "seed" not in inputs):
        raise FormatError(f"{part.where}: inputs must name the seed's and every tensor's")
    spec = SeededSpec(**_built_in(part), inputs=inputs)
    part.done()
    return spec


def _built_in(part: Fields) -> dict[str, Any]:
    """What an expansion has built in."""
    return {
        "method": part.take("method", str),
        "config": part.take("config", dict),
        "storage": part.choice("storage", ("int8", "fp32")),
        "targets": part.strings("targets"),
    }


def _expander(part: Fields) -> ExpanderSpec:
    spec = ExpanderSpec(
        **_built_in(part),
        file=part.take("file", str),
        inputs=tuple(_tensor(item) for item in part.objects("inputs")),
        outputs=part.strings("outputs"),
    )
    part.done()
    return spec
