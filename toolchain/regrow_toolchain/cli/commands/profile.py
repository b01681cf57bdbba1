"""regrow profile."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from regrow_toolchain.config import ProfileConfig

from ..config_options import config_options
from ..options import emit, force_option, json_option

if TYPE_CHECKING:
    from regrow_toolchain.profiling import Settings


@click.command("profile")
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Adapter file to profile with; repeatable.",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--compare",
    nargs=2,
    type=click.Path(path_type=Path),
    metavar="A B",
    help="Hold two folders that this command wrote side by side.",
)
@click.option("--quick", is_flag=True, help="A tenth of the time: fewer runs, rounds, adapters.")
@config_options(ProfileConfig)
@force_option
@json_option
def profile_command(
    bundle: Path | None,
    config: ProfileConfig,
    adapters: tuple[Path, ...],
    out: Path | None,
    compare: tuple[Path, Path] | None,
    quick: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Measure what BUNDLE costs on this machine: latency, RAM, swaps; torch is not needed.

    Writes profile.json, profile.md and profile.html into the output folder. Everything is measured
    in processes of its own, several of them, with nothing else in between; so close what else runs.
    Exits with 1 if --memory-limit is given and the bundle does not fit; the report is written.
    """
    if compare is not None:
        if bundle is not None or adapters:
            raise click.UsageError("--compare takes two profiles, and no bundle or adapter")
        _compare(compare, out, force, as_json)
    elif bundle is None:
        raise click.UsageError("give a bundle, or two profiles with --compare")
    elif out is None:
        raise click.UsageError("give a folder to write with -o")
    else:
        parsed = _settings(config, quick)
        _profile(bundle, adapters, out, parsed, force, as_json)


def _settings(config: ProfileConfig, quick: bool) -> Settings:
    """What was asked for; `quick` leaves alone what was told on the command line."""
    from regrow_toolchain.profiling import parse_settings

    context, usual = click.get_current_context(), click.core.ParameterSource.DEFAULT
    told = [name for name in vars(config) if context.get_parameter_source(name) is not usual]
    return parse_settings(config, quick=quick, told=told)


def _profile(
    bundle: Path,
    adapters: tuple[Path, ...],
    out: Path,
    settings: Settings,
    force: bool,
    as_json: bool,
) -> None:
    from regrow_format.files import check_output
    from regrow_format.manifest import Manifest
    from regrow_toolchain.profiling import (
        failed,
        left_out,
        measure_bundle,
        record_lines,
        write_profile,
    )

    check_output(out, force=force, marker="profile.json")
    Manifest.load(bundle)
    record = measure_bundle(bundle.absolute(), _named(adapters), settings, _tell)
    _tell("")
    write_profile(record, out, force=force)
    if as_json:
        for line in (*failed(record), *left_out(record)):
            click.echo(f"regrow: {line}", err=True)
    emit(record, [*record_lines(record), f"Written: {out}/profile.html"], as_json=as_json)
    check_fit(record["fit"])


def check_fit(fit: Mapping[str, Any] | None) -> None:
    """Raise `RegrowError` if it was asked whether the bundle fits, and the answer is not yes."""
    from regrow_format.errors import RegrowError
    from regrow_toolchain.pages import GAP, size

    if fit is None or fit["fits"]:
        return
    if fit["fits"] is None:
        raise RegrowError(fit["answer"])
    enough = fit["enough"]
    way = f"--memory-limit {enough // 10**6}MB would do" if enough else "see the memory table"
    limit = size(fit["limit"]).replace(GAP, " ")
    raise RegrowError(
        f"bundle must fit in {limit}, got a failure at the stage {fit['stage']} "
        f"({fit['kind']}): {way}"
    )


def _compare(profiles: tuple[Path, Path], out: Path | None, force: bool, as_json: bool) -> None:
    from regrow_format.files import check_output
    from regrow_toolchain.profiling import compare, comparison_lines, read_profile, write_comparison

    if out is not None:
        check_output(out, force=force, marker="compare.json")
    a, b = (read_profile(path) for path in profiles)
    found = compare(a, b) | {"a": str(profiles[0]), "b": str(profiles[1])}
    if out is not None:
        write_comparison(found, out, force=force)
    emit(found, comparison_lines(found), as_json=as_json)


def _named(adapters: tuple[Path, ...]) -> list[tuple[str, str]]:
    """Names to tell them apart by: the files' own, numbered where two are alike."""
    found: dict[str, str] = {}
    for path in adapters:
        name, number = path.stem, 2
        while name in found:
            name, number = f"{path.stem}-{number}", number + 1
        found[name] = str(path.absolute())
    return list(found.items())


def _tell(words: str) -> None:
    """One line on stderr that is written over again and again; silent where it is no terminal."""
    if sys.stderr.isatty():
        width = os.get_terminal_size(sys.stderr.fileno()).columns
        click.echo(f"\r{words[: width - 1]}\033[K", nl=False, err=True)
