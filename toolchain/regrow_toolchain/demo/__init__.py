"""`regrow demo`: the whole way on real handwriting, then a report.

`device` runs in a process of its own, without torch.
"""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .artifacts import DemoSettings as DemoSettings
    from .dense_model import DenseRecipe as DenseRecipe
    from .dense_model import new_model as new_model
    from .dense_model import save_dense as save_dense
    from .dense_model import train_dense as train_dense
    from .digits import load_digits as load_digits
    from .pipeline import run_demo as run_demo
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".artifacts": ("DemoSettings",),
            ".dense_model": ("DenseRecipe", "new_model", "save_dense", "train_dense"),
            ".digits": ("load_digits",),
            ".pipeline": ("run_demo",),
        },
    )
