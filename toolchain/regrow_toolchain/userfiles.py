"""A folder with an adapter per user, written as training goes on."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import quote

from regrow_runtime.errors import FormatError, UsageError
from regrow_runtime.fields import dump_json, parse_json
from regrow_runtime.files import check_output, new_folder

from .adapting import Adapted

__all__ = ["SUMMARY", "UserFolder", "file_name"]

SUMMARY = "adapters.jsonl"
_STATE = ".state"


def file_name(user: str) -> str:
    """A user's file: the id, with `%xx` for what a file's name cannot have everywhere."""
    name = quote(user, safe=" @+-_.,=~")
    return (f"%2E{name[1:]}" if name.startswith(".") else name) + ".safetensors"


class UserFolder:
    """Collects adapters in `OUT.resume`, which becomes `OUT` in the end.

    `adapters.jsonl` has a line per user: id, file (null if it was not written), scores, bytes.

    Args:
        keep_anyway: also write adapters that do not help.
        resume: go on with what an interrupted run left.

    Raises:
        UsageError: `out` exists and `force` is off; there is something to resume and `resume` is
            off.
    """

    def __init__(self, out: Path, *, force: bool, keep_anyway: bool, resume: bool) -> None:
        self.out, self.force, self.keep_anyway = out, force, keep_anyway
        self.room = out.with_name(f"{out.name}.resume")
        check_output(out, force=force, marker=SUMMARY)
        if self.room.exists() and not resume:
            raise UsageError(
                f"an interrupted run left {self.room}: --resume goes on with it, or remove it"
            )
        self.rows = self._read()

    @property
    def done(self) -> set[str]:
        """Users who need no more training."""
        return {row["user"] for row in self.rows}

    def _read(self) -> list[dict[str, Any]]:
        path = self.room / SUMMARY
        if not path.is_file():
            return []
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            fields = parse_json(line, f"{path}, line {number}")
            row = {name: fields.take(name, kind) for name, kind in (("user", str),)}
            try:
                rows.append({**json.loads(line), **row})
            except ValueError as error:
                raise FormatError(f"{path}, line {number} must be JSON: {error}") from None
        return rows

    @property
    def state(self) -> Path:
        """Where training keeps the state of what is not done; the folder is made for it."""
        self.room.mkdir(exist_ok=True)
        return self.room / _STATE

    def add(self, user: str, done: Adapted) -> dict[str, Any]:
        """Write a user's adapter, if it helps or is kept anyway; returns the line about it."""
        self.room.mkdir(exist_ok=True)
        written = (done.helps or self.keep_anyway) and not (done.stopped and not done.stopped.step)
        name = file_name(user) if written else None
        row = {
            "user": user,
            "file": name,
            "bytes": done.adapter.save(self.room / name) if name else 0,
            "metric": done.metric,
            "before": _plain(done.before),
            "after": _plain(done.after),
            "held_back": done.samples,
            "stopped": str(done.stopped) if done.stopped else None,
        }
        with (self.room / SUMMARY).open("a", encoding="utf-8") as stream:
            stream.write(dump_json(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        self.rows.append(row)
        return row

    def finish(self) -> None:
        """Put everything in its place."""
        with new_folder(self.out, marker=SUMMARY, force=self.force) as folder:
            for path in self.room.iterdir():
                if path.name.startswith(_STATE):
                    continue
                shutil.copyfile(path, folder / path.name)
        shutil.rmtree(self.room, ignore_errors=True)


def _plain(score: float) -> float | None:
    return None if math.isnan(score) else score
