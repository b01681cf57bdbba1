"""What an adapter is imported for: the identity, the layers and the head of its backbone.

A bundle and a compressed backbone say all of it in files. A plain Hugging Face directory does not
say which layers are its head, and the identity leaves the head out: that needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_format.fields import parse_json
from regrow_format.files import no_folder, read_bytes
from regrow_format.manifest import MANIFEST, Manifest
from regrow_format.methods import get_method
from regrow_inputs.extras import pip_line
from regrow_toolchain.models import stored_tensors

from .tensors import matrix_shape

if TYPE_CHECKING:
    from regrow_toolchain.models import Backbone

__all__ = ["Base", "Widths", "factored", "read_base"]

# As `regrow_toolchain.models` names them, which needs torch.
_CONFIG, _WEIGHTS, _HF_CONFIG = "regrow.json", "regrow.safetensors", "config.json"
_FORMAT = 1
_MAX_JSON = 64 << 20
_MAX_WIDTH = 1 << 24
_MAX_GRAPH = 256 << 20  # weights lie beside it
_LINEAR = "a linear layer of the backbone, got none"

Widths = tuple[int, int]  # in, out


@dataclass(frozen=True)
class Base:
    """A backbone as an import sees it.

    Attributes:
        where: its path, for messages.
        change: what a layer must be to be changed, for messages.
        layers: (in, out) of the layers that adapters can change, by module path.
        head: (in, out) of the head's layers, first to last.
        labels: class names; empty if there are none.
        transposed: layers whose in and out may be the other way round: weights alone tell, which
            GPT-2's Conv1D stores transposed; convolutions do not.
        loaded: the backbone itself, where it had to be loaded.
        is_bundle: it is a bundle, whose weights are not to be had.
    """

    where: str
    change: str
    backbone_id: str
    layers: Mapping[str, Widths]
    head: Mapping[str, Widths]
    labels: tuple[str, ...]
    transposed: frozenset[str] = frozenset()
    loaded: Backbone | None = None
    is_bundle: bool = False

    @cached_property
    def backbone(self) -> Backbone:
        """The backbone itself, which takes torch; it is loaded once.

        Raises:
            UsageError: it is a bundle, or a function must make it.
            RegrowError: torch is not installed.
        """
        if not _has_torch():
            raise RegrowError(
                f"{self.where} must be loaded for its weights, which takes torch, got none: "
                f"{pip_line('export')}"
            )
        from regrow_toolchain.models import load_backbone

        return self.loaded or load_backbone(self.where)

    def weight_and_bias(self, layer: str) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
        """Weight [out, in] and bias [out] (None if it has none) of one of `layers`.

        Raises:
            UsageError: as `backbone`, or its weight is no matrix.
        """
        from regrow_export.layers import layer_type

        module = self.backbone.model.get_submodule(layer)
        found = layer_type(module)
        weight, bias = (found.weight(module), found.bias(module)) if found else (None, None)
        if weight is None:
            raise UsageError(
                f"{layer} must have a matrix for a weight, got {type(module).__name__}"
            )
        return weight.double().numpy(), None if bias is None else bias.detach().double().numpy()

    def missing(self, layer: str) -> str | None:
        """Why `layer` cannot be changed, None if it can."""
        if layer in self.head:
            return f"{layer} must be no target, got a layer of the head: use modules_to_save"
        if layer in self.layers:
            return None
        return f"{layer} must be {self.change}"

    def finding(self, layer: str, found: Widths) -> str | None:
        """Why a change of `layer` with the widths `found` does not fit, None if it does."""
        if (missing := self.missing(layer)) is not None:
            return missing
        want = self.layers[layer]
        if found == want or (layer in self.transposed and found == want[::-1]):
            return None
        return f"{layer} must be {want[0]} -> {want[1]}, got {found[0]} -> {found[1]}"


def read_base(path: str | Path, method: str) -> Base:
    """From a bundle, a compressed backbone, or (where torch is) a Hugging Face directory.

    Args:
        method: the adapter's, which a bundle may have no slots for.

    Raises:
        UsageError: `path` is none of them, or a bundle that takes no adapters.
        FormatError: its files are broken.
        RegrowError: a Hugging Face directory, and torch is not installed.
    """
    path = Path(path)
    if (path / MANIFEST).is_file():
        return _of_bundle(path, method)
    if (path / _CONFIG).is_file():
        return _of_compressed(path)
    if (path / _HF_CONFIG).is_file():
        return _of_huggingface(path)
    found = "a folder with neither" if path.is_dir() else no_folder(path)
    raise UsageError(
        f"--backbone must be a bundle ({MANIFEST}) or a backbone ({_CONFIG}, {_HF_CONFIG}), "
        f"got {path}: {found}"
    )


def factored(path: str | Path, layers: Iterable[str]) -> tuple[str, ...]:
    """Those of `layers` that compression made a pair of factors, in a backbone or in a bundle.

    A bundle tells by the names in its graph, which are the modules'.
    """
    path, layers = Path(path), tuple(layers)
    if (path / MANIFEST).is_file():
        graph = path / Manifest.load(path).graphs[0].file
        if not graph.is_file() or graph.stat().st_size > _MAX_GRAPH:
            return ()
        data = graph.read_bytes()
        return tuple(name for name in layers if re.search(_pair(name), data))
    if not (path / _CONFIG).is_file():
        return ()
    fields = parse_json(
        read_bytes(path / _CONFIG, limit=_MAX_JSON, what=_CONFIG), str(path / _CONFIG)
    )
    pairs = {plan.take("name", str) for plan in fields.objects("layers")}
    return tuple(name for name in layers if name in pairs)


def _pair(layer: str) -> bytes:
    """What a graph calls a part of the pair at `layer`: in a slot (`base`), in names of nodes or of
    weights.
    """
    path = re.escape(layer.encode()).replace(rb"\.", rb"[./]")
    return path + rb"(?:[./]base)?[./]up[./]"


def _of_bundle(path: Path, method: str) -> Base:
    manifest = Manifest.load(path)
    if manifest.mode != "swappable":
        raise UsageError(
            f"bundle must be swappable to take an adapter, got a {manifest.mode} one, {path}: "
            "export it with --mode swappable"
        )
    kinds = get_method(method).kinds
    layers = {s.target: (s.in_features, s.out_features) for s in manifest.slots if s.kind in kinds}
    heads = {slot.target: (slot.in_features, slot.out_features) for slot in manifest.head_slots}
    change = "a slot of the bundle, got none: export it with --target"
    if kinds != get_method("lora").kinds:  # which bundles have if nothing else is asked for
        named = " or ".join(kinds)
        change = f"a {named} slot of the bundle, got none: export it with --for {method} --target"
    return Base(
        str(path), change, manifest.backbone_id, layers, heads, manifest.labels, is_bundle=True
    )


def _of_compressed(path: Path) -> Base:
    fields = parse_json(
        read_bytes(path / _CONFIG, limit=_MAX_JSON, what=_CONFIG), str(path / _CONFIG)
    )
    if (version := fields.take("format", int)) != _FORMAT:
        raise FormatError(f"{fields.where}: format must be {_FORMAT}, got {version}")
    if not (path / _WEIGHTS).is_file():
        raise FormatError(f"{path / _WEIGHTS} is missing: compress the model again")
    weights = {
        tensor.name.removesuffix(".weight"): tensor.shape
        for tensor in stored_tensors(path / _WEIGHTS)
        if tensor.name.endswith(".weight") and matrix_shape(tensor.shape)
    }
    layers = {name: (shape[1], shape[0]) for name, shape in weights.items()}
    head = fields.strings("head")
    if lost := [name for name in head if name not in layers]:
        raise FormatError(f"{path / _WEIGHTS} must have the head's {', '.join(lost)}, got none")
    heads = {name: layers.pop(name) for name in head}
    pairs = {  # a factored pair is a layer too
        plan.take("name", str): (
            plan.number("in_features", 1, _MAX_WIDTH),
            plan.number("out_features", 1, _MAX_WIDTH),
        )
        for plan in fields.objects("layers")
    }
    transposed = frozenset(n for n in layers.keys() - pairs if len(weights[n]) == 2)
    identity = fields.take("backbone_id", str)
    return Base(str(path), _LINEAR, identity, layers | pairs, heads, _labels(path), transposed)


def _has_torch() -> bool:
    return find_spec("torch") is not None and find_spec("transformers") is not None


def _labels(path: Path) -> tuple[str, ...]:
    """Class names of config.json, in the order of the outputs."""
    config = path / _HF_CONFIG
    fields = parse_json(read_bytes(config, limit=_MAX_JSON, what="a config"), str(config))
    names = fields.plain("id2label", dict) or {}
    return tuple(str(names.get(str(i), i)) for i in range(len(names)))


def _of_huggingface(path: Path) -> Base:
    if not _has_torch():
        raise RegrowError(
            "--backbone must be a bundle or a compressed backbone where torch is not installed, "
            f"got {path}, a Hugging Face directory: give the bundle that regrow export made of "
            f"it, or {pip_line('export')}"
        )
    from regrow_export.layers import find_layers
    from regrow_toolchain.models import load_backbone

    model = load_backbone(path)
    layers = {
        name: layer.sizes(module)
        for name, (module, layer) in find_layers(model.model).items()
        if layer.is_linear
    }
    heads = {name: layers.pop(name) for name in model.head}
    return Base(str(path), _LINEAR, model.backbone_id, layers, heads, model.labels, loaded=model)
