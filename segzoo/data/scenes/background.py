"""What a street scene stands before, from far to near: sky, road and sidewalks, skyline, and the two sides."""

import numpy as np
from PIL import Image

from . import colours
from .basics import Point, Rng, chance, pick
from .camera import NEAR, Camera, noise
from .canvas import ASPECT, Canvas
from .classes import BUILDING, FENCE, ROAD, SIDEWALK, VEGETATION
from .layout import Street
from .objects import draw_foliage


def draw_sky(rng: Rng, camera: Camera, height: int, width: int) -> Image.Image:
    """The whole canvas as sky: a vertical gradient (blue, grey, sunset or white) with clouds."""
    kind = rng.random()
    if kind < 0.4:  # clear
        top = colours.hsv(rng, hue=(0.54, 0.63), saturation=(0.2, 0.7), value=(0.55, 0.95))
        bottom = colours.hsv(rng, hue=(0.5, 0.65), saturation=(0.02, 0.3), value=(0.75, 1))
    elif kind < 0.6:  # sunset
        top = colours.hsv(rng, hue=(0.6, 0.85), saturation=(0.1, 0.5), value=(0.35, 0.8))
        bottom = colours.hsv(rng, hue=(-0.03, 0.14), saturation=(0.2, 0.7), value=(0.6, 1))
    else:  # overcast
        top = colours.hsv(rng, hue=(0.5, 0.7), saturation=(0, 0.15), value=(0.35, 0.95))
        bottom = colours.shade(top, rng.uniform(0.85, 1.3))
    cover = rng.uniform(0, 110)
    clouds = noise(rng, (5, 8), height, width)[..., None]
    t = np.minimum((np.arange(height, dtype=np.float32) + 0.5) / (height * camera.horizon), 1)[:, None, None]
    sky = np.array(top, np.float32) * (1 - t) + np.array(bottom, np.float32) * t + clouds * np.float32(cover)
    return Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))


def draw_ground(canvas: Canvas, rng: Rng, camera: Camera, street: Street) -> None:
    """Road with markings, and a sidewalk with a kerb and joints on each side."""
    road = colours.asphalt(rng)
    canvas.box((0, camera.horizon), (ASPECT, 1), road, ROAD)
    for _ in range(int(rng.integers(4))):  # repairs
        x, s, length = rng.uniform(*street.kerb), rng.uniform(0.08, 0.3), rng.uniform(1.1, 2)
        patch = (*colours.shade(road, rng.uniform(0.5, 1.5)), 130)
        canvas.poly(camera.strip(x, x + rng.uniform(0.6, 2), s, s * length), patch)
    _draw_markings(canvas, rng, camera, street)

    walk = colours.unlike(rng, pick(rng, (colours.asphalt, colours.masonry)), road)
    kerb_colour = colours.shade(walk, pick(rng, (0.6, 1.35)))
    joint = (*colours.edge(walk), 110)
    tile = rng.uniform(0.7, 1.3)
    for kerb, back in zip(street.kerb, street.back, strict=True):
        out = 1 if back > kerb else -1
        canvas.poly(camera.strip(kerb, back + out, street.end, NEAR), walk, SIDEWALK)
        for metres in np.arange(0.3 + tile, abs(back - kerb), tile):
            x = kerb + out * float(metres)
            canvas.line([camera.at(x, 0, street.end), camera.at(x, 0, NEAR)], joint, 0.003)
        for metres in np.arange(1.5, 10, tile):
            s = 1 / float(metres)
            canvas.line([camera.at(kerb, 0, s), camera.at(back + out, 0, s)], joint, 0.003)
        canvas.poly(camera.strip(kerb, kerb + out * 0.3, street.end, NEAR), kerb_colour, SIDEWALK)


def _draw_markings(canvas: Canvas, rng: Rng, camera: Camera, street: Street) -> None:
    paint = pick(rng, ((225, 225, 220), (200, 200, 190), (225, 190, 70)))
    left, right = street.kerb
    dash, gap = rng.uniform(1.5, 3), rng.uniform(1, 3)
    start = rng.uniform(1.5, 3)
    for near in np.arange(start, 0.9 / street.end, dash + gap):
        middle = (left + right) / 2
        canvas.poly(camera.strip(middle - 0.1, middle + 0.1, 1 / (near + dash), 1 / near), paint)
    if chance(rng, 0.5):
        for x in (left + 0.35, right - 0.5):
            canvas.poly(camera.strip(x, x + 0.15, street.end, NEAR), paint)
    if chance(rng, 0.35):  # zebra crossing
        near = rng.uniform(3, 6)
        for x in np.arange(left + 0.5, right - 0.7, 1.0):
            canvas.poly(camera.strip(x, x + 0.5, 1 / (near + 2), 1 / near), paint)


def draw_skyline(canvas: Canvas, rng: Rng, camera: Camera, street: Street) -> None:
    """Houses and trees across the far end of the street."""
    base = camera.at(0, 0, street.end)[1]
    x = -rng.uniform(0, 0.2)
    while x < ASPECT:
        w = rng.uniform(0.14, 0.36)
        if chance(rng, 0.3):
            draw_foliage(canvas, rng, (x + w / 2, base - 0.06), w * 0.6, rng.uniform(0.07, 0.12), colours.leaves(rng))
        else:
            _draw_facade(canvas, rng, (x, base), w, rng.uniform(0.1, 0.26))
        x += w


def draw_side(canvas: Canvas, rng: Rng, camera: Camera, street: Street, side: int) -> None:
    """What stands behind the sidewalk, on the left (side -1) or the right (1), and the fence before it."""
    kind, back = street.sides[side > 0], street.back[side > 0]
    if kind == "houses":
        _draw_houses(canvas, rng, camera, street, back)
    else:
        grass = colours.leaves(rng)
        canvas.poly(camera.strip(back, back + side * 80, street.end, NEAR), grass, VEGETATION)
        if kind == "open":
            s = rng.uniform(0.04, 0.07)
            x, y = camera.at(back + side * rng.uniform(2, 5), 0, s)
            w = rng.uniform(7, 11) * s
            _draw_facade(canvas, rng, (x if side > 0 else x - w, y), w, rng.uniform(4, 6) * s)
        leaves = colours.leaves(rng)
        for s in np.sort(rng.uniform(street.end, 0.13, 7 if kind == "park" else 3)):
            x, y = camera.at(back + side * rng.uniform(1.5, 5), 0, s)
            r = rng.uniform(1.6, 2.8) * s
            canvas.box((x - 0.22 * s, y - 2.4 * s), (x + 0.22 * s, y), (70, 52, 40), VEGETATION)
            draw_foliage(canvas, rng, (x, y - 1.6 * s - r), r, r * rng.uniform(0.8, 1.2), colours.shade(leaves, 0.9))
    if chance(rng, 0.55 if kind == "houses" else 0.85):
        far = max(street.end, rng.uniform(0.03, 0.07))
        near = min(NEAR, far * rng.uniform(2.5, 8))
        _draw_fence(canvas, rng, camera, back - side * 0.1, far, near)


def _draw_facade(canvas: Canvas, rng: Rng, foot: Point, w: float, h: float) -> None:
    """A house front that faces the camera; `foot` is its lower left corner."""
    wall = colours.masonry(rng)
    x, y = foot
    if chance(rng, 0.5):  # pitched roof
        roof = colours.unlike(rng, colours.masonry, wall)
        ridge = [(x, y - h), (x + 0.25 * w, y - 1.35 * h), (x + 0.75 * w, y - 1.35 * h), (x + w, y - h)]
        canvas.poly(ridge, roof, BUILDING, colours.edge(roof))
    canvas.box((x, y - h), (x + w, y), wall, BUILDING, colours.edge(wall))
    glass = colours.unlike(rng, colours.paint, wall)
    columns, floors = max(1, int(w / 0.06)), max(1, int(h / 0.07))
    pitch_x, pitch_y = w / columns, h / floors
    for column in range(columns):
        for floor in range(floors):
            corner = (x + (column + 0.25) * pitch_x, y - h + (floor + 0.25) * pitch_y)
            canvas.box(corner, (corner[0] + 0.5 * pitch_x, corner[1] + 0.55 * pitch_y), glass)


def _draw_houses(canvas: Canvas, rng: Rng, camera: Camera, street: Street, back: float) -> None:
    """A row of facades along the street, in perspective."""
    depth = 1 / street.end
    while depth > 1 / NEAR:
        nearer = max(depth - rng.uniform(5, 12), 1 / NEAR)
        if nearer < 3 / NEAR:  # no slivers at the edge of the frame
            nearer = 1 / NEAR
        _draw_wall(canvas, rng, camera, back, depth, nearer, rng.uniform(5, 14))
        depth = nearer


def _draw_wall(
    canvas: Canvas,
    rng: Rng,
    camera: Camera,
    x: float,
    far: float,
    near: float,
    height: float,
) -> None:
    """One facade at X = `x` from depth `far` to `near` (metres), with floors of windows over a shop front."""

    def face(z0: float, z1: float, low: float, high: float) -> list[Point]:
        corners = ((z0, low), (z0, high), (z1, high), (z1, low))
        return [camera.at(x, up, 1 / z) for z, up in corners]

    wall = colours.masonry(rng)
    canvas.poly(face(far, near, 0, height), wall, BUILDING, colours.edge(wall))
    glass, frame = colours.unlike(rng, colours.paint, wall), colours.shade(wall, pick(rng, (0.6, 1.4)))
    canvas.poly(face(far, near, height - 0.4, height), frame)
    columns, floors = max(1, int((far - near) / rng.uniform(2, 3.2))), int(height / 3)
    pitch = (far - near) / columns
    for column in range(columns):
        z = near + column * pitch
        for floor in range(1, floors):
            window = face(z + 0.8 * pitch, z + 0.2 * pitch, 3 * floor + 0.5, 3 * floor + 2.2)
            if window[1][1] < 1 and window[3][1] > 0:
                canvas.poly(window, colours.shade(glass, rng.uniform(0.7, 1.2)))
    shop = colours.paint(rng)
    canvas.poly(face(far, near, 2.5, 2.9), shop)  # awning or sign board
    for column in range(columns):
        z = near + column * pitch
        canvas.poly(face(z + 0.85 * pitch, z + 0.15 * pitch, pick(rng, (0, 0.6)), 2.3), colours.shade(shop, 0.6))


def _draw_fence(canvas: Canvas, rng: Rng, camera: Camera, x: float, far: float, near: float) -> None:
    """A fence along the street at X = `x`, labelled as one band; panels, or bars one can look through."""
    height = rng.uniform(1.1, 1.5)
    colour = colours.paint(rng)
    base = [camera.at(x, 0, far), camera.at(x, 0, near)]
    top = [camera.at(x, height, far), camera.at(x, height, near)]
    bar = colours.edge(colour)
    canvas.poly([*base, *top[::-1]], (*colour, pick(rng, (120, 255))), FENCE)
    for z in np.arange(1 / near, 1 / far, rng.uniform(0.35, 0.6)):
        s = 1 / float(z)
        canvas.line([camera.at(x, 0, s), camera.at(x, height, s)], bar, 0.09 * s)
    for rail in (base, top):
        canvas.line(rail, bar, 0.01, FENCE)
