"""What an export is asked for: its settings, the objects that go with them, and all the rules.

The rules of the modes stand here and nowhere else. They hold from the moment a config or a request
is made, so what exports need not check again. Importing this loads neither numpy nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .settings import check_settings, setting

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from regrow_export.validation import Measure
    from regrow_format.adapter import Adapter

__all__ = ["ExportConfig", "ExportRequest", "check_objects", "targets_setting"]

# By setting, or object that goes with them: the only mode that it is for.
_MODE_OF = {
    "methods": "swappable",
    "slots": "swappable",
    "fixed_rank": "swappable",
    "expanders": "swappable",
    "constants": "seeded",
}


def targets_setting() -> Any:
    """Which layers adapters change; the same for their training."""
    return setting(
        (),
        "Layer to adapt: an ending such as `query`, a shell pattern such as `*.layer.0.*`, or a "
        "set: `@qv` (query and value, or the layer that fuses them), `@attention`, `@mlp`, `@all` "
        "(every linear layer of the blocks, 1 x 1 convolutions too, the default), `all-linear` "
        "(those outside of the blocks too, but not convolutions and the head); repeatable.",
        option="--target",
        metavar="NAME",
    )


@dataclass(frozen=True)
class ExportConfig:
    """Settings of an export: what the bundle is, and how adapters enter it.

    Raises:
        SettingError: a setting makes no sense, alone or with the others.
    """

    mode: str = setting(
        "swappable",
        "swappable: adapters come and go. merged: a plain model without slots, one adapter (or "
        "none) folded into its weights; an adapter makes factored layers larger by its rank. "
        "seeded: one graph that rebuilds an adapter's basis from its seed at every run.",
        choices=("swappable", "merged", "seeded"),
    )
    precision: str = setting(
        "fp32",
        "Of the weights of the blocks' linear layers; adapters and the head stay fp32. int8 also "
        "rounds those layers' inputs as it runs.",
        choices=("fp32", "fp16", "int8", "int4"),
    )
    methods: Sequence[str] = setting(
        (),
        "Method whose adapters a swappable bundle takes, such as fourierft or bitfit, beside that "
        "of --adapter; repeatable. By default nola, lora and vera, whose slots are the same.",
        option="--for",
        metavar="METHOD",
    )
    slots: Sequence[str] = setting(
        (),
        "Kind of slot, such as low_rank or delta, instead of what --for asks for; repeatable. "
        "weight: a layer's whole weight, one adapter a batch. vector: two vectors a layer, for "
        "VeRA adapters of the seed and rank of --adapter.",
        metavar="KIND",
    )
    fixed_rank: int | None = setting(
        None,
        "Give all slots fixed shapes, for accelerators that need them: adapters of rank R or "
        "less, one adapter a batch, classes no more than the backbone's. No more than the "
        "narrowest layer's width, but for VeRA.",
        low=None,  # both ends are those of the format
        metavar="R",
    )
    constants: bool = setting(
        False, "With --mode seeded: the adapter is part of the file, which takes no other."
    )
    cache: bool = setting(
        True,
        "Leave out the key-value cache of a causal language model; without it, it makes no text.",
        option="--no-cache",
    )
    targets: Sequence[str] = targets_setting()

    def __post_init__(self) -> None:
        check_settings(self)
        for name in ("methods", "slots", "fixed_rank", "constants"):
            value = getattr(self, name)
            _check_mode(self, name, given=value is not None and value not in ((), False))
        if self.methods:
            _check_methods(self.methods)
        if self.fixed_rank is not None:
            _check_fixed_rank(self.fixed_rank)
        _check_slots(self.slots, self.precision)


@dataclass(frozen=True, eq=False)
class ExportRequest:
    """The settings of an export and the objects that go with them.

    Attributes:
        adapter: what merged and seeded bundles build in; merged without one is the backbone as it
            is. The layers of a swappable bundle's slots, if no targets are named; of vector slots
            the seed and the rank.
        expanders: adapters for whose like a swappable bundle gets an `expand-<method>.onnx`.
        inputs: by argument name of `forward`, batch first: what the bundle is traced and checked
            with. Needed for models that optimum does not know, made up for others.
        measure: how good a model is on samples, to say what the precision costs.

    Raises:
        SettingError: an adapter is missing or too many, or does not go with the settings.
    """

    config: ExportConfig = field(default_factory=ExportConfig)
    adapter: Adapter | None = None
    expanders: Sequence[Adapter] = ()
    inputs: Mapping[str, NDArray[Any]] | None = None
    measure: Measure | None = None

    def __post_init__(self) -> None:
        check_objects(self.config, self.adapter, self.expanders)
        _check_example(self.config.slots, self.adapter)
        if self.config.mode == "swappable":
            self._check_swappable()
        elif self.config.targets:
            self._check_built_in()

    @property
    def methods(self) -> tuple[str, ...]:
        """Whose adapters a swappable bundle takes: those asked for, and those of what is given."""
        given = [one.method for one in (self.adapter, *self.expanders) if one is not None]
        return tuple(dict.fromkeys([*self.config.methods, *given])) or ("nola",)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of a swappable bundle's slots: those named, or what the methods need; may be none."""
        from regrow_format.methods import get_method

        needed = (kind for method in self.methods for kind in get_method(method).kinds)
        return tuple(self.config.slots) or tuple(dict.fromkeys(needed))

    @property
    def targets(self) -> tuple[str, ...]:
        """The layers named, or else the adapter's."""
        own = self.adapter.targets if self.adapter else ()
        return tuple(self.config.targets) or tuple(target.name for target in own)

    def _check_swappable(self) -> None:
        if self.adapter is not None and self.adapter.extra:
            raise _refusal(
                "{adapter} must have no saved modules ({0}) to be swapped, since there is no slot "
                "for them: export it with {mode} merged",
                min(self.adapter.extra),
            )
        if self.config.targets and not self.kinds:
            raise _refusal(
                "{targets} must be left out for {methods} {0}, which changes no layers, got {1}",
                self.methods[0],
                ", ".join(self.config.targets),
            )

    def _check_built_in(self) -> None:
        """Targets of a bundle without slots: they say no more than the adapter does."""
        if self.adapter is None:
            raise _refusal(
                "{targets} must be left out for {mode} {0} without an {adapter}", self.config.mode
            )
        if sorted(self.config.targets) != sorted(target.name for target in self.adapter.targets):
            raise _refusal(
                "{targets} must be the adapter's for {mode} {0}: leave them out", self.config.mode
            )


def check_objects(config: ExportConfig, adapter: object, expanders: Sized) -> None:
    """Whether the mode takes what is given with it; files that are still to be read will do.

    Raises:
        SettingError: an adapter is missing, or there are expanders for a mode without slots.
    """
    _check_mode(config, "expanders", given=len(expanders) > 0)
    if config.mode == "seeded" and adapter is None:
        raise _refusal("{adapter} must be given for {mode} seeded, got none: it is built in")


def _check_mode(config: ExportConfig, name: str, *, given: bool) -> None:
    if given and config.mode != (wanted := _MODE_OF[name]):
        raise _refusal(f"{{{name}}} must be for {{mode}} {wanted}, got {{0}}", config.mode)


def _check_methods(methods: Sequence[str]) -> None:
    from regrow_format.methods import METHODS

    if unknown := [method for method in methods if method not in METHODS]:
        raise _refusal("{methods} must be among {0}, got {1!r}", ", ".join(METHODS), unknown[0])


def _check_fixed_rank(rank: int) -> None:
    from regrow_format.methods.base import MAX_RANK

    if not 1 <= rank <= MAX_RANK:
        raise _refusal("{fixed_rank} must be from 1 to {0}, got {1}", MAX_RANK, rank)


def _check_slots(slots: Sequence[str], precision: str) -> None:
    from regrow_format.slot_kinds import SLOT_KINDS

    known = [name for name, kind in SLOT_KINDS.items() if not kind.is_head]
    for index, name in enumerate(slots):
        if name not in known:
            raise _refusal("{slots} must be among {0}, got {1!r}", ", ".join(known), name)
        if name in slots[:index]:
            raise _refusal("{slots} must be named once, got {0!r} twice", name)
        if SLOT_KINDS[name].only_fp32 and precision != "fp32":
            raise _refusal(
                "{precision} must be fp32 for {0} {slots}, which are float32, got {1}: use {slots} "
                "of another kind",
                name,
                precision,
            )


def _check_example(slots: Sequence[str], adapter: Adapter | None) -> None:
    from regrow_format.slot_kinds import SLOT_KINDS

    for name in slots:
        if reason := SLOT_KINDS[name].unlike(adapter):
            raise _refusal("{adapter} must {0}", reason)


def _refusal(text: str, *values: object) -> Exception:
    from regrow_format.errors import SettingError  # not above: it loads numpy

    return SettingError(text, *values)
