"""regrow's device side: numpy and onnxruntime, no torch.

Open a bundle, swap personal adapters without reloading the model, run it:

    bundle = Bundle.open("digits-bundle")
    cost = bundle.swap("user-17.safetensors")
    logits = bundle.run({"pixel_values": x})["logits"]
"""

import typing

from regrow_format.adapter import (
    Adapter,
    Coefficients,
    Head,
    HeadLayer,
    Probe,
    Target,
    Validated,
)
from regrow_format.basis import BasisCache, BasisSpec, Role, locations, sign_bits, signs
from regrow_format.errors import FormatError, MismatchError, RegrowError, UsageError
from regrow_format.manifest import Manifest, Slot

from .bundle import Bundle, SwapStats
from .checks import Check
from .sessions import PROFILES, Profile

if typing.TYPE_CHECKING:
    from .generate import Generated, Generation

__all__ = [
    "PROFILES",
    "Adapter",
    "BasisCache",
    "BasisSpec",
    "Bundle",
    "Check",
    "Coefficients",
    "FormatError",
    "Generated",
    "Generation",
    "Head",
    "HeadLayer",
    "Manifest",
    "MismatchError",
    "Probe",
    "Profile",
    "RegrowError",
    "Role",
    "Slot",
    "SwapStats",
    "Target",
    "UsageError",
    "Validated",
    "locations",
    "sign_bits",
    "signs",
]


def __getattr__(name: str) -> typing.Any:
    """Loads text generation on use: most bundles are no language models."""
    if name in ("Generated", "Generation"):
        from . import generate

        return getattr(generate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
