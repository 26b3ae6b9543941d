"""What `explain` found, and its PNGs: heat over a grey image, and tokens as regions.

Shape letters: H, W rows and columns of a map or picture, Q queries that are looked at.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .._files import write_files
from ..layers.reduction import NEUTRAL, entry_to_text
from ..plans import Plan
from ..visualize import panel

WIDTH = 512  # pixels of a picture, at least half and at most as many
# From none to most: black, purple, red, orange, pale yellow. Dark to light, so that it is read without its colours.
HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], dtype=np.float32)
SMALLEST_BORDERED = 100  # pixels of a region; borders of smaller ones would hide them
OPACITY = 0.65  # of heat
LEFT_OUT = (60, 60, 60)  # positions of which no token knows


@dataclasses.dataclass(frozen=True)
class View:
    """What one block did. Maps have cells of the block's own stride."""

    attention: np.ndarray  # (Q, H, W) float32: of each query, mean over heads, sums to 1
    features: np.ndarray  # (H, W) float32: length of what the attention adds to each position
    keys: np.ndarray  # (H, W) int64: number of the key and value token of each position; -1 for those left out
    queries: np.ndarray  # (H, W) int64: number of the query token of each position
    similarity: Mapping[str, np.ndarray]  # SegViT's mask of each class that it found, 0 to 1, (H, W) float32


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What `explain` found; `save` draws it."""

    site: str
    block: str  # name of the attention in the model
    plan: Plan
    image: np.ndarray  # (H, W, 3) uint8, at the size that the model sees
    covered_size: tuple[int, int]  # (H, W) in pixels that every map covers, padding at the bottom and right included
    queries: tuple[tuple[int, int], ...]  # (row, column) in pixels of `image`
    without: View
    reduced: View

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write `attention.png`, `features.png`, `tokens.png` and, of SegViT, `similarity.png`.

        Raises:
            SegzooError: a file exists and `overwrite` is not set, or one cannot be written.
        """
        return _save(self, Path(folder), overwrite=overwrite)


def seen_image(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The image at the size that the model sees, as (H, W, 3) uint8; of many bands the first."""
    channels = image_HWC if image_HWC.shape[2] == 3 else image_HWC[..., :1].repeat(3, axis=2)
    return np.asarray(Image.fromarray(channels).resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _save(shown: Explanation, folder: Path, *, overwrite: bool) -> list[Path]:
    """Write every picture that there is something for; all or none."""
    drawn = {"attention": _attention(shown), "features": _features(shown), "tokens": _tokens(shown)}
    if shown.without.similarity:
        drawn["similarity"] = _similarity(shown)
    places = {folder / f"{name}.png": picture for name, picture in drawn.items()}
    writers = {
        path: lambda place, picture=picture: picture.save(place, format="PNG") for path, picture in places.items()
    }
    write_files(writers, overwrite=overwrite)
    return list(places)


def _attention(shown: Explanation) -> Image.Image:
    """A row a query: where it stands, and its attention; both maps of a row from their least to their largest value."""
    rows = []
    for i, point in enumerate(shown.queries):
        maps = [view.attention[i] for view in (shown.without, shown.reduced)]
        titles = _titles(shown, ["attention", "attention"])
        heats = [_marked(heat, shown, point) for heat in _heats(shown, maps)]
        rows.append([(f"query {point[0]}, {point[1]}", _marked(_base(shown), shown, point)), *_pairs(titles, heats)])
    return panel(rows)


def _features(shown: Explanation) -> Image.Image:
    """How much the attention adds to each position, to one scale, and by how much the reduction changes that."""
    maps = [view.features for view in (shown.without, shown.reduced)]
    change = abs(maps[1] - maps[0])
    title = f"difference, mean {100 * change.mean() / maps[0].mean():.2g} % of the features"
    shown_change = (title, _heat(shown, change, 0, change.max()))
    return panel([[*_pairs(_titles(shown, ["attended features"] * 2), _heats(shown, maps)), shown_change]])


def _tokens(shown: Explanation) -> Image.Image:
    """Every token as a region in the mean colour of its pixels; a second row where queries are merged."""

    def row(name: str, kind: str) -> list[tuple[str, Image.Image]]:
        numbers = [getattr(view, name) for view in (shown.without, shown.reduced)]
        titles = _titles(shown, [f"{values.max() + 1} {kind}" for values in numbers])
        return [("image", _base(shown)), *_pairs(titles, [_regions(shown, values) for values in numbers])]

    rows = [row("keys", "keys and values")]
    if shown.reduced.queries.max() != shown.without.queries.max():
        rows.append(row("queries", "queries"))
    return panel(rows)


def _similarity(shown: Explanation) -> Image.Image:
    """A row a class: how similar each position is to the class's query, as SegViT's masks say; 0 is dark, 1 light."""
    rows = []
    for name, values in shown.without.similarity.items():
        titles = _titles(shown, [name] * 2)
        heats = [_heat(shown, masks, 0, 1) for masks in (values, shown.reduced.similarity[name])]
        rows.append(_pairs(titles, heats))
    return panel(rows)


def _pairs(titles: Sequence[str], images: Sequence[Image.Image]) -> list[tuple[str, Image.Image]]:
    return list(zip(titles, images, strict=True))


def _titles(shown: Explanation, texts: Sequence[str]) -> list[str]:
    entries = [shown.plan[site] for site in (shown.site, f"{shown.site}.q") if site in shown.plan]
    plan = ", ".join(entry_to_text(entry) for entry in entries if entry != NEUTRAL)
    return [f"{texts[0]}: without", f"{texts[1]}: {plan or 'with the plan elsewhere'}"]


def _shape(shown: Explanation) -> tuple[int, int]:
    """(W, H) of a picture, as PIL has them."""
    H, W = shown.image.shape[:2]
    width = min(WIDTH, max(W, WIDTH // 2))
    return width, max(1, round(H * width / W))


def _base(shown: Explanation) -> Image.Image:
    return Image.fromarray(shown.image).resize(_shape(shown), Image.Resampling.LANCZOS)


def _spread(shown: Explanation, map_HW: np.ndarray) -> np.ndarray:
    """A map's cells over the pixels of a picture, without the padding, each pixel as its cell."""
    width, height = _shape(shown)
    H, W = map_HW.shape
    share_H, share_W = (side / covered for side, covered in zip(shown.image.shape[:2], shown.covered_size, strict=True))
    rows = ((np.arange(height) + 0.5) / height * share_H * H).astype(int)
    columns = ((np.arange(width) + 0.5) / width * share_W * W).astype(int)
    return map_HW[rows][:, columns]


def _heats(shown: Explanation, maps: Sequence[np.ndarray]) -> list[Image.Image]:
    """Maps to one scale, from the least to the largest value of all."""
    low, high = min(map_HW.min() for map_HW in maps), max(map_HW.max() for map_HW in maps)
    return [_heat(shown, map_HW, low, high) for map_HW in maps]


def _heat(shown: Explanation, map_HW: np.ndarray, low: float, high: float) -> Image.Image:
    """Heat over the grey image, from `low` to `high`."""
    values_HW = np.clip((_spread(shown, map_HW) - low) / max(high - low, 1e-12), 0, 1)
    place_HW = values_HW * (len(HEAT) - 1)
    below_HW = np.minimum(place_HW.astype(int), len(HEAT) - 2)
    share_HW1 = (place_HW - below_HW)[..., None]
    colour_HWC = HEAT[below_HW] * (1 - share_HW1) + HEAT[below_HW + 1] * share_HW1
    grey_HW1 = np.asarray(_base(shown).convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((grey_HW1 * (1 - OPACITY) + colour_HWC * OPACITY).round().astype(np.uint8))


def _regions(shown: Explanation, tokens_HW: np.ndarray) -> Image.Image:
    token_HW = _spread(shown, tokens_HW)
    picture_HWC = np.asarray(_base(shown), dtype=np.float64)
    taken_HW = token_HW >= 0
    counts = np.bincount(token_HW[taken_HW]).clip(min=1)
    means = [np.bincount(token_HW[taken_HW], weights=picture_HWC[..., c][taken_HW]) / counts for c in range(3)]
    coloured_HWC = np.stack([mean[token_HW.clip(min=0)] for mean in means], axis=-1)
    coloured_HWC[~taken_HW] = LEFT_OUT
    if counts.mean() >= SMALLEST_BORDERED:
        border_HW = np.zeros(token_HW.shape, dtype=bool)
        border_HW[1:] |= token_HW[1:] != token_HW[:-1]
        border_HW[:, 1:] |= token_HW[:, 1:] != token_HW[:, :-1]
        coloured_HWC[border_HW] *= 0.4
    return Image.fromarray(coloured_HWC.round().astype(np.uint8))


def _marked(picture: Image.Image, shown: Explanation, point: tuple[int, int]) -> Image.Image:
    """A ring around a query, white in black."""
    picture = picture.convert("RGB")
    H, W = shown.image.shape[:2]
    x, y = (point[1] + 0.5) * picture.width / W, (point[0] + 0.5) * picture.height / H
    draw = ImageDraw.Draw(picture)
    for radius, colour, width in ((7, "black", 4), (6, "white", 2)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour, width=width)
    return picture
