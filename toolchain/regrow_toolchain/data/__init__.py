"""Datasets from disk, their labels, and the files a bundle needs beside the weights (assets).

`load_data` tells what may be read; a further kind of file is one module and a line in `loading.py`.
"""

from typing import TYPE_CHECKING

from regrow_export.lazy import load_on_use

if TYPE_CHECKING:
    from .assets import attach_assets as attach_assets
    from .assets import dummy_inputs as dummy_inputs
    from .assets import for_device as for_device
    from .dataset import Dataset as Dataset
    from .dataset import by_user as by_user
    from .dataset import check_samples as check_samples
    from .dataset import equal_samples as equal_samples
    from .dataset import fold_numbers as fold_numbers
    from .dataset import joined as joined
    from .dataset import split as split
    from .formats import DATA as DATA
    from .formats import LABEL_WORDS as LABEL_WORDS
    from .label_matching import fit_both as fit_both
    from .label_matching import fit_labels as fit_labels
    from .loading import load_data as load_data
    from .loading import load_inputs as load_inputs
    from .saved import is_saved as is_saved
    from .text import Encoder as Encoder
else:
    __all__, __getattr__, __dir__ = load_on_use(
        __name__,
        {
            ".assets": ("attach_assets", "dummy_inputs", "for_device"),
            ".dataset": (
                "Dataset",
                "by_user",
                "check_samples",
                "equal_samples",
                "fold_numbers",
                "joined",
                "split",
            ),
            ".formats": ("DATA", "LABEL_WORDS"),
            ".label_matching": ("fit_both", "fit_labels"),
            ".loading": ("load_data", "load_inputs"),
            ".saved": ("is_saved",),
            ".text": ("Encoder",),
        },
    )
