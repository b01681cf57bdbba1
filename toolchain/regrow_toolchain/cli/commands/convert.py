"""regrow convert."""

from __future__ import annotations

from pathlib import Path

import click

from ..options import check_npz, emit, force_option, json_option, out_option, path_argument
from ..tables import size


@click.command("convert")
@path_argument("file")
@out_option("File to write.")
@click.option(
    "--to",
    required=True,
    type=click.Choice(["onnx_adapter", "npz"]),
    help="onnx_adapter: for ONNX Runtime's LoraAdapter (C, C++, C#, Java, Python). npz: for NumPy.",
)
@click.option(
    "--bundle",
    required=True,
    type=click.Path(path_type=Path),
    help="The swappable bundle whose inputs the tensors are for.",
)
@force_option
@json_option
def convert_command(
    file: Path, out: Path, to: str, bundle: Path, force: bool, as_json: bool
) -> None:
    """Write the adapter FILE as dense tensors, by the names of the bundle's inputs.

    They are what regrow would feed: a program without regrow gives them to ONNX Runtime itself.
    """
    if to == "npz":
        check_npz(out)
    from regrow_toolchain.interop import convert

    tensors = convert(file, bundle, out, to=to, force=force)
    result = {
        "out": str(out),
        "to": to,
        "bytes": out.stat().st_size,
        "tensors": {name: list(array.shape) for name, array in tensors.items()},
    }
    line = f"wrote {out}: {size(out.stat().st_size)}, {len(tensors)} tensors as {to}"
    emit(result, [line], as_json=as_json)
