"""`segzoo eval`: how good a model is on a data set, with any reduction, by the protocol of its paper."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..zoo.index import check_name
from .arguments import add_weights, positive
from .loading import find_device, trained_model
from .output import print_json, print_table, progress

if TYPE_CHECKING:
    from ..training.reports import Evaluation

SUMMARY = "measure a model on a data set: mIoU, top-1 or keypoints, with any reduction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name, name.tag, local-dir:DIR or hf-hub:OWNER/NAME")
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="folder in a known layout, LAYOUT:DIR, a list file, 'scenes', 'context', or for keypoints 'car_corners'",
    )
    parser.add_argument("--split", metavar="NAME", help="train, val, ... (default: val)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N samples")
    parser.add_argument(
        "--reduction", nargs="+", metavar="PLAN", help="presets, whole numbers or JSON dicts; one evaluation each"
    )
    parser.add_argument(
        "--protocol",
        default="row",
        metavar="NAME",
        help="how images are shown (default: as the weights' row says); with +ms also at six scales and mirrored, "
        "with +flip mirrored; a wrong name lists all",
    )
    add_weights(parser)
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for results as JSON, CSV and PNG")


def run(args: argparse.Namespace) -> int:
    check_name(args.model)  # before torch is loaded
    from ..training.evaluation import evaluate
    from ..training.reports import write_results

    model = trained_model(args).eval().to(find_device(args.device))
    data = _open(args, model)
    results = [
        evaluate(
            model,
            data,
            protocol=args.protocol,
            reduction=plan,
            progress=lambda samples: progress(samples, as_json=args.json),
        )
        for plan in args.reduction or [None]
    ]
    files = write_results(results, args.output) if args.output else []
    if args.json:
        print_json([result.to_dict() for result in results])
        return 0
    _print_text(results)
    for file in files:
        print(f"written to {file}")
    return 0


def _open(args: argparse.Namespace, model: Any) -> Any:
    """The data that belong to the kind of model."""
    from ..data.car_corners import car_crops
    from ..data.classification import open_classification
    from ..data.coco_keypoints import open_coco_keypoints
    from ..data.segmentation import FIRST_HELD_OUT_SEED, open_data

    kind = getattr(model, "score_kind", "classifier")
    if kind == "classifier":
        return open_classification(args.data, split=args.split).first(args.limit)
    if kind != "heatmap":
        return open_data(args.data, split=args.split, num_classes=model.num_classes).first(args.limit)
    if args.data == "car_corners":
        side = model.pretrained_cfg.input_size[0] if model.pretrained_cfg else 96
        return list(car_crops(args.limit or 200, first_seed=FIRST_HELD_OUT_SEED, side=side))
    return open_coco_keypoints(args.data, split=args.split or "val").first(args.limit)


def _print_text(results: list[Evaluation]) -> None:
    first = results[0]
    print(f"{first.model} on {first.data} {first.split}, {first.samples} samples: {first.protocol_text}\n")
    kept = ("reduction", *first.metrics, f"published {first.main}")
    print_table([{key: row[key] for key in kept} for row in (result.row() for result in results)])
    classes = [result.class_rows() for result in results]
    if classes[0]:
        print("\nIoU in percent")
        columns = {result.reduction: rows for result, rows in zip(results, classes, strict=True)}
        print_table(
            [
                {"class": row["name"], **{reduction: rows[i]["IoU"] for reduction, rows in columns.items()}}
                for i, row in enumerate(classes[0])
            ]
        )
