"""The demo's four users. They are made: the same digits under conditions of capture of their own.

Nobody is behind them. Three differ in how their digits look, one in what their digits mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["USERS", "User", "capture"]

Condition = Callable[[NDArray[np.float64], np.random.Generator], NDArray[np.float64]]

_SHEAR = 0.45
_THICKEN = 0.8
_NOISE = 20.0


def _plain(image: NDArray[np.float64], _noise: np.random.Generator) -> NDArray[np.float64]:
    return image


def _slanted(image: NDArray[np.float64], _noise: np.random.Generator) -> NDArray[np.float64]:
    """Sheared sideways around the middle row, bilinear, empty outside."""
    from scipy import ndimage

    middle = (image.shape[0] - 1) / 2
    matrix, offset = [[1.0, 0.0], [_SHEAR, 1.0]], [0.0, -_SHEAR * middle]
    sheared: NDArray[np.float64] = ndimage.affine_transform(image, matrix, offset, order=1)
    return sheared


def _thick(image: NDArray[np.float64], _noise: np.random.Generator) -> NDArray[np.float64]:
    """Mostly what a broader pen leaves: every pixel as dark as its darkest neighbour."""
    from scipy import ndimage

    cross = ndimage.generate_binary_structure(2, 1)
    broad = ndimage.grey_dilation(image, footprint=cross, mode="constant", cval=0)
    mixed: NDArray[np.float64] = (1 - _THICKEN) * image + _THICKEN * broad
    return mixed


def _inverted(image: NDArray[np.float64], noise: np.random.Generator) -> NDArray[np.float64]:
    """A scan with light and dark exchanged, and noise."""
    return 255 - image + noise.normal(0, _NOISE, image.shape)


@dataclass(frozen=True)
class User:
    """A made user.

    Attributes:
        id: short name, also that of the adapter's file.
        title, condition: for people.
        image: what capture does to an image of 0 to 255.
        labels: names of the user's own classes; empty if the digits are meant.
        meaning: for each digit, the user's class.
    """

    id: str
    title: str
    condition: str
    image: Condition
    labels: tuple[str, ...] = ()
    meaning: tuple[int, ...] = tuple(range(10))


USERS = (
    User(
        "slanted",
        "Slanted strokes",
        f"every digit is sheared sideways by {_SHEAR} pixels a row",
        _slanted,
    ),
    User(
        "thick",
        "Thick strokes",
        f"every digit is drawn with a broader pen (a {_THICKEN:.0%} mix with its dilation)",
        _thick,
    ),
    User(
        "inverted",
        "Inverted noisy scans",
        f"light and dark are exchanged, with noise of {_NOISE:.0f} grey levels of 255",
        _inverted,
    ),
    User(
        "relabelled",
        "Other labels for the same digits",
        "unchanged digits that stand for five commands, which needs a head of its own",
        _plain,
        labels=("lights", "heating", "music", "door", "phone"),
        meaning=(2, 0, 4, 1, 3, 1, 3, 0, 2, 4),
    ),
)


def capture(
    user: User, images: NDArray[np.uint8], labels: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images uint8 [n, 8, 8] as this user's scanner sees them, and what they mean to the user."""
    noise = np.random.Generator(np.random.PCG64(seed))
    seen = [user.image(image.astype(np.float64), noise) for image in images]
    pixels = np.clip(np.rint(np.stack(seen)), 0, 255).astype(np.uint8)
    return pixels, np.array(user.meaning, dtype=np.int64)[labels]
