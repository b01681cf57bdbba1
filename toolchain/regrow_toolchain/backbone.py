"""Backbones on disk: a Hugging Face directory, or one that regrow compressed.

A compressed one has `regrow.json` and `regrow.safetensors`. The weights are not called
`model.safetensors` on purpose: plain `from_pretrained` would load them with random layers and no
error.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from regrow_runtime.errors import FormatError, MismatchError, RegrowError, UsageError
from regrow_runtime.fields import Fields, dump_json, parse_json
from regrow_runtime.files import new_folder, read_bytes
from regrow_runtime.manifest import MANIFEST
from regrow_runtime.preprocess import PREPROCESSOR, ImagePreprocessor

from .backbone_id import INDEX, backbone_id
from .lowrank import Plan, apply_plan
from .structure import find_head

__all__ = ["CONFIG", "WEIGHTS", "Backbone", "load_backbone", "save_backbone"]

FORMAT = 1
CONFIG, WEIGHTS = "regrow.json", "regrow.safetensors"
_HF_CONFIG, _HF_WEIGHTS = "config.json", "model.safetensors"
_MAX_JSON = 64 << 20
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MAX_WIDTH = 1 << 24

# The files that travel from a model's directory to the backbone and on to the bundle.
_COMPANIONS = (
    _HF_CONFIG,
    PREPROCESSOR,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)

_TASKS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForAudioClassification": "audio-classification",
}


@dataclass(eq=False)
class Backbone:
    """A model with what is known of it.

    Attributes:
        model: in eval mode, fp32, on the CPU.
        task: optimum's name of the task, such as "image-classification".
        head: module paths of the head's linear layers, first to last.
        labels: class names in the order of the outputs; empty if it is no classifier, or if the
            checkpoint has no head.
        layers: the layers that are factored; empty for a dense model.
        files: config, preprocessing and tokenizer files that go with it.
        report: what compression measured; kept in `regrow.json`.
    """

    model: nn.Module
    backbone_id: str
    task: str
    head: tuple[str, ...]
    labels: tuple[str, ...]
    files: tuple[Path, ...]
    layers: tuple[Plan, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(p.numel() for p in self.model.parameters())

    def preprocessor(self) -> ImagePreprocessor:
        """The image preprocessing that training and the device share.

        Raises:
            UsageError: the directory has no preprocessor_config.json.
        """
        folder = next((f.parent for f in self.files if f.name == PREPROCESSOR), None)
        if folder is None:
            raise UsageError(
                f"model must have {PREPROCESSOR} to take pictures, got none: save its image "
                "processor beside it, or give ready pixel_values in an .npz"
            )
        return ImagePreprocessor.from_folder(folder)


def load_backbone(path: str | Path) -> Backbone:
    """Load a Hugging Face directory or one that `regrow compress` wrote.

    A name such as `google/vit-base-patch16-224` that is no folder here is fetched from the hub.
    Nothing is unpickled, and a compressed model's dense weights are never made.

    Raises:
        UsageError: `path` is no such directory.
        FormatError: its files are broken.
        RegrowError: the hub did not give the model.
    """
    folder = Path(path)
    if not folder.parent.exists() and _HUB_NAME.fullmatch(str(path)):
        folder = _fetch(str(path))
    if not folder.is_dir():
        found = "it is a file" if folder.is_file() else "no such folder"
        raise UsageError(f"backbone must be a model's folder, got {folder}: {found}")
    if (folder / CONFIG).is_file():
        return _load_compressed(folder)
    if (folder / MANIFEST).is_file():
        raise UsageError(f"backbone must be a model's folder, got {folder}: it is a bundle")
    if not (folder / _HF_CONFIG).is_file():
        raise UsageError(f"backbone must be a model's folder, got {folder}: it has no config.json")
    return _load_huggingface(folder)


def _fetch(name: str) -> Path:
    """The model's files in the hub's own cache; only what is needed, and nothing pickled."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", INDEX, *_COMPANIONS]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds
        raise RegrowError(
            f"model must be a folder here or a name on the hub, got {name}: it could not be "
            f"fetched ({type(error).__name__})"
        ) from error


def _load_huggingface(folder: Path) -> Backbone:
    weights = _weight_files(folder)
    model_class = _model_class(folder)
    with quiet_transformers():
        try:
            model, info = model_class.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, output_loading_info=True,
                torch_dtype=torch.float32,
            )  # fmt: skip
        except Exception as error:  # transformers raises many kinds on broken directories
            raise FormatError(f"{folder} could not be loaded: {_first_line(error)}") from error
    head = find_head(model, _classes(model))
    parts = tuple(f"{layer}." for layer in head)
    missing = [name for name in info["missing_keys"] if not name.startswith(parts)]
    if missing:
        raise FormatError(f"{folder}: weights lack {', '.join(sorted(missing)[:5])}")
    backbone = _backbone(folder, model.eval(), backbone_id(weights, head), head)
    if any(name.startswith(parts) for name in info["missing_keys"]):
        backbone.labels = ()  # the head was drawn at random: its outputs mean nothing yet
    return backbone


def _weight_files(folder: Path) -> list[Path]:
    if (folder / _HF_WEIGHTS).is_file():
        return [folder / _HF_WEIGHTS]
    if (folder / INDEX).is_file():
        index = parse_json(read_bytes(folder / INDEX, limit=_MAX_JSON, what="an index"), INDEX)
        return [folder / name for name in sorted(set(index.take("weight_map", dict).values()))]
    pickled = [p.name for p in folder.glob("*.bin")]
    why = f"only {pickled[0]}, which is pickle: save it as safetensors" if pickled else "none"
    raise UsageError(f"{folder} must have {_HF_WEIGHTS}, got {why}")


def _load_compressed(folder: Path) -> Backbone:
    fields = parse_json(
        read_bytes(folder / CONFIG, limit=_MAX_JSON, what=CONFIG), str(folder / CONFIG)
    )
    if (version := fields.take("format", int)) != FORMAT:
        raise FormatError(f"{fields.where}: format must be {FORMAT}, got {version}")
    plans = tuple(_plan(part) for part in fields.objects("layers"))
    stored_id = fields.take("backbone_id", str)
    head = fields.strings("head")
    report = fields.take("report", dict, {})
    fields.done()
    model = _empty_model(folder, plans)
    _load_weights(model, folder / WEIGHTS)
    if (found := backbone_id([folder / WEIGHTS], head)) != stored_id:
        raise FormatError(
            f"{folder / WEIGHTS} must have the backbone_id of {CONFIG} ({stored_id}), got {found}"
        )
    backbone = _backbone(folder, model.eval(), stored_id, head)
    backbone.layers, backbone.report = plans, report
    return backbone


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


def _empty_model(folder: Path, plans: tuple[Plan, ...]) -> nn.Module:
    """The model's structure without weights; non-persistent buffers are made as usual."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    model_class = _model_class(folder)
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            with init_empty_weights(include_buffers=False):
                model: nn.Module = model_class(config)
        except Exception as error:  # transformers raises many kinds on broken directories
            raise FormatError(
                f"{folder / _HF_CONFIG} must describe a model: {_first_line(error)}"
            ) from error
    known = {name for name, _ in model.named_modules() if name}
    if lost := [plan.name for plan in plans if plan.name not in known]:
        raise MismatchError(
            f"{folder / CONFIG} does not fit {_HF_CONFIG}:",
            [f"{name!r} is no layer of the model" for name in lost],
        )
    apply_plan(model, plans, empty=True)
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise FormatError(f"{path} is missing: compress the model again")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise FormatError(f"{path} must be a whole safetensors file: {error}") from None
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    findings = [
        f"{name} must be {list(wanted[name])}, got {list(tensor.shape)}"
        if name in wanted
        else f"{name} is unknown"
        for name, tensor in tensors.items()
        if wanted.get(name) != tensor.shape
    ]
    fitting = {name: t for name, t in tensors.items() if wanted.get(name) == t.shape}
    model.load_state_dict(fitting, strict=False, assign=True)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    lost = [n for n, p in model.named_parameters() if p.is_meta and n not in tensors]
    findings += [f"{name} is missing" for name in lost]
    if findings:
        raise MismatchError(f"{path} does not fit its config:", findings)


def save_backbone(backbone: Backbone, out: str | Path, *, force: bool = False) -> Backbone:
    """Write a compressed backbone atomically; returns it with its `backbone_id` and its files.

    Raises:
        UsageError: `out` exists and `force` is off.
    """
    out = Path(out)
    with new_folder(out, marker=CONFIG, force=force) as folder:
        _save_weights(backbone.model, folder / WEIGHTS)
        identity = backbone_id([folder / WEIGHTS], backbone.head)
        for file in backbone.files:
            shutil.copyfile(file, folder / file.name)
        config = {
            "format": FORMAT,
            "backbone_id": identity,
            "head": list(backbone.head),
            "layers": [asdict(plan) for plan in backbone.layers],
            "report": backbone.report,
        }
        (folder / CONFIG).write_text(dump_json(config, indent=1) + "\n", encoding="utf-8")
    backbone.backbone_id = identity
    backbone.files = tuple(out / file.name for file in backbone.files)
    return backbone


def _save_weights(model: nn.Module, path: Path) -> None:
    """Parameters and persistent buffers, tied ones once, under their first name."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            tensors[name] = tensor.contiguous()
    save_file(tensors, path, {"format": "pt"})


def _backbone(folder: Path, model: nn.Module, identity: str, head: Sequence[str]) -> Backbone:
    config: Any = model.config
    names = getattr(config, "id2label", None) or {}
    classes = _classes(model) or 0
    labels = tuple(str(names.get(i, i)) for i in range(classes)) if head else ()
    files = tuple(folder / name for name in _COMPANIONS if (folder / name).is_file())
    return Backbone(model, identity, _task(type(model).__name__), tuple(head), labels, files)


def _classes(model: nn.Module) -> int | None:
    return getattr(model.config, "num_labels", None)


def _task(architecture: str) -> str:
    for ending, task in _TASKS.items():
        if architecture.endswith(ending):
            return task
    return "feature-extraction"


def _model_class(folder: Path) -> Any:
    """The transformers class that config.json names; no code of the directory is run."""
    import transformers

    path = folder / _HF_CONFIG
    config = parse_json(read_bytes(path, limit=_MAX_JSON, what="a config"), str(path))
    names = config.strings("architectures")
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UsageError(
            f"{path}: architectures must name a model class of transformers, got {list(names)}"
        )
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' advice and bars off the terminal; its errors still come."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
