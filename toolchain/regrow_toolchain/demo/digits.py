"""The demo's data: scikit-learn's handwritten digits (`load_digits`, 1,797 images of 8 x 8).

They come with the installed package, so nothing is downloaded. The images are split once, by
class, into those that train the backbone, 60 for each user, and 480 that nothing is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["NAME", "TEST", "Digits", "load_digits"]

NAME = "scikit-learn load_digits"
TEST = 480
PER_USER = 60


@dataclass(frozen=True, eq=False)
class Digits:
    """Images uint8 [n, 8, 8] with labels int64 [n], in parts that share nothing.

    `users` has one (images, labels) per user, `test` is shared by all.
    """

    train: tuple[NDArray[np.uint8], NDArray[np.int64]]
    users: tuple[tuple[NDArray[np.uint8], NDArray[np.int64]], ...]
    test: tuple[NDArray[np.uint8], NDArray[np.int64]]


def load_digits(users: int, seed: int = 0) -> Digits:
    """Split the digits into training, `users` times 60, and 480 for testing."""
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    data = load()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    labels = data.target.astype(np.int64)

    def part(rows: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        return images[rows], labels[rows]

    rest, test = train_test_split(
        np.arange(len(labels)), test_size=TEST, stratify=labels, random_state=seed % 2**32
    )
    own = []
    for user in range(users):
        rest, rows = train_test_split(
            rest, test_size=PER_USER, stratify=labels[rest], random_state=(seed + 1 + user) % 2**32
        )
        own.append(part(rows))
    return Digits(part(rest), tuple(own), part(test))
