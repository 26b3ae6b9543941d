"""What came out: the mask of an image with names and colours of its classes, or its keypoints with theirs, and the
forms in which people use them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import regions, visualize
from ._errors import SaveError, SegzooError
from ._files import write_files
from .keypoints import Skeleton
from .labels import LabelSet
from .plans import Plan

if TYPE_CHECKING:
    from .models.base import WeightsState

LEGEND_CLASSES = 40  # the largest; a legend of more would bury the picture
SHOWN_PIXELS = 1600  # long side of what a notebook shows
PHOTO_COMPRESSION = 2  # zlib's level; of a photograph its usual 6 takes four times as long for a seventh less
MIN_SCORE = 0.3  # of the keypoints that are drawn: a sure one has about 1
# Of the person's left and right side and of what is on neither; vermilion and blue, which the colour-blind tell apart.
SIDES = {"left": (0, 114, 178), "right": (213, 60, 0), "": (240, 228, 66)}


class PresentLabel(NamedTuple):
    """A class that occurs in a mask."""

    index: int
    name: str
    pixels: int


class Area(NamedTuple):
    """How much of a mask a class covers."""

    pixels: int
    share: float  # of all pixels, 0 to 1


class SavedFiles(NamedTuple):
    """Where a result is on disk."""

    mask: Path  # PNG in palette mode, pixel value = class
    overlay: Path  # PNG
    classes: Path  # JSON: `Segmentation.to_dict`, with index, name and colour of the classes

    @classmethod
    def of(cls, mask: Path) -> SavedFiles:
        """The places of all files of a result whose mask is saved there."""
        return cls(mask, mask.with_name(f"{mask.stem}_overlay.png"), mask.with_name(f"{mask.stem}_classes.json"))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """A predicted mask of one image, at the image's own size."""

    mask: np.ndarray  # (H, W) class indices, uint8 up to 256 classes, else uint16
    label_set: LabelSet  # names and colours of the classes
    image: np.ndarray  # (H, W, 3) uint8, the upright image that the mask belongs to
    source: str  # file name, or the kind of object given
    model: str  # name of the model
    weights_state: WeightsState  # of the model: with other than "pretrained" ones a mask means nothing
    plan: Plan  # inference reduction that was in force
    _full_scores: Callable[[], Tensor] | None  # None in a copy

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {_percent(area.share)}" for name, area in list(self.areas().items())[:3])
        more = len(self.labels) - 3
        H, W = self.mask.shape
        return (
            f"<Segmentation of {os.path.basename(self.source)} ({H}x{W}) by {self.model}: {shown}"
            + (f", {more} more" if more > 0 else "")
            + ("" if self.weights_state == "pretrained" else f"; {self.weights_state}")
            + ">"
        )

    @property
    def labels(self) -> list[PresentLabel]:
        """Classes present, most pixels first."""
        counts = np.bincount(self.mask.ravel(), minlength=len(self.label_set))
        present = sorted(np.flatnonzero(counts), key=lambda index: -counts[index])
        return [PresentLabel(int(i), self.label_set.classes[i], int(counts[i])) for i in present]

    def areas(self) -> dict[str, Area]:
        """Class name -> its pixels and its share of the image, of the classes present, the largest first."""
        return {label.name: Area(label.pixels, label.pixels / self.mask.size) for label in self.labels}

    def scores(self) -> Tensor:
        """(K, H, W) float32 on the CPU, made on request: logits, or for SegViT products of probabilities; of several
        views (`scales`, `flip`) the mean probabilities of any model."""
        if self._full_scores is None:
            raise SegzooError("a copied or pickled Segmentation has no scores; take scores() of the original")
        with torch.inference_mode():
            scores_KHW = self._full_scores()[0]
        return scores_KHW.float().clone()  # an ordinary tensor of the caller's own

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_full_scores": None}

    def to_rle(self) -> dict[str, dict[str, Any]]:
        """Class name -> COCO's compressed run lengths, {"size": [H, W], "counts": text}; pycocotools reads them."""
        return {self.label_set.classes[index]: rle for index, rle in regions.to_rle(self.mask).items()}

    def polygons(self) -> dict[str, list[np.ndarray]]:
        """Class name -> closed rings, each (N, 2) corners (x, y) in pixels, along the edges of the pixels.

        Outer rings go clockwise as one sees them, rings around holes counter-clockwise; filled by the even-odd rule,
        the rings of a class cover it exactly.
        """
        return {self.label_set.classes[index]: rings for index, rings in regions.to_polygons(self.mask).items()}

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: the image, the model with its reduction, and the classes present, the largest first."""
        return {
            "image": self.source,
            "size": list(self.mask.shape),
            "model": self.model,
            "weights_state": self.weights_state,
            "reduction": json.loads(self.plan.to_json()),
            "classes": class_records(self.label_set, np.bincount(self.mask.ravel(), minlength=len(self.label_set))),
        }

    def overlay(self, alpha: float = 0.5, *, legend: bool = False) -> Image.Image:
        """The image with the classes' colours over it; alpha from 0 (image) to 1 (colours).

        Between the two, borders of classes are drawn, white or black against what they lie on. A legend below names
        the colours and says how much they cover; letters are large enough for the image seen as a whole.
        """
        if not 0 <= alpha <= 1:
            raise SegzooError(f"alpha must be between 0 and 1, not {alpha!r}")
        picture = visualize.overlay(self.image, self.mask, self.label_set, alpha)
        if 0 < alpha < 1:
            picture = visualize.draw_borders(picture, self.mask)
        if not legend:
            return picture
        labels = self.labels[:LEGEND_CLASSES]
        notes = {label.index: _percent(label.pixels / self.mask.size) for label in labels}
        size = min(64, max(11, round(min(self.mask.shape) / 28)))
        strip = visualize.legend(
            self.label_set, [label.index for label in labels], picture.width, notes=notes, size=size
        )
        return visualize.stack(picture, strip)

    def show(self) -> None:
        """Open the overlay and its legend in the system's image viewer."""
        self.overlay(legend=True).show()

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the overlay and its legend, at most SHOWN_PIXELS on the long side."""
        return _shown_png(self.overlay(legend=True))

    def save(self, path: str | Path, *, alpha: float = 0.5, legend: bool = True, overwrite: bool = False) -> SavedFiles:
        """Write the mask (PNG in palette mode, pixel value = class), the overlay `<name>_overlay.png`, and
        `<name>_classes.json`, which says what the pixel values mean.

        Each file appears whole or not at all, and no file is ever written over the image itself.

        Args:
            path: of the mask; its name ends in .png.
            alpha, legend: of the overlay.
            overwrite: take the place of files that exist.

        Raises:
            SaveError: a file exists, is the image itself, or cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise SaveError(f"{path}: masks are saved as .png, because lossy formats would change classes")
        files = SavedFiles.of(path)
        _refuse_image_itself(files, self.source)
        picture = self.overlay(alpha, legend=legend)
        write_files(
            {
                files.mask: lambda place: _save_png(visualize.palette_image(self.mask, self.label_set), place),
                files.overlay: lambda place: picture.save(place, format="PNG", compress_level=PHOTO_COMPRESSION),
                files.classes: lambda place: place.write_text(json.dumps(self.to_dict(), indent=1) + "\n"),
            },
            overwrite=overwrite,
        )
        return files


def class_records(label_set: LabelSet, pixels_K: np.ndarray) -> list[dict[str, Any]]:
    """What JSON says of the classes that occur, the largest first.

    Args:
        pixels_K: how many pixels each class has.
    """
    return [
        {
            "index": int(index),
            "name": label_set.classes[index],
            "colour": list(label_set.palette[index]),
            "pixels": int(pixels_K[index]),
            "share": int(pixels_K[index]) / int(pixels_K.sum()),
        }
        for index in sorted(np.flatnonzero(pixels_K), key=lambda index: -pixels_K[index])
    ]


class SavedPose(NamedTuple):
    """Where the keypoints of an image are on disk."""

    picture: Path  # PNG: the image with the skeleton
    keypoints: Path  # JSON: `Pose.to_dict`

    @classmethod
    def of(cls, picture: Path) -> SavedPose:
        """The places of both files of a result whose picture is saved there."""
        return cls(picture, picture.with_name(f"{picture.stem}_keypoints.json"))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Pose:
    """The keypoints found in an image, or in a part of it."""

    xy: Tensor  # (K, 2) positions in pixels of the image, as in `segzoo.keypoints`; float32 on the CPU
    score: Tensor  # (K,) height of the heatmap's peak, about 1 for a sure keypoint and 0 for none
    skeleton: Skeleton  # names of the keypoints, and the lines between them
    image: np.ndarray  # (H, W, 3) uint8, the upright image
    box: tuple[int, int, int, int]  # (x0, y0, x1, y1) of the part that was looked at, in pixels
    source: str  # file name, or the kind of object given
    model: str  # name of the model
    weights_state: WeightsState  # of the model: with other than "pretrained" ones positions mean nothing
    plan: Plan  # inference reduction that was in force

    def __repr__(self) -> str:
        H, W = self.image.shape[:2]
        state = "" if self.weights_state == "pretrained" else f"; {self.weights_state}"
        return f"<Pose in {os.path.basename(self.source)} ({H}x{W}) by {self.model}: {self.summary()}{state}>"

    def summary(self, min_score: float = MIN_SCORE) -> str:
        """How many keypoints have at least this score, in words."""
        seen = int((self.score >= min_score).sum())
        return f"{seen} of {len(self.score)} keypoints with a score of at least {min_score:g}"

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold: the image, the model with its reduction, and every keypoint with name, x, y and score.

        x and y are in pixels of the image, to a thousandth; the first pixel's centre is (0.5, 0.5).
        """
        return {
            "image": self.source,
            "size": list(self.image.shape[:2]),
            "model": self.model,
            "weights_state": self.weights_state,
            "reduction": json.loads(self.plan.to_json()),
            "box": list(self.box),
            "keypoints": [
                {"name": name, "x": round(x, 3), "y": round(y, 3), "score": round(score, 4)}
                for name, (x, y), score in zip(
                    self.skeleton.keypoints, self.xy.tolist(), self.score.tolist(), strict=True
                )
            ],
            "edges": [list(edge) for edge in self.skeleton.edges],
        }

    def overlay(self, min_score: float = MIN_SCORE) -> Image.Image:
        """The image with the keypoints of at least this score and the lines between them: the person's left side blue,
        the right one red, the rest yellow."""
        names, xy = self.skeleton.keypoints, self.xy.tolist()
        seen = (self.score >= min_score).tolist()
        sides = [next((side for side in ("left", "right") if name.startswith(side)), "") for name in names]
        lines = [
            (xy[a], xy[b], SIDES[sides[a] if sides[a] == sides[b] else ""])
            for a, b in self.skeleton.pairs()
            if seen[a] and seen[b]
        ]
        points = [(xy[k], SIDES[sides[k]]) for k in range(len(xy)) if seen[k]]
        x0, y0, x1, y1 = self.box
        size = max(1, round(max(x1 - x0, y1 - y0) / 120))
        return visualize.draw_points(Image.fromarray(self.image), lines, points, size=size)

    def show(self) -> None:
        """Open the overlay in the system's image viewer."""
        self.overlay().show()

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the overlay, at most SHOWN_PIXELS on the long side."""
        return _shown_png(self.overlay())

    def save(self, path: str | Path, *, min_score: float = MIN_SCORE, overwrite: bool = False) -> SavedPose:
        """Write the overlay (PNG), and `<name>_keypoints.json`, which is `to_dict` and has every keypoint.

        Both files appear whole or not at all, and neither is ever written over the image itself.

        Args:
            path: of the picture; its name ends in .png.
            min_score: of the keypoints that are drawn.
            overwrite: take the place of files that exist.

        Raises:
            SaveError: a file exists, is the image itself, or cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise SaveError(f"{path}: pictures of keypoints are saved as .png")
        files = SavedPose.of(path)
        _refuse_image_itself(files, self.source)
        picture = self.overlay(min_score)
        write_files(
            {
                files.picture: lambda place: picture.save(place, format="PNG", compress_level=PHOTO_COMPRESSION),
                files.keypoints: lambda place: place.write_text(json.dumps(self.to_dict(), indent=1) + "\n"),
            },
            overwrite=overwrite,
        )
        return files


def write_png(image: Image.Image, path: Path) -> None:
    """Write a PNG, or write it anew, with the folders that it needs; it appears whole or not at all."""
    write_files({path: lambda place: _save_png(image, place)}, overwrite=True)


def _save_png(image: Image.Image, path: Path) -> None:
    image.save(path, format="PNG")


def _shown_png(picture: Image.Image) -> bytes:
    picture.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _refuse_image_itself(files: Sequence[Path], source: str) -> None:
    for file in files:
        if _is_same_file(file, source):
            raise SaveError(f"{file} is the image itself; choose another place for its results")


def _is_same_file(path: Path, source: str) -> bool:
    try:
        return os.path.samefile(path, source)
    except (OSError, ValueError):  # one of them is no file
        return False


def _percent(share: float) -> str:
    return "<1 %" if share < 0.005 else f"{100 * share:.0f} %"
