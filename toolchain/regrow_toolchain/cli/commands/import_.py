"""regrow import."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from regrow_toolchain.config import ImportConfig

from ..config_options import config_options
from ..options import emit, force_option, json_option, out_option, path_argument
from ..tables import size


@click.command("import")
@path_argument("peft_dir")
@out_option("Adapter file to write (.safetensors).")
@click.option(
    "--backbone",
    required=True,
    type=click.Path(path_type=Path),
    help="The bundle or the backbone that the adapter is for.",
)
@config_options(ImportConfig)
@force_option
@json_option
def import_command(
    peft_dir: Path, out: Path, config: ImportConfig, backbone: Path, force: bool, as_json: bool
) -> None:
    """Make an adapter of PEFT_DIR, as PEFT saves it: LoRA, DoRA, VeRA, FourierFT or IA3.

    Its layers are compared to the backbone's, and nothing is left out in silence: what regrow
    cannot compute is refused. A classifier in modules_to_save becomes the adapter's head.
    """
    from regrow_format.files import check_output
    from regrow_toolchain.interop import factored, import_peft

    check_output(out, force=force)
    adapter = import_peft(peft_dir, backbone, **asdict(config))
    written = adapter.save(out)
    result = {
        "out": str(out),
        "bytes": written,
        "method": adapter.method,
        "basis": adapter.basis.kind,
        "config": dict(adapter.config),
        "storage": adapter.storage,
        "backbone_id": adapter.backbone_id,
        "targets": len(adapter.targets),
        "labels": list(adapter.head.labels) if adapter.head else None,
    }
    emit(result, [*_lines(result), _your_word(backbone)], as_json=as_json)
    if pairs := factored(backbone, (target.name for target in adapter.targets)):
        click.echo(
            f"regrow: {backbone} is compressed, and PEFT trains dense layers: {len(pairs)} of the "
            f"{len(adapter.targets)} layers are factored there ({pairs[0]}), so this adapter was "
            "trained on a dense model and has another effect here; train on the backbone that you "
            "deploy (regrow adapt), or measure",
            err=True,
        )


def _your_word(backbone: Path) -> str:
    return (
        f"that it was trained on the weights of {backbone} is your word: PEFT's files do not say, "
        "only names and widths were compared"
    )


def _lines(result: dict[str, Any]) -> list[str]:
    head = f", own head of {len(result['labels'])} classes" if result["labels"] else ""
    settings = ", ".join(f"{name} {value}" for name, value in result["config"].items())
    return [
        f"wrote {result['out']}: {size(result['bytes'])}, {result['method']} ({settings}) "
        f"in {result['storage']}, {result['targets']} layers{head}"
    ]
