"""What data may be and what labels are called, in words, for errors and help. Imports nothing."""

from __future__ import annotations

__all__ = ["DATA", "LABEL_NAMES", "LABEL_WORDS"]

LABEL_NAMES = ("label", "labels", "category", "intent", "y")  # of columns and arrays, by default
LABEL_WORDS = ", ".join(f"`{name}`" for name in LABEL_NAMES[:-1]) + f" or `{LABEL_NAMES[-1]}`"

DATA = (
    "a folder with one folder of images or .wav files per class, an .npz, a .csv, .tsv or "
    ".jsonl with a text column, a .txt for a language model, or a folder of the datasets library"
)
