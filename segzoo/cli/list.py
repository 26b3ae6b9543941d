"""`segzoo list`: the models, or with --pretrained their weights, family by family and no wider than the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import SegzooError
from ..zoo.index import WILDCARDS, ListedModel, ListedRow, known_models, known_rows, list_models, list_pretrained
from .output import Group, print_groups, print_json, terminal_width

SUMMARY = "list models, or with --pretrained every row of weights"
COMMERCIAL = {True: "any", False: "nc", None: "ask"}
METRIC_HEADS = {"miou": "mIoU", "top1": "top-1"}
LEGEND = {
    "(": "( ): not published; `segzoo info NAME.TAG` says how to get the weights",
    "?": "?: a published figure that could not be confirmed; `segzoo info NAME.TAG`",
    "drive": "drive: Google Drive, by pip install 'segzoo[drive]'; see `segzoo info NAME.TAG`",
    "unpublished": "unpublished: `segzoo info NAME.TAG` says how to get the weights",
    "use": "use: any = commercial too, nc = not commercial, ask = terms not stated",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("filter", nargs="*", default=["*"], help="parts of names, or wildcards such as 'edaformer_?'")
    parser.add_argument("--pretrained", action="store_true", help="list weights (name.tag) instead of models")
    parser.add_argument(
        "--source", choices=("bundled", "hub", "url", "drive", "unpublished"), help="with --pretrained: only these"
    )
    parser.add_argument("--license", metavar="ID", help="with --pretrained: only this licence, such as apache-2.0")
    parser.add_argument(
        "--commercial", action="store_true", help="with --pretrained: only where commercial use is allowed"
    )
    parser.add_argument("--dataset", metavar="NAME", help="with --pretrained: only this data set")


def run(args: argparse.Namespace) -> int:
    _refuse_without_pretrained(args)
    filters = [text if WILDCARDS & set(text) else f"*{text}*" for text in args.filter]
    names = _weights(args, filters) if args.pretrained else list_models(filters)
    if not names:
        raise SegzooError(f"no name matches {' '.join(args.filter)}; `segzoo list` shows all")
    if args.json:
        print_json([_weights_json(name) if args.pretrained else _model_json(name) for name in names])
        return 0
    groups, marks = _weights_groups(names) if args.pretrained else _model_groups(names)
    print_groups(groups, width=terminal_width())
    notes = [note for mark, note in LEGEND.items() if mark in marks]
    if notes:
        print("\n" + "\n".join(notes))
    return 0


def _refuse_without_pretrained(args: argparse.Namespace) -> None:
    if not args.pretrained and (args.source or args.license or args.commercial or args.dataset):
        raise SegzooError("--source, --license, --commercial and --dataset select weights; add --pretrained")


def _weights(args: argparse.Namespace, filters: Sequence[str]) -> list[str]:
    return list_pretrained(
        filters,
        source=args.source,
        license=args.license,
        commercial=True if args.commercial else None,
        dataset=args.dataset,
    )


# --- models ---------------------------------------------------------------------------------------------------------


def _model_json(name: str) -> dict[str, Any]:
    model = known_models()[name]
    return {"name": name, "family": model.family, "params": model.params, "tags": [*model.rows]}


def _model_groups(names: Sequence[str]) -> tuple[list[Group], str]:
    """A table a family, and the marks that it needs explained."""
    known = known_models()
    groups: dict[str, Group] = {}
    for label, (name, *_) in _folded(names, known).items():
        model = known[name]
        group = groups.setdefault(model.family, Group(head=[model.family, " parameters", "weights for"]))
        group.rows.append([label, f"{model.params:>11,}" if model.params else "", _datasets(model)])
    text = "".join(cell for group in groups.values() for row in group.rows for cell in row)
    return list(groups.values()), text


def _datasets(model: ListedModel) -> str:
    """What there are weights for; in parentheses those that nobody can load as they are."""
    loadable = dict.fromkeys(row.dataset for row in model.rows.values() if row.loadable)
    others = dict.fromkeys(row.dataset for row in model.rows.values() if row.dataset not in loadable)
    return ", ".join([*loadable, *([f"({', '.join(others)})"] if others else [])])


def _folded(names: Sequence[str], known: Mapping[str, ListedModel]) -> dict[str, list[str]]:
    """Label -> names: several names that only differ in the preset that they set share a label."""
    folds: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        preset = known[name].reduction
        folds.setdefault((name.removesuffix(f"_{preset}"), preset is not None), []).append(name)
    labels = {}
    for (stem, _), same in folds.items():
        presets = ",".join(known[name].reduction or "" for name in same)
        labels[f"{stem}_{{{presets}}}" if len(same) > 1 else same[0]] = same
    return labels


# --- weights --------------------------------------------------------------------------------------------------------


def _weights_json(name: str) -> dict[str, Any]:
    row = known_rows()[name]
    return {
        "name": name,
        "source": row.state,
        "from": row.from_text,
        "dataset": row.dataset,
        "classes": row.num_classes,
        "miou": row.score if row.metric == "miou" else None,
        "top1": row.score if row.metric == "top1" else None,
        "confirmed": row.confirmed if row.score is not None else None,
        "license": row.license,
        "commercial_use": row.commercial_use,
    }


def _weights_groups(names: Sequence[str]) -> tuple[list[Group], str]:
    """A table a family, and the marks that it needs explained."""
    known = known_models()
    of_variant: dict[str, list[str]] = {}
    for name in names:
        of_variant.setdefault(name.partition(".")[0], []).append(name)
    groups: dict[str, Group] = {}
    for label, variants in _folded(list(of_variant), known).items():
        model = known[variants[0]]
        metric = METRIC_HEADS[next((row.metric for row in model.rows.values() if row.score is not None), "miou")]
        head = [model.family, "data set", metric, "source", "use", "licence", "from"]
        group = groups.setdefault(model.family, Group(head=head))
        if len(variants) > 1:
            group.rows.append([f"{label}: {_without_preset(variants[0], known)}'s weights{_own_figures(variants)}"])
        else:
            group.rows += [[name, *_cells(known_rows()[name])] for name in of_variant[variants[0]]]
    text = "use " + " ".join(cell for group in groups.values() for row in group.rows for cell in row[2:4])
    return list(groups.values()), text


def _cells(row: ListedRow) -> list[str]:
    doubt = "" if row.confirmed else "?"
    score = "" if row.score is None else f"{row.score:.{2 if round(row.score, 1) != row.score else 1}f}{doubt}"
    return [row.dataset, score, row.state, COMMERCIAL[row.commercial_use], row.license, row.from_text]


def _own_figures(variants: Sequence[str]) -> str:
    """What the default weights reach with each preset, if that was published."""
    rows = [next(row for row in known_models()[name].rows.values() if row.loadable) for name in variants]
    figures = [_cells(row)[1] for row in rows]
    return f"; {METRIC_HEADS[rows[0].metric]} {', '.join(figures)}" if all(figures) else ""


def _without_preset(name: str, known: Mapping[str, ListedModel]) -> str:
    """The model that a name with a preset is otherwise."""
    model = known[name]
    same = (model.family, model.params, set(model.rows))
    plain = (other for other, it in known.items() if not it.reduction and (it.family, it.params, set(it.rows)) == same)
    return next(plain, name)
