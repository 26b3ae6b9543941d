"""`segzoo explain`: what a reduction does inside one block, on one image, as pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..zoo.index import check_name
from .arguments import add_weights, positive
from .loading import find_device, trained_model
from .output import print_json

SUMMARY = "show attention, features and merged tokens of a block with and without a reduction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name, name.tag, local-dir:DIR or hf-hub:OWNER/NAME")
    parser.add_argument("image", metavar="IMAGE", help="image file or URL")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", required=True, help="folder for the pictures")
    parser.add_argument("--site", help="stage or level to look at, encoder.2 (default: the first that is reduced)")
    parser.add_argument("--reduction", default="fast", metavar="PLAN", help="preset or JSON (default: %(default)s)")
    parser.add_argument("--block", type=int, default=-1, help="which of the site's blocks, from 0 (default: the last)")
    parser.add_argument(
        "--query",
        type=int,
        nargs=2,
        action="append",
        metavar=("ROW", "COLUMN"),
        help="pixel whose attention is shown; may be repeated (default: four)",
    )
    parser.add_argument("--overwrite", action="store_true", help="also where the pictures exist")
    add_weights(parser)
    parser.add_argument("--resize", type=positive, nargs=2, metavar=("H", "W"), help="exact size that the model sees")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    check_name(args.model)  # before torch is loaded
    from ..explaining import explain

    shown = explain(
        trained_model(args).eval().to(find_device(args.device)),
        args.image,
        site=args.site,
        reduction=args.reduction,
        queries=[(row, column) for row, column in args.query] if args.query else None,
        block=args.block,
        resize=tuple(args.resize) if args.resize else None,
    )
    files = shown.save(args.output, overwrite=args.overwrite)
    tokens = [int(view.keys.max()) + 1 for view in (shown.without, shown.reduced)]
    if args.json:
        print_json({"model": args.model, "block": shown.block, "keys": tokens, "files": list(map(str, files))})
        return 0
    print(f"{shown.block}: {tokens[0]} keys and values without the reduction, {tokens[1]} with it")
    print(f"written: {', '.join(map(str, files))}")
    return 0
