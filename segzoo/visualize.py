"""Masks and figures a person can look at: palette images, overlays, legends, panels, bar charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ._errors import SegzooError
from ._files import write_files
from .labels import LabelSet

IGNORED_COLOUR = (0, 0, 0)
BLOCK_PIXELS = 2**16  # mixed at a time, so that their floating-point temporaries stay in the cache
# What a change of a pixel's class did; blue and vermilion, which the colour-blind tell apart.
CHANGES = LabelSet(
    name="changes",
    title="changed pixels",
    classes=("changed: wrong now", "changed: right now", "changed: wrong before and now"),
    palette=((213, 60, 0), (0, 114, 178), (0, 0, 0)),
    ignore_index=255,
    source="segzoo",
    notes="",
)


def palette_image(mask_HW: np.ndarray, labels: LabelSet) -> Image.Image:
    """A mask as an image whose pixels are the class indices: palette mode, or 16-bit grey beyond 256 classes."""
    if mask_HW.dtype != np.uint8:
        return Image.fromarray(mask_HW.astype(np.uint16))
    image = Image.fromarray(mask_HW)
    colours = [*labels.palette, *[IGNORED_COLOUR] * (256 - len(labels))]
    image.putpalette([channel for colour in colours for channel in colour])
    return image


def colour_mask(mask_HW: np.ndarray, labels: LabelSet) -> np.ndarray:
    """(H, W) class indices -> (H, W, 3) uint8 colours; what is no class is black."""
    table = np.array([*labels.palette, IGNORED_COLOUR], dtype=np.uint8)
    is_class_HW = (mask_HW >= 0) & (mask_HW < len(labels))
    return table[np.where(is_class_HW, mask_HW, np.intp(len(labels)))]


def overlay(image_HWC: np.ndarray, mask_HW: np.ndarray, labels: LabelSet, alpha: float = 0.5) -> Image.Image:
    """Colours over the image: alpha 0 shows only the image, 1 only the colours."""
    H, W = mask_HW.shape
    step = max(1, BLOCK_PIXELS // W)
    mixed_HWC = np.empty((H, W, 3), dtype=np.uint8)
    for top in range(0, H, step):
        rows = slice(top, top + step)
        mixed_HWC[rows] = (image_HWC[rows] * (1 - alpha) + colour_mask(mask_HW[rows], labels) * alpha).round()
    return Image.fromarray(mixed_HWC)


def draw_borders(picture: Image.Image, mask_HW: np.ndarray) -> Image.Image:
    """A line along the borders between classes: white where the picture is dark, black where it is light."""
    H, W = mask_HW.shape
    width = max(1, min(H, W) // 512)  # pixels
    border_HW = np.zeros((H, W), dtype=bool)
    border_HW[width:] |= mask_HW[width:] != mask_HW[:-width]
    border_HW[:, width:] |= mask_HW[:, width:] != mask_HW[:, :-width]
    picture_HWC = np.array(picture)
    grey_HW = np.asarray(picture.convert("L"))
    picture_HWC[border_HW] = np.where(grey_HW[border_HW] < 128, 255, 0).astype(np.uint8)[:, None]
    return Image.fromarray(picture_HWC)


def draw_points(
    picture: Image.Image,
    lines: Sequence[tuple[Sequence[float], Sequence[float], tuple[int, int, int]]],
    points: Sequence[tuple[Sequence[float], tuple[int, int, int]]],
    *,
    size: int,
) -> Image.Image:
    """Lines, and points on top of them, each with a dark rim, so that they are seen on anything.

    Args:
        lines: (x, y) of both ends in pixels, and colour.
        points: (x, y) in pixels, and colour.
        size: radius of the points in pixels, and width of the lines.
    """
    picture = picture.convert("RGB")
    draw = ImageDraw.Draw(picture)
    rim = max(1, round(size / 4))
    ends = [((a[0], a[1], b[0], b[1]), colour) for a, b, colour in lines]
    for corners, _ in ends:
        draw.line(corners, fill="black", width=size + 2 * rim)
    for corners, colour in ends:
        draw.line(corners, fill=colour, width=size)
    for (x, y), colour in points:
        for radius, fill in ((size + rim, "black"), (size, colour)):
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    return picture


def changed_pixels(
    image_HWC: np.ndarray, before_HW: np.ndarray, after_HW: np.ndarray, truth_HW: np.ndarray
) -> Image.Image:
    """The image in pale grey, and on it, in the colours of `CHANGES`, the pixels whose class is another one after.

    Each is drawn with its eight neighbours, or single pixels would not be seen; changes for the worse lie on top.
    """
    kind_HW = np.where(before_HW == truth_HW, 0, np.where(after_HW == truth_HW, 1, 2)).astype(np.uint8)
    kind_HW[before_HW == after_HW] = CHANGES.ignore_index
    kind_HW = np.asarray(Image.fromarray(kind_HW).filter(ImageFilter.MinFilter(3)))
    grey_HW = 160 + np.asarray(Image.fromarray(image_HWC).convert("L")) // 3
    is_grey_HW = kind_HW == CHANGES.ignore_index
    return Image.fromarray(np.where(is_grey_HW[..., None], grey_HW[..., None], colour_mask(kind_HW, CHANGES)))


def legend(
    labels: LabelSet, classes: Sequence[int], width: int, *, notes: Mapping[int, str] | None = None, size: int = 11
) -> Image.Image:
    """A strip with a swatch and a name for each class: as many rows as `width` pixels need, wider if one column is.

    Args:
        notes: what stands behind the name of a class.
        size: of the letters, in pixels.
    """
    font = ImageFont.load_default(size)
    texts = [f"{labels.classes[index]}  {(notes or {}).get(index, '')}".rstrip() for index in classes]
    swatch, margin, row = size, max(2, size // 3), round(1.6 * size)
    column = max([round(font.getlength(text)) for text in texts], default=0) + swatch + 5 * margin
    columns = max(1, width // column)
    rows = max(1, -(-len(texts) // columns))
    strip = Image.new("RGB", (max(width, column), rows * row + 2 * margin), "white")
    draw = ImageDraw.Draw(strip)
    for i, (index, text) in enumerate(zip(classes, texts, strict=True)):
        x, y = i % columns * column + margin, i // columns * row + 2 * margin
        draw.rectangle((x, y, x + swatch, y + swatch), fill=labels.palette[index], outline="black")
        draw.text((x + swatch + margin, y + swatch // 2), text, fill="black", font=font, anchor="lm")
    return strip


def stack(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """One above the other, on white."""
    sheet = Image.new("RGB", (max(upper.width, lower.width), upper.height + lower.height), "white")
    sheet.paste(upper, (0, 0))
    sheet.paste(lower, (0, upper.height))
    return sheet


def panel(
    rows: Sequence[Sequence[tuple[str, Image.Image]]], footer: Image.Image | None = None, *, size: int = 11
) -> Image.Image:
    """Titled images of one size in a grid, a footer below; letters of `size` pixels."""
    width, height = rows[0][0][1].size
    font = ImageFont.load_default(size)
    title = round(1.5 * size)
    columns = max(len(row) for row in rows)
    footer_height = footer.height + 4 if footer else 0
    sheet = Image.new("RGB", (columns * width, len(rows) * (height + title) + footer_height), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (text, image) in enumerate(row):
            middle = r * (height + title) + title // 2
            draw.text((c * width + size // 3, middle), text, fill="black", font=font, anchor="lm")
            sheet.paste(image.convert("RGB"), (c * width, r * (height + title) + title))
    if footer:
        sheet.paste(footer, (0, sheet.height - footer.height))
    return sheet


def bar_chart(
    series: Mapping[str, Sequence[float]], names: Sequence[str], path: Path, *, title: str, unit: str
) -> None:
    """Write a PNG of horizontal bars: a group for each name, in it a bar for each series. Needs matplotlib.

    Args:
        series: values by the name of the series, one for each of `names`; NaN leaves a gap.
        unit: what the axis shows, "IoU in percent" for example.

    Raises:
        SegzooError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SegzooError("charts need matplotlib: pip install 'segzoo[train]'") from None
    if path.suffix.lower() != ".png":
        raise SegzooError(f"{path}: charts are saved as .png")
    thickness = 0.8 / len(series)
    figure = Figure(figsize=(8, 1.4 + len(names) * max(0.22, 0.16 * len(series))), layout="constrained")
    axes = figure.add_subplot()
    for i, (label, values) in enumerate(series.items()):
        places = [row - 0.4 + (i + 0.5) * thickness for row in range(len(names))]
        axes.barh(places, np.nan_to_num(values), height=thickness, label=label)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)  # the first name on top
    axes.set(title=title, xlabel=unit)
    axes.grid(axis="x", alpha=0.4)
    axes.set_axisbelow(True)
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(series), 4))
    write_files({path: lambda place: figure.savefig(place, format="png", dpi=120)}, overwrite=True)
