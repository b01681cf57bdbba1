"""regrow store, and how `regrow run` takes an adapter out of one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from regrow_toolchain.pages import table

from ..options import emit, json_option, path_argument
from ..tables import counted, size

if TYPE_CHECKING:
    from regrow_runtime import Bundle
    from regrow_runtime.bundle import SwapStats
    from regrow_runtime.store import Installed

__all__ = ["listing", "store_command", "store_options", "swap_first"]

F = TypeVar("F", bound=Callable[..., Any])

_version_option = click.option("--version", type=click.IntRange(1), help="By default the newest.")
_bundle_option = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Refuse an adapter that does not fit this bundle, or does not do there what it should.",
)


@click.group("store", no_args_is_help=False, invoke_without_command=True)
@click.pass_context
def store_command(ctx: click.Context) -> None:
    """Keep adapters on the device, by user and version, in a folder STORE.

    Several programs may use one store at once; nothing is lost if one of them is killed.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@store_command.command("add")
@path_argument("store")
@click.argument("user")
@path_argument("file")
@click.option("--version", type=click.IntRange(1), help="By default one more than the newest.")
@click.option("--label", default="", help="A line for people, such as where it comes from.")
@_bundle_option
@click.option("--activate", is_flag=True, help="Make it the user's active adapter, too.")
@click.option("--allow-downgrade", is_flag=True, help="Take a version below the newest.")
@json_option
def _add(
    store: Path,
    user: str,
    file: Path,
    version: int | None,
    label: str,
    bundle: Path | None,
    activate: bool,
    allow_downgrade: bool,
    as_json: bool,
) -> None:
    """Install the adapter FILE for USER.

    STORE is made if it is not there. What is there already stays as it is.
    """
    from regrow_runtime.index import INDEX, clean
    from regrow_runtime.store import Store, check_incoming

    fits = _opened(bundle)
    if not (store / INDEX).is_file():  # what is refused makes no store
        clean(user, "user")
        check_incoming(file, fits)
    with Store(store) as opened:
        entry = opened.add(
            user,
            file,
            version=version,
            label=label,
            bundle=fits,
            activate=activate,
            allow_downgrade=allow_downgrade,
        )
    state = "active" if entry.active else "not active: `regrow store activate` makes it so"
    emit(vars(entry), [f"{_named(entry)}: {size(entry.size)}, {state}"], as_json=as_json)


@store_command.command("list")
@path_argument("store")
@click.option("--user", help="Only this user's.")
@json_option
def _list(store: Path, user: str | None, as_json: bool) -> None:
    """Tell what is installed; * is active."""
    result, lines = listing(store, user)
    emit(result, lines, as_json=as_json)


def listing(store: Path, user: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """What is installed, of one user or of all: the entries and the usage, and lines to print.

    Raises:
        UsageError: there is no store, or the user has nothing in it.
    """
    from regrow_format.errors import UsageError
    from regrow_runtime.store import Store

    with Store(store, create=False) as opened:
        entries, usage = opened.list(user), opened.usage()
    if user is not None and not entries:
        raise UsageError(
            f"user must have an adapter in the store, got {user!r}, who has none: "
            f"`regrow store list {store}` shows all"
        )
    rows = [
        [
            e.user,
            f"{e.version}{'*' if e.active else ' '}",
            e.method,
            size(e.size),
            e.digest[:12],
            e.label,
        ]
        for e in entries
    ]
    total = (
        f"{counted(usage['adapters'], 'adapter')} of {counted(usage['users'], 'user')}: "
        f"{counted(usage['files'], 'file')} of "
        f"{size(usage['file_bytes'])}, index {size(usage['index_bytes'])}"
    )
    lines = [*table(["user", "version", "method", "size", "content", "label"], rows), total]
    return {"adapters": [vars(e) for e in entries], "usage": usage}, lines


@store_command.command("activate")
@path_argument("store")
@click.argument("user")
@_version_option
@_bundle_option
@json_option
def _activate(
    store: Path, user: str, version: int | None, bundle: Path | None, as_json: bool
) -> None:
    """Serve USER with a version.

    Its file is checked first.
    """
    from regrow_runtime.store import Store

    with Store(store, create=False) as opened:
        entry = opened.activate(user, version, bundle=_opened(bundle))
    emit(vars(entry), [f"{_named(entry)} is active"], as_json=as_json)


@store_command.command("rollback")
@path_argument("store")
@click.argument("user")
@json_option
def _rollback(store: Path, user: str, as_json: bool) -> None:
    """Serve USER as before the last change.

    Can be repeated.
    """
    from regrow_runtime.store import Store

    with Store(store, create=False) as opened:
        entry = opened.roll_back(user)
    emit(vars(entry), [f"{_named(entry)} is active again"], as_json=as_json)


@store_command.command("remove")
@path_argument("store")
@click.argument("user")
@click.option("--version", type=click.IntRange(1), help="A version that is not active.")
@click.option("--all", "everything", is_flag=True, help="All of the user's.")
@json_option
def _remove(store: Path, user: str, version: int | None, everything: bool, as_json: bool) -> None:
    """Remove adapters of USER.

    Their files go too, unless others have the same.
    """
    if (version is None) != everything:
        raise click.UsageError("give one of --version and --all")
    from regrow_runtime.store import Store

    with Store(store, create=False) as opened:
        gone = opened.remove(user, version)
    lines = [f"{_named(entry)} removed" for entry in gone]
    emit({"removed": [vars(entry) for entry in gone]}, lines, as_json=as_json)


@store_command.command("verify")
@path_argument("store")
@json_option
def _verify(store: Path, as_json: bool) -> None:
    """Compare every file to its hash.

    Exits with 1 if one is broken or missing.
    """
    from regrow_format.errors import MismatchError
    from regrow_runtime.store import Store

    with Store(store, create=False) as opened:
        findings, usage = opened.verify(), opened.usage()
    if as_json:
        emit({"findings": findings, "usage": usage}, [], as_json=True)
    if findings:
        raise MismatchError(f"store must be whole, got {len(findings)} broken:", findings)
    if not as_json:
        emit({}, [f"{usage['adapters']} adapters in {usage['files']} files: whole"], as_json=False)


def _named(entry: Installed) -> str:
    return f"{entry.user}, version {entry.version}"


def _opened(bundle: Path | None) -> Bundle | None:
    from regrow_runtime import Bundle

    return None if bundle is None else Bundle.open(bundle, profile="memory")


def store_options(function: F) -> F:
    """--store and --user."""
    store = click.option(
        "--store", type=click.Path(path_type=Path), help="A store to take the adapter from…"
    )
    return store(click.option("--user", help="… the active one of this user.")(function))


def swap_first(
    bundle: Bundle, adapter: Path | None, store: Path | None, user: str | None
) -> SwapStats | None:
    """Swap to the adapter file, or to the user's active one in the store, if one is given."""
    if (store is None) != (user is None) or (store is not None and adapter is not None):
        raise click.UsageError("give --adapter, or --store and --user, or none of them")
    if store is None or user is None:
        return bundle.swap(adapter) if adapter else None
    from regrow_runtime.store import Store

    with Store(store, create=False) as opened:
        return opened.swap(bundle, user)
