"""`segzoo tune`: a reduction for a budget, chosen on a few images of your own."""

from __future__ import annotations

import argparse
from pathlib import Path

from .._errors import SaveError, SegzooError
from ..zoo.index import check_name
from .arguments import add_compiled, add_weights, positive
from .loading import model_for_engine
from .output import print_json

SUMMARY = "choose a reduction for a budget on a few images, without labels"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name, name.tag, local-dir:DIR or hf-hub:OWNER/NAME")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="image files such as the model will see; eight or so"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--macs", type=float, metavar="SHARE", help="multiply-accumulates at most, as a share: 0.85")
    budget.add_argument(
        "--latency-ms", type=float, metavar="MS", help="time at most of a forward pass, on --device or --engine"
    )
    budget.add_argument("--memory-mb", type=float, metavar="MB", help="tensors alive at most in a forward pass")
    budget.add_argument("--max-change", type=float, metavar="SHARE", help="changed pixels of the mask at most: 0.01")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for reduction.json and reduction.png")
    parser.add_argument("--overwrite", action="store_true", help="also where these exist")
    add_weights(parser)
    parser.add_argument("--resize", type=positive, nargs=2, metavar=("H", "W"), help="exact size that the model sees")
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    add_compiled(parser)


def run(args: argparse.Namespace) -> int:
    check_name(args.model)  # before torch is loaded
    if args.engine is not None and args.latency_ms is None:
        raise SegzooError(f"--engine {args.engine} is what --latency-ms is measured on; leave it out, or give both")
    from ..tuning import fit_reduction

    if args.output is not None:  # refused before minutes of work
        _check_output(args)
    fit = fit_reduction(
        model_for_engine(args),
        args.images,
        macs=args.macs,
        latency_ms=args.latency_ms,
        memory_mb=args.memory_mb,
        max_change=args.max_change,
        resize=tuple(args.resize) if args.resize else None,
        engine=args.engine,
        precision=args.precision or "f32",
        threads=args.threads,
        progress=not args.json,
    )
    files = fit.save(args.output, overwrite=args.overwrite) if args.output is not None else []
    if args.json:
        print_json({"model": args.model, **fit.to_dict(), "files": list(map(str, files))})
        return 0
    print(fit)
    print(f"plan: {fit.plan.to_json()}")
    if files:
        print(f"written: {', '.join(map(str, files))}")
    return 0


def _check_output(args: argparse.Namespace) -> None:
    from ..tuning.record import output_files, require_matplotlib

    require_matplotlib()
    if not args.overwrite and (taken := [file for file in output_files(args.output) if file.exists()]):
        raise SaveError(f"{taken[0]} exists; give another folder as -o, or --overwrite")
