"""Is a bundle what was exported, does it compute what it did, and do adapters?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from regrow_format.adapter import Adapter
from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.files import no_file
from regrow_format.integers import SAFE_CODES, saturates
from regrow_format.manifest import MANIFEST, Manifest
from regrow_format.products import IntegerProduct, integer_products
from regrow_runtime import Bundle
from regrow_runtime.checks import Check

from .finding import Finding

__all__ = ["verify"]


def verify(
    folder: str | Path, adapters: Sequence[str | Path] = (), against: str | Path | None = None
) -> list[Finding]:
    """Check everything that can be checked, on this machine; nothing is written.

    Args:
        folder: the bundle.
        adapters: files whose fit and probe are checked too.
        against: the backbone, to compare with torch (which must be installed).

    Raises:
        UsageError: there is no such bundle, adapter or backbone.
        FormatError: the manifest is broken, so that nothing can be said.
    """
    folder, paths = Path(folder), [Path(path) for path in adapters]
    for path in paths:
        if not path.is_file():
            raise UsageError(f"an adapter must be a file, got {path}: {no_file(path)}")
    manifest = Manifest.load(folder)
    findings = [*_files(folder, manifest), *_unlisted(folder, manifest)]
    if any(found.result == "failed" for found in findings):
        why = "files are not those that were exported, so they are not run"
        return [*findings, Finding("graph", "skipped", why)]
    findings += _products(folder, manifest)
    try:
        bundle = Bundle.open(folder)
    except RegrowError as error:
        return [*findings, Finding("graph", "failed", str(error))]
    findings += [_graph(bundle), _tried("base", lambda: _base(bundle))]
    for path in paths:
        findings.append(_tried(path.name, lambda path=path: _adapter(bundle, path)))  # type: ignore[misc]
    if against is not None:
        from .torch_parity import compared

        findings += compared(bundle, Path(against), paths)
    return findings


def _tried(check: str, find: Callable[[], Finding]) -> Finding:
    try:
        return find()
    except RegrowError as error:
        return Finding(check, "failed", str(error))


def _files(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """One finding for each file that is not as listed, then one for all."""
    broken = 0
    for name, entry in manifest.files.items():
        try:
            replace(manifest, files={name: entry}).check_files(folder, hashes=True)
        except (FormatError, OSError) as error:
            broken += 1
            yield Finding(name, "failed", str(error))
    count, size = len(manifest.files), sum(entry.size for entry in manifest.files.values())
    detail = f"{count - broken} of {count} have the manifest's size and SHA-256, {size:,} bytes"
    yield Finding("files", "failed" if broken else "ok", detail)


def _unlisted(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Files that the manifest does not know; hidden ones are an operating system's own."""
    known = {MANIFEST, *manifest.files}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if name not in known and not hidden and (path.is_symlink() or not path.is_dir()):
            yield Finding(name, "failed", "not listed in the manifest: remove it, or export again")


def _products(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Of the weights that the graphs have, whatever the manifest says: are their products exact?

    Weights that are computed are an expansion's codes, which only ones and zeros are multiplied
    with.
    """
    files = [graph.file for graph in manifest.graphs] + [one.file for one in manifest.expanders]
    try:
        found = [product for file in files for product in integer_products(folder / file)]
    except FormatError as error:
        yield Finding("products", "failed", str(error))
        return
    known = [(product, product.codes) for product in found if product.codes]
    low, high = manifest.rounding.range if manifest.rounding else SAFE_CODES
    odd = [product for product, codes in known if codes[0] < low or codes[1] > high]
    if odd:
        yield Finding("products", "failed", _odd(odd, f"from {low} to {high}"))
    elif known:
        yield _exact(len(known), min(c[0] for _, c in known), max(c[1] for _, c in known))


def _odd(products: Sequence[IntegerProduct], wanted: str) -> str:
    first = products[0]
    got = "{} to {}".format(*(first.codes or ()))
    return (
        f"weights of integer products must have codes {wanted}, got {got} in {first.weight} "
        f"({len(products)} such products): export it again"
    )


def _exact(count: int, low: int, high: int) -> Finding:
    detail = f"{count} integer products with weights from {low} to {high}"
    if SAFE_CODES[0] <= low and high <= SAFE_CODES[1]:
        return Finding("products", "ok", f"{detail}: exact on every processor")
    if not saturates():
        return Finding("products", "ok", f"{detail}: exact here, wrong without VNNI")
    why = f"{detail} saturate on this processor, which has no VNNI: export it again"
    return Finding("products", "failed", why)


def _graph(bundle: Bundle) -> Finding:
    manifest = bundle.manifest
    version = bundle.health()["onnxruntime"]
    detail = (
        f"{manifest.mode}, {manifest.variant}, {len(manifest.slots)} slots, opset "
        f"{manifest.opset}: opens in ONNX Runtime {version}"
    )
    return Finding("graph", "ok", detail)


def _base(bundle: Bundle) -> Finding:
    found = bundle.check()
    if found.finding == "no probe":
        return Finding("base", "skipped", "the bundle has no outputs to compare with: export again")
    found.require()
    return Finding("base", "ok", f"outputs as at export, {_within(found)}")


def _adapter(bundle: Bundle, path: Path) -> Finding:
    adapter, manifest = Adapter.load(path), bundle.manifest
    if manifest.mode == "merged":
        if adapter.digest() == manifest.adapter:
            return Finding(path.name, "ok", "the adapter that is built in")
        there = "the adapter that is built in must be this one"
        return Finding(path.name, "failed", there if manifest.adapter else "none is built in")
    bundle.load(adapter, name=path.name)
    found = bundle.check(path.name)
    bundle.unload(path.name)
    found.require()
    fits = f"fits ({len(adapter.targets)} layers" + (", own head)" if adapter.head else ")")
    known = found.effect is not None and math.isfinite(found.effect)
    change = f", changes outputs by up to {found.effect:.2g}" if known else ""
    if found.difference is None:
        return Finding(path.name, "ok", f"{fits}{change}; it has no probe for this bundle")
    return Finding(path.name, "ok", f"{fits}{change}; outputs as at training, {_within(found)}")


def _within(found: Check) -> str:
    return f"within {found.difference:.2g} ({found.allowed:.2g} allowed)"
