"""regrow verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..options import emit, json_option, path_argument


@click.command("verify")
@path_argument("bundle")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Adapter file whose fit and probe are checked too; repeatable.",
)
@click.option(
    "--against",
    metavar="BACKBONE",
    help="Compare with torch too, which must be installed: the backbone that the bundle was made "
    "of, as `regrow export` takes it.",
)
@json_option
def verify_command(
    bundle: Path, adapters: tuple[Path, ...], against: str | None, as_json: bool
) -> None:
    """Check that BUNDLE is what was exported, and that it computes here what it did there.

    Hashes of every file, files that do not belong there, the graph, the base's outputs for the
    bundle's own probe; and of adapters, whether they fit and do what they did at training. Nothing
    is written. Exits with 1 if a check failed.
    """
    if against is not None:
        from regrow_toolchain.extras import require_extra

        require_extra("export", "regrow verify --against")
    from regrow_format.errors import RegrowError
    from regrow_toolchain.verification import verify

    findings = verify(bundle, adapters, against)
    failed = sum(found.result == "failed" for found in findings)
    result = {
        "bundle": str(bundle),
        "ok": not failed,
        "checks": [vars(found) for found in findings],
    }
    emit(result, _lines(result), as_json=as_json)
    if failed:
        raise RegrowError(
            f"{bundle} is not as it should be: {failed} of {len(findings)} checks failed"
        )


def _lines(result: dict[str, Any]) -> list[str]:
    checks = result["checks"]
    width = max(len(found["check"]) for found in checks)
    lines = []
    for found in checks:
        first, *more = found["detail"].splitlines()
        lines.append(f"{found['result']:7}  {found['check']:{width}}  {first}")
        lines += [" " * (width + 11) + line for line in more]
    if result["ok"]:
        lines.append(f"{result['bundle']} is as it was exported")
    return lines
