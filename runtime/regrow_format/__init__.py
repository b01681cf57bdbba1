"""What regrow's files mean: the seeded basis, the adapter file, the bundle's manifest.

numpy and safetensors, and ONNX Runtime's integer product where it is installed. Whoever reads,
checks, converts or makes such files needs nothing else; `regrow_runtime` opens and runs bundles.
"""

from .adapter import Adapter, Coefficients, Head, HeadLayer, Probe, Target, Validated
from .basis import BasisCache, BasisSpec, Role, locations, sign_bits, signs
from .errors import FormatError, MismatchError, RegrowError, UsageError
from .manifest import Manifest, Slot

__all__ = [
    "Adapter",
    "BasisCache",
    "BasisSpec",
    "Coefficients",
    "FormatError",
    "Head",
    "HeadLayer",
    "Manifest",
    "MismatchError",
    "Probe",
    "RegrowError",
    "Role",
    "Slot",
    "Target",
    "UsageError",
    "Validated",
    "locations",
    "sign_bits",
    "signs",
]
