"""The record for a terminal, and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from regrow_toolchain.pages import GAP, Table, duration, size, table

from .tables import all_tables, comparison_tables
from .wording import energy_words, failed, left_out

__all__ = ["comparison_lines", "comparison_markdown", "record_lines", "record_markdown"]

Record = Mapping[str, Any]
_RESERVED = (
    "RLIMIT_DATA counts private memory that is reserved, used or not, and a library may reserve "
    "less where there is less, so the stage that fails may be a later one under a smaller limit; "
    "what is used is the private RAM in the table."
)


def record_lines(record: Record) -> list[str]:
    """For a terminal: every table, then what has to be known to read them."""
    lines = [line for part in all_tables(record) for line in _plain(part)]
    return [*lines, *notes(record)]


def _plain(part: Table) -> list[str]:
    """A terminal takes the space before a unit for a control character."""
    lines = [part.caption, *table(part.head, part.rows), ""]
    return [line.replace(GAP, " ") for line in lines]


def notes(record: Record) -> list[str]:
    """Noise, energy, source of the memory figures, whether it fits, what was left out."""
    lines = [
        f"Memory figures: {record['memory']['source']}.",
        f"ONNX Runtime's arena: {_arena(record)}.",
        f"Energy: {energy_words(record)}.",
        f"Noise: {record['noise']['note']}.",
    ]
    if record["fit"]:
        lines.append(record["fit"]["answer"])
        if record["fit"]["kind"] == "RLIMIT_DATA":
            lines.append(_RESERVED)
    if record["language"] and not record["language"]["cache"]:
        lines.append("The bundle has no key-value cache: each token is a run over all of them.")
    return [line.replace(GAP, " ") for line in (*lines, *failed(record), *left_out(record))]


def _arena(record: Record) -> str:
    found = (record["operators"] or {}).get("arena")
    if not found and record["settings"]["profile"] == "memory":
        return "off in the memory profile"
    if not found:
        return "not told by this version"
    return f"held {size(found.get('held'))}, in use at most {size(found.get('in_use_peak'))}"


def record_markdown(record: Record) -> str:
    """profile.md."""
    about, bundle = record["environment"], record["bundle"]
    head = [
        f"# Profile of {bundle['path']}",
        "",
        f"{bundle['mode']}, {bundle['variant']}, {bundle['task']}, {size(bundle['bytes'])}. "
        f"regrow {about['regrow']}, ONNX Runtime {about['onnxruntime']}, NumPy {about['numpy']}, "
        f"Python {about['python']}; {about['cpu']}, {about['cores']} cores, governor "
        f"{about['governor'] or 'not told'}; {about['system']}; {record['made']}, "
        f"{duration(1e3 * record['seconds'])}.",
        "",
    ]
    body = [line for part in all_tables(record) for line in _markdown(part)]
    return "\n".join([*head, *body, *(f"- {line}" for line in notes(record)), ""])


def _markdown(part: Table) -> list[str]:
    return [
        f"## {part.caption}",
        "",
        _row(part.head),
        _row(["---", *["--:"] * (len(part.head) - 1)]),
        *(_row(row) for row in part.rows),
        "",
    ]


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def comparison_lines(found: Record) -> list[str]:
    """For a terminal."""
    lines = [line for part in comparison_tables(found) for line in _plain(part)]
    return [*lines, *comparison_notes(found)]


def comparison_notes(found: Record) -> list[str]:
    """The rule, the machine, and what cannot be compared."""
    real = [row for row in found["rows"] if row["real"]]
    lines = [
        f"{len(real)} of {len(found['rows'])} figures differ by more than the noise.",
        "A difference counts if the rank interval (97 %) of the ratio, over the fresh processes "
        "that each profile took, does not hold 1, and if it is over 5 %. For times it must be over "
        f"{100 * found['floor']:.0f} % here: more than the machine and other programs can do. "
        "Times are compared without what a thread waited for a core: A and B can be below what the "
        "two profiles show.",
        _crowd(found["crowd"]),
        f"The machine: a fixed piece of work took {found['machine']:.2f} times as long in B.",
    ]
    lines += [f"Unlike: {words}" for words in found["unlike"]]
    if found["only"]:
        lines.append(f"In one profile alone: {'; '.join(sorted(found['only']))}")
    return lines


def _crowd(share: float) -> str:
    if not share:
        return "The machine was quiet."
    return f"Other programs had {100 * share:.0f} % of the cores."


def comparison_markdown(found: Record) -> str:
    """compare.md."""
    head = ["# Two profiles side by side", "", f"A is {found['a']}, B is {found['b']}.", ""]
    body = [line for part in comparison_tables(found) for line in _markdown(part)]
    return "\n".join([*head, *body, *(f"- {line}" for line in comparison_notes(found)), ""])
