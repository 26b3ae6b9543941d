"""Palettes that overlap from class to class, so that colour alone does not tell what a thing is."""

import colorsys
from collections.abc import Callable

from .basics import Colour, Rng, pick, round_half_up


def paint(rng: Rng) -> Colour:
    """A colour for anything made by people: greys, muted tones and bright paint."""
    kind = rng.random()
    if kind < 0.35:
        return hsv(rng, saturation=(0, 0.12), value=(0.12, 0.95))
    if kind < 0.7:
        return hsv(rng, saturation=(0.15, 0.5), value=(0.25, 0.9))
    return hsv(rng, saturation=(0.5, 0.95), value=(0.3, 0.95))


def masonry(rng: Rng) -> Colour:
    kind = rng.random()
    if kind < 0.4:
        return hsv(rng, hue=(-0.02, 0.13), saturation=(0.1, 0.6), value=(0.3, 0.9))  # brick to cream
    if kind < 0.7:
        return hsv(rng, hue=(0.5, 0.7), saturation=(0.02, 0.4), value=(0.3, 0.95))  # concrete to glass
    return paint(rng)


def asphalt(rng: Rng) -> Colour:
    return hsv(rng, hue=pick(rng, [(0.55, 0.7), (0.02, 0.14)]), saturation=(0, 0.22), value=(0.28, 0.68))


def leaves(rng: Rng) -> Colour:
    kind = rng.random()
    if kind < 0.75:
        return hsv(rng, hue=(0.18, 0.4), saturation=(0.25, 0.75), value=(0.25, 0.7))
    if kind < 0.9:
        return hsv(rng, hue=(0.02, 0.16), saturation=(0.4, 0.85), value=(0.35, 0.85))  # autumn
    return hsv(rng, hue=(-0.1, 0.03), saturation=(0.2, 0.45), value=(0.6, 0.95))  # blossom


def hsv(
    rng: Rng,
    hue: tuple[float, float] = (0, 1),
    saturation: tuple[float, float] = (0, 1),
    value: tuple[float, float] = (0, 1),
) -> Colour:
    rgb = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value))
    return tuple(round_half_up(255 * channel) for channel in rgb)


def shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, round_half_up(channel * factor)) for channel in colour[:3])


def edge(colour: Colour) -> Colour:
    """An outline that stands out from `colour`: darker, or lighter where it is dark already."""
    return shade(colour, 0.4) if _luma(colour) > 70 else tuple(min(255, channel + 90) for channel in colour[:3])


def unlike(rng: Rng, palette: Callable[[Rng], Colour], other: Colour) -> Colour:
    """A colour from `palette` that is not too close to `other`."""
    colour = palette(rng)
    for _ in range(8):
        if sum(abs(a - b) for a, b in zip(colour, other, strict=True)) > 60:
            break
        colour = palette(rng)
    return colour


def _luma(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
