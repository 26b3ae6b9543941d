"""What every part of a scene is made with: its types, its random choices and its way to round."""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Rng = np.random.Generator
Colour = tuple[int, ...]  # RGB or RGBA, 0..255
Point = tuple[float, float]  # canvas coordinates

T = TypeVar("T")


def chance(rng: Rng, probability: float) -> bool:
    return rng.random() < probability


def pick(rng: Rng, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def checked(seed: int, size: tuple[int, int]) -> tuple[int, int]:
    """The size as two ints. Raises ValueError if the seed is no integer >= 0 or the size not two integers >= 1."""

    def is_int(value: object) -> bool:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)

    if not is_int(seed) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}.")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(is_int(n) and n >= 1 for n in size):
        raise ValueError(f"size must be (height, width), two integers >= 1, got {size!r}.")
    return int(size[0]), int(size[1])
