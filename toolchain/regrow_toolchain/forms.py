"""What data may be, in words: for errors and help alike. Imports nothing."""

from __future__ import annotations

__all__ = ["DATA"]

DATA = (
    "a folder with one folder of pictures or .wav files per class, an .npz, a .csv, .tsv or "
    ".jsonl with a text column, a .txt for a language model, or a folder of the datasets library"
)
