"""Sunlight on the ground: the shadows of houses and objects."""

from __future__ import annotations

from dataclasses import dataclass

from .basics import Rng, chance
from .camera import NEAR, Camera
from .canvas import Canvas
from .layout import Item, Street


@dataclass(frozen=True)
class Sun:
    opacity: int  # of cast shadows, 0..255
    lean: float  # shadows fall this many object widths to the right

    @classmethod
    def random(cls, rng: Rng) -> Sun:
        return cls(int(rng.integers(60, 150)), rng.uniform(-0.5, 0.5))


def draw_wall_shadow(canvas: Canvas, rng: Rng, camera: Camera, street: Street, sun: Sun) -> None:
    side = int(sun.lean < 0)  # the houses on the left throw shadows to the right
    if street.sides[side] == "houses" and chance(rng, 0.6):
        back, reach = street.back[side], rng.uniform(2, 7)
        to = back + reach if side == 0 else back - reach
        canvas.poly(camera.strip(back, to, street.end, NEAR), (0, 0, 0, sun.opacity))


def draw_shadow(canvas: Canvas, item: Item, sun: Sun) -> None:
    wide = item.w * item.s / 2 * (0.5 if item.kind in ("light", "sign", "pole", "tree") else 1.0)
    foot = (item.x + sun.lean * wide, item.y)
    canvas.disc(foot, 1.15 * wide, 0.012 + 0.18 * wide, (0, 0, 0, sun.opacity))
