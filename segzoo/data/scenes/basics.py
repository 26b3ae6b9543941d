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
