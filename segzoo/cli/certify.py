"""`segzoo certify`: how far every engine, precision and reduction is from the exact model, and how fast it is."""

from __future__ import annotations

import argparse

from .._errors import SegzooError
from ..zoo.index import check_name
from .arguments import add_weights, positive
from .loading import trained_model
from .output import print_json, print_table, progress

SUMMARY = "measure engines, precisions and reductions against the exact model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name, name.tag, local-dir:DIR or hf-hub:OWNER/NAME")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="image files")
    parser.add_argument("--data", choices=("scenes",), help="synthetic street scenes with truth, for mIoU")
    parser.add_argument("--limit", type=positive, default=8, metavar="N", help="so many scenes (default: %(default)s)")
    parser.add_argument("--engine", nargs="+", metavar="NAME", help="only these (default: all that are installed)")
    parser.add_argument("--precision", nargs="+", choices=("f32", "bf16"), help="only these (default: both)")
    parser.add_argument("--reduction", nargs="+", metavar="PLAN", help="beside none (default: the model's presets)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of a stage, as a share of its largest value")
    parser.add_argument("--threads", type=positive, metavar="N", help="of onnxruntime and openvino (default: torch's)")
    add_weights(parser)


def run(args: argparse.Namespace) -> int:
    if not args.images and not args.data:
        raise SegzooError("name images to compare the masks of, or --data scenes")
    check_name(args.model)  # before torch is loaded
    from ..training.certification import certify, scene_pairs

    pairs = [(image, None) for image in args.images] + (scene_pairs(args.limit) if args.data else [])
    certificate = certify(
        trained_model(args),
        pairs,
        engines=args.engine,
        precisions=args.precision,
        reductions=args.reduction,
        tolerance=args.tolerance,
        threads=args.threads,
        progress=lambda items: progress(items, as_json=args.json),
    )
    if args.json:
        print_json(certificate.to_dict())
        return 0
    print(certificate.text() + "\n")
    print_table([row.to_dict() for row in certificate.rows])
    for reason in certificate.left_out:
        print(f"left out: {reason}")
    return 0
