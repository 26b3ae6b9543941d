"""`segzoo archive`: a mask for every image of an archive, on one machine or a cluster; it goes on where it stopped."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..zoo.index import check_name
from .arguments import DEFAULT_MODEL, add_compiled, positive
from .output import Steps, print_json, say

if TYPE_CHECKING:
    from ..scale.archives import ArchiveReport

SUMMARY = "write a mask for every image of an archive, on one machine or a cluster, and go on where it stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "input",
        metavar="INPUT",
        help="folder with images, .tar (WebDataset) or .parquet shards at any depth; one such file; a wildcard in "
        "quotes; or a text file with a path a line",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="DIR", help="folder of results, outside of INPUT"
    )
    parser.add_argument(
        "--format",
        choices=("png", "parquet"),
        default="png",
        help="a PNG file an image, in folders as INPUT has them, or Parquet shards (default: %(default)s)",
    )
    parser.add_argument(
        "--column", metavar="NAME", help="of Parquet, the column of images; of tar, the ending of the images, as jpg"
    )
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name or name.tag (default: %(default)s)")
    parser.add_argument("--reduction", metavar="PLAN", help="preset, whole number, or JSON dict")
    add_compiled(parser, threads="1 a worker")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of the workers (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=positive, default=1, metavar="N", help="images of one size that run together (%(default)s)"
    )
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="processes with a model each (default: one a core or GPU)"
    )
    parser.add_argument(
        "--part-size",
        type=positive,
        default=64,
        metavar="N",
        help="images of a Parquet shard, and what a stop costs each worker (default: %(default)s)",
    )
    parser.add_argument(
        "--address", metavar="HOST:PORT", help="of a Ray cluster, or auto (default: this machine alone)"
    )


def run(args: argparse.Namespace) -> int:
    check_name(args.model)  # before torch is loaded
    from ..scale import BatchSegmenter
    from ..scale.archives import check_installed, segment_archive

    check_installed()
    segmenter = BatchSegmenter(
        model=args.model,
        reduction=args.reduction,
        engine=args.engine,
        precision=args.precision or "f32",
        threads=args.threads or (1 if args.engine in ("onnxruntime", "openvino") else None),
        device=args.device,
        batch_size=args.batch_size,
    )
    bar = Steps(as_json=args.json, unit=" images")
    try:
        report = segment_archive(
            segmenter,
            args.input,
            args.output,
            format=args.format,
            column=args.column,
            workers=args.workers,
            address=args.address,
            part_size=args.part_size,
            on_images=bar,
        )
    finally:
        bar.close()
    if args.json:
        print_json({**report._asdict(), "folder": str(report.folder)})
    else:
        for line in summary(report):
            say(line, sys.stderr)
    return 0


def summary(report: ArchiveReport) -> list[str]:
    """What became of the archive, in two or three sentences."""
    masks = report.images - report.failed
    lines = [f"{report.folder}: {report.images:,} images, {masks:,} masks, {report.failed:,} failed"]
    if report.done:
        rate = report.done / report.seconds
        lines.append(f"now {report.done:,} in {report.seconds:,.0f} s, {rate:.3g} images/s; before {report.skipped:,}")
    else:
        lines.append("nothing was left to do")
    if report.failed:
        lines.append("why they failed: failed.csv there")
    return lines
