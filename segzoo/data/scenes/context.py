"""Landscapes whose classes come in pairs that look alike nearby; only something far away tells which of two it is.

A river comes from the horizon and parts the land. Before it lie pastures with fields, and a road with a column of cars.
Which class these have says a *cue*, at least 64 pixels from them at 256x512:

| what | is | if | else |
|---|---|---|---|
| fields | wheat or barley | a mill stands at the horizon | a church does |
| pasture, by its side of the river | hill or lowland pasture | mountains end that side | a plain does |
| cars behind the first one | red or blue convoy | the first car's flag is red | it is blue |

Each cue is one random bit, and the two pictures that differ in it alone are equal in every pixel that is not at the
cue: colours, shapes, places and texture of a pair are drawn by the same calls with the same numbers. So a model that
sees less than that distance gives both pictures the same answer, which is right in one of them. Over both, a pair of
n pixels each of which a share p is called by the first name gets IoU p / (1 + p) and (1 - p) / (2 - p) at best: 1/3 on
average at p = 1/2, and never more.

A crop may cut off a cue, so that models are trained on whole pictures; mirrored ones are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import colours
from .background import draw_sky
from .basics import Point, Rng, checked, pick
from .camera import Camera, expose
from .canvas import ASPECT, Canvas
from .layout import Item
from .objects import draw_car, draw_foliage

CLASSES = (
    "sky",
    "mountain",
    "plain",
    "forest",
    "water",
    "road",
    "mill",
    "church",
    "first car",
    "red flag",
    "blue flag",
    "wheat",
    "barley",
    "hill pasture",
    "lowland pasture",
    "red convoy",
    "blue convoy",
)
SMALL_CLASSES = ("mill", "church", "first car", "red flag", "blue flag")
PAIRS = (("wheat", "barley"), ("hill pasture", "lowland pasture"), ("red convoy", "blue convoy"))
PAIRED_CLASSES = tuple(name for pair in PAIRS for name in pair)
CUES = (("mill", "church"), ("mountain", "plain"), ("red flag", "blue flag"))  # of each pair

SKY, MOUNTAIN, PLAIN, FOREST, WATER, ROAD, MILL, CHURCH, FIRST_CAR, RED_FLAG, BLUE_FLAG = range(11)
WHEAT, BARLEY, HILL_PASTURE, LOWLAND_PASTURE, RED_CONVOY, BLUE_CONVOY = range(11, 17)

_LAND = 0.6  # y where pastures begin; everything of the horizon ends at 0.32
_FIELDS = (0.63, 0.7)  # y where a field begins


def render(
    *, seed: int, size: tuple[int, int] = (256, 512), cues: tuple[bool, bool, bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the landscape of a seed.

    Args:
        seed: Which landscape, >= 0.
        size: (H, W) in pixels, each >= 1. They are composed for W = 2 H; other shapes stretch them.
        cues: Whether a church stands at the horizon, whether the mountains are on the right, and whether the flag is
            blue; None draws all three at random. Nothing else depends on them.

    Returns:
        The image, uint8 (H, W, 3), RGB in 0..255, and its labels, uint8 (H, W), indices into `CLASSES`.

    Raises:
        ValueError: If the seed is not an integer >= 0, the size is not two integers >= 1, or the cues are not three
            booleans.
    """
    height, width = checked(seed, size)
    if cues is not None and (len(cues) != 3 or not all(isinstance(cue, (bool, np.bool_)) for cue in cues)):
        raise ValueError(f"cues must be three booleans, got {cues!r}.")
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rng.integers(2, size=3).astype(bool)
    church, mountains_right, blue = drawn if cues is None else cues
    land = Land.random(rng)

    canvas = Canvas(draw_sky(rng, Camera(land.horizon, 2.0, 1.0), height, width), SKY)
    for right in (False, True):
        _draw_range(canvas, rng, land, right=right, mountains=right == mountains_right)
    _draw_landmark(canvas, rng, land, church=church)
    _draw_forest(canvas, rng, land)
    _draw_pasture(canvas, rng, land, mountains_right=mountains_right)
    for _ in range(int(rng.integers(2, 5))):
        _draw_field(canvas, rng, BARLEY if church else WHEAT)
    _draw_river(canvas, rng, land)
    _draw_road(canvas, rng)
    _draw_column(canvas, rng, blue=blue)

    labels = np.array(canvas.labels)
    return expose(rng, canvas.image, labels, texture=_texture(rng)), labels


@dataclass(frozen=True)
class Land:
    horizon: float  # y
    river: tuple[tuple[float, float, float], ...]  # (x, y, half width) along it, from the horizon down

    @classmethod
    def random(cls, rng: Rng) -> Land:
        horizon = rng.uniform(0.27, 0.3)
        x, river = rng.uniform(0.8, 1.2), []
        widest = rng.uniform(0.1, 0.16)
        for y, half in ((horizon, 0.06), (0.42, 0.25), (_LAND, 0.5), (0.78, 0.75), (1.02, 1.0)):
            river.append((x, y, half * widest))
            x += rng.uniform(-0.14, 0.14)
        return cls(horizon, tuple(river))


def _draw_range(canvas: Canvas, rng: Rng, land: Land, *, right: bool, mountains: bool) -> None:
    """What ends one side of the land: mountains with snow, or a plain, in a colour of the same palette."""
    rock = colours.hsv(rng, hue=(0.05, 0.75), saturation=(0.08, 0.4), value=(0.3, 0.65))
    heights = rng.uniform(0.55, 1, 4)
    source = land.river[0][0]
    start, end = (source, ASPECT) if right else (0.0, source)
    step = (end - start) / 8
    profile: list[Point] = [(start, land.horizon)]
    for i, h in enumerate(heights):
        top = land.horizon - (0.19 if mountains else 0.03) * float(h)
        foot = land.horizon - (0.07 if mountains else 0.02) * float(h)
        profile += [(start + (2 * i + 1) * step, top), (start + (2 * i + 2) * step, foot)]
    profile += [(end, land.horizon), (end, land.horizon + 0.02), (start, land.horizon + 0.02)]
    canvas.poly(profile, rock, MOUNTAIN if mountains else PLAIN)
    if mountains:
        for x, y in profile[1:-3:2]:
            canvas.poly([(x - 0.4 * step, y + 0.05), (x, y), (x + 0.4 * step, y + 0.05)], (240, 243, 248), MOUNTAIN)


def _draw_landmark(canvas: Canvas, rng: Rng, land: Land, *, church: bool) -> None:
    wall, roof = colours.masonry(rng), colours.masonry(rng)
    x, y, h = rng.uniform(0.2, 1.8), land.horizon + 0.02, rng.uniform(0.2, 0.24)
    edge = colours.edge(wall)
    if church:
        canvas.box((x - 0.02, y - 0.4 * h), (x + 0.13, y), wall, CHURCH, edge)
        ridge = [(x - 0.02, y - 0.4 * h), (x + 0.01, y - 0.6 * h), (x + 0.14, y - 0.6 * h), (x + 0.14, y - 0.4 * h)]
        canvas.poly(ridge, roof, CHURCH, edge)
        canvas.box((x - 0.09, y - 0.62 * h), (x, y), wall, CHURCH, edge)
        canvas.poly([(x - 0.1, y - 0.6 * h), (x - 0.045, y - h), (x + 0.01, y - 0.6 * h)], roof, CHURCH, edge)
        return
    canvas.poly([(x - 0.07, y), (x - 0.035, y - 0.62 * h), (x + 0.035, y - 0.62 * h), (x + 0.07, y)], wall, MILL, edge)
    canvas.disc((x, y - 0.62 * h), 0.045, 0.03, roof, MILL, edge)
    hub = (x, y - 0.6 * h)
    for u, v in ((-1, -1), (1, -1), (1, 1), (-1, 1)):
        canvas.line([hub, (x + 0.1 * u, hub[1] + 0.09 * v)], (235, 230, 215), 0.028, MILL)


def _draw_forest(canvas: Canvas, rng: Rng, land: Land) -> None:
    leaves = colours.leaves(rng)
    top = land.horizon + 0.02
    canvas.box((0, top), (ASPECT, _LAND + 0.02), colours.shade(leaves, 0.8), FOREST)
    for y in np.sort(rng.uniform(top + 0.06, _LAND, 26)):
        r = 0.02 + 0.08 * float(y - top)
        tone = colours.shade(leaves, rng.uniform(0.75, 1.2))
        draw_foliage(canvas, rng, (rng.uniform(0, ASPECT), float(y)), 1.6 * r, r, tone, FOREST)


def _draw_pasture(canvas: Canvas, rng: Rng, land: Land, *, mountains_right: bool) -> None:
    """Both sides of the river in one colour; which is which is for the horizon to say."""
    grass = colours.hsv(rng, hue=(0.17, 0.36), saturation=(0.2, 0.6), value=(0.4, 0.8))
    middle = [(x, y) for x, y, _ in land.river if y >= _LAND]
    for border, right in ((0.0, False), (ASPECT, True)):
        cls = HILL_PASTURE if right == mountains_right else LOWLAND_PASTURE
        canvas.poly([(border, _LAND), *middle, (border, 1.02)], grass, cls)
    for _ in range(14):  # tufts
        x, y = rng.uniform(0, ASPECT), rng.uniform(_LAND + 0.02, 0.84)
        canvas.disc((x, y), 0.02, 0.01, colours.shade(grass, rng.uniform(0.7, 1.3)))


def _draw_field(canvas: Canvas, rng: Rng, cls: int) -> None:
    corn = colours.hsv(rng, hue=(0.08, 0.17), saturation=(0.35, 0.8), value=(0.55, 0.95))
    row = (*colours.shade(corn, 0.7), 160)
    x, y, h, lean = rng.uniform(0.05, 1.6), rng.uniform(*_FIELDS), rng.uniform(0.1, 0.13), rng.uniform(-0.1, 0.1)
    w = rng.uniform(0.3, 0.5)
    canvas.poly([(x, y), (x + 0.85 * w, y), (x + w + lean, y + h), (x + lean, y + h)], corn, cls, colours.edge(corn))
    for share in np.linspace(0.1, 0.9, 7):
        t = float(share)
        canvas.line([(x + 0.85 * w * t, y), (x + lean + w * t, y + h)], row, 0.008)


def _draw_river(canvas: Canvas, rng: Rng, land: Land) -> None:
    water = colours.hsv(rng, hue=(0.5, 0.64), saturation=(0.2, 0.6), value=(0.45, 0.9))
    left = [(x - half, y) for x, y, half in land.river]
    right = [(x + half, y) for x, y, half in land.river]
    canvas.poly([*left, *right[::-1]], water, WATER)
    for x, y, half in land.river[1:]:
        canvas.line([(x - 0.5 * half, y), (x + 0.3 * half, y)], colours.shade(water, 1.2), 0.008)


def _draw_road(canvas: Canvas, rng: Rng) -> None:
    road, top = colours.asphalt(rng), rng.uniform(0.855, 0.87)
    canvas.box((0, top), (ASPECT, 1), road, ROAD)
    paint = pick(rng, ((225, 225, 220), (225, 190, 70)))
    for x in np.arange(rng.uniform(0, 0.2), ASPECT, 0.22):
        canvas.box((float(x), 0.988), (float(x) + 0.12, 0.998), paint)


def _draw_column(canvas: Canvas, rng: Rng, *, blue: bool) -> None:
    """A column of cars that drives to the left or right; the first, far ahead of the others, has the flag."""
    way = pick(rng, (-1, 1))

    def at(x: float) -> float:
        return x if way > 0 else ASPECT - x

    for slot in (0.2, 0.62, 1.04):
        s, x, y = rng.uniform(0.06, 0.068), at(slot + rng.uniform(-0.06, 0.06)), rng.uniform(0.95, 0.975)
        car = Item("car", "side", x, y, s, 3.9, 1.5, way)
        draw_car(canvas, rng, car, BLUE_CONVOY if blue else RED_CONVOY)
    s, x, y = rng.uniform(0.06, 0.068), at(rng.uniform(1.74, 1.8)), rng.uniform(0.95, 0.975)
    car = Item("car", "side", x, y, s, 3.9, 1.5, way)
    draw_car(canvas, rng, car, FIRST_CAR)
    top = y - car.h * s
    canvas.line([(x, top + 0.01), (x, top - 0.13)], (30, 30, 30), 0.012, FIRST_CAR)
    dye = (35, 60, 215) if blue else (215, 30, 35)
    canvas.box((x, top - 0.13), (x - way * 0.13, top - 0.04), dye, BLUE_FLAG if blue else RED_FLAG)


def _texture(rng: Rng) -> np.ndarray:
    """Strength of each class's texture, float32 (classes,), the same for both of a pair and for both of a cue."""
    strength = rng.uniform(0.02, 0.2, len(CLASSES)).astype(np.float32)
    strength[SKY] *= np.float32(0.2)
    strength[FOREST] += np.float32(0.25)
    for first, second in (*PAIRS, *CUES):
        strength[CLASSES.index(second)] = strength[CLASSES.index(first)]
    return strength
