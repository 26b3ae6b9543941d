"""`segzoo export`: a model becomes a file for inference elsewhere."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..zoo.index import check_name
from .arguments import add_weights
from .loading import trained_model
from .output import print_json

SUMMARY = "write a model as an ONNX, OpenVINO or torch.export file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name, name.tag, local-dir:DIR or hf-hub:OWNER/NAME")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=".onnx, .xml or .pt2")
    parser.add_argument("--format", choices=("onnx", "openvino", "pt2"), help="(default: by the ending of the file)")
    parser.add_argument("--with-mask", action="store_true", help="uint8 images in and class maps out, not scores")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    add_weights(parser)
    parser.add_argument("--reduction", metavar="PLAN", help="preset, whole number, or JSON dict; part of the file")


def run(args: argparse.Namespace) -> int:
    check_name(args.model)  # before torch is loaded
    from ..engines import export

    model = trained_model(args).eval()
    if args.reduction:
        model.set_inference_reduction(args.reduction)
    path = export(model, args.output, format=args.format, with_mask=args.with_mask, overwrite=args.overwrite)
    print_json({"file": str(path), "bytes": path.stat().st_size}) if args.json else print(f"{args.model} -> {path}")
    return 0
