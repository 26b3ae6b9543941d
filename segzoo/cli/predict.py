"""`segzoo predict`: a mask and an overlay for each image."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import ImageError, SegzooError
from ..zoo.index import check_name
from .arguments import DEFAULT_MODEL, add_engine, positive
from .loading import score_maker_of
from .output import print_json, progress

if TYPE_CHECKING:
    from ..results import Segmentation

SUMMARY = "write a mask and an overlay for each image"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or name.tag (default: %(default)s)")
    parser.add_argument("--checkpoint", metavar="FILE", help="weights to load instead of the published ones")
    parser.add_argument("--num-classes", type=positive, metavar="K", help="classes of the checkpoint")
    parser.add_argument("--reduction", metavar="PLAN", help="preset, whole number, or JSON dict")
    parser.add_argument("--resize", type=positive, nargs=2, metavar=("H", "W"), help="exact size that the model sees")
    parser.add_argument("--mode", choices=("whole", "slide"), help="whole image or sliding window")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="average over these scales")
    parser.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    parser.add_argument("--alpha", type=float, default=0.5, help="strength of the overlay's colours, 0 to 1")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.alpha <= 1:
        raise SegzooError(f"--alpha must be between 0 and 1, not {args.alpha}")
    paths = output_paths(args.images, args.output)
    if args.engine_file is None:
        check_name(args.model)  # before torch is loaded
    from ..prediction import predict

    model = score_maker_of(args)
    resize = tuple(args.resize) if args.resize else None
    done, errors = [], []
    for source, path in progress(list(zip(args.images, paths, strict=True)), as_json=args.json):
        try:
            result = predict(model, source, resize=resize, mode=args.mode, scales=args.scales, flip=args.flip)
        except ImageError as error:
            errors.append(str(error))
            print(f"segzoo: error: {error}", file=sys.stderr)
            continue
        mask_path, overlay_path = result.save(path, alpha=args.alpha)
        done.append(_as_dict(result, mask_path, overlay_path))
    if args.json:
        print_json({"model": args.engine_file or args.model, "images": done, "errors": errors})
    else:
        for item in done:
            _print_text(item)
    return 2 if errors else 0


def output_paths(images: Sequence[str], folder: Path) -> list[Path]:
    """One mask file per image; where its name or that of its overlay is taken, it gets a number.

    Raises:
        SegzooError: a mask or an overlay would take the place of an image.
    """
    inputs = {os.path.realpath(image) for image in images}
    used: set[Path] = set()
    paths = []
    for image in images:
        name, number = Path(image).stem, 2
        while used.intersection(outputs := (folder / f"{name}.png", folder / f"{name}_overlay.png")):
            name, number = f"{Path(image).stem}-{number}", number + 1
        for output in outputs:
            if os.path.realpath(output) in inputs:
                raise SegzooError(f"{output} is one of the images and would be overwritten; give another folder as -o")
        used.update(outputs)
        paths.append(outputs[0])
    return paths


def _as_dict(result: Segmentation, mask_path: Path, overlay_path: Path) -> dict[str, Any]:
    return {
        "image": result.source,
        "mask": str(mask_path),
        "overlay": str(overlay_path),
        "size": list(result.mask.shape),
        "labels": [label._asdict() for label in result.labels],
        "reduction": json.loads(result.plan.to_json()),
    }


def _print_text(item: dict[str, Any]) -> None:
    """One line an image, from `_as_dict`: its six largest labels with their share."""
    pixels = item["size"][0] * item["size"][1]
    labels = ", ".join(f"{label['name']} {100 * label['pixels'] / pixels:.0f} %" for label in item["labels"][:6])
    print(f"{item['image']} -> {item['mask']}: {labels}")
