"""What is where: the street, and the objects that stand on it."""

from __future__ import annotations

from dataclasses import dataclass

from .basics import Point, Rng, chance, pick
from .camera import Camera
from .canvas import ASPECT


@dataclass(frozen=True)
class Street:
    kerb: tuple[float, float]  # X of the road's edges, left < 0 < right
    back: tuple[float, float]  # X where the sidewalks end
    end: float  # scale at which the street ends
    sides: tuple[str, str]  # what stands behind each sidewalk: houses, park or open

    @classmethod
    def random(cls, rng: Rng) -> Street:
        kerb = (-rng.uniform(3.0, 5.0), rng.uniform(3.0, 5.0))
        back = (kerb[0] - rng.uniform(2.2, 4.0), kerb[1] + rng.uniform(2.2, 4.0))
        kinds = ("houses", "houses", "houses", "park", "open")
        return cls(kerb, back, rng.uniform(0.018, 0.04), (pick(rng, kinds), pick(rng, kinds)))


def place_items(rng: Rng, camera: Camera, street: Street) -> list[Item]:
    """Objects in the frame that do not hide each other too much, far to near."""
    items: list[Item] = []
    for kind, spec in _KINDS.items():
        for _ in range(int(rng.integers(spec.count[0], spec.count[1] + 1))):
            for _ in range(10):
                item = _random_item(rng, camera, street, kind, spec)
                if _in_frame(item) and _all_visible([*items, item]):
                    items.append(item)
                    break
    return sorted(items, key=lambda item: item.s)


@dataclass(frozen=True)
class Item:
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


def _random_item(rng: Rng, camera: Camera, street: Street, kind: str, spec: _Kind) -> Item:
    view = pick(rng, list(spec.views))
    w, h = (metres * rng.uniform(0.9, 1.12) for metres in spec.views[view])
    s = rng.uniform(*spec.scale)
    side = int(rng.integers(2))
    out = (-1, 1)[side]  # direction away from the road
    kerb, back = street.kerb[side], street.back[side]
    zone = spec.zone
    if zone == "walk" and chance(rng, 0.25):
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
    return Item(kind, view, *camera.at(x, 0, s), s, w, h, pick(rng, (-1, 1)))


def _in_frame(item: Item) -> bool:
    x0, y0, x1, y1 = item.box
    wide = min(x1, ASPECT) - max(x0, 0)
    high = min(y1, 1) - max(y0, 0)
    least = 0.45 if item.kind in ("tree", "pole") else 0.8  # tall things may leave the frame above
    return y1 < 0.99 and wide > 0.75 * (x1 - x0) and high > least * (y1 - y0)


def _all_visible(items: list[Item]) -> bool:
    """Whether nearer boxes cover less than 45 % of each box (counted twice where two of them overlap)."""
    boxes = [item.box for item in sorted(items, key=lambda item: item.s)]
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        hidden = 0.0
        for nx0, ny0, nx1, ny1 in boxes[i + 1 :]:
            hidden += max(min(x1, nx1) - max(x0, nx0), 0) * max(min(y1, ny1) - max(y0, ny0), 0)
        if hidden >= 0.45 * (x1 - x0) * (y1 - y0):
            return False
    return True
