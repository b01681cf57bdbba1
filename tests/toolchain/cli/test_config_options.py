"""Options made from configs: the command line asks for what Python does, and says the same."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import click
import pytest
from click.testing import CliRunner

from regrow_format.errors import SettingError
from regrow_toolchain.cli.commands.adapt import adapt_command
from regrow_toolchain.cli.commands.compress import compress_command
from regrow_toolchain.cli.commands.export import export_command
from regrow_toolchain.cli.commands.import_ import import_command
from regrow_toolchain.cli.commands.profile import profile_command
from regrow_toolchain.cli.config_options import config_options
from regrow_toolchain.config import (
    AdaptConfig,
    CompressConfig,
    ExportConfig,
    ImportConfig,
    ProfileConfig,
)

_COMMANDS = [
    (adapt_command, AdaptConfig),
    (compress_command, CompressConfig),
    (export_command, ExportConfig),
    (import_command, ImportConfig),
    (profile_command, ProfileConfig),
]


def _made(kind: type, *arguments: str) -> Any:
    """The config of a command line, or what is said of it."""
    found: list[Any] = []

    @click.command()
    @config_options(kind)
    def command(config: Any) -> None:
        found.append(config)

    result = CliRunner().invoke(command, list(arguments))
    return found[0] if found else result.output


@pytest.mark.parametrize(("command", "kind"), _COMMANDS)
def test_every_setting_is_an_option_and_nothing_said_is_the_default(
    command: click.Command, kind: type
) -> None:
    assert {item.name for item in fields(kind)} <= {option.name for option in command.params}
    assert _made(kind) == kind()


def test_options_say_settings() -> None:
    assert _made(
        ExportConfig, "--mode", "swappable", "--for", "lora", "--for", "bitfit", "--no-cache",
        "--fixed-rank", "4", "--target", "query",
    ) == ExportConfig(
        methods=("lora", "bitfit"), cache=False, fixed_rank=4, targets=("query",)
    )  # fmt: skip
    assert _made(ExportConfig, "--mode", "seeded", "--constants").constants
    assert _made(AdaptConfig, "--set", "k=5", "--set", "l=6", "--lr", "1e-2") == AdaptConfig(
        method_settings={"k": "5", "l": "6"}, lr=0.01
    )


@pytest.mark.parametrize(
    ("kind", "arguments", "settings"),
    [
        (ExportConfig, ["--fixed-rank", "9000"], {"fixed_rank": 9000}),
        (ExportConfig, ["--precision", "int2"], {"precision": "int2"}),
        (ExportConfig, ["--slots", "bias", "--slots", "bias"], {"slots": ("bias", "bias")}),
        (ExportConfig, ["--for", "magic"], {"methods": ("magic",)}),
        (ExportConfig, ["--mode", "merged", "--for", "lora"],
         {"mode": "merged", "methods": ("lora",)}),
        (CompressConfig, ["--ratio", "0.5"], {"ratio": 0.5}),
        (CompressConfig, ["--holdout", "nan"], {"holdout": float("nan")}),
        (AdaptConfig, ["--group", "4"], {"group": 4}),
        (AdaptConfig, ["--method", "head", "--head", "keep"], {"method": "head", "head": "keep"}),
        (AdaptConfig, ["--eval-every", "0"], {"eval_every": 0}),
    ],
)  # fmt: skip
def test_errors_are_python_s_in_the_options_names(
    kind: type, arguments: list[str], settings: dict[str, Any]
) -> None:
    with pytest.raises(SettingError) as caught:
        kind(**settings)
    options = {item.name: f"--{item.name.replace('_', '-')}" for item in fields(kind)}
    message = caught.value.named(options | {"methods": "--for", "targets": "--target"})
    assert message.startswith("--")
    assert f"Error: {message}\n" in _made(kind, *arguments)


def test_pairs_must_be_pairs() -> None:
    assert "--set must be NAME=VALUE, got 'k'" in _made(AdaptConfig, "--set", "k")


def test_errors_of_other_kinds_pass() -> None:
    @dataclass(frozen=True)
    class Odd:
        def __post_init__(self) -> None:
            raise ZeroDivisionError

    @click.command()
    @config_options(Odd)
    def command(config: Any) -> None: ...

    assert isinstance(CliRunner().invoke(command).exception, ZeroDivisionError)
