"""`segzoo info`: one model's size and cost, its reduction sites and its weights."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..zoo.index import check_name
from .arguments import positive
from .output import print_json

if TYPE_CHECKING:
    from ..costing import Cost
    from ..models.base import Model
    from ..models.family import PublishedCost
    from ..zoo.names import ModelInfo

SUMMARY = "parameters, cost per stage and reduction site, weights, licence"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name or name.tag")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="input in pixels (default: 512 512)")
    parser.add_argument("--reduction", metavar="PLAN", help="preset, whole number, or JSON dict")
    parser.add_argument("--num-classes", type=positive, metavar="K")


def run(args: argparse.Namespace) -> int:
    check_name(args.model)  # before torch is loaded
    import torch

    from ..costing import cost
    from ..zoo import create_model, model_info

    info = model_info(args.model)
    with torch.device("meta"):
        model = create_model(args.model, num_classes=args.num_classes)
    if args.reduction:
        model.set_inference_reduction(args.reduction)
    height, width = args.size or (512, 512)
    size = (height, width)
    result = cost(model, size)
    published = [
        figure
        for figure in info.published
        if figure.size == size
        and (figure.num_classes in (None, model.num_classes))
        and figure.reduction == (args.reduction or "base")
    ]
    if args.json:
        print_json(_as_dict(args.model, info, model, result, published))
    else:
        _print_text(args.model, info, model, result, published)
    return 0


def _as_dict(
    name: str, info: ModelInfo, model: Model, result: Cost, published: Sequence[PublishedCost]
) -> dict[str, Any]:
    row = info.pretrained_cfg
    return {
        "name": name,
        "family": info.family,
        "note": info.note,
        "num_classes": model.num_classes,
        "size": result.size,
        "params": result.params,
        "macs": result.macs,
        "published_gmacs": published[0].gmacs if published else None,
        "stages": result.stages,
        "sites": result.sites,
        "reduction": json.loads(result.plan.to_json()),
        "presets": list(model.reduction_presets),
        "tags": list(info.tags),
        "license": row.license if row else None,
        "commercial_use": row.commercial_use if row else None,
    }


def _print_text(name: str, info: ModelInfo, model: Model, result: Cost, published: Sequence[PublishedCost]) -> None:
    print(f"{name} ({info.family}), {model.num_classes} classes")
    if info.note:
        print(f"note: {info.note}")
    print(result)
    for figure in published:
        params = f", {figure.params_m} M parameters" if figure.params_m else ""
        print(f"published: {figure.gmacs} GMACs{params}")
    if not published:
        print("published: no figure for this size, number of classes and reduction")
    print(f"presets: {', '.join(model.reduction_presets) or 'none'}")
    print(f"weights: {', '.join(info.tags) or 'none'}")
    row = info.pretrained_cfg
    if row:
        allowed = {True: "allowed", False: "not allowed", None: "unknown"}[row.commercial_use]
        print(f"default weights: {info.tag} ({row.state}), licence {row.license}, commercial use {allowed}")
        if not row.loadable:
            print(f"how to get them: {row.how_to_get}")
