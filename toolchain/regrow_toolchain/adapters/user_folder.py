"""A folder with an adapter per user, written as training goes on."""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from regrow_format.errors import FormatError, UsageError
from regrow_format.fields import Fields, dump_json, parse_json
from regrow_format.files import check_output, new_folder, read_bytes, write_bytes
from regrow_toolchain.training import StateFile, TrainingIdentity

from .group import Adapted

__all__ = ["SUMMARY", "UserFolder", "file_name"]

SUMMARY = "adapters.jsonl"
_STATE, _RUN = ".state", ".run"
_MAX_BYTES = 1 << 30


def file_name(user: str) -> str:
    """A user's file: the id, with `%xx` for what a file's name cannot have everywhere."""
    name = quote(user, safe=" @+-_.,=~")
    return (f"%2E{name[1:]}" if name.startswith(".") else name) + ".safetensors"


class UserFolder:
    """Collects adapters in `OUT.resume`, which becomes `OUT` in the end.

    `adapters.jsonl` has a line per user: id, file (null if it was not written), scores, bytes.

    Args:
        identity: everything that decides the results, but the samples: what was begun with other
            settings is not gone on with.
        keep_anyway: also write adapters that improve nothing.
        resume: go on with what an interrupted run left.

    Raises:
        UsageError: `out` exists and `force` is off; there is something to resume and `resume` is
            off, or it is of another run.
        FormatError: what is to be resumed is broken.
    """

    def __init__(
        self,
        out: Path,
        identity: TrainingIdentity,
        *,
        force: bool,
        keep_anyway: bool,
        resume: bool,
    ) -> None:
        self.out, self.force, self.keep_anyway = out, force, keep_anyway
        self.identity, self.resume = identity, resume
        self.scratch = out.with_name(f"{out.name}.resume")
        check_output(out, force=force, marker=SUMMARY)
        if self.scratch.exists():
            self._check()
        self.rows = self._read()

    def _check(self) -> None:
        if not self.resume:
            raise UsageError(
                f"an interrupted run left {self.scratch}: --resume goes on with it, or remove it"
            )
        path = self.scratch / _RUN
        found = {}
        if path.exists():
            text = read_bytes(path, limit=_MAX_BYTES, what="a run's settings")
            lines = text.decode(errors="replace").splitlines()
            found = dict(line.split("\t", 1) for line in lines if "\t" in line)
        self.identity.check(self.scratch, found, of="settings, targets, backbone")

    @property
    def done(self) -> set[str]:
        """Users who need no more training."""
        return {row["user"] for row in self.rows}

    def _read(self) -> list[dict[str, Any]]:
        """The lines that are whole; the last may have been cut off when the run was killed."""
        path = self.scratch / SUMMARY
        if not path.is_file():
            return []
        text = read_bytes(path, limit=_MAX_BYTES, what="a summary").decode(errors="replace")
        whole = text.split("\n")[:-1]
        rows = [
            _row(parse_json(line, f"{path}, line {number}")) for number, line in enumerate(whole, 1)
        ]
        if not text.endswith("\n") and text:
            write_bytes(path, "".join(f"{line}\n" for line in whole).encode())
        for row in rows:
            if row["file"] and not (self.scratch / row["file"]).is_file():
                raise FormatError(f"{self.scratch} must have {row['file']}: remove {self.scratch}")
        return rows

    @property
    def state(self) -> StateFile:
        """Where training keeps the state of what is not done, once the folder is there."""
        return StateFile(self.scratch / _STATE, self.resume, self.begin)

    def begin(self) -> None:
        """Make the folder, if it is not there: training has begun."""
        if not (self.scratch / _RUN).exists():
            self.scratch.mkdir(exist_ok=True)
            lines = [f"{name}\t{value}\n" for name, value in self.identity.to_fields().items()]
            write_bytes(self.scratch / _RUN, "".join(lines).encode())

    def add(self, user: str, done: Adapted) -> dict[str, Any]:
        """Write a user's adapter, if it improves or is kept anyway; returns the line about it."""
        self.begin()
        written = (done.improves or self.keep_anyway) and not (
            done.stopped and not done.stopped.step
        )
        name = file_name(user) if written else None
        row = {
            "user": user,
            "file": name,
            "bytes": done.adapter.save(self.scratch / name) if name else 0,
            "metric": done.metric,
            "before": _plain(done.before),
            "after": _plain(done.after),
            "held_back": done.samples,
            "folds": done.folds,
            "p_value": done.verdict.p_value if done.verdict else None,
            "baseline": done.verdict.baseline if done.verdict else None,
            "stopped": str(done.stopped) if done.stopped else None,
        }
        with (self.scratch / SUMMARY).open("a", encoding="utf-8") as stream:
            stream.write(dump_json(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.append(row)
        return row

    def finish(self) -> None:
        """Put everything in its place; a run that wrote no adapter leaves nothing."""
        if not any(row["file"] for row in self.rows):
            shutil.rmtree(self.scratch, ignore_errors=True)
            return
        with new_folder(self.out, marker=SUMMARY, force=self.force) as folder:
            for path in self.scratch.iterdir():
                if not path.name.startswith((_STATE, _RUN)):
                    shutil.copyfile(path, folder / path.name)
        shutil.rmtree(self.scratch, ignore_errors=True)


def _row(fields: Fields) -> dict[str, Any]:
    """A line of the summary, checked."""
    row: dict[str, Any] = {"user": fields.take("user", str), "metric": fields.take("metric", str)}
    row["file"] = fields.take("file", str) if fields.has("file") else None
    if row["file"] not in (None, file_name(row["user"])):
        raise FormatError(f"{fields.where}: file must be the user's, got {row['file']!r:.80}")
    for name in ("before", "after"):
        row[name] = fields.take(name, float) if fields.has(name) else None
    row["stopped"] = fields.take("stopped", str) if fields.has("stopped") else None
    row["bytes"] = fields.number("bytes", 0, 1 << 40)
    row["held_back"] = fields.number("held_back", 0, 1 << 40)
    row["folds"] = fields.number("folds", 0, 1 << 10)
    row["p_value"] = fields.take("p_value", float) if fields.has("p_value") else None
    row["baseline"] = fields.take("baseline", str) if fields.has("baseline") else None
    fields.done()
    return row


def _plain(score: float) -> float | None:
    return score if math.isfinite(score) else None
