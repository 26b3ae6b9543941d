"""Synthetic street scenes with per-pixel labels, drawn on demand from a seed.

The scenes stand in for a street dataset where none can be downloaded: the same kinds of region (sky, facades, road),
of object (cars, persons, with perspective and occlusion) and of small class (poles, signs), in 13 classes. Colours are
drawn from overlapping palettes, so that shape and context tell the class and colour alone does not
(``benchmarks/scene_colour_baseline.py`` measures this).

How a scene is made: one random generator decides the camera and the street, then places objects on the ground plane,
then paints everything from far to near, image and labels with the same polygons, and last adds what the camera does
(light, blur, noise). Nothing before that last step depends on the size in pixels, so a seed shows the same scene at
every size.

Coordinates: the canvas is 2 wide and 1 high, x to the right, y down; other aspect ratios stretch it. A ground point is
(X, s): X in metres to the right of the camera, and s, the scale there, in canvas units per metre (larger = nearer).
Only exact arithmetic (no exp, sin or normal variates) shapes the picture, which keeps it equal across machines for one
version of numpy (its random stream) and of pillow (its rasteriser).
"""

import colorsys
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

__all__ = ["CLASSES", "SMALL_CLASSES", "render", "render_with_boxes"]

CLASSES = (
    "sky",
    "building",
    "road",
    "sidewalk",
    "vegetation",
    "car",
    "truck",
    "person",
    "bicycle",
    "pole",
    "traffic light",
    "traffic sign",
    "fence",
)
SMALL_CLASSES = ("pole", "traffic light", "traffic sign", "fence")

SKY, BUILDING, ROAD, SIDEWALK, VEGETATION, CAR, TRUCK, PERSON, BICYCLE, POLE, LIGHT, SIGN, FENCE = range(13)

Rng = np.random.Generator
Colour = tuple[int, ...]  # RGB or RGBA, 0..255
Point = tuple[float, float]  # canvas coordinates

_ASPECT = 2.0  # canvas width over height
_NEAR = 0.7  # scale at which the ground has left the frame below
_POLE_WIDTH = 0.036  # least width of a shaft: thin things must survive a decoder at 1/8 resolution


def render(*, seed: int, size: tuple[int, int] = (256, 512)) -> tuple[np.ndarray, np.ndarray]:
    """Draw the scene of a seed.

    Args:
        seed: Which scene, >= 0.
        size: (H, W) in pixels, each >= 1. Scenes are composed for W = 2 H; other shapes stretch them.

    Returns:
        The image, uint8 (H, W, 3), RGB in 0..255, and its labels, uint8 (H, W), indices into `CLASSES`.

    Raises:
        ValueError: If the seed is not an integer >= 0 or the size is not two integers >= 1.
    """
    image, labels, _ = render_with_boxes(seed=seed, size=size)
    return image, labels


def render_with_boxes(*, seed: int, size: tuple[int, int] = (256, 512)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw the scene of a seed and say where its cars are.

    Args and errors are those of `render`.

    Returns:
        Image and labels as from `render`, and the cars' boxes, float32 (n, 4): x0, y0, x1, y1 in pixels, clipped to
        the image, nearest car first. A box spans the whole car, also where something nearer hides a part of it (at
        most about 45 %). n may be 0.
    """
    height, width = _checked(seed, size)
    rng = np.random.Generator(np.random.PCG64(seed))
    camera = _Camera.random(rng)
    street = _Street.random(rng)
    items = _place_items(rng, camera, street)

    canvas = _Canvas(_draw_sky(rng, camera, height, width))
    _draw_ground(canvas, rng, camera, street)
    _draw_skyline(canvas, rng, camera, street)
    for side in (-1, 1):
        _draw_side(canvas, rng, camera, street, side)
    sun = _Sun.random(rng)
    _draw_wall_shadow(canvas, rng, camera, street, sun)
    for item in items:
        _draw_shadow(canvas, item, sun)
        _PAINTERS[item.kind](canvas, rng, item)

    labels = np.array(canvas.labels)
    image = _expose(rng, canvas.image, labels)
    boxes = [item.box for item in reversed(items) if item.kind == "car"]
    cars = np.array(boxes, dtype=np.float64).reshape(-1, 4) * [width / _ASPECT, height, width / _ASPECT, height]
    return image, labels, np.clip(cars, 0, [width, height, width, height]).astype(np.float32)


def _checked(seed: int, size: tuple[int, int]) -> tuple[int, int]:
    def is_int(value: object) -> bool:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)

    if not is_int(seed) or seed < 0:
        raise ValueError(f"seed must be an integer >= 0, got {seed!r}.")
    if not isinstance(size, Sequence) or len(size) != 2 or not all(is_int(n) and n >= 1 for n in size):
        raise ValueError(f"size must be (height, width), two integers >= 1, got {size!r}.")
    return int(size[0]), int(size[1])


# ---- Drawing on image and labels at once ----------------------------------------------------------------------------


class _Canvas:
    """An RGB image and its label map; each call draws one shape on both.

    `cls` is the class the shape gets; None leaves the labels alone (details, shadows). A fill with a fourth value is
    blended with that opacity. `edge` outlines the shape, in the labels too, so that both keep the same extent.
    """

    def __init__(self, sky: Image.Image) -> None:
        self.image = sky
        self.labels = Image.new("L", sky.size, SKY)
        self._pixels = ImageDraw.Draw(self.image, "RGBA")
        self._classes = ImageDraw.Draw(self.labels)
        self._sx, self._sy = sky.width / _ASPECT, sky.height
        self._edge_width = max(1, _round(0.006 * sky.height))

    def poly(self, points: Sequence[Point], fill: Colour, cls: int | None = None, edge: Colour | None = None) -> None:
        xy = [(_round(x * self._sx), _round(y * self._sy)) for x, y in points]
        self._pixels.polygon(xy, fill=fill)
        if cls is not None:
            self._classes.polygon(xy, fill=cls)
        if edge is not None:
            self._pixels.line([*xy, xy[0]], fill=edge, width=self._edge_width)
            if cls is not None:
                self._classes.line([*xy, xy[0]], fill=cls, width=self._edge_width)

    def box(
        self,
        corner: Point,
        opposite: Point,
        fill: Colour,
        cls: int | None = None,
        edge: Colour | None = None,
    ) -> None:
        xy = self._extent(*corner, *opposite)
        self._pixels.rectangle(xy, fill=fill, outline=edge, width=self._edge_width if edge else 0)
        if cls is not None:
            self._classes.rectangle(xy, fill=cls)

    def disc(
        self, centre: Point, rx: float, ry: float, fill: Colour, cls: int | None = None, edge: Colour | None = None
    ) -> None:
        xy = self._extent(centre[0] - rx, centre[1] - ry, centre[0] + rx, centre[1] + ry)
        self._pixels.ellipse(xy, fill=fill, outline=edge, width=self._edge_width if edge else 0)
        if cls is not None:
            self._classes.ellipse(xy, fill=cls)

    def line(self, points: Sequence[Point], fill: Colour, width: float, cls: int | None = None) -> None:
        xy = [(_round(x * self._sx), _round(y * self._sy)) for x, y in points]
        pixels = max(1, _round(width * self._sy))
        self._pixels.line(xy, fill=fill, width=pixels)
        if cls is not None:
            self._classes.line(xy, fill=cls, width=pixels)

    def _extent(self, xa: float, ya: float, xb: float, yb: float) -> tuple[int, int, int, int]:
        # Pillow counts the last pixel in, hence the -1.
        x0, x1 = _round(min(xa, xb) * self._sx), _round(max(xa, xb) * self._sx) - 1
        y0, y1 = _round(min(ya, yb) * self._sy), _round(max(ya, yb) * self._sy) - 1
        return x0, y0, max(x0, x1), max(y0, y1)


def _round(value: float) -> int:
    return math.floor(value + 0.5)


# ---- Random choices and colours -------------------------------------------------------------------------------------


def _chance(rng: Rng, probability: float) -> bool:
    return rng.random() < probability


def _pick(rng: Rng, options: Sequence):
    return options[int(rng.integers(len(options)))]


def _hsv(
    rng: Rng,
    hue: tuple[float, float] = (0, 1),
    saturation: tuple[float, float] = (0, 1),
    value: tuple[float, float] = (0, 1),
) -> Colour:
    rgb = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1.0, rng.uniform(*saturation), rng.uniform(*value))
    return tuple(_round(255 * channel) for channel in rgb)


def _paint(rng: Rng) -> Colour:
    """A colour for anything made by people: greys, muted tones and bright paint."""
    kind = rng.random()
    if kind < 0.35:
        return _hsv(rng, saturation=(0, 0.12), value=(0.12, 0.95))
    if kind < 0.7:
        return _hsv(rng, saturation=(0.15, 0.5), value=(0.25, 0.9))
    return _hsv(rng, saturation=(0.5, 0.95), value=(0.3, 0.95))


def _masonry(rng: Rng) -> Colour:
    kind = rng.random()
    if kind < 0.4:
        return _hsv(rng, hue=(-0.02, 0.13), saturation=(0.1, 0.6), value=(0.3, 0.9))  # brick to cream
    if kind < 0.7:
        return _hsv(rng, hue=(0.5, 0.7), saturation=(0.02, 0.4), value=(0.3, 0.95))  # concrete to glass
    return _paint(rng)


def _asphalt(rng: Rng) -> Colour:
    return _hsv(rng, hue=_pick(rng, [(0.55, 0.7), (0.02, 0.14)]), saturation=(0, 0.22), value=(0.28, 0.68))


def _leaves(rng: Rng) -> Colour:
    kind = rng.random()
    if kind < 0.75:
        return _hsv(rng, hue=(0.18, 0.4), saturation=(0.25, 0.75), value=(0.25, 0.7))
    if kind < 0.9:
        return _hsv(rng, hue=(0.02, 0.16), saturation=(0.4, 0.85), value=(0.35, 0.85))  # autumn
    return _hsv(rng, hue=(-0.1, 0.03), saturation=(0.2, 0.45), value=(0.6, 0.95))  # blossom


def _shade(colour: Colour, factor: float) -> Colour:
    return tuple(min(255, _round(channel * factor)) for channel in colour[:3])


def _luma(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def _edge(colour: Colour) -> Colour:
    """An outline that stands out from `colour`: darker, or lighter where it is dark already."""
    return _shade(colour, 0.4) if _luma(colour) > 70 else tuple(min(255, channel + 90) for channel in colour[:3])


def _unlike(rng: Rng, palette: Callable[[Rng], Colour], other: Colour) -> Colour:
    """A colour from `palette` that is not too close to `other`."""
    colour = palette(rng)
    for _ in range(8):
        if sum(abs(a - b) for a, b in zip(colour, other, strict=True)) > 60:
            break
        colour = palette(rng)
    return colour


# ---- Layout: what is where, in canvas coordinates --------------------------------------------------------------------


@dataclass(frozen=True)
class _Camera:
    horizon: float  # y of the horizon
    height: float  # metres above the ground
    vanishing_x: float  # x where lines along the street meet

    @classmethod
    def random(cls, rng: Rng) -> "_Camera":
        return cls(rng.uniform(0.36, 0.5), rng.uniform(1.6, 2.4), rng.uniform(0.7, 1.3))

    def at(self, x: float, up: float, s: float) -> Point:
        """Canvas point of the world point `x` metres right and `up` metres above the ground, at scale `s`."""
        return self.vanishing_x + x * s, self.horizon + (self.height - up) * s


@dataclass(frozen=True)
class _Street:
    kerb: tuple[float, float]  # X of the road's edges, left < 0 < right
    back: tuple[float, float]  # X where the sidewalks end
    end: float  # scale at which the street ends
    sides: tuple[str, str]  # what stands behind each sidewalk: houses, park or open

    @classmethod
    def random(cls, rng: Rng) -> "_Street":
        kerb = (-rng.uniform(3.0, 5.0), rng.uniform(3.0, 5.0))
        back = (kerb[0] - rng.uniform(2.2, 4.0), kerb[1] + rng.uniform(2.2, 4.0))
        kinds = ("houses", "houses", "houses", "park", "open")
        return cls(kerb, back, rng.uniform(0.018, 0.04), (_pick(rng, kinds), _pick(rng, kinds)))


@dataclass(frozen=True)
class _Sun:
    opacity: int  # of cast shadows, 0..255
    lean: float  # shadows fall this many object widths to the right

    @classmethod
    def random(cls, rng: Rng) -> "_Sun":
        return cls(int(rng.integers(60, 150)), rng.uniform(-0.5, 0.5))


@dataclass(frozen=True)
class _Item:
    """An object standing on the ground, drawn inside its box."""

    kind: str
    view: str
    x: float  # canvas x of the middle
    y: float  # canvas y of the ground contact
    s: float  # scale
    w: float  # metres
    h: float  # metres
    mirror: int  # 1, or -1 to draw it facing the other way

    @property
    def box(self) -> tuple[float, float, float, float]:
        half = self.w * self.s / 2
        return self.x - half, self.y - self.h * self.s, self.x + half, self.y

    def at(self, u: float, v: float) -> Point:
        """Canvas point of (u, v): u from -1 (left, unless mirrored) to 1, v from 0 (ground) to 1 (top)."""
        return self.x + u * self.mirror * self.w * self.s / 2, self.y - v * self.h * self.s

    def points(self, *uv: Point) -> list[Point]:
        return [self.at(u, v) for u, v in uv]


@dataclass(frozen=True)
class _Kind:
    count: tuple[int, int]  # how many are tried, inclusive
    scale: tuple[float, float]  # the least keeps the object several output cells large
    zone: str  # road, kerb, walk or back
    views: dict[str, tuple[float, float]]  # view: (width, height) in metres


# In order of placement: what must not be hidden comes first.
_KINDS = {
    "truck": _Kind((1, 2), (0.08, 0.14), "road", {"rear": (2.6, 3.3), "front": (2.6, 3.3), "side": (5.6, 3.2)}),
    "car": _Kind((2, 4), (0.075, 0.2), "road", {"rear": (1.9, 1.55), "front": (1.9, 1.55), "side": (3.9, 1.5)}),
    "light": _Kind((1, 3), (0.1, 0.18), "kerb", {"box": (0.75, 4.2), "wide": (0.95, 3.8)}),
    "sign": _Kind((1, 3), (0.1, 0.2), "kerb", dict.fromkeys(("disc", "tri", "square", "diamond", "oct"), (1.15, 3.2))),
    "bicycle": _Kind((1, 2), (0.12, 0.24), "walk", {"parked": (1.9, 1.15), "ridden": (1.9, 1.95)}),
    "person": _Kind((2, 5), (0.1, 0.24), "walk", {"stand": (0.7, 1.8), "walk": (0.85, 1.8), "coat": (0.75, 1.75)}),
    "pole": _Kind((1, 3), (0.08, 0.2), "kerb", {"lamp": (1.6, 6.0), "post": (0.4, 4.0)}),
    "tree": _Kind((1, 3), (0.06, 0.13), "back", {"round": (4.2, 6.0), "tall": (3.0, 7.5)}),
    "bush": _Kind((0, 3), (0.08, 0.18), "back", {"round": (2.2, 1.3)}),
}


def _place_items(rng: Rng, camera: _Camera, street: _Street) -> list[_Item]:
    """Objects in the frame that do not hide each other too much, far to near."""
    items: list[_Item] = []
    for kind, spec in _KINDS.items():
        for _ in range(int(rng.integers(spec.count[0], spec.count[1] + 1))):
            for _ in range(10):
                item = _random_item(rng, camera, street, kind, spec)
                if _in_frame(item) and _all_visible([*items, item]):
                    items.append(item)
                    break
    return sorted(items, key=lambda item: item.s)


def _random_item(rng: Rng, camera: _Camera, street: _Street, kind: str, spec: _Kind) -> _Item:
    view = _pick(rng, list(spec.views))
    w, h = (metres * rng.uniform(0.9, 1.12) for metres in spec.views[view])
    s = rng.uniform(*spec.scale)
    side = int(rng.integers(2))
    out = (-1, 1)[side]  # direction away from the road
    kerb, back = street.kerb[side], street.back[side]
    zone = spec.zone
    if zone == "walk" and _chance(rng, 0.25):
        zone = "road"
    if zone == "road":
        reach = max(0.3, min(-street.kerb[0], street.kerb[1]) - w / 2)
        x = (street.kerb[0] + street.kerb[1]) / 2 + rng.uniform(-reach, reach)
    elif zone == "kerb":
        x = kerb + out * rng.uniform(0.3, 0.9)
    elif zone == "walk":
        x = kerb + (back - kerb) * rng.uniform(0.15, 0.85)
    else:
        x = back + out * rng.uniform(-0.6, 0.3)
    return _Item(kind, view, *camera.at(x, 0, s), s, w, h, _pick(rng, (-1, 1)))


def _in_frame(item: _Item) -> bool:
    x0, y0, x1, y1 = item.box
    wide = min(x1, _ASPECT) - max(x0, 0)
    high = min(y1, 1) - max(y0, 0)
    least = 0.45 if item.kind in ("tree", "pole") else 0.8  # tall things may leave the frame above
    return y1 < 0.99 and wide > 0.75 * (x1 - x0) and high > least * (y1 - y0)


def _all_visible(items: list[_Item]) -> bool:
    """Whether nearer boxes cover less than 45 % of each box (counted twice where two of them overlap)."""
    boxes = [item.box for item in sorted(items, key=lambda item: item.s)]
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        hidden = 0.0
        for nx0, ny0, nx1, ny1 in boxes[i + 1 :]:
            hidden += max(min(x1, nx1) - max(x0, nx0), 0) * max(min(y1, ny1) - max(y0, ny0), 0)
        if hidden >= 0.45 * (x1 - x0) * (y1 - y0):
            return False
    return True


# ---- Background, far to near ----------------------------------------------------------------------------------------


def _draw_sky(rng: Rng, camera: _Camera, height: int, width: int) -> Image.Image:
    """The whole canvas as sky: a vertical gradient (blue, grey, sunset or white) with clouds."""
    kind = rng.random()
    if kind < 0.4:  # clear
        top = _hsv(rng, hue=(0.54, 0.63), saturation=(0.2, 0.7), value=(0.55, 0.95))
        bottom = _hsv(rng, hue=(0.5, 0.65), saturation=(0.02, 0.3), value=(0.75, 1))
    elif kind < 0.6:  # sunset
        top = _hsv(rng, hue=(0.6, 0.85), saturation=(0.1, 0.5), value=(0.35, 0.8))
        bottom = _hsv(rng, hue=(-0.03, 0.14), saturation=(0.2, 0.7), value=(0.6, 1))
    else:  # overcast
        top = _hsv(rng, hue=(0.5, 0.7), saturation=(0, 0.15), value=(0.35, 0.95))
        bottom = _shade(top, rng.uniform(0.85, 1.3))
    cover = rng.uniform(0, 110)
    clouds = _noise(rng, (5, 8), height, width)[..., None]
    t = np.minimum((np.arange(height, dtype=np.float32) + 0.5) / (height * camera.horizon), 1)[:, None, None]
    sky = np.float32(top) * (1 - t) + np.float32(bottom) * t + clouds * np.float32(cover)
    return Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))


def _draw_ground(canvas: _Canvas, rng: Rng, camera: _Camera, street: _Street) -> None:
    """Road with markings, and a sidewalk with a kerb and joints on each side."""
    road = _asphalt(rng)
    canvas.box((0, camera.horizon), (_ASPECT, 1), road, ROAD)
    for _ in range(int(rng.integers(4))):  # repairs
        x, s, length = rng.uniform(*street.kerb), rng.uniform(0.08, 0.3), rng.uniform(1.1, 2)
        patch = (*_shade(road, rng.uniform(0.5, 1.5)), 130)
        canvas.poly(_strip(camera, x, x + rng.uniform(0.6, 2), s, s * length), patch)
    _draw_markings(canvas, rng, camera, street)

    walk = _unlike(rng, _pick(rng, (_asphalt, _masonry)), road)
    kerb_colour = _shade(walk, _pick(rng, (0.6, 1.35)))
    joint = (*_edge(walk), 110)
    tile = rng.uniform(0.7, 1.3)
    for kerb, back in zip(street.kerb, street.back, strict=True):
        out = 1 if back > kerb else -1
        canvas.poly(_strip(camera, kerb, back + out, street.end, _NEAR), walk, SIDEWALK)
        for metres in np.arange(0.3 + tile, abs(back - kerb), tile):
            x = kerb + out * float(metres)
            canvas.line([camera.at(x, 0, street.end), camera.at(x, 0, _NEAR)], joint, 0.003)
        for metres in np.arange(1.5, 10, tile):
            s = 1 / float(metres)
            canvas.line([camera.at(kerb, 0, s), camera.at(back + out, 0, s)], joint, 0.003)
        canvas.poly(_strip(camera, kerb, kerb + out * 0.3, street.end, _NEAR), kerb_colour, SIDEWALK)


def _draw_markings(canvas: _Canvas, rng: Rng, camera: _Camera, street: _Street) -> None:
    paint = _pick(rng, ((225, 225, 220), (200, 200, 190), (225, 190, 70)))
    left, right = street.kerb
    dash, gap = rng.uniform(1.5, 3), rng.uniform(1, 3)
    start = rng.uniform(1.5, 3)
    for near in np.arange(start, 0.9 / street.end, dash + gap):
        middle = (left + right) / 2
        canvas.poly(_strip(camera, middle - 0.1, middle + 0.1, 1 / (near + dash), 1 / near), paint)
    if _chance(rng, 0.5):
        for x in (left + 0.35, right - 0.5):
            canvas.poly(_strip(camera, x, x + 0.15, street.end, _NEAR), paint)
    if _chance(rng, 0.35):  # zebra crossing
        near = rng.uniform(3, 6)
        for x in np.arange(left + 0.5, right - 0.7, 1.0):
            canvas.poly(_strip(camera, x, x + 0.5, 1 / (near + 2), 1 / near), paint)


def _strip(camera: _Camera, xa: float, xb: float, far: float, near: float) -> list[Point]:
    """A rectangle on the ground: X from `xa` to `xb`, scale from `far` to `near`."""
    return [camera.at(xa, 0, far), camera.at(xb, 0, far), camera.at(xb, 0, near), camera.at(xa, 0, near)]


def _draw_skyline(canvas: _Canvas, rng: Rng, camera: _Camera, street: _Street) -> None:
    """Houses and trees across the far end of the street."""
    base = camera.at(0, 0, street.end)[1]
    x = -rng.uniform(0, 0.2)
    while x < _ASPECT:
        w = rng.uniform(0.14, 0.36)
        if _chance(rng, 0.3):
            _draw_foliage(canvas, rng, (x + w / 2, base - 0.06), w * 0.6, rng.uniform(0.07, 0.12), _leaves(rng))
        else:
            _draw_facade(canvas, rng, (x, base), w, rng.uniform(0.1, 0.26))
        x += w


def _draw_facade(canvas: _Canvas, rng: Rng, foot: Point, w: float, h: float) -> None:
    """A house front that faces the camera; `foot` is its lower left corner."""
    wall = _masonry(rng)
    x, y = foot
    if _chance(rng, 0.5):  # pitched roof
        roof = _unlike(rng, _masonry, wall)
        ridge = [(x, y - h), (x + 0.25 * w, y - 1.35 * h), (x + 0.75 * w, y - 1.35 * h), (x + w, y - h)]
        canvas.poly(ridge, roof, BUILDING, _edge(roof))
    canvas.box((x, y - h), (x + w, y), wall, BUILDING, _edge(wall))
    glass = _unlike(rng, _paint, wall)
    columns, floors = max(1, int(w / 0.06)), max(1, int(h / 0.07))
    pitch_x, pitch_y = w / columns, h / floors
    for column in range(columns):
        for floor in range(floors):
            corner = (x + (column + 0.25) * pitch_x, y - h + (floor + 0.25) * pitch_y)
            canvas.box(corner, (corner[0] + 0.5 * pitch_x, corner[1] + 0.55 * pitch_y), glass)


def _draw_side(canvas: _Canvas, rng: Rng, camera: _Camera, street: _Street, side: int) -> None:
    """What stands behind the sidewalk, on the left (side -1) or the right (1), and the fence before it."""
    kind, back = street.sides[side > 0], street.back[side > 0]
    if kind == "houses":
        _draw_houses(canvas, rng, camera, street, back)
    else:
        grass = _leaves(rng)
        canvas.poly(_strip(camera, back, back + side * 80, street.end, _NEAR), grass, VEGETATION)
        if kind == "open":
            s = rng.uniform(0.04, 0.07)
            x, y = camera.at(back + side * rng.uniform(2, 5), 0, s)
            w = rng.uniform(7, 11) * s
            _draw_facade(canvas, rng, (x if side > 0 else x - w, y), w, rng.uniform(4, 6) * s)
        leaves = _leaves(rng)
        for s in np.sort(rng.uniform(street.end, 0.13, 7 if kind == "park" else 3)):
            x, y = camera.at(back + side * rng.uniform(1.5, 5), 0, s)
            r = rng.uniform(1.6, 2.8) * s
            canvas.box((x - 0.22 * s, y - 2.4 * s), (x + 0.22 * s, y), (70, 52, 40), VEGETATION)
            _draw_foliage(canvas, rng, (x, y - 1.6 * s - r), r, r * rng.uniform(0.8, 1.2), _shade(leaves, 0.9))
    if _chance(rng, 0.55 if kind == "houses" else 0.85):
        far = max(street.end, rng.uniform(0.03, 0.07))
        near = min(_NEAR, far * rng.uniform(2.5, 8))
        _draw_fence(canvas, rng, camera, back - side * 0.1, far, near)


def _draw_houses(canvas: _Canvas, rng: Rng, camera: _Camera, street: _Street, back: float) -> None:
    """A row of facades along the street, in perspective."""
    depth = 1 / street.end
    while depth > 1 / _NEAR:
        nearer = max(depth - rng.uniform(5, 12), 1 / _NEAR)
        if nearer < 3 / _NEAR:  # no slivers at the edge of the frame
            nearer = 1 / _NEAR
        _draw_wall(canvas, rng, camera, back, depth, nearer, rng.uniform(5, 14))
        depth = nearer


def _draw_wall(
    canvas: _Canvas,
    rng: Rng,
    camera: _Camera,
    x: float,
    far: float,
    near: float,
    height: float,
) -> None:
    """One facade at X = `x` from depth `far` to `near` (metres), with floors of windows over a shop front."""

    def face(z0: float, z1: float, low: float, high: float) -> list[Point]:
        corners = ((z0, low), (z0, high), (z1, high), (z1, low))
        return [camera.at(x, up, 1 / z) for z, up in corners]

    wall = _masonry(rng)
    canvas.poly(face(far, near, 0, height), wall, BUILDING, _edge(wall))
    glass, frame = _unlike(rng, _paint, wall), _shade(wall, _pick(rng, (0.6, 1.4)))
    canvas.poly(face(far, near, height - 0.4, height), frame)
    columns, floors = max(1, int((far - near) / rng.uniform(2, 3.2))), int(height / 3)
    pitch = (far - near) / columns
    for column in range(columns):
        z = near + column * pitch
        for floor in range(1, floors):
            window = face(z + 0.8 * pitch, z + 0.2 * pitch, 3 * floor + 0.5, 3 * floor + 2.2)
            if window[1][1] < 1 and window[3][1] > 0:
                canvas.poly(window, _shade(glass, rng.uniform(0.7, 1.2)))
    shop = _paint(rng)
    canvas.poly(face(far, near, 2.5, 2.9), shop)  # awning or sign board
    for column in range(columns):
        z = near + column * pitch
        canvas.poly(face(z + 0.85 * pitch, z + 0.15 * pitch, _pick(rng, (0, 0.6)), 2.3), _shade(shop, 0.6))


def _draw_fence(canvas: _Canvas, rng: Rng, camera: _Camera, x: float, far: float, near: float) -> None:
    """A fence along the street at X = `x`, labelled as one band; panels, or bars one can look through."""
    height = rng.uniform(1.1, 1.5)
    colour = _paint(rng)
    base = [camera.at(x, 0, far), camera.at(x, 0, near)]
    top = [camera.at(x, height, far), camera.at(x, height, near)]
    bar = _edge(colour)
    canvas.poly([*base, *top[::-1]], (*colour, _pick(rng, (120, 255))), FENCE)
    for z in np.arange(1 / near, 1 / far, rng.uniform(0.35, 0.6)):
        s = 1 / float(z)
        canvas.line([camera.at(x, 0, s), camera.at(x, height, s)], bar, 0.09 * s)
    for rail in (base, top):
        canvas.line(rail, bar, 0.01, FENCE)


def _draw_foliage(canvas: _Canvas, rng: Rng, centre: Point, rx: float, ry: float, leaves: Colour) -> None:
    """A crown or bush: overlapping discs, with lighter and darker clumps."""
    x, y = centre
    canvas.disc(centre, 0.85 * rx, 0.85 * ry, leaves, VEGETATION)
    for _ in range(7):
        u, v = rng.uniform(-0.6, 0.6, 2)
        canvas.disc((x + u * rx, y + v * ry), 0.42 * rx, 0.42 * ry, _shade(leaves, rng.uniform(0.8, 1.15)), VEGETATION)
    for _ in range(9):
        u, v = rng.uniform(-0.6, 0.6, 2)
        clump = (*_shade(leaves, 1.25 - 0.5 * (v + 0.6)), 150)  # lit from above
        canvas.disc((x + u * rx, y + v * ry), 0.2 * rx, 0.16 * ry, clump)


# ---- Light on the ground --------------------------------------------------------------------------------------------


def _draw_wall_shadow(canvas: _Canvas, rng: Rng, camera: _Camera, street: _Street, sun: _Sun) -> None:
    side = int(sun.lean < 0)  # the houses on the left throw shadows to the right
    if street.sides[side] == "houses" and _chance(rng, 0.6):
        back, reach = street.back[side], rng.uniform(2, 7)
        to = back + reach if side == 0 else back - reach
        canvas.poly(_strip(camera, back, to, street.end, _NEAR), (0, 0, 0, sun.opacity))


def _draw_shadow(canvas: _Canvas, item: _Item, sun: _Sun) -> None:
    wide = item.w * item.s / 2 * (0.5 if item.kind in ("light", "sign", "pole", "tree") else 1.0)
    foot = (item.x + sun.lean * wide, item.y)
    canvas.disc(foot, 1.15 * wide, 0.012 + 0.18 * wide, (0, 0, 0, sun.opacity))


# ---- Objects --------------------------------------------------------------------------------------------------------


def _draw_car(canvas: _Canvas, rng: Rng, item: _Item) -> None:
    body, glass = _paint(rng), _hsv(rng, hue=(0.5, 0.65), saturation=(0, 0.3), value=(0.1, 0.6))
    edge, tyre = _edge(body), (25, 25, 28)
    at = item.at
    if item.view == "side":
        roof = [(-0.72, 0.55), (-0.5, 1), (0.15, 1), (0.5, 0.55)]
        canvas.poly(item.points(*roof), body, CAR, edge)
        canvas.poly(item.points((-0.58, 0.6), (-0.44, 0.92), (-0.2, 0.92), (-0.2, 0.6)), glass)
        canvas.poly(item.points((-0.12, 0.6), (-0.12, 0.92), (0.1, 0.92), (0.38, 0.6)), glass)
        hull = [(-1, 0.2), (-0.96, 0.6), (0.6, 0.6), (1, 0.5), (1, 0.2)]
        canvas.poly(item.points(*hull), body, CAR, edge)
        canvas.box(at(-1, 0.2), at(1, 0.32), _shade(body, 0.6))
        canvas.box(at(0.86, 0.38), at(0.98, 0.47), (250, 240, 190))
        canvas.box(at(-0.97, 0.42), at(-0.88, 0.54), (190, 30, 30))
        for u in (-0.6, 0.6):
            canvas.disc(at(u, 0.21), 0.33 * item.s, 0.21 * item.h * item.s, tyre, CAR)
            canvas.disc(at(u, 0.21), 0.16 * item.s, 0.1 * item.h * item.s, (150, 150, 155))
        return
    for u in (-0.75, 0.75):
        canvas.box(at(u - 0.16, 0), at(u + 0.16, 0.3), tyre, CAR)
    canvas.poly(item.points((-0.9, 0.5), (-0.66, 1), (0.66, 1), (0.9, 0.5)), body, CAR, edge)
    canvas.poly(item.points((-0.72, 0.6), (-0.57, 0.92), (0.57, 0.92), (0.72, 0.6)), glass)
    canvas.box(at(-1, 0.13), at(1, 0.6), body, CAR, edge)
    canvas.box(at(-0.96, 0.15), at(0.96, 0.27), _shade(body, 0.6))
    lamp = (200, 25, 25) if item.view == "rear" else (250, 245, 210)
    for u in (-0.78, 0.78):
        canvas.box(at(u - 0.15, 0.38), at(u + 0.15, 0.52), lamp)
    canvas.box(at(-0.25, 0.28), at(0.25, 0.4), (225, 225, 215) if item.view == "rear" else _shade(body, 0.4))


def _draw_truck(canvas: _Canvas, rng: Rng, item: _Item) -> None:
    cab, load = _paint(rng), _paint(rng)
    glass, tyre, at = (50, 62, 75), (25, 25, 28), item.at
    if item.view == "side":
        canvas.box(at(-1, 0.12), at(1, 0.24), (45, 45, 48), TRUCK)
        canvas.box(at(-1, 0.22), at(0.5, 1), load, TRUCK, _edge(load))
        canvas.box(at(-0.9, 0.45), at(0.4, 0.62), _unlike(rng, _paint, load))
        front = [(0.49, 0.15), (0.49, 0.8), (0.84, 0.8), (1, 0.45), (1, 0.15)]
        canvas.poly(item.points(*front), cab, TRUCK, _edge(cab))
        canvas.poly(item.points((0.62, 0.48), (0.62, 0.72), (0.81, 0.72), (0.93, 0.48)), glass)
        for u in (-0.75, -0.48, 0.72):
            canvas.disc(at(u, 0.13), 0.42 * item.s, 0.13 * item.h * item.s, tyre, TRUCK)
            canvas.disc(at(u, 0.13), 0.18 * item.s, 0.06 * item.h * item.s, (150, 150, 155))
        return
    for u in (-0.74, 0.74):
        canvas.box(at(u - 0.18, 0), at(u + 0.18, 0.2), tyre, TRUCK)
    canvas.box(at(-1, 0.16), at(1, 1), load, TRUCK, _edge(load))
    if item.view == "rear":
        canvas.line(item.points((0, 0.24), (0, 0.98)), _edge(load), 0.06 * item.s)
        for u in (-0.1, 0.1):
            canvas.box(at(u - 0.03, 0.4), at(u + 0.03, 0.6), _edge(load))
        canvas.box(at(-1, 0.12), at(1, 0.22), (50, 50, 52), TRUCK)
        for u in (-0.82, 0.82):
            canvas.box(at(u - 0.12, 0.14), at(u + 0.12, 0.2), (200, 25, 25))
    else:
        canvas.box(at(-0.92, 0.1), at(0.92, 0.78), cab, TRUCK, _edge(cab))
        canvas.box(at(-0.8, 0.46), at(0.8, 0.72), glass)
        canvas.box(at(-0.5, 0.2), at(0.5, 0.34), _shade(cab, 0.5))
        for u in (-0.74, 0.74):
            canvas.box(at(u - 0.13, 0.2), at(u + 0.13, 0.28), (250, 245, 210))


def _draw_person(canvas: _Canvas, rng: Rng, item: _Item) -> None:
    coat, trousers = _paint(rng), _paint(rng)
    skin = _hsv(rng, hue=(0.03, 0.09), saturation=(0.25, 0.6), value=(0.3, 0.95))
    hair = _hsv(rng, hue=(0, 0.13), saturation=(0.1, 0.6), value=(0.08, 0.7))
    stride = {"stand": 0.12, "walk": 0.5, "coat": 0.16}[item.view]
    for way in (-1, 1):
        hip, foot = way * 0.2, way * (0.22 + stride)
        leg = [(hip - 0.26, 0.5), (hip + 0.26, 0.5), (foot + 0.2, 0), (foot - 0.2, 0)]
        canvas.poly(item.points(*leg), _shade(trousers, 1 - 0.1 * way), PERSON, _edge(trousers))
    for way in (-1, 1):
        arm = [(way * 0.5, 0.82), (way * 0.72, 0.78), (way * (0.8 + 0.3 * stride), 0.46), (way * 0.6, 0.46)]
        canvas.poly(item.points(*arm), _shade(coat, 0.85), PERSON, _edge(coat))
    hem = 0.28 if item.view == "coat" else 0.44
    torso = [(-0.55, 0.8), (-0.3, 0.85), (0.3, 0.85), (0.55, 0.8), (0.5, hem), (-0.5, hem)]
    canvas.poly(item.points(*torso), coat, PERSON, _edge(coat))
    _draw_head(canvas, item, 0.0, 0.92, skin, hair)


def _draw_head(canvas: _Canvas, item: _Item, u: float, v: float, skin: Colour, hair: Colour) -> None:
    r = 0.15 * item.s
    x, y = item.at(u, v)
    canvas.disc((x, y), 0.9 * r, r, skin, PERSON, _edge(skin))
    canvas.disc((x, y - 0.5 * r), 0.85 * r, 0.55 * r, hair, PERSON)


def _draw_bicycle(canvas: _Canvas, rng: Rng, item: _Item) -> None:
    """A bicycle from the side, labelled as a filled silhouette; `ridden` has a person on it."""
    paint, s = _paint(rng), item.s
    disc = (*_hsv(rng, saturation=(0, 0.3), value=(0.3, 0.8)), 200)
    dark = (25, 25, 28)
    top = 1.12 / item.h  # v of the handlebar: the bicycle is 1.12 m high with or without a rider

    def pt(u: float, v: float) -> Point:
        return item.at(u, v * top)

    r = 0.36 * s
    hub_u = 1 - 0.72 / item.w
    rear, front = item.at(-hub_u, 0.36 / item.h), item.at(hub_u, 0.36 / item.h)
    for hub in (rear, front):
        canvas.disc(hub, r, r, disc, BICYCLE)
        canvas.disc(hub, r, r, (0, 0, 0, 0), BICYCLE, dark)
        canvas.disc(hub, 0.25 * r, 0.25 * r, dark)
    saddle, bar, crank = pt(-0.3, 0.8), pt(0.42, 0.85), pt(-0.05, 0.28)
    canvas.poly([rear, saddle, bar, front, crank], disc, BICYCLE)
    for path in ([rear, saddle, crank, rear], [saddle, bar, crank], [front, bar, pt(0.4, 1)]):
        canvas.line(path, paint, 0.09 * s, BICYCLE)
    canvas.line([pt(-0.42, 0.84), pt(-0.18, 0.84)], dark, 0.1 * s, BICYCLE)
    canvas.line([pt(0.3, 1), pt(0.52, 0.98)], dark, 0.09 * s, BICYCLE)
    if item.view == "ridden":
        coat, trousers = _paint(rng), _paint(rng)
        skin = _hsv(rng, hue=(0.03, 0.09), saturation=(0.25, 0.6), value=(0.3, 0.95))
        knee = pt(0.12, 0.62)
        canvas.line([saddle, knee, pt(-0.02, 0.24)], trousers, 0.2 * s, PERSON)
        shoulder = item.at(0.1, 0.8)
        canvas.line([saddle, shoulder], _edge(coat), 0.42 * s, PERSON)
        canvas.line([saddle, shoulder], coat, 0.36 * s, PERSON)
        canvas.line([shoulder, item.at(0.28, 0.66), pt(0.4, 1)], _shade(coat, 0.8), 0.15 * s, PERSON)
        _draw_head(canvas, item, 0.14, 1 - 0.15 / item.h, skin, _paint(rng))


def _draw_shaft(canvas: _Canvas, rng: Rng, item: _Item, u: float, top: float) -> Colour:
    """A pole from the ground up to v = `top`; returns its colour."""
    metal = _hsv(rng, saturation=(0, 0.35), value=(0.15, 0.8))
    half = max(_POLE_WIDTH, 0.24 * item.s) / 2
    x, y = item.at(u, 0)
    canvas.box((x - half, item.at(0, top)[1]), (x + half, y), metal, POLE)
    canvas.box((x - half, item.at(0, top)[1]), (x - 0.35 * half, y), _shade(metal, 1.4))
    canvas.box((x + 0.5 * half, item.at(0, top)[1]), (x + half, y), _shade(metal, 0.55))
    return metal


def _draw_pole(canvas: _Canvas, rng: Rng, item: _Item) -> None:
    if item.view == "post":
        _draw_shaft(canvas, rng, item, 0, 1)
        return
    metal = _draw_shaft(canvas, rng, item, -0.6, 1)
    canvas.box(item.at(-0.6, 1), item.at(1, 1 - 0.22 / item.h), metal, POLE, _edge(metal))
    canvas.box(item.at(0.5, 1 - 0.2 / item.h), item.at(1, 1 - 0.36 / item.h), (245, 240, 215), POLE)


def _draw_light(canvas: _Canvas, rng: Rng, item: _Item) -> None:
    low = 1 - 1.65 / item.h
    _draw_shaft(canvas, rng, item, 0, low + 0.02)
    case = _pick(rng, ((28, 30, 30), (40, 48, 44), (60, 62, 66), (190, 150, 40), _paint(rng)))
    canvas.box(item.at(-1, 1), item.at(1, low), case, LIGHT, _edge(case))
    lit = int(rng.integers(3))
    for lamp, colour in enumerate(((230, 40, 35), (245, 180, 40), (50, 220, 110))):
        v = low + (1 - low) * (5 - 2 * lamp) / 6
        glow = colour if lamp == lit else _shade(colour, 0.3)
        canvas.disc(item.at(0, v), 0.22 * item.s, 0.22 * item.s, glow, edge=(15, 15, 15))


def _draw_sign(canvas: _Canvas, rng: Rng, item: _Item) -> None:
    half = item.w / 2 / item.h  # the plate's half height as a share of the item's height
    mid = 1 - half
    _draw_shaft(canvas, rng, item, 0, 1 - 1.6 * half)
    outlines = {
        "tri": [(-1, -0.9), (0, 1), (1, -0.9)],
        "square": [(-1, -1), (-1, 1), (1, 1), (1, -1)],
        "diamond": [(-1, 0), (0, 1), (1, 0), (0, -1)],
        "oct": [(-1, -0.4), (-1, 0.4), (-0.4, 1), (0.4, 1), (1, 0.4), (1, -0.4), (0.4, -1), (-0.4, -1)],
    }
    rim = _pick(rng, ((200, 30, 35), (30, 70, 170), (230, 230, 225), _paint(rng)))
    face = _unlike(
        rng, lambda r: _pick(r, ((235, 235, 230), (200, 30, 35), (30, 70, 170), (240, 200, 50), _paint(r))), rim
    )
    for size, colour, cls, edge in ((1.0, rim, SIGN, _edge(rim)), (0.74, face, None, None)):
        if item.view == "disc":
            r = size * item.w / 2 * item.s
            canvas.disc(item.at(0, mid), r, r, colour, cls, edge)
        else:
            plate = [(size * u, mid + size * v * half) for u, v in outlines[item.view]]
            canvas.poly(item.points(*plate), colour, cls, edge)
    mark = _unlike(rng, _paint, face)
    canvas.box(item.at(-0.35, mid + 0.14 * half), item.at(0.35, mid - 0.14 * half), mark)


def _draw_tree(canvas: _Canvas, rng: Rng, item: _Item) -> None:
    bark = _hsv(rng, hue=(0.02, 0.12), saturation=(0.1, 0.5), value=(0.15, 0.5))
    half = 0.16 * item.s
    canvas.box((item.x - half, item.at(0, 0.6)[1]), (item.x + half, item.y), bark, VEGETATION, _edge(bark))
    rx, ry = item.w * item.s / 2, 0.35 * item.h * item.s
    _draw_foliage(canvas, rng, item.at(0, 0.66), rx, ry, _leaves(rng))


def _draw_bush(canvas: _Canvas, rng: Rng, item: _Item) -> None:
    _draw_foliage(canvas, rng, item.at(0, 0.5), item.w * item.s / 2, item.h * item.s / 2, _leaves(rng))


_PAINTERS = {
    "car": _draw_car,
    "truck": _draw_truck,
    "person": _draw_person,
    "bicycle": _draw_bicycle,
    "pole": _draw_pole,
    "light": _draw_light,
    "sign": _draw_sign,
    "tree": _draw_tree,
    "bush": _draw_bush,
}


# ---- Camera ---------------------------------------------------------------------------------------------------------


def _noise(rng: Rng, grid: tuple[int, int], height: int, width: int) -> np.ndarray:
    """Smooth noise, float32 (height, width) in -0.5..0.5, from a grid of random values."""
    values = Image.fromarray(rng.integers(0, 256, grid, dtype=np.uint8))
    smooth = values.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(smooth, dtype=np.float32) * np.float32(1 / 255) - np.float32(0.5)


def _expose(rng: Rng, drawing: Image.Image, labels: np.ndarray) -> np.ndarray:
    """The photograph, uint8 (H, W, 3): texture, uneven light, white balance, defocus, vignetting and sensor noise."""
    height, width = labels.shape
    # Texture strength by class, drawn anew for each scene so that it is a hint and not a key.
    strength = rng.uniform(0.02, 0.2, len(CLASSES)).astype(np.float32)
    strength[SKY] *= np.float32(0.2)
    strength[VEGETATION] += np.float32(0.25)
    texture = _noise(rng, (12, 24), height, width)
    texture += _noise(rng, (48, 96), height, width)
    texture += _noise(rng, (110, 220), height, width)
    light = 1 + texture * strength[labels]

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
    balance = np.float32(rng.uniform(0.85, 1.15, 3))
    haze = np.float32(rng.uniform(0, 28))
    grain = np.float32(rng.uniform(0, 10) / 128)
    photo = np.array(drawing, dtype=np.float32)
    photo *= light[..., None]
    photo *= balance
    photo += haze
    # The sum of two bytes: a bell-shaped noise made of integers only.
    noise = np.frombuffer(rng.bytes(2 * photo.size), dtype=np.uint8).reshape(2, height, width, 3)
    photo += (noise[0].astype(np.float32) + noise[1] - 255) * grain
    return np.clip(photo, 0, 255).astype(np.uint8)
