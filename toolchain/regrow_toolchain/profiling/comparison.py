"""Two profiles side by side: every figure that both have, the ratio, and whether it is noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from regrow_format.errors import FormatError, UsageError
from regrow_format.fields import parse_json
from regrow_format.files import read_bytes

from .record import FORMAT
from .significance import FLOOR, LOUD, crowd_floor, judge
from .wording import STAGES, case_words

__all__ = ["compare", "figures", "read_profile"]

Record = Mapping[str, Any]
_MAX_BYTES = 256 << 20
_SAME = ("cpu", "cores", "governor", "python", "numpy", "onnxruntime", "regrow", "blas_threads")


@dataclass(frozen=True)
class Figure:
    """One figure of a profile. `unit` is "ms" or "bytes"; `exact`: noise does not reach it."""

    group: str
    name: str
    unit: str
    value: float
    rounds: tuple[float, ...]
    exact: bool = False


def read_profile(path: Path) -> dict[str, Any]:
    """The record in a folder that `regrow profile` wrote, or in the file itself.

    Raises:
        UsageError: there is none.
        FormatError: it is of another kind or version.
    """
    file = path / "profile.json" if path.is_dir() else path
    if not file.is_file():
        found = "a folder without it" if path.is_dir() else "no such file"
        raise UsageError(f"profile must be a folder with profile.json, got {path}: {found}")
    fields = parse_json(read_bytes(file, limit=_MAX_BYTES, what="a profile"), str(file))
    record = fields.rest()
    if record.get("kind") != "regrow-profile":
        raise FormatError(f"{file} must be what regrow profile wrote, got another JSON file")
    if record.get("format") != FORMAT:
        raise FormatError(f"{file}: format must be {FORMAT}, got {record.get('format')!r:.40}")
    return record


def compare(a: Record, b: Record) -> dict[str, Any]:
    """`rows`: each with `a`, `b`, `ratio`, its interval and `real`; `only`: figures of one alone;
    `machine`: how much slower the machine was in B; `unlike`: what else differs.
    """
    try:
        left, right = ({(f.group, f.name): f for f in figures(record)} for record in (a, b))
        machine = median(b["calibration_ms"]) / median(a["calibration_ms"])
        crowd = max(_crowd(a), _crowd(b))
        threads = max(cell["threads"] for one in (a, b) for cell in one["settings"]["cells"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"profile must have every part of its format, got one without {error}"
        ) from None
    floor = max(FLOOR, max(machine, 1 / machine) - 1, crowd_floor(crowd, threads))
    rows = []
    for key in (key for key in left if key in right):
        x, y = left[key], right[key]
        found = judge(x.rounds, y.rounds, floor=floor if x.unit == "ms" else FLOOR, exact=x.exact)
        if found is not None:
            about = {"group": x.group, "name": x.name, "unit": x.unit}
            rows.append({**about, "a": x.value, "b": y.value, **asdict(found)})
    return {
        "kind": "regrow-profile-comparison",
        "rows": rows,
        "only": [" ".join(key) for key in left.keys() ^ right.keys()],
        "machine": machine,
        "crowd": crowd,
        "floor": floor,
        "unlike": _unlike(a, b),
    }


def _crowd(record: Record) -> float:
    """Share of the cores that other programs had, if the machine was not quiet; at most 1."""
    others = record["noise"]["others"] or 0.0
    return min(1.0, others / record["environment"]["cores"]) if others > LOUD else 0.0


def _unlike(a: Record, b: Record) -> list[str]:
    found = [
        f"{name}: {a['environment'].get(name)} and {b['environment'].get(name)}"
        for name in _SAME
        if a["environment"].get(name) != b["environment"].get(name)
    ]
    if a["bundle"]["backbone_id"] != b["bundle"]["backbone_id"]:
        found.append("the backbones are different ones")
    return found


def figures(record: Record) -> Iterator[Figure]:
    """Every figure that can be compared."""
    yield _bytes("size", "bundle", record["bundle"]["bytes"])
    for adapter in record["adapters"]:
        if adapter["reason"] is None:
            yield _bytes("size", f"adapter {adapter['name']}, file", adapter["bytes"])
    for row in record["latency"]:
        yield _times("latency", case_words(row), row)
    for stage in record["cold_start"]["stages"]:
        yield _rounds(
            "cold start", STAGES.get(stage["stage"], stage["stage"]), "ms", stage["rounds"]
        )
    yield _rounds("cold start", "together", "ms", record["cold_start"]["rounds"])
    for stage in record["memory"]["stages"]:
        if stage["rounds"]:
            name = STAGES.get(stage["stage"], stage["stage"])
            yield _rounds("private RAM", name, "bytes", stage["rounds"])
    for row in record["swap"]:
        if row["kind"] != "first_run":
            yield _times("swap", f"{row['kind']}, {row['installed']} installed", row)
    for name in ("prefill", "first_token", "decode"):
        if part := (record.get("language") or {}).get(name):
            yield _times("language", name.replace("_", " "), part)


def _bytes(group: str, name: str, value: int) -> Figure:
    return Figure(group, name, "bytes", value, (value,), exact=True)


def _rounds(group: str, name: str, unit: str, rounds: list[float]) -> Figure:
    return Figure(group, name, unit, median(rounds), tuple(rounds))


def _times(group: str, name: str, row: Mapping[str, Any]) -> Figure:
    return _rounds(group, name, "ms", row["rounds"])
