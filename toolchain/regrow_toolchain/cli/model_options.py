"""Options that say which model and which samples, and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from regrow_toolchain.data import DATA, LABEL_WORDS

if TYPE_CHECKING:
    from regrow_toolchain.data import Dataset
    from regrow_toolchain.models import Backbone

__all__ = ["AssetFiles", "Samples", "asset_options", "data_options"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Samples:
    """--data, if it was given, and how to read it."""

    path: Path | None
    text: str | None
    label: str | None
    max_length: int

    def check(self) -> None:
        """Raise `UsageError` if nothing is there: at once, before packages take seconds to load."""
        from regrow_format.errors import UsageError

        if self.path is not None and not self.path.exists():
            raise UsageError(f"data must be {DATA}; got {self.path}: no such file")

    def load(
        self, backbone: Backbone, *, users: str | None = None, labels: str = "needed"
    ) -> Dataset | None:
        """The samples as the backbone takes them; None if none were asked for."""
        from regrow_toolchain.data import load_data

        if self.path is None:
            return None
        return load_data(
            self.path, backbone, users=users, text=self.text, label=self.label,
            max_length=self.max_length, labels=labels,
        )  # fmt: skip


@dataclass(frozen=True)
class AssetFiles:
    """--preprocessor and --labels: what a model's directory or function lacks."""

    preprocessor: Path | None
    labels: Path | None

    def load(self, model: Path) -> Backbone:
        """The model, with them."""
        from regrow_toolchain.data import attach_assets
        from regrow_toolchain.models import load_backbone

        found = load_backbone(model)
        return attach_assets(found, preprocessor=self.preprocessor, labels=self.labels)


def data_options(what: str, *, required: bool = False) -> Callable[[F], Callable[..., Any]]:
    """--data with `what` in its help, and how to read it; the command takes them as `samples`."""

    def decorate(function: F) -> Callable[..., Any]:
        @wraps(function)
        def command(
            *, data: Path | None, text: str | None, label: str | None, max_length: int, **given: Any
        ) -> Any:
            return function(samples=Samples(data, text, label, max_length), **given)

        for option in (
            click.option(
                "--max-length", type=click.IntRange(2), default=128, show_default=True,
                help="Tokens per text at most; the model may take fewer.",
            ),
            click.option(
                "--label", metavar="NAME",
                help=f"Column or array with the labels; by default {LABEL_WORDS}.",
            ),
            click.option(
                "--text", metavar="NAME",
                help="Column with the text, or two with a comma between for pairs; by default "
                "`text`, or the only one of words.",
            ),
            click.option(
                "--data", type=click.Path(path_type=Path), required=required,
                help=f"{what}: {DATA}.",
            ),
        ):  # fmt: skip
            command = option(command)
        return command

    return decorate


def asset_options(function: F) -> Callable[..., Any]:
    """--preprocessor and --labels, which the command takes as `assets`."""

    @wraps(function)
    def command(*, preprocessor: Path | None, label_file: Path | None, **given: Any) -> Any:
        return function(assets=AssetFiles(preprocessor, label_file), **given)

    for option in (
        click.option(
            "--labels", "label_file", type=click.Path(path_type=Path),
            help="Class names in the order of the outputs, a line each or a JSON list, for a model "
            "that does not say them.",
        ),
        click.option(
            "--preprocessor", type=click.Path(path_type=Path),
            help="A preprocessor_config.json, or a folder with one or a tokenizer: how images, "
            "audio or text become inputs, for a model that has none.",
        ),
    ):  # fmt: skip
        command = option(command)
    return command
