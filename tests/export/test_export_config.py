"""What an export is asked for: the rules of its settings, in Python's words and in options'."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import Any

import pytest

from regrow_export import ExportConfig, ExportRequest, check_settings, setting
from regrow_export.modes import MODES
from regrow_export.quantization import PRECISIONS
from regrow_format.errors import SettingError, UsageError
from regrow_format.manifest import MODES as MANIFEST_MODES


def _choices(name: str) -> tuple[str, ...]:
    (found,) = (item for item in fields(ExportConfig) if item.name == name)
    return found.metadata["choices"]


def test_choices_are_what_there_is():
    assert _choices("mode") == tuple(MODES) == MANIFEST_MODES
    assert _choices("precision") == PRECISIONS


def test_a_config_cannot_change_after_it_was_checked():
    names = ["query"]
    config = ExportConfig(targets=names)
    names.append("value")
    assert config.targets == ("query",)
    with pytest.raises(FrozenInstanceError):
        config.mode = "merged"  # type: ignore[misc]
    assert hash(config) == hash(ExportConfig(targets=("query",)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "fast"}, "mode must be one of swappable, merged, seeded, got 'fast'"),
        ({"mode": 1}, "mode must be one of swappable, merged, seeded, got 1"),
        ({"precision": "bf16"}, "precision must be one of fp32, fp16, int8, int4, got 'bf16'"),
        ({"targets": "query"}, "targets must be a list of names, got the string 'query'"),
        ({"targets": ["a", 1]}, "targets must be a list of names, got 1 in it"),
        ({"fixed_rank": True}, "fixed_rank must be a whole number, got True"),
        ({"fixed_rank": 2.5}, "fixed_rank must be a whole number, got 2.5"),
        ({"fixed_rank": 0}, "fixed_rank must be from 1 to 4096, got 0"),
        ({"fixed_rank": 4097}, "fixed_rank must be from 1 to 4096, got 4097"),
        ({"constants": 1}, "constants must be True or False, got 1"),
        ({"cache": "no"}, "cache must be True or False, got 'no'"),
        ({"constants": True}, "constants must be for mode seeded, got swappable"),
        ({"mode": "merged", "fixed_rank": 4}, "fixed_rank must be for mode swappable, got merged"),
        ({"mode": "seeded", "slots": ["bias"]}, "slots must be for mode swappable, got seeded"),
        ({"mode": "merged", "methods": ["nola"]}, "methods must be for mode swappable, got merged"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str):
    with pytest.raises(SettingError) as caught:
        ExportConfig(**settings)
    assert str(caught.value) == message
    with pytest.raises(SettingError):  # nor can a good one become such
        replace(ExportConfig(), **settings)


def test_an_error_says_the_names_that_it_is_given():
    with pytest.raises(UsageError) as caught:
        ExportConfig(mode="merged", methods=["lora"])
    error = caught.value
    assert isinstance(error, SettingError)
    assert error.named({"methods": "--for"}) == "--for must be for mode swappable, got merged"
    assert SettingError("{mode} must not be {0!r}", "{odd}").named({}) == "mode must not be '{odd}'"


def test_objects_go_with_the_mode(adapter_for, vit):
    adapter = adapter_for(vit, ["vit.encoder.layer.0.output.dense"], method="fourierft")
    with pytest.raises(SettingError, match="adapter must be given for mode seeded, got none"):
        ExportRequest(ExportConfig(mode="seeded"))
    with pytest.raises(SettingError, match="expanders must be for mode swappable, got merged"):
        ExportRequest(ExportConfig(mode="merged"), adapter, expanders=[adapter])
    with pytest.raises(SettingError, match="left out for mode merged without an adapter"):
        ExportRequest(ExportConfig(mode="merged", targets=["stem"]))


def test_methods_and_objects_decide_kinds_and_targets(adapter_for, vit):
    name = "vit.encoder.layer.0.output.dense"
    adapter = adapter_for(vit, [name], method="fourierft")
    assert ExportRequest().kinds == ("low_rank",)
    assert ExportRequest(adapter=adapter).kinds == ("delta",)
    assert ExportRequest(adapter=adapter).targets == (name,)
    both = ExportRequest(ExportConfig(methods=["bitfit"]), expanders=[adapter])
    assert (both.methods, both.kinds) == (("bitfit", "fourierft"), ("bias", "delta"))
    assert ExportRequest(ExportConfig(slots=["weight"]), adapter).kinds == ("weight",)
    assert ExportRequest(ExportConfig(methods=["head"])).kinds == ()


@dataclass(frozen=True)
class _Numbers:
    """Of every kind that a config may have."""

    share: float = setting(0.5, "", high=1.0)
    count: int = setting(2, "", low=1)
    maybe: int | None = setting(None, "", low=3, high=5)
    pairs: dict[str, Any] = setting(dict, "")  # noqa: RUF009

    def __post_init__(self) -> None:
        check_settings(self)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 1.5}, "share must be from 0 to 1, got 1.5"),
        ({"share": float("nan")}, "share must be a finite number, got nan"),
        ({"share": "1"}, "share must be a finite number, got '1'"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"count": 1.0}, "count must be a whole number, got 1.0"),
        ({"maybe": 6}, "maybe must be from 3 to 5, got 6"),
        ({"pairs": "k=1"}, "pairs must be a mapping of names to values, got 'k=1'"),
    ],
)
def test_numbers_have_ends(settings: dict[str, Any], message: str):
    assert _Numbers(share=1, maybe=3, pairs={"k": 1}).maybe == 3
    with pytest.raises(SettingError) as caught:
        _Numbers(**settings)
    assert str(caught.value) == message
