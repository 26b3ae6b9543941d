"""Synthetic street scenes with per-pixel labels, drawn on demand from a seed.

The scenes stand in for a street dataset where none can be downloaded: the same kinds of region (sky, facades, road),
of object (cars, persons, with perspective and occlusion) and of small class (poles, signs), in 13 classes. Colours are
drawn from overlapping palettes, so that shape and context tell the class and colour alone does not
(``benchmarks/scene_colour_baseline.py`` measures this).

How a scene is made: one random generator decides the camera and the street, then places objects on the ground plane,
then paints everything from far to near, image and labels with the same polygons, and last adds what the camera does
(light, blur, noise). Nothing before that last step depends on the size in pixels, so a seed shows the same scene at
every size.

The files in the order of the walk: `layout`, `background`, `light`, `objects`, `camera`. They draw with `basics`,
`canvas` and `colours`, which know no class, as `camera` knows none. `context` draws other pictures with them:
landscapes whose classes only something far away tells apart.

Coordinates: the canvas is 2 wide and 1 high, x to the right, y down; other aspect ratios stretch it. A ground point is
(X, s): X in metres to the right of the camera, and s, the scale there, in canvas units per metre (larger = nearer).
Only exact arithmetic (no exp, sin or normal variates) shapes the picture, which keeps it equal across machines for one
version of numpy (its random stream) and of pillow (its rasteriser).
"""

import numpy as np

from .background import draw_ground, draw_side, draw_sky, draw_skyline
from .basics import Rng, checked
from .camera import Camera, expose
from .canvas import ASPECT, Canvas
from .classes import CLASSES, SKY, SMALL_CLASSES, VEGETATION
from .layout import Street, place_items
from .light import Sun, draw_shadow, draw_wall_shadow
from .objects import draw_item

__all__ = ["CLASSES", "SMALL_CLASSES", "render", "render_with_boxes"]


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
    height, width = checked(seed, size)
    rng = np.random.Generator(np.random.PCG64(seed))
    camera = Camera.random(rng)
    street = Street.random(rng)
    items = place_items(rng, camera, street)

    canvas = Canvas(draw_sky(rng, camera, height, width), SKY)
    draw_ground(canvas, rng, camera, street)
    draw_skyline(canvas, rng, camera, street)
    for side in (-1, 1):
        draw_side(canvas, rng, camera, street, side)
    sun = Sun.random(rng)
    draw_wall_shadow(canvas, rng, camera, street, sun)
    for item in items:
        draw_shadow(canvas, item, sun)
        draw_item(canvas, rng, item)

    labels = np.array(canvas.labels)
    image = expose(rng, canvas.image, labels, texture=_texture(rng))
    boxes = [item.box for item in reversed(items) if item.kind == "car"]
    cars = np.array(boxes, dtype=np.float64).reshape(-1, 4) * [width / ASPECT, height, width / ASPECT, height]
    return image, labels, np.clip(cars, 0, [width, height, width, height]).astype(np.float32)


def _texture(rng: Rng) -> np.ndarray:
    """Strength of each class's texture, float32 (classes,), drawn anew for each scene: a hint, and not a key."""
    strength = rng.uniform(0.02, 0.2, len(CLASSES)).astype(np.float32)
    strength[SKY] *= np.float32(0.2)
    strength[VEGETATION] += np.float32(0.25)
    return strength
