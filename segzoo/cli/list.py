"""`segzoo list`: the models, or with --pretrained their weights."""

from __future__ import annotations

import argparse
from typing import Any

from .._errors import SegzooError
from ..zoo.index import known_models, known_rows, list_models, list_pretrained
from .output import print_json, print_table

SUMMARY = "list models, or with --pretrained every row of weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("filter", nargs="*", default=["*"], help="wildcards, for example 'edaformer*'")
    parser.add_argument("--pretrained", action="store_true", help="list weights (name.tag) instead of models")
    parser.add_argument(
        "--source", choices=("bundled", "hub", "url", "unpublished"), help="with --pretrained: only these"
    )
    parser.add_argument("--license", metavar="ID", help="with --pretrained: only this licence, such as apache-2.0")
    parser.add_argument(
        "--commercial", action="store_true", help="with --pretrained: only where commercial use is allowed"
    )
    parser.add_argument("--dataset", metavar="NAME", help="with --pretrained: only this data set")


def run(args: argparse.Namespace) -> int:
    if not args.pretrained and (args.source or args.license or args.commercial or args.dataset):
        raise SegzooError("--source, --license, --commercial and --dataset select weights; add --pretrained")
    rows = _weights(args) if args.pretrained else _models(args)
    if not rows:
        raise SegzooError(f"no name matches {' '.join(args.filter)}; `segzoo list` shows all")
    if args.json:
        print_json(rows)
        return 0
    print_table(rows)
    if any(row.get("source") == "unpublished" for row in rows):
        print("\nunpublished: `segzoo info NAME.TAG` says how to get the weights")
    return 0


def _models(args: argparse.Namespace) -> list[dict[str, Any]]:
    known = known_models()
    return [
        {"name": name, "family": known[name].family, "params": known[name].params, "tags": [*known[name].rows]}
        for name in list_models(args.filter)
    ]


def _weights(args: argparse.Namespace) -> list[dict[str, Any]]:
    known = known_rows()
    names = list_pretrained(
        args.filter,
        source=args.source,
        license=args.license,
        commercial=True if args.commercial else None,
        dataset=args.dataset,
    )
    rows = []
    for name in names:
        row = known[name]
        rows.append(
            {
                "name": name,
                "source": row.state,
                "from": row.from_text,
                "dataset": row.dataset,
                "classes": row.num_classes,
                "miou": row.miou,
                "license": row.license,
                "commercial_use": row.commercial_use,
            }
        )
    return rows
