"""`regrow.json`: what a compressed backbone says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from regrow_format.errors import FormatError
from regrow_format.fields import Fields, dump_json, parse_json
from regrow_format.files import read_bytes

from .backbone import MAX_JSON
from .low_rank import Plan

__all__ = ["CONFIG", "CompressedConfig"]

CONFIG = "regrow.json"
_FORMAT = 1
_MAX_WIDTH = 1 << 24


@dataclass(frozen=True)
class CompressedConfig:
    """Its fields, which are those of `Backbone`.

    Attributes:
        function: `package.module:function` that makes the dense model; empty where a Hugging Face
            config does. Only with it are `labels` in the file.
    """

    backbone_id: str
    head: tuple[str, ...]
    layers: tuple[Plan, ...]
    report: dict[str, Any] = field(default_factory=dict)
    function: str = ""
    labels: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> CompressedConfig:
        """Read and check the one in a folder.

        Raises:
            FormatError: it is broken, or of another version.
        """
        path = folder / CONFIG
        fields = parse_json(read_bytes(path, limit=MAX_JSON, what=CONFIG), str(path))
        if (version := fields.take("format", int)) != _FORMAT:
            raise FormatError(f"{fields.where}: format must be {_FORMAT}, got {version}")
        config = cls(
            layers=tuple(_plan(part) for part in fields.objects("layers")),
            backbone_id=fields.take("backbone_id", str),
            head=fields.strings("head"),
            report=fields.take("report", dict, {}),
            function=fields.take("function", str, ""),
            labels=fields.strings("labels"),
        )
        fields.done()
        return config

    def save(self, folder: Path) -> None:
        """Write it into a folder; the same config always gives the same bytes."""
        config = {
            "format": _FORMAT,
            "backbone_id": self.backbone_id,
            "head": list(self.head),
            "layers": [asdict(plan) for plan in self.layers],
            "report": self.report,
            **({"function": self.function} if self.function else {}),
            **({"labels": list(self.labels)} if self.function else {}),
        }
        (folder / CONFIG).write_text(dump_json(config, indent=1) + "\n", encoding="utf-8")


def _plan(part: Fields) -> Plan:
    plan = Plan(
        part.take("name", str),
        part.number("in_features", 1, _MAX_WIDTH),
        part.number("out_features", 1, _MAX_WIDTH),
        part.number("rank", 1, _MAX_WIDTH),
        part.take("bias", bool),
    )
    part.done()
    return plan
