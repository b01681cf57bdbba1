"""The bundle's manifest: what the graph takes and gives, where adapters enter, what was checked.

A bundle is a folder: `manifest.json`, the ONNX graph with its external data, the model's config
and preprocessing files, and a probe. `docs/bundle-format.md` describes it for other clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, field, replace
from functools import cached_property
from pathlib import Path

from .bundle_files import FileEntry, check_files, parse_files
from .errors import FormatError, UsageError
from .expansion_spec import ExpanderSpec, SeededSpec, parse_expander, parse_seeded
from .fields import Fields, dump_json, parse_json
from .files import no_folder, read_bytes
from .graph_spec import GraphSpec, TensorSpec, parse_graph
from .kv_cache import CacheSpec, parse_cache
from .measured import Checks, Score, parse_checks, parse_score
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
        check_files(folder, self.files, hashes=hashes)


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
        graphs=tuple(parse_graph(part) for part in fields.objects("graphs")),
        slots=tuple(parse_slot(part) for part in fields.objects("slots")),
        labels=fields.strings("labels"),
        files=parse_files(fields),
        variant=variant,
        rounding=_rounding(fields, variant),
        adapter=_text_or_none(fields, "adapter"),
        seeded=None if seeded is None else parse_seeded(seeded),
        expanders=tuple(parse_expander(part) for part in fields.objects("expanders")),
        parity=_numbers(fields, "parity"),
        score=parse_score(fields.optional("score")),
        checks=parse_checks(fields.optional("checks")),
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


def _text_or_none(fields: Fields, name: str) -> str | None:
    return fields.take(name, str) if fields.has(name) else None


def _numbers(fields: Fields, name: str) -> dict[str, float]:
    part = Fields(fields.take(name, dict, {}), f"{fields.where}: {name}")
    return {key: part.take(key, float) for key in part.names()}
