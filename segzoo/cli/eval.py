"""`segzoo eval`: how good a model is on a data set, with any reduction, by the protocol of its paper."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import SegzooError
from ..zoo.index import check_name
from .arguments import add_engine, add_weights, positive, refuse_beside
from .loading import engine_in_file, model_for_engine, run_by_engine
from .output import print_json, print_table, progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..engines import Engine
    from ..models.base import Model
    from ..training.reports import Evaluation

SUMMARY = "measure a model on a data set: mIoU, top-1 or keypoints, with any reduction"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="name, name.tag, local-dir:DIR or hf-hub:OWNER/NAME")
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
    add_engine(parser)
    parser.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for results as JSON, CSV and PNG")


def run(args: argparse.Namespace) -> int:
    if args.engine_file is not None:
        refuse_beside("--engine-file", args, ("model",))
    elif args.model is None:
        raise SegzooError("name a model, or a file of `segzoo export` with --engine-file")
    else:
        check_name(args.model)  # before torch is loaded
    from ..training.evaluation import evaluate
    from ..training.reports import write_results

    data, results = None, []
    for model, plan in _measured(args):
        data = _open(args, model) if data is None else data
        results.append(
            evaluate(
                model,
                data,
                protocol=args.protocol,
                reduction=plan,
                progress=lambda samples: progress(samples, as_json=args.json),
            )
        )
    files = write_results(results, args.output) if args.output else []
    if args.json:
        print_json([result.to_dict() for result in results])
        return 0
    _print_text(results)
    for file in files:
        print(f"written to {file}")
    return 0


def _measured(args: argparse.Namespace) -> Iterator[tuple[Model | Engine, str | None]]:
    """The model, or an engine a reduction, each with its plan."""
    if args.engine_file is not None:
        yield engine_in_file(args), None
        return
    from ..plans import inference_reduction

    model = model_for_engine(args)
    for plan in args.reduction or [None]:
        if plan is None or args.engine is None:
            yield run_by_engine(model, args), plan
        else:
            with inference_reduction(model, plan):
                engine = run_by_engine(model, args)
            yield engine, plan


def _open(args: argparse.Namespace, measured: Model | Engine) -> Any:
    """The data that belong to the kind of model."""
    from ..data.car_corners import car_crops
    from ..data.classification import open_classification
    from ..data.coco_keypoints import open_coco_keypoints
    from ..data.segmentation import FIRST_HELD_OUT_SEED, open_data
    from ..engines import Engine

    model: Any = measured.upscaler if isinstance(measured, Engine) else measured
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
