"""Backbones: a Hugging Face directory, a function that returns a module, or what regrow compressed.

A compressed one has `regrow.json` and `regrow.safetensors`. The weights are not called
`model.safetensors` on purpose: plain `from_pretrained` would load them with random layers and no
error.
"""

from __future__ import annotations

import filecmp
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from regrow_format.errors import FormatError, MismatchError, RegrowError, UsageError
from regrow_format.fields import Fields, dump_json, parse_json
from regrow_format.files import new_folder, read_bytes
from regrow_format.manifest import MANIFEST
from regrow_inputs import PREPROCESSOR, ImagePreprocessor

from .huggingface import import_transformers, quiet_transformers
from .identity import INDEX, backbone_id, memory_id
from .low_rank import Plan, apply_plan
from .module_factory import (
    FUNCTION,
    check_finite,
    check_weights,
    declared,
    made_by,
    tied,
    unique_tensors,
)
from .pooling import with_pooling, write_pooling
from .structure import find_head

__all__ = [
    "COMPANIONS",
    "CONFIG",
    "WEIGHTS",
    "Backbone",
    "load_backbone",
    "load_structure",
    "save_backbone",
]

FORMAT = 1
CONFIG, WEIGHTS = "regrow.json", "regrow.safetensors"
_HF_CONFIG, _HF_WEIGHTS = "config.json", "model.safetensors"
_MAX_JSON = 64 << 20
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_MAX_WIDTH = 1 << 24
_ALIGNED = 64  # bytes, as torch allocates

# The files that travel from a model's directory to the backbone and on to the bundle.
COMPANIONS = (
    _HF_CONFIG,
    PREPROCESSOR,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)

_TASKS = {
    "ForImageClassification": "image-classification",
    "ForImageClassificationWithTeacher": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForAudioClassification": "audio-classification",
}

_SOUNDS = ("input_values", "input_features")  # what models of sounds take


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
        function: `package.module:function` where a function made the model, else empty.
    """

    model: nn.Module
    backbone_id: str
    task: str
    head: tuple[str, ...]
    labels: tuple[str, ...]
    files: tuple[Path, ...] = ()
    layers: tuple[Plan, ...] = ()
    report: dict[str, Any] = field(default_factory=dict)
    function: str = ""

    @property
    def parameters(self) -> int:
        """How many numbers the model has."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def folder(self) -> Path | None:
        """Where its files lie, all of them in one place; None without any."""
        return self.files[0].parent if self.files else None

    def preprocessor(self) -> ImagePreprocessor:
        """The image preprocessing that training and the device share.

        Raises:
            UsageError: the directory has no preprocessor_config.json.
        """
        folder = next((f.parent for f in self.files if f.name == PREPROCESSOR), None)
        if folder is None:
            raise UsageError(
                f"model must have {PREPROCESSOR} to take images, got none: save its image "
                "processor beside it, or give ready pixel_values in an .npz"
            )
        return ImagePreprocessor.from_folder(folder)


def load_structure(path: str | Path) -> nn.Module:
    """A dense model for looking at its shapes: of a Hugging Face directory, whose weights need not
    be there and are not read, or of `package.module:function`.

    Raises:
        UsageError: there is no such directory or function, or it is a compressed one.
        FormatError: its config is broken.
    """
    folder = Path(path)
    if not folder.exists() and (match := FUNCTION.fullmatch(str(path))) and not match["folder"]:
        return made_by(match["function"])
    if not (folder / _HF_CONFIG).is_file() or (folder / CONFIG).is_file():
        raise UsageError(f"model must be a folder with {_HF_CONFIG}, or a function, got {path}")
    model = _empty_model(folder, ()).eval()
    tied: Any = model
    tied.tie_weights()  # each shared weight is counted once
    return model


def load_backbone(path: str | Path) -> Backbone:
    """Load a Hugging Face directory, what a function returns, or what `regrow compress` wrote.

    A name such as `google/vit-base-patch16-224` that is no folder here is fetched from the hub.
    `package.module:function` is imported (from the current directory too) and called; it returns
    an `nn.Module`, which may say what it is by attributes `labels` (class names), `head` (module
    paths of its head's linear layers) and `task`. What was compressed from such a module is
    `package.module:function@FOLDER`: its folder names the function, but a file's word is not
    enough to run code. Nothing is unpickled, and the dense weights of a compressed Hugging Face
    model are never made.

    Raises:
        UsageError: there is no such directory or function, or it is no model.
        FormatError: files are broken.
        RegrowError: the hub did not give the model, the function failed, or weights are not finite.
    """
    folder = Path(path)
    if not folder.exists() and (match := FUNCTION.fullmatch(str(path))):
        if match["folder"] is None:
            return _from_function(match["function"])
        folder = Path(match["folder"])
        if not (folder / CONFIG).is_file():
            raise UsageError(f"backbone must be a folder with {CONFIG} after @, got {folder}")
        return _load_compressed(folder, match["function"])
    if not folder.parent.exists() and _HUB_NAME.fullmatch(str(path)):
        folder = _fetch(str(path))
    if not folder.is_dir():
        found = "it is a file" if folder.is_file() else "no such folder"
        raise UsageError(f"backbone must be a model's folder, got {folder}: {found}")
    if (folder / CONFIG).is_file():
        return _load_compressed(folder, "")
    if (folder / MANIFEST).is_file():
        raise UsageError(f"backbone must be a model's folder, got {folder}: it is a bundle")
    if not (folder / _HF_CONFIG).is_file():
        raise UsageError(f"backbone must be a model's folder, got {folder}: it has no config.json")
    return _load_huggingface(folder)


def _fetch(name: str) -> Path:
    """The model's files in the hub's own cache; only what is needed, and nothing pickled."""
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", INDEX, *COMPANIONS]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds
        raise RegrowError(
            f"model must be a folder here or a name on the hub, got {name}: it could not be "
            f"fetched ({type(error).__name__})"
        ) from error


def _from_function(function: str) -> Backbone:
    model = made_by(function)
    check_weights(model, function)
    backbone = _described(model, function)
    backbone.backbone_id = memory_id(unique_tensors(model), backbone.head)
    return backbone


def _described(model: nn.Module, function: str) -> Backbone:
    """What a function returned, with what it says of itself or else looks like; it has no id yet.

    Raises:
        UsageError: what it says does not fit.
    """
    said = declared(model, function)
    head = find_head(model, _classes(model)) if said.head is None else said.head
    plain = "classification" if head else "feature-extraction"
    task = said.task or (_task(model) if _is_transformers(model) else plain)
    outputs = len(model.get_submodule(head[-1]).get_parameter("weight")) if head else 0
    labels = _names(model, outputs) if said.labels is None else said.labels
    if head and len(labels) != outputs:
        raise UsageError(
            f"{function}: labels must be one per output of {head[-1]}, got {len(labels)} for "
            f"{outputs}"
        )
    return Backbone(model, "", task, head, labels, function=function)


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
            broken = "; copy or fetch it again" if isinstance(error, SafetensorError) else ""
            raise FormatError(
                f"{folder} could not be loaded: {_first_line(error)}{broken}"
            ) from error
    head = find_head(model, _classes(model))
    parts = tuple(f"{layer}." for layer in head)
    missing = [name for name in info["missing_keys"] if not name.startswith(parts)]
    if missing:
        raise FormatError(f"{folder}: weights lack {', '.join(sorted(missing)[:5])}")
    check_finite(model, str(folder))
    model = with_pooling(model.eval(), folder)
    backbone = _backbone(folder, model, backbone_id(weights, head), head)
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


def _load_compressed(folder: Path, function: str) -> Backbone:
    """`function`: what the user allowed to be imported and called; empty for nothing."""
    fields = parse_json(
        read_bytes(folder / CONFIG, limit=_MAX_JSON, what=CONFIG), str(folder / CONFIG)
    )
    if (version := fields.take("format", int)) != FORMAT:
        raise FormatError(f"{fields.where}: format must be {FORMAT}, got {version}")
    plans = tuple(_plan(part) for part in fields.objects("layers"))
    stored_id = fields.take("backbone_id", str)
    head = fields.strings("head")
    report = fields.take("report", dict, {})
    wanted = fields.take("function", str, "")
    labels = fields.strings("labels")
    fields.done()
    if wanted != function:
        raise UsageError(_which_function(folder, wanted, function))
    if function:
        model = _with_plans(made_by(function), plans, folder, function)
        _load_into(model, folder / WEIGHTS)
    else:
        model = _empty_model(folder, plans)
        _load_weights(model, folder / WEIGHTS)
    if (found := backbone_id([folder / WEIGHTS], head)) != stored_id:
        raise FormatError(
            f"{folder / WEIGHTS} must have the backbone_id of {CONFIG} ({stored_id}), got {found}"
        )
    if function:
        backbone = _described(model, function)
        if backbone.head != head:
            raise FormatError(
                f"{folder / CONFIG}: head must be the model's, {list(backbone.head)}, "
                f"got {list(head)}"
            )
        backbone.backbone_id = stored_id
        backbone.labels = labels or backbone.labels
        backbone.files = tuple(folder / n for n in COMPANIONS if (folder / n).is_file())
    else:
        backbone = _backbone(folder, with_pooling(model.eval(), folder), stored_id, head)
    backbone.layers, backbone.report = plans, report
    return backbone


def _which_function(folder: Path, wanted: str, given: str) -> str:
    if not wanted:
        return f"{folder} must be given without {given}@, got one of a Hugging Face directory"
    other = f", got {given}" if given else ""
    return (
        f"{folder} was compressed from a model that {wanted} makes{other}: to import and call "
        f"that, give {wanted}@{folder}"
    )


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
    import_transformers()
    from accelerate import init_empty_weights
    from transformers import AutoConfig, GenerationConfig

    model_class = _model_class(folder)
    with quiet_transformers():
        try:
            # As its from_pretrained does. AutoConfig does not know every part of a model, but what
            # neither knows is none.
            kind = model_class.config_class
            if kind.get_config_dict(folder)[0].get("model_type") != kind.model_type:
                AutoConfig.from_pretrained(folder, local_files_only=True)
            config = kind.from_pretrained(folder, local_files_only=True)
            with init_empty_weights(include_buffers=False):
                model: Any = model_class(config)
            if (folder / "generation_config.json").is_file():  # such as what ends a text
                model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # transformers raises many kinds on broken directories
            raise FormatError(
                f"{folder / _HF_CONFIG} must describe a model: {_first_line(error)}"
            ) from error
    return _with_plans(model, plans, folder, _HF_CONFIG)


def _with_plans(model: nn.Module, plans: tuple[Plan, ...], folder: Path, source: str) -> nn.Module:
    """The model with empty pairs in the places of the factored layers."""
    known = {name for name, _ in model.named_modules() if name}
    if lost := [plan.name for plan in plans if plan.name not in known]:
        raise MismatchError(
            f"{folder / CONFIG} does not fit {source}:",
            [f"{name!r} is no layer of the model" for name in lost],
        )
    try:
        apply_plan(model, plans, empty=True)
    except MismatchError as error:
        raise MismatchError(f"{folder / CONFIG} does not fit {source}: {error}") from None
    return model


def _load_weights(model: nn.Module, path: Path) -> None:
    """Into a model of transformers, which ties its weights itself."""
    tensors = _stored(path)
    findings = _unfitting(tensors, model.state_dict())
    fitting = {name: t for name, t in tensors.items() if name not in findings}
    model.load_state_dict(fitting, strict=False, assign=True)
    tie = getattr(model, "tie_weights", None)
    if tie is not None:
        tie()
    lost = [n for n, p in model.named_parameters() if p.is_meta and n not in tensors]
    _check_fit(path, findings, lost)


def _load_into(model: nn.Module, path: Path) -> None:
    """Into a module that does not tie its weights itself: they are tied again as they were."""
    tensors = _stored(path)
    state, ties = unique_tensors(model), tied(model)
    findings = _unfitting(tensors, state)
    _check_fit(path, findings, [name for name in state if name not in tensors])
    model.load_state_dict(tensors, strict=False, assign=True)
    for name, first in ties.items():
        (owner, part), (other, same) = (name.rpartition(".")[::2] for name in (name, first))
        value = getattr(model.get_submodule(other), same)
        setattr(model.get_submodule(owner), part, value)


def _stored(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FormatError(f"{path} is missing: compress the model again")
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise FormatError(
            f"{path} must be a whole safetensors file, got a broken one: copy it again, or "
            f"compress the model again ({error})"
        ) from None
    return {name: _aligned(tensor) for name, tensor in tensors.items()}


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor where torch would have put it: at a multiple of 64 bytes, not where a file has it.

    MKL without AVX-512 rounds products otherwise for other addresses: so what is loaded computes
    what was saved, to the bit.
    """
    return tensor if tensor.data_ptr() % _ALIGNED == 0 else tensor.clone()


def _unfitting(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """What is wrong, by name of a tensor."""
    findings = {}
    for name, tensor in tensors.items():
        if name not in state:
            findings[name] = f"{name} is unknown"
        elif tensor.shape != (shape := state[name].shape):
            findings[name] = f"{name} must be {list(shape)}, got {list(tensor.shape)}"
        elif tensor.dtype != (kind := state[name].dtype):
            findings[name] = f"{name} must be {kind}, got {tensor.dtype}"
    return findings


def _check_fit(path: Path, findings: Mapping[str, str], lost: Sequence[str]) -> None:
    if findings or lost:
        lines = [*findings.values(), *(f"{name} is missing" for name in lost)]
        raise MismatchError(f"{path} does not fit its config:", lines)


def save_backbone(
    backbone: Backbone,
    out: str | Path,
    *,
    force: bool = False,
    beside: Callable[[Path], None] = lambda _folder: None,
) -> Backbone:
    """Write a compressed backbone atomically; returns it with its `backbone_id` and its files.

    Args:
        beside: writes further files into the folder, before it gets its name.

    Raises:
        UsageError: `out` exists and `force` is off, or it could not be loaded again: the model is
            neither from a Hugging Face directory nor from a function.
    """
    out = Path(out)
    if not backbone.function and not any(file.name == _HF_CONFIG for file in backbone.files):
        raise UsageError(
            f"backbone must come from load_backbone to be saved, got one without {_HF_CONFIG} "
            "and without a function"
        )
    with new_folder(out, marker=CONFIG, force=force) as folder:
        _save_weights(backbone.model, folder / WEIGHTS)
        identity = backbone_id([folder / WEIGHTS], backbone.head)
        for file in backbone.files:
            shutil.copyfile(file, folder / file.name)
        write_pooling(backbone.model, folder)
        config = {
            "format": FORMAT,
            "backbone_id": identity,
            "head": list(backbone.head),
            "layers": [asdict(plan) for plan in backbone.layers],
            "report": _still_true(backbone, folder / WEIGHTS),
            **({"function": backbone.function} if backbone.function else {}),
            **({"labels": list(backbone.labels)} if backbone.function else {}),
        }
        (folder / CONFIG).write_text(dump_json(config, indent=1) + "\n", encoding="utf-8")
        beside(folder)
    backbone.backbone_id = identity
    backbone.files = tuple(out / file.name for file in backbone.files)
    return backbone


def _still_true(backbone: Backbone, weights: Path) -> dict[str, Any]:
    """The report, without scores if the weights are no more those that were loaded.

    What was just compressed has no id yet, and was scored as it is. The id leaves out the head.
    """
    before = [file.parent / WEIGHTS for file in backbone.files[:1]]
    same = all(path.is_file() and filecmp.cmp(path, weights, shallow=False) for path in before)
    same = not backbone.backbone_id or (bool(before) and same)
    scored = () if same else ("metric", "scores", "samples")
    backbone.report = {name: value for name, value in backbone.report.items() if name not in scored}
    return backbone.report


def _save_weights(model: nn.Module, path: Path) -> None:
    """As `unique_tensors` has them; a part of another tensor is saved on its own."""
    tensors = {}
    for name, tensor in unique_tensors(model).items():
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor.contiguous() if whole else tensor.clone()
    save_file(tensors, path, {"format": "pt"})


def _backbone(folder: Path, model: nn.Module, identity: str, head: Sequence[str]) -> Backbone:
    files = tuple(folder / name for name in COMPANIONS if (folder / name).is_file())
    # Heads side by side are none that an adapter could replace, but their classes have names.
    classifies = bool(head) or type(model).__name__.endswith("WithTeacher")
    labels = _names(model, _classes(model) or 0) if classifies else ()
    return Backbone(model, identity, _task(model), tuple(head), labels, files)


def _names(model: nn.Module, outputs: int) -> tuple[str, ...]:
    """Class names as the model's config has them, or else numbers."""
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    return tuple(str(names.get(i, i)) for i in range(outputs))


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "model_type")


def _classes(model: nn.Module) -> int | None:
    return getattr(getattr(model, "config", None), "num_labels", None)


def _task(model: nn.Module) -> str:
    """optimum's name of what a class of transformers does."""
    architecture = type(model).__name__
    found = next((task for end, task in _TASKS.items() if architecture.endswith(end)), None)
    if found == "text-classification" and getattr(model, "main_input_name", "") in _SOUNDS:
        return "audio-classification"
    return found or "feature-extraction"


def _model_class(folder: Path) -> Any:
    """The transformers class that config.json names; no code of the directory is run."""
    transformers = import_transformers()
    path = folder / _HF_CONFIG
    config = parse_json(read_bytes(path, limit=_MAX_JSON, what="a config"), str(path))
    names = config.strings("architectures")
    found = getattr(transformers, names[0], None) if names else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UsageError(
            f"{path}: architectures must name a model class of transformers, got {list(names)}"
        )
    return found


def _first_line(error: Exception) -> str:
    """With the second where the first one ends in a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])
