"""The camera: where a point of the world lands on the canvas, and what lens and sensor make of the drawing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from .basics import Point, Rng

NEAR = 0.7  # scale at which the ground has left the frame below


@dataclass(frozen=True)
class Camera:
    horizon: float  # y of the horizon
    height: float  # metres above the ground
    vanishing_x: float  # x where lines along the street meet

    @classmethod
    def random(cls, rng: Rng) -> Camera:
        return cls(rng.uniform(0.36, 0.5), rng.uniform(1.6, 2.4), rng.uniform(0.7, 1.3))

    def at(self, x: float, up: float, s: float) -> Point:
        """Canvas point of the world point `x` metres right and `up` metres above the ground, at scale `s`."""
        return self.vanishing_x + x * s, self.horizon + (self.height - up) * s

    def strip(self, xa: float, xb: float, far: float, near: float) -> list[Point]:
        """A rectangle on the ground: X from `xa` to `xb`, scale from `far` to `near`."""
        return [self.at(xa, 0, far), self.at(xb, 0, far), self.at(xb, 0, near), self.at(xa, 0, near)]


def expose(rng: Rng, drawing: Image.Image, labels: np.ndarray, *, texture: np.ndarray) -> np.ndarray:
    """The photograph, uint8 (H, W, 3): texture, uneven light, white balance, defocus, vignetting and sensor noise.

    Args:
        drawing: RGB, H x W pixels.
        labels: uint8 (H, W), indices into `texture`.
        texture: how strongly the surface of each class varies in brightness, float32 (classes,).
    """
    height, width = labels.shape
    pattern = noise(rng, (12, 24), height, width)
    pattern += noise(rng, (48, 96), height, width)
    pattern += noise(rng, (110, 220), height, width)
    light = 1 + pattern * texture[labels]

    exposure = rng.uniform(0.78, 1.22)
    slope_x, slope_y = rng.uniform(-0.22, 0.22, 2)
    vignette = rng.uniform(0, 0.3)
    x = np.linspace(-1, 1, width, dtype=np.float32) if width > 1 else np.zeros(1, np.float32)
    y = (np.linspace(-1, 1, height, dtype=np.float32) if height > 1 else np.zeros(1, np.float32))[:, None]
    light *= (np.float32(slope_x) * x - np.float32(vignette / 2) * x * x) + (
        np.float32(exposure) + np.float32(slope_y) * y - np.float32(vignette / 2) * y * y
    )

    defocus = rng.uniform(-0.001, 0.0035) * height
    if defocus > 0:
        drawing = drawing.filter(ImageFilter.GaussianBlur(defocus))
    balance = rng.uniform(0.85, 1.15, 3).astype(np.float32)
    haze = np.float32(rng.uniform(0, 28))
    grain = np.float32(rng.uniform(0, 10) / 128)
    photo = np.array(drawing, dtype=np.float32)
    photo *= light[..., None]
    photo *= balance
    photo += haze
    # The sum of two bytes: a bell-shaped noise made of integers only.
    speckle = np.frombuffer(rng.bytes(2 * photo.size), dtype=np.uint8).reshape(2, height, width, 3)
    photo += (speckle[0].astype(np.float32) + speckle[1] - 255) * grain
    return np.clip(photo, 0, 255).astype(np.uint8)


def noise(rng: Rng, grid: tuple[int, int], height: int, width: int) -> np.ndarray:
    """Smooth noise, float32 (height, width) in -0.5..0.5, from a grid of random values."""
    values = Image.fromarray(rng.integers(0, 256, grid, dtype=np.uint8))
    smooth = values.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(smooth, dtype=np.float32) * np.float32(1 / 255) - np.float32(0.5)
