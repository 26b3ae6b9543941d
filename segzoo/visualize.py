"""Masks a person can look at: palette images, overlays, legends, panels."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .labels import LabelSet

IGNORED_COLOUR = (0, 0, 0)
BLOCK_PIXELS = 2**16  # mixed at a time, so that their floating-point temporaries stay in the cache


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


def legend(labels: LabelSet, classes: Sequence[int], width: int) -> Image.Image:
    """A strip with a swatch and a name for each class, as many rows as `width` pixels need."""
    font = ImageFont.load_default()
    row, column = 18, 130
    columns = max(1, width // column)
    image = Image.new("RGB", (width, row * max(1, -(-len(classes) // columns))), "white")
    draw = ImageDraw.Draw(image)
    for i, index in enumerate(classes):
        x, y = i % columns * column + 4, i // columns * row + 3
        draw.rectangle((x, y, x + 12, y + 11), fill=labels.palette[index], outline="black")
        draw.text((x + 18, y), labels.classes[index], fill="black", font=font)
    return image


def panel(rows: Sequence[Sequence[tuple[str, Image.Image]]], footer: Image.Image | None = None) -> Image.Image:
    """Titled images of one size in a grid, a footer below."""
    width, height = rows[0][0][1].size
    title = 16
    columns = max(len(row) for row in rows)
    footer_height = footer.height + 4 if footer else 0
    sheet = Image.new("RGB", (columns * width, len(rows) * (height + title) + footer_height), "white")
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        for c, (text, image) in enumerate(row):
            draw.text((c * width + 4, r * (height + title) + 2), text, fill="black", font=ImageFont.load_default())
            sheet.paste(image.convert("RGB"), (c * width, r * (height + title) + title))
    if footer:
        sheet.paste(footer, (0, sheet.height - footer.height))
    return sheet
