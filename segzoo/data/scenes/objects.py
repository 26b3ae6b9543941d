"""The objects of a street scene, each drawn inside its box."""

from . import colours
from .basics import Colour, Point, Rng, pick
from .canvas import Canvas
from .classes import BICYCLE, CAR, LIGHT, PERSON, POLE, SIGN, TRUCK, VEGETATION
from .layout import Item

_POLE_WIDTH = 0.036  # least width of a shaft: thin things must survive a decoder at 1/8 resolution


def draw_item(canvas: Canvas, rng: Rng, item: Item) -> None:
    _PAINTERS[item.kind](canvas, rng, item)


def draw_car(canvas: Canvas, rng: Rng, item: Item, cls: int = CAR) -> None:
    body, glass = colours.paint(rng), colours.hsv(rng, hue=(0.5, 0.65), saturation=(0, 0.3), value=(0.1, 0.6))
    edge, tyre = colours.edge(body), (25, 25, 28)
    at = item.at
    if item.view == "side":
        roof = [(-0.72, 0.55), (-0.5, 1), (0.15, 1), (0.5, 0.55)]
        canvas.poly(item.points(*roof), body, cls, edge)
        canvas.poly(item.points((-0.58, 0.6), (-0.44, 0.92), (-0.2, 0.92), (-0.2, 0.6)), glass)
        canvas.poly(item.points((-0.12, 0.6), (-0.12, 0.92), (0.1, 0.92), (0.38, 0.6)), glass)
        hull = [(-1, 0.2), (-0.96, 0.6), (0.6, 0.6), (1, 0.5), (1, 0.2)]
        canvas.poly(item.points(*hull), body, cls, edge)
        canvas.box(at(-1, 0.2), at(1, 0.32), colours.shade(body, 0.6))
        canvas.box(at(0.86, 0.38), at(0.98, 0.47), (250, 240, 190))
        canvas.box(at(-0.97, 0.42), at(-0.88, 0.54), (190, 30, 30))
        for u in (-0.6, 0.6):
            canvas.disc(at(u, 0.21), 0.33 * item.s, 0.21 * item.h * item.s, tyre, cls)
            canvas.disc(at(u, 0.21), 0.16 * item.s, 0.1 * item.h * item.s, (150, 150, 155))
        return
    for u in (-0.75, 0.75):
        canvas.box(at(u - 0.16, 0), at(u + 0.16, 0.3), tyre, cls)
    canvas.poly(item.points((-0.9, 0.5), (-0.66, 1), (0.66, 1), (0.9, 0.5)), body, cls, edge)
    canvas.poly(item.points((-0.72, 0.6), (-0.57, 0.92), (0.57, 0.92), (0.72, 0.6)), glass)
    canvas.box(at(-1, 0.13), at(1, 0.6), body, cls, edge)
    canvas.box(at(-0.96, 0.15), at(0.96, 0.27), colours.shade(body, 0.6))
    lamp = (200, 25, 25) if item.view == "rear" else (250, 245, 210)
    for u in (-0.78, 0.78):
        canvas.box(at(u - 0.15, 0.38), at(u + 0.15, 0.52), lamp)
    canvas.box(at(-0.25, 0.28), at(0.25, 0.4), (225, 225, 215) if item.view == "rear" else colours.shade(body, 0.4))


def _draw_truck(canvas: Canvas, rng: Rng, item: Item) -> None:
    cab, load = colours.paint(rng), colours.paint(rng)
    glass, tyre, at = (50, 62, 75), (25, 25, 28), item.at
    if item.view == "side":
        canvas.box(at(-1, 0.12), at(1, 0.24), (45, 45, 48), TRUCK)
        canvas.box(at(-1, 0.22), at(0.5, 1), load, TRUCK, colours.edge(load))
        canvas.box(at(-0.9, 0.45), at(0.4, 0.62), colours.unlike(rng, colours.paint, load))
        front = [(0.49, 0.15), (0.49, 0.8), (0.84, 0.8), (1, 0.45), (1, 0.15)]
        canvas.poly(item.points(*front), cab, TRUCK, colours.edge(cab))
        canvas.poly(item.points((0.62, 0.48), (0.62, 0.72), (0.81, 0.72), (0.93, 0.48)), glass)
        for u in (-0.75, -0.48, 0.72):
            canvas.disc(at(u, 0.13), 0.42 * item.s, 0.13 * item.h * item.s, tyre, TRUCK)
            canvas.disc(at(u, 0.13), 0.18 * item.s, 0.06 * item.h * item.s, (150, 150, 155))
        return
    for u in (-0.74, 0.74):
        canvas.box(at(u - 0.18, 0), at(u + 0.18, 0.2), tyre, TRUCK)
    canvas.box(at(-1, 0.16), at(1, 1), load, TRUCK, colours.edge(load))
    if item.view == "rear":
        canvas.line(item.points((0, 0.24), (0, 0.98)), colours.edge(load), 0.06 * item.s)
        for u in (-0.1, 0.1):
            canvas.box(at(u - 0.03, 0.4), at(u + 0.03, 0.6), colours.edge(load))
        canvas.box(at(-1, 0.12), at(1, 0.22), (50, 50, 52), TRUCK)
        for u in (-0.82, 0.82):
            canvas.box(at(u - 0.12, 0.14), at(u + 0.12, 0.2), (200, 25, 25))
    else:
        canvas.box(at(-0.92, 0.1), at(0.92, 0.78), cab, TRUCK, colours.edge(cab))
        canvas.box(at(-0.8, 0.46), at(0.8, 0.72), glass)
        canvas.box(at(-0.5, 0.2), at(0.5, 0.34), colours.shade(cab, 0.5))
        for u in (-0.74, 0.74):
            canvas.box(at(u - 0.13, 0.2), at(u + 0.13, 0.28), (250, 245, 210))


def _draw_person(canvas: Canvas, rng: Rng, item: Item) -> None:
    coat, trousers = colours.paint(rng), colours.paint(rng)
    skin = colours.hsv(rng, hue=(0.03, 0.09), saturation=(0.25, 0.6), value=(0.3, 0.95))
    hair = colours.hsv(rng, hue=(0, 0.13), saturation=(0.1, 0.6), value=(0.08, 0.7))
    stride = {"stand": 0.12, "walk": 0.5, "coat": 0.16}[item.view]
    for way in (-1, 1):
        hip, foot = way * 0.2, way * (0.22 + stride)
        leg = [(hip - 0.26, 0.5), (hip + 0.26, 0.5), (foot + 0.2, 0), (foot - 0.2, 0)]
        canvas.poly(item.points(*leg), colours.shade(trousers, 1 - 0.1 * way), PERSON, colours.edge(trousers))
    for way in (-1, 1):
        arm = [(way * 0.5, 0.82), (way * 0.72, 0.78), (way * (0.8 + 0.3 * stride), 0.46), (way * 0.6, 0.46)]
        canvas.poly(item.points(*arm), colours.shade(coat, 0.85), PERSON, colours.edge(coat))
    hem = 0.28 if item.view == "coat" else 0.44
    torso = [(-0.55, 0.8), (-0.3, 0.85), (0.3, 0.85), (0.55, 0.8), (0.5, hem), (-0.5, hem)]
    canvas.poly(item.points(*torso), coat, PERSON, colours.edge(coat))
    _draw_head(canvas, item, 0.0, 0.92, skin, hair)


def _draw_bicycle(canvas: Canvas, rng: Rng, item: Item) -> None:
    """A bicycle from the side, labelled as a filled silhouette; `ridden` has a person on it."""
    paint, s = colours.paint(rng), item.s
    disc = (*colours.hsv(rng, saturation=(0, 0.3), value=(0.3, 0.8)), 200)
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
        coat, trousers = colours.paint(rng), colours.paint(rng)
        skin = colours.hsv(rng, hue=(0.03, 0.09), saturation=(0.25, 0.6), value=(0.3, 0.95))
        knee = pt(0.12, 0.62)
        canvas.line([saddle, knee, pt(-0.02, 0.24)], trousers, 0.2 * s, PERSON)
        shoulder = item.at(0.1, 0.8)
        canvas.line([saddle, shoulder], colours.edge(coat), 0.42 * s, PERSON)
        canvas.line([saddle, shoulder], coat, 0.36 * s, PERSON)
        canvas.line([shoulder, item.at(0.28, 0.66), pt(0.4, 1)], colours.shade(coat, 0.8), 0.15 * s, PERSON)
        _draw_head(canvas, item, 0.14, 1 - 0.15 / item.h, skin, colours.paint(rng))


def _draw_head(canvas: Canvas, item: Item, u: float, v: float, skin: Colour, hair: Colour) -> None:
    r = 0.15 * item.s
    x, y = item.at(u, v)
    canvas.disc((x, y), 0.9 * r, r, skin, PERSON, colours.edge(skin))
    canvas.disc((x, y - 0.5 * r), 0.85 * r, 0.55 * r, hair, PERSON)


def _draw_pole(canvas: Canvas, rng: Rng, item: Item) -> None:
    if item.view == "post":
        _draw_shaft(canvas, rng, item, 0, 1)
        return
    metal = _draw_shaft(canvas, rng, item, -0.6, 1)
    canvas.box(item.at(-0.6, 1), item.at(1, 1 - 0.22 / item.h), metal, POLE, colours.edge(metal))
    canvas.box(item.at(0.5, 1 - 0.2 / item.h), item.at(1, 1 - 0.36 / item.h), (245, 240, 215), POLE)


def _draw_light(canvas: Canvas, rng: Rng, item: Item) -> None:
    low = 1 - 1.65 / item.h
    _draw_shaft(canvas, rng, item, 0, low + 0.02)
    case = pick(rng, ((28, 30, 30), (40, 48, 44), (60, 62, 66), (190, 150, 40), colours.paint(rng)))
    canvas.box(item.at(-1, 1), item.at(1, low), case, LIGHT, colours.edge(case))
    lit = int(rng.integers(3))
    for lamp, colour in enumerate(((230, 40, 35), (245, 180, 40), (50, 220, 110))):
        v = low + (1 - low) * (5 - 2 * lamp) / 6
        glow = colour if lamp == lit else colours.shade(colour, 0.3)
        canvas.disc(item.at(0, v), 0.22 * item.s, 0.22 * item.s, glow, edge=(15, 15, 15))


def _draw_sign(canvas: Canvas, rng: Rng, item: Item) -> None:
    half = item.w / 2 / item.h  # the plate's half height as a share of the item's height
    mid = 1 - half
    _draw_shaft(canvas, rng, item, 0, 1 - 1.6 * half)
    outlines = {
        "tri": [(-1, -0.9), (0, 1), (1, -0.9)],
        "square": [(-1, -1), (-1, 1), (1, 1), (1, -1)],
        "diamond": [(-1, 0), (0, 1), (1, 0), (0, -1)],
        "oct": [(-1, -0.4), (-1, 0.4), (-0.4, 1), (0.4, 1), (1, 0.4), (1, -0.4), (0.4, -1), (-0.4, -1)],
    }
    rim = pick(rng, ((200, 30, 35), (30, 70, 170), (230, 230, 225), colours.paint(rng)))
    face = colours.unlike(
        rng, lambda r: pick(r, ((235, 235, 230), (200, 30, 35), (30, 70, 170), (240, 200, 50), colours.paint(r))), rim
    )
    for size, colour, cls, edge in ((1.0, rim, SIGN, colours.edge(rim)), (0.74, face, None, None)):
        if item.view == "disc":
            r = size * item.w / 2 * item.s
            canvas.disc(item.at(0, mid), r, r, colour, cls, edge)
        else:
            plate = [(size * u, mid + size * v * half) for u, v in outlines[item.view]]
            canvas.poly(item.points(*plate), colour, cls, edge)
    mark = colours.unlike(rng, colours.paint, face)
    canvas.box(item.at(-0.35, mid + 0.14 * half), item.at(0.35, mid - 0.14 * half), mark)


def _draw_shaft(canvas: Canvas, rng: Rng, item: Item, u: float, top: float) -> Colour:
    """A pole from the ground up to v = `top`; returns its colour."""
    metal = colours.hsv(rng, saturation=(0, 0.35), value=(0.15, 0.8))
    half = max(_POLE_WIDTH, 0.24 * item.s) / 2
    x, y = item.at(u, 0)
    canvas.box((x - half, item.at(0, top)[1]), (x + half, y), metal, POLE)
    canvas.box((x - half, item.at(0, top)[1]), (x - 0.35 * half, y), colours.shade(metal, 1.4))
    canvas.box((x + 0.5 * half, item.at(0, top)[1]), (x + half, y), colours.shade(metal, 0.55))
    return metal


def _draw_tree(canvas: Canvas, rng: Rng, item: Item) -> None:
    bark = colours.hsv(rng, hue=(0.02, 0.12), saturation=(0.1, 0.5), value=(0.15, 0.5))
    half = 0.16 * item.s
    canvas.box((item.x - half, item.at(0, 0.6)[1]), (item.x + half, item.y), bark, VEGETATION, colours.edge(bark))
    rx, ry = item.w * item.s / 2, 0.35 * item.h * item.s
    draw_foliage(canvas, rng, item.at(0, 0.66), rx, ry, colours.leaves(rng))


def _draw_bush(canvas: Canvas, rng: Rng, item: Item) -> None:
    draw_foliage(canvas, rng, item.at(0, 0.5), item.w * item.s / 2, item.h * item.s / 2, colours.leaves(rng))


def draw_foliage(
    canvas: Canvas, rng: Rng, centre: Point, rx: float, ry: float, leaves: Colour, cls: int = VEGETATION
) -> None:
    """A crown or bush: overlapping discs, with lighter and darker clumps."""
    x, y = centre
    canvas.disc(centre, 0.85 * rx, 0.85 * ry, leaves, cls)
    for _ in range(7):
        u, v = rng.uniform(-0.6, 0.6, 2)
        canvas.disc((x + u * rx, y + v * ry), 0.42 * rx, 0.42 * ry, colours.shade(leaves, rng.uniform(0.8, 1.15)), cls)
    for _ in range(9):
        u, v = rng.uniform(-0.6, 0.6, 2)
        clump = (*colours.shade(leaves, 1.25 - 0.5 * (v + 0.6)), 150)  # lit from above
        canvas.disc((x + u * rx, y + v * ry), 0.2 * rx, 0.16 * ry, clump)


_PAINTERS = {
    "car": draw_car,
    "truck": _draw_truck,
    "person": _draw_person,
    "bicycle": _draw_bicycle,
    "pole": _draw_pole,
    "light": _draw_light,
    "sign": _draw_sign,
    "tree": _draw_tree,
    "bush": _draw_bush,
}
