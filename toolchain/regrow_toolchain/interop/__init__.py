"""To and from other formats: PEFT's adapters in; ONNX bundles and dense tensors out."""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .onnx_export import export_backbone as export_backbone
    from .peft import factored as factored
    from .peft import import_peft as import_peft
    from .tensor_files import FORMATS as FORMATS
    from .tensor_files import convert as convert
    from .tensor_files import dense_tensors as dense_tensors
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".onnx_export": ("export_backbone",),
            ".peft": ("factored", "import_peft"),
            ".tensor_files": ("FORMATS", "convert", "dense_tensors"),
        },
    )
