"""`segzoo info`: one model's size and cost, its reduction sites, and the weights that the name means."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..zoo.index import check_name
from .arguments import named_value, positive
from .output import in_lines, print_json

if TYPE_CHECKING:
    from ..costing import Cost
    from ..models.base import Model
    from ..models.family import PublishedCost
    from ..models.rows import PretrainedCfg, PublishedScore
    from ..zoo.names import ModelInfo

SUMMARY = "parameters, cost per stage and reduction site, weights, licence"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name, name.tag, local-dir:PATH or hf-hub:OWNER/NAME")
    parser.add_argument("--size", type=positive, nargs=2, metavar=("H", "W"), help="input in pixels (default: 512 512)")
    parser.add_argument("--reduction", metavar="PLAN", help="preset, whole number, or JSON dict")
    parser.add_argument("--num-classes", type=positive, metavar="K")
    parser.add_argument(
        "--option",
        nargs="+",
        type=named_value,
        default=[],
        metavar="NAME=VALUE",
        help="of the model's config, as create_model takes them: embedding_free=true, stages=[5,11], encoder=pvt_v2_b0",
    )


def run(args: argparse.Namespace) -> int:
    check_name(args.model)  # before torch is loaded
    from ..costing import cost
    from ..zoo.names import model_info
    from ..zoo.recipe import blueprint

    model = blueprint(args.model, num_classes=args.num_classes, options=dict(args.option))
    if args.reduction:
        model.set_inference_reduction(args.reduction)
    height, width = args.size or (512, 512)
    subject = Subject(
        name=args.model,
        model=model,
        info=model_info(model.name.partition(".")[0]),
        cost=cost(model, (height, width)),
        reduction=args.reduction or "base",
    )
    if args.json:
        print_json(subject.as_dict())
    elif sys.stdout.isatty():
        for line in subject.lines():
            print(in_lines(line, " " * (len(line) - len(line.lstrip()) + 4)))
    else:
        print("\n".join(subject.lines()))
    return 0


@dataclasses.dataclass(frozen=True)
class Subject:
    """What `segzoo info` was asked about."""

    name: str  # as given
    model: Model  # without weights
    info: ModelInfo  # of the variant
    cost: Cost
    reduction: str  # as given

    @property
    def row(self) -> PretrainedCfg | None:
        return self.model.pretrained_cfg or None  # one that records nothing is none

    @property
    def published(self) -> list[PublishedCost]:
        """The paper's costs of exactly this size, number of classes and reduction."""
        return [
            figure
            for figure in self.info.published
            if figure.size == self.cost.size
            and figure.num_classes in (None, self.model.num_classes)
            and figure.reduction == self.reduction
        ]

    def as_dict(self) -> dict[str, Any]:
        row = self.row
        return {
            "name": self.name,
            "family": self.info.family,
            "note": self.info.note,
            "num_classes": self.model.num_classes,
            "size": self.cost.size,
            "params": self.cost.params,
            "macs": self.cost.macs,
            "published_gmacs": self.published[0].gmacs if self.published else None,
            "published_why": self.published[0].why if self.published else None,
            "stages": self.cost.stages,
            "sites": self.cost.sites,
            "reduction": json.loads(self.cost.plan.to_json()),
            "presets": list(self.model.reduction_presets),
            "tags": list(self.info.tags),
            "weights": self.model.name if row else None,
            "source": row.state if row else None,
            "from": _place(row) if row else None,
            "dataset": row.dataset if row else None,
            "published": [dataclasses.asdict(score) for score in row.published] if row else [],
            "license": row.license if row else None,
            "license_url": row.license_url if row else None,
            "commercial_use": row.commercial_use if row else None,
        }

    def lines(self) -> list[str]:
        lines = [f"{self.name} ({self.info.family}), {self.model.num_classes} classes"]
        if self.info.note:
            lines.append(f"note: {self.info.note}")
        lines.append(str(self.cost))
        for figure in self.published:
            params = f", {figure.params_m} M parameters" if figure.params_m else ""
            lines.append(f"published: {figure.gmacs} GMACs{params}" + (f"; {figure.why}" if figure.why else ""))
        if not self.published:
            lines.append(f"published: no figure for this size, number of classes and reduction{self._other_costs()}")
        lines.append(f"presets: {', '.join(self.model.reduction_presets) or 'none'}")
        from ..models.base import NOT_MEASURED

        unmeasured = [name for name, known in self.model.preset_accuracy.items() if known == NOT_MEASURED]
        if unmeasured:
            lines.append(f"presets whose cost in accuracy nobody has measured: {', '.join(unmeasured)}")
        return [*lines, *self._weights()]

    def _other_costs(self) -> str:
        """For which sizes and numbers of classes there are published costs."""
        settings = dict.fromkeys(
            f"{figure.size[0]}x{figure.size[1]}" + (f" with {figure.num_classes} classes" if figure.num_classes else "")
            for figure in self.info.published
        )
        return f"; there are for {', '.join(settings)}" if settings else ""

    def _weights(self) -> list[str]:
        row, tags = self.row, ", ".join(self.info.tags) or "none"
        if row is None:
            return [f"weights: {tags}"]
        classes = "" if row.num_classes == self.model.num_classes else f", {row.num_classes} classes"
        by_default = "" if "." in self.name or ":" in self.name else ", the default"
        allowed = {True: "allowed", False: "not allowed", None: "unknown"}[row.commercial_use]
        page = f" ({row.license_url})" if row.license_url else ""
        lines = [
            f"weights: {self.model.name}{by_default}, trained on {row.dataset or 'unknown data'}{classes}",
            f"  from: {self._place_of(row)}",
            *(f"  {line}" for line in _figures(row.published)),
            f"  licence: {row.license}{page}, commercial use {allowed}",
            f"  origin: {row.origin or 'unknown'}",
            f"all weights of {self.info.name}: {tags}",
        ]
        if row.how_to_get:
            lines.insert(2, f"  how to get them: {row.how_to_get}")
        return lines

    def _place_of(self, row: PretrainedCfg) -> str:
        """Where the weights come from: the place that was asked for, else the row's."""
        return self.name if self.name != self.model.name and ":" in self.name else _place(row)


def _place(row: PretrainedCfg) -> str:
    """Where the file of a row is."""
    if row.state == "bundled":
        return f"this package, {row.file}"
    if row.state == "hub":
        file = f", {row.hf_hub_filename}" if row.hf_hub_filename else ""
        return f"https://huggingface.co/{row.hf_hub_id} at {row.hf_revision or 'main'}{file}"
    if row.state == "drive":
        return f"the authors' folder https://drive.google.com/drive/folders/{row.drive_folder}"
    return row.url or "not published in a loadable form"


def _figures(published: Sequence[PublishedScore]) -> list[str]:
    """A line for the figures that only differ in their reduction, and one for how and where they were published."""
    from ..models.rows import METRICS

    alike: dict[tuple[str, ...], list[str]] = {}
    for score in published:
        terms = [score.protocol or "protocol not stated", score.training, score.source or "source not stated"]
        terms.append(f"confirmed by {score.confirmed_by}" if score.confirmed_by else "could not be confirmed")
        key = (METRICS[score.metric], "; ".join(term for term in terms if term))
        alike.setdefault(key, []).append(f"{score.value} ({score.reduction})")
    if not alike:
        return ["published accuracy: none known for these weights"]
    lines = []
    for (metric, terms), values in alike.items():
        lines += [f"published {metric} in percent: {', '.join(values)}", f"  {terms}"]
    return lines
