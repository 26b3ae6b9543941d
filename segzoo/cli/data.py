"""`segzoo data check`: what is wrong with the masks of a data set, before a training finds out; `segzoo data scenes`: a
small data set to try things on."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._errors import SegzooError
from .arguments import positive, refuse_given
from .output import print_json, progress

DRAWN_NAMES = ("scenes", "context")  # of `segzoo.data.segmentation.DRAWN`
SUMMARY = "check the masks of a data set before training, or draw a small one to try things on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        choices=("check", *DRAWN_NAMES),
        help="check: read every mask and say what is wrong; another name: write drawn pictures and their masks",
    )
    parser.add_argument(
        "data", metavar="DIR", help="folder in a known layout, LAYOUT:DIR, or a list file; of drawn ones, a new folder"
    )
    parser.add_argument("--split", metavar="NAME", help="train, val, ... (default: val, or all of it)")
    parser.add_argument("--num-classes", type=positive, metavar="K", help="classes, where the data do not say")
    parser.add_argument(
        "--reduce-zero-label",
        action=argparse.BooleanOptionalAction,
        help="stored 0 is no class and stored k is class k - 1",
    )
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="chart of the share of every class")
    drawn = parser.add_argument_group("of drawn pictures")
    drawn.add_argument("--count", type=positive, metavar="N", help="for training (default: 100)")
    drawn.add_argument("--val-count", type=positive, metavar="N", help="for validation (default: 20)")
    drawn.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="in pixels (default: 256 512)")


def run(args: argparse.Namespace) -> int:
    if args.action != "check":
        _refuse(args, "--split", "--num-classes", "--reduce-zero-label", "--output")
        return _draw(args)
    _refuse(args, "--count", "--val-count", "--size")
    from ..data.checking import check_data
    from ..data.segmentation import FileData, open_data
    from ..visualize import bar_chart

    data = open_data(
        args.data, split=args.split, num_classes=args.num_classes, reduce_zero_label=args.reduce_zero_label
    )
    if not isinstance(data, FileData):
        raise SegzooError(f"{args.data} are drawn, not read: their masks are right by construction")
    report = check_data(data, progress=lambda pairs: progress(pairs, as_json=args.json))
    if args.output:
        total = max(1, sum(report.pixels))
        shares = {"pixels": [100 * pixels / total for pixels in report.pixels]}
        bar_chart(shares, report.class_names, args.output, title=report.data, unit="share of the labelled pixels, %")
    print_json(report.to_dict()) if args.json else print(report)
    return 0 if report.ok else 2


def _refuse(args: argparse.Namespace, *options: str) -> None:
    given = {option: getattr(args, option[2:].replace("-", "_")) is not None for option in options}
    refuse_given(given, f"is not of `segzoo data {args.action}`")


def _draw(args: argparse.Namespace) -> int:
    from ..data.drawing import write_drawn

    counts = {"train": args.count or 100, "val": args.val_count or 20}
    total = write_drawn(
        args.action,
        Path(args.data),
        counts=counts,
        size=(args.size[0], args.size[1]) if args.size else (256, 512),
        progress=lambda samples: progress(samples, as_json=args.json),
    )
    if args.json:
        print_json({"folder": args.data, "images": total})
    else:
        print(f"{total} pictures with masks in {args.data}")
    return 0
