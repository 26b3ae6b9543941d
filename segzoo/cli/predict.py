"""`segzoo predict`: a mask and an overlay for each image, or keypoints and a picture of them."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .._errors import ImageError, SaveError, SegzooError
from ..labels import load_labels
from ..zoo.index import check_name
from .arguments import DEFAULT_MODEL, add_engine, add_weights, positive, refuse_given
from .inputs import Input, find_inputs, is_url
from .loading import score_maker_of
from .output import Steps, progress, say, say_error, say_json

if TYPE_CHECKING:
    from ..prediction import ScoreMaker
    from ..results import Pose, SavedFiles, SavedPose, Segmentation
    from ..scale.rasters import RasterMap, SavedRaster

Places = TypeVar("Places", bound="tuple[Path, ...]")

SUMMARY = "write a mask and an overlay, or the keypoints, for each image"

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="image files, folders, wildcards in quotes, http(s) URLs, or - for a list of them on standard input",
    )
    parser.add_argument("--recursive", action="store_true", help="of a folder, also the images in its folders")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("segzoo_masks"), metavar="DIR", help="folder of results (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="also images whose results exist (default: skip them)")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or name.tag (default: %(default)s)")
    add_weights(parser)
    parser.add_argument("--reduction", metavar="PLAN", help="preset, whole number, or JSON dict")
    parser.add_argument("--resize", type=positive, nargs=2, metavar=("H", "W"), help="exact size that the model sees")
    parser.add_argument("--mode", choices=("whole", "slide"), help="whole image or sliding window")
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0], metavar="S", help="average over these scales")
    parser.add_argument("--flip", action="store_true", help="average over the image and its mirror image")
    parser.add_argument(
        "--raster",
        action=argparse.BooleanOptionalAction,
        help="windows of the file's own pixels in, GeoTIFF out (default: for TIFFs with coordinates or too large)",
    )
    parser.add_argument("--bands", type=positive, nargs="+", metavar="N", help="of a raster, the model's channels")
    parser.add_argument(
        "--range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of a raster, the values that are black and white"
    )
    parser.add_argument("--alpha", type=float, default=0.5, help="strength of the overlay's colours, 0 to 1")
    parser.add_argument("--no-legend", action="store_true", help="overlays without the names of their colours")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps or xpu (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the computation (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images of one size that run together (%(default)s)"
    )
    parser.add_argument(
        "--min-score", type=float, metavar="S", help="of the keypoints that are drawn (default: 0.3; all are written)"
    )
    add_engine(parser)


def run(args: argparse.Namespace) -> int:
    if not 0 <= args.alpha <= 1:
        raise SegzooError(f"--alpha must be between 0 and 1, not {args.alpha}")
    if args.engine_file is None:
        check_name(args.model)  # before torch is loaded
    inputs = find_inputs(args.images, recursive=args.recursive, output=args.output)
    kind = _kind_of(args)
    inputs = _with_rasters(args, inputs) if kind.run is _segment_all else inputs
    places = output_files(inputs, args.output, kind.places)
    todo, skipped = [], []
    for item, files in zip(inputs, places, strict=True):
        exists = not args.overwrite and any(os.path.lexists(file) for file in files)
        (skipped if exists else todo).append((item, files))
    failed = kind.run(args, todo) if todo else 0
    _say_what_became(args, len(todo), skipped, failed)
    return 2 if failed else 0


class Kind(NamedTuple):
    """What is made of each image."""

    places: Callable[[Path], Any]  # the first result's place -> those of all results
    run: Callable[[argparse.Namespace, Sequence[tuple[Input, Any]]], int]  # returns how many images failed


def _kind_of(args: argparse.Namespace) -> Kind:
    """Keypoints for a model of keypoints, else masks.

    Raises:
        SegzooError: an option of the one where the other is made.
    """
    from ..models.segmenter import SegmentationModel
    from ..results import SavedFiles, SavedPose
    from ..zoo.recipe import blueprint

    model = None if args.engine_file is not None else blueprint(args.model)
    if isinstance(model, SegmentationModel) and model.score_kind == "heatmap":
        of_masks = {"--mode": args.mode, "--flip": args.flip, "--no-legend": args.no_legend}
        of_masks |= {"--raster": args.raster, "--bands": args.bands, "--range": args.range}
        of_masks |= {"--scales": args.scales != [1.0], "--alpha": args.alpha != 0.5}
        refuse_given(of_masks, f"is of masks, and {args.model} finds keypoints")
        return Kind(SavedPose.of, _find_all)
    refuse_given({"--min-score": args.min_score is not None}, f"is of keypoints, and {args.model} makes masks")
    return Kind(SavedFiles.of, _segment_all)


def _with_rasters(args: argparse.Namespace, inputs: Sequence[Input]) -> list[Input]:
    """The inputs, with those marked that are rasters.

    Raises:
        SegzooError: an option of rasters where there is none, or one of images where there are some.
    """
    from ..scale.rasters import check_installed, is_raster

    if args.raster and (url := next((item.source for item in inputs if is_url(item.source)), None)):
        raise SegzooError(f"--raster: {url} is no file; fetch it first")
    marked = [
        dataclasses.replace(item, raster=is_raster(item.source) if args.raster is None else args.raster)
        for item in inputs
    ]
    first = next((item.source for item in marked if item.raster), None)
    if first is None:
        of_rasters = {"--bands": args.bands, "--range": args.range}
        refuse_given(of_rasters, "is of rasters, and none of the images is taken for one (--raster takes all)")
        return marked
    check_installed()
    of_images = {"--resize": args.resize, "--mode whole": args.mode == "whole"}
    of_images |= {"--scales": args.scales != [1.0], "--flip": args.flip}
    refuse_given(of_images, f"is not of rasters, such as {first} (--no-raster takes it for an image)")
    return marked


def output_files(inputs: Sequence[Input], folder: Path, places_of: Callable[[Path], Places]) -> list[Places]:
    """Where the results of each image go; of several that would go to one place, all but the first get a number.

    Args:
        places_of: the first result's place -> those of all results of an image.

    Raises:
        SegzooError: a result would take the place of an image.
    """
    sources = {os.path.realpath(item.source) for item in inputs if not is_url(item.source)}
    if any(item.raster for item in inputs):
        from ..scale.rasters import SavedRaster
    used: set[Path] = set()
    next_number: dict[PurePath, int] = {}  # so that no number is tried twice
    places = []
    for item in inputs:
        number, free = next_number.get(item.place, 1), False
        while not free:
            name = item.place.name if number == 1 else f"{item.place.name}-{number}"
            of_item = SavedRaster.of if item.raster else places_of
            files = of_item(folder / item.place.with_name(f"{name}.png"))
            free, number = used.isdisjoint(files), number + 1
        next_number[item.place] = number
        for file in files:
            if os.path.realpath(file) in sources:
                raise SegzooError(f"{file} is one of the images and would be overwritten; give another folder as -o")
        used.update(files)
        places.append(files)
    return places


def _segment_all(args: argparse.Namespace, todo: Sequence[tuple[Input, SavedFiles | SavedRaster]]) -> int:
    """Segment, save and report each image, then each raster; returns how many failed."""
    import torch

    from ..prediction import mask_maker, protocol_of, segment_many

    model = score_maker_of(args, getattr(torch, DTYPES[args.dtype]))
    maker = mask_maker(model)
    protocol = protocol_of(
        maker.row,
        resize=tuple(args.resize) if args.resize else None,
        mode=args.mode,
        scales=args.scales,
        flip=args.flip,
    )
    if not args.json:
        say(describe_model(maker, args.checkpoint), sys.stderr)
    images = [(item, files) for item, files in todo if not item.raster]
    looks = Steps(as_json=args.json, unit=" windows" if protocol.mode == "slide" else " views")
    outcomes = segment_many(maker, [item.source for item, _ in images], protocol, args.batch_size, looks)

    def save(result: Segmentation, files: SavedFiles) -> Segmentation:
        result.save(files.mask, alpha=args.alpha, legend=not args.no_legend, overwrite=args.overwrite)
        return result

    failed = _save_all(args, images, outcomes, save, _text_line, looks)
    rasters = [(item, files) for item, files in todo if item.raster]
    return failed + (_segment_rasters(args, maker, rasters) if rasters else 0)


def _segment_rasters(args: argparse.Namespace, maker: ScoreMaker, todo: Sequence[tuple[Input, Any]]) -> int:
    """Segment, write and report each raster; returns how many failed."""
    from ..scale.rasters import segment_raster

    looks = Steps(as_json=args.json, unit=" windows")

    def save(source: str, files: SavedRaster) -> RasterMap:
        return segment_raster(
            maker,
            source,
            files.mask,
            bands=args.bands,
            value_range=args.range,
            overwrite=args.overwrite,
            on_look=looks,
        )

    return _save_all(args, todo, [item.source for item, _ in todo], save, _text_line, looks)


def _find_all(args: argparse.Namespace, todo: Sequence[tuple[Input, SavedPose]]) -> int:
    """Find the keypoints of each image, save and report them; returns how many images failed."""
    import torch

    from ..prediction import pose_maker, pose_many
    from ..results import MIN_SCORE

    maker = pose_maker(score_maker_of(args, getattr(torch, DTYPES[args.dtype])))
    if not args.json:
        say(describe_model(maker, args.checkpoint), sys.stderr)
    resize = tuple(args.resize) if args.resize else None
    outcomes = pose_many(maker, [item.source for item, _ in todo], args.batch_size, resize=resize)
    min_score = MIN_SCORE if args.min_score is None else args.min_score

    def save(pose: Pose, files: SavedPose) -> Pose:
        pose.save(files.picture, min_score=min_score, overwrite=args.overwrite)
        return pose

    def line(pose: Pose, files: SavedPose) -> str:
        return f"{pose.source} -> {files.keypoints}: {pose.summary(min_score)}"

    return _save_all(args, todo, outcomes, save, line)


def _save_all(
    args: argparse.Namespace,
    todo: Sequence[tuple[Input, Any]],
    outcomes: Iterable[Any],
    save: Callable[[Any, Any], Segmentation | RasterMap | Pose],
    line: Callable[[Any, Any], str],
    looks: Steps | None = None,
) -> int:
    """Save and report what became of each image as it comes; returns how many failed.

    Args:
        save: writes an outcome to its places, and returns what was written.
        line: reports that.
        looks: the bar of the image that is worked on.
    """
    failed = 0
    bar = progress(outcomes, total=len(todo), as_json=args.json, unit=" images")
    for (item, files), outcome in zip(todo, bar, strict=True):
        try:
            if isinstance(outcome, ImageError):
                raise outcome
            result = save(outcome, files)
        except (ImageError, SaveError) as error:
            failed += 1
            if looks is not None:
                looks.close()
            say_error(error)
            if args.json:
                say_json({"image": item.source, "error": str(error)})
            continue
        if args.json:
            say_json({**result.to_dict(), "files": {kind: str(file) for kind, file in files._asdict().items()}})
        else:
            say(line(result, files))
    return failed


def describe_model(model: ScoreMaker, checkpoint: str | None = None) -> str:
    """One line: which model, what its weights were trained on, and what they are not for."""
    row = model.row
    if checkpoint is not None:
        return f"{model.name.partition('.')[0]} with the weights of {checkpoint}"
    if not row.dataset:
        return f"{model.name}, which does not say what it was trained on"
    data = load_labels(row.label_set).title if row.label_set else row.dataset
    terms = "; not for commercial use" if row.commercial_use is False else ""
    return f"{model.name}, trained on {data}{terms}" + (f"; {row.advice}" if row.advice else "")


def _text_line(result: Segmentation | RasterMap, files: SavedFiles | SavedRaster) -> str:
    """An image, its mask, and the six largest classes with their share."""
    largest = ", ".join(f"{name} {100 * area.share:.0f} %" for name, area in list(result.areas().items())[:6])
    return f"{result.source} -> {files.mask}: {largest}"


def _say_what_became(
    args: argparse.Namespace, todo: int, skipped: Sequence[tuple[Input, SavedFiles | SavedPose]], failed: int
) -> None:
    """Of all images: with --json a line for each that was skipped, else how many were written, skipped and failed."""
    total = todo + len(skipped)
    if args.json:
        for item, files in skipped:
            say_json({"image": item.source, "skipped": str(files[0])})
    elif skipped or total > 1:
        parts = [f"{todo - failed} of {total} written to {args.output}"]
        parts += [f"{len(skipped)} skipped, whose results exist (--overwrite writes them anew)"] if skipped else []
        parts += [f"{failed} failed"] if failed else []
        say("; ".join(parts), sys.stderr)
