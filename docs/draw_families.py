"""A page and a figure for each family: `python docs/draw_families.py` writes docs/families/.

Made of the registry, of the tables in benchmarks/results/ that have a model, its cost and its mIoU (whatever files
there are), and of families/costs.csv. `--count` makes the latter anew first, which takes some minutes.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import segzoo.models  # noqa: F401 (registers the families)
from segzoo.costing import cost
from segzoo.models.family import FAMILIES, VARIANTS, Family, Variant
from segzoo.models.rows import METRICS, PretrainedCfg
from segzoo.models.segmenter import SegmentationModel
from segzoo.zoo.recipe import blueprint

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "families"
COSTS = FOLDER / "costs.csv"
RESULTS = ROOT / "benchmarks" / "results"

SIZE = (512, 512)
CLASSES = 150  # of segmenters, as ADE20K has them
NEEDED = {"model", "gmacs", "miou", "size"}  # the columns of a table of accuracy
BASE = ("base", "none", "factor 1")  # what no reduction is called
DATA = {"scenes": "street scenes", "context": "landscapes"}
SHOWN_SHARES = ("0.9", "0.8", "0.7", "0.6")
LEAST_SPAN = 0.04  # of mIoU in a figure, so that little differences look little


# --- what is known ----------------------------------------------------------------------------------------------------


def title_of(family: Family) -> str:
    return re.split(r"[:,(]", _docstring(family))[0].strip()


def _docstring(family: Family) -> str:
    return str(sys.modules[family.build.__module__].__doc__)


def about(family: Family) -> str:
    """What the family's file says of itself, without the letters of its shapes."""
    paragraphs = [" ".join(part.split()) for part in _docstring(family).split("\n\n")]
    text = "\n\n".join(part for part in paragraphs if not re.match(r"Shape letters|B batch", part))
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def own_variants(family: Family) -> dict[str, Variant]:
    """Without those for tests, and without names for another variant with a plan set."""
    return {
        name: variant
        for name, variant in family.variants.items()
        if not name.startswith("test_") and variant.reduction is None
    }


def aliases(family: Family) -> dict[str, Any]:
    """The names that mean another variant with a plan set, and that plan."""
    return {name: variant.reduction for name, variant in family.variants.items() if variant.reduction is not None}


@dataclasses.dataclass(frozen=True)
class CountedCost:
    """A row of costs.csv."""

    model: str
    reduction: str
    gmacs: float


def count(model_name: str) -> Iterator[CountedCost]:
    """Of every preset, at SIZE."""
    model = blueprint(model_name)
    if isinstance(model, SegmentationModel) and model.score_kind != "heatmap":
        model.reset_classifier(CLASSES)
    for preset in model.reduction_presets:
        model.set_inference_reduction(preset)
        yield CountedCost(model_name, preset, round(cost(model, SIZE).macs / 1e9, 3))


def count_all() -> None:
    rows = [row for family in FAMILIES.values() for name in own_variants(family) for row in count(name)]
    with COSTS.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in dataclasses.fields(CountedCost))
        writer.writerows(dataclasses.astuple(row) for row in rows)


@cache
def costs() -> list[CountedCost]:
    with COSTS.open(newline="", encoding="utf-8") as file:
        return [CountedCost(row["model"], row["reduction"], float(row["gmacs"])) for row in csv.DictReader(file)]


# --- what was measured ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A measured row: mIoU in [0, 1], multiply-accumulates in units of 1e9; "" is what was not measured."""

    model: str
    data: str  # of DATA
    reduction: str
    kind: str = ""  # of arena.py: what the plan is made of
    share: str = ""  # of arena.py: so much of the multiply-accumulates at most
    gmacs: float
    miou: float
    small: str = ""
    paired: str = ""
    changed: str = ""
    time: str = ""
    size: str
    seen: str  # what the image was resized to

    @classmethod
    def of(cls, row: Mapping[str, str], file: Path) -> Point:
        kind = row.get("kind", "")
        reduction = row["side"] if kind == "preset" else f"{kind} at {row['side']}" if kind else row["reduction"]
        return cls(
            model=row["model"].partition(" from ")[0],
            data=row.get("data") or file.name.partition("_")[0],
            reduction=short(reduction),
            kind=kind,
            share=row.get("macs_share", ""),
            gmacs=float(row["gmacs"]),
            miou=float(row["miou"]),
            small=row.get("small_class_miou") or row.get("small_miou", ""),
            paired=row.get("paired_miou", ""),
            changed=row.get("changed", ""),
            time=row.get("time_ratio") or row.get("time_fused", ""),
            size=row["size"],
            seen=row.get("seen_size") or row["size"],
        )

    @property
    def variant(self) -> str:
        return self.model.partition(".")[0]


@dataclasses.dataclass(frozen=True)
class Table:
    """A file of benchmarks/results/ and its measured rows."""

    file: Path
    points: tuple[Point, ...]

    @property
    def data(self) -> str:
        return self.points[0].data

    @property
    def base(self) -> Point | None:
        """The row without reduction."""
        return next((point for point in self.points if point.reduction in BASE), None)

    @property
    def series(self) -> str:
        """What a figure calls it."""
        point = self.points[0]
        return f"{point.model}, image shrunk to {point.seen}" if self.shrunk else point.model

    @property
    def shrunk(self) -> bool:
        """Whether the model saw smaller images than there were."""
        return self.points[0].seen != self.points[0].size

    def of(self, family: Family) -> bool:
        return any(point.variant in family.variants for point in self.points)

    def shown(self) -> list[Point]:
        """All rows; of those of `arena.py` the presets, and the best of each share."""
        best = [
            max((p for p in self.points if p.share == share), key=lambda p: p.miou, default=None)
            for share in SHOWN_SHARES
        ]
        return [p for p in self.points if not p.share] + [p for p in best if p is not None]


def short(reduction: str) -> str:
    """A plan in few words: "encoder 4/4/2/1, decoder 4"."""
    try:
        plan = json.loads(reduction)
    except ValueError:
        return reduction
    if not isinstance(plan, dict):
        return f"factor {plan}"
    return ", ".join(f"{site} {_entry(entry)}" for site, entry in plan.items())


def _entry(entry: Any) -> str:
    if isinstance(entry, list):
        return "/".join(map(_entry, entry))
    if isinstance(entry, dict):
        return " ".join([entry["type"], *(str(value) for name, value in entry.items() if name != "type")])
    return str(entry)


def tables(folder: Path = RESULTS) -> list[Table]:
    """The files of accuracy and cost on drawn pictures, in the order of their names."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if not set(reader.fieldnames or ()) >= NEEDED:
                continue
            points = tuple(Point.of(row, path) for row in reader if row["miou"])
        if points and points[0].data in DATA:
            found.append(Table(path, points))
    return found


# --- pages ------------------------------------------------------------------------------------------------------------


def grid(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table, without the columns in which nothing stands."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    kept = [i for i in range(len(head)) if any(row[i] for row in cells)]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line[i] for i in kept) + " |" for line in lines)


def page(family: Family, measured: Sequence[Table]) -> str:
    first = next(iter(own_variants(family)))
    parts = [
        f"# {title_of(family)}",
        f"<!-- Made by docs/draw_families.py of segzoo/models/{family.name}.py and benchmarks/results/. -->",
        about(family),
        f"```sh\nsegzoo list {first.partition('_')[0]}\nsegzoo info {first} --reduction fast\n```",
        *variants_section(family),
        *published_section(family),
        *measured_section(family, [table for table in measured if table.of(family)]),
    ]
    return "\n\n".join(parts) + "\n"


def variants_section(family: Family) -> list[str]:
    counted = {(row.model, row.reduction): row.gmacs for row in costs()}
    names = own_variants(family)
    presets = dict.fromkeys(row.reduction for row in costs() if row.model in names)
    rows = [
        [
            f"`{name}`",
            f"{variant.params / 1e6:.1f} M" if variant.params else "",
            *(f"{counted[name, preset]:.2f}" if (name, preset) in counted else "" for preset in presets),
        ]
        for name, variant in names.items()
    ]
    parts = [
        "## Variants",
        f"Parameters, and GMACs (1e9 multiply-accumulates) of an image of {SIZE[0]}x{SIZE[1]} by preset of the "
        f"[reduction](../choose-a-reduction.md). Segmenters have {CLASSES} classes here.",
        grid(["name", "parameters", *presets], rows),
        *(f"`{name}`: {variant.note}" for name, variant in names.items() if variant.note),
    ]
    known = blueprint(next(iter(names))).preset_accuracy
    told = {what: [f'"{name}"' for name in known if known[name] == what] for what in known.values()}
    if told:
        sentences = "; ".join(f"{', '.join(presets)}: {what}" for what, presets in told.items())
        parts.append(f"What the presets cost in accuracy: {sentences}.")
    if aliases(family):
        parts.append(
            "Names of the same models with a preset set: "
            + ", ".join(f"`{name}`" for name in aliases(family))
            + ". Weights and parameters are those of the name without it."
        )
    return parts


def published_section(family: Family) -> list[str]:
    names = own_variants(family)
    weights = [(f"{name}.{tag}", row) for name in names for tag, row in family.pretrained.get(name, {}).items()]
    paper = [
        [
            f"`{name}`",
            f"{figure.size[0]}x{figure.size[1]}" + (f", {figure.num_classes} classes" if figure.num_classes else ""),
            figure.reduction,
            f"{figure.gmacs:g}",
            f"{figure.params_m:g} M" if figure.params_m else "",
            figure.why,
        ]
        for name, variant in names.items()
        for figure in variant.published
    ]
    parts = []
    if weights:
        head = ["weights", "trained on", "published, in percent (reduction)", "licence", "where"]
        rows = [[f"`{name}`", row.dataset, figures(row), licence(row), row.state] for name, row in weights]
        parts += ["## Weights and what was published for them", grid(head, rows)]
        parts.append("Protocols, sources and what could be confirmed: `segzoo info NAME.TAG`.")
    if paper:
        head = ["name", "input", "reduction", "GMACs", "parameters", "differs from segzoo's count because"]
        parts += ["## Published costs", grid(head, paper)]
        parts.append("Beside segzoo's exact counts: [what segzoo covers of its papers](../coverage.md).")
    return parts


def figures(row: PretrainedCfg) -> str:
    """The published accuracies, those of one metric together; of weights trained otherwise with how."""
    by_metric: dict[str, list[str]] = {}
    for score in row.published:
        terms = ", ".join(filter(None, [score.reduction, score.training]))
        by_metric.setdefault(METRICS[score.metric], []).append(f"{score.value:g} ({terms})")
    return "; ".join(f"{metric} {', '.join(dict.fromkeys(values))}" for metric, values in by_metric.items())


def licence(row: PretrainedCfg) -> str:
    allowed = {True: "", False: ", not commercial", None: ", use unknown"}[row.commercial_use]
    return row.license + allowed


def measured_section(family: Family, measured: Sequence[Table]) -> list[str]:
    if not measured:
        return ["## Measured", "Nothing of this family has been measured here yet."]
    parts = [
        "## Measured",
        f"![Accuracy over cost of {title_of(family)}]({family.name}.svg)",
        "On pictures that are drawn on demand, held out from training. How long each model was trained differs, so "
        "that what counts is the change along a table; conditions and command of every row are in its file.",
    ]
    for table in measured:
        parts += [f"### {table.series}, {DATA[table.data]}", measured_table(table), _source(table)]
    return parts


def measured_table(table: Table) -> str:
    columns = {
        "model": lambda p: f"`{p.model}`" if len({q.model for q in table.points}) > 1 else "",
        "reduction": lambda p: p.reduction + (f", at most {p.share} of the MACs" if p.share else ""),
        "GMACs": lambda p: f"{p.gmacs:.3f}",
        "mIoU": lambda p: f"{p.miou:.4f}",
        "small classes": lambda p: p.small,
        "paired classes": lambda p: p.paired,
        "changed pixels": lambda p: f"{float(p.changed):.2%}" if p.changed else "",
        "time": lambda p: p.time,
    }
    return grid(list(columns), [[cell(point) for cell in columns.values()] for point in table.shown()])


def _source(table: Table) -> str:
    link = f"[{table.file.name}](../../benchmarks/results/{table.file.name})"
    contest = any(point.share for point in table.points)
    best = " With a share given: the best of its kinds of entries at that share." if contest else ""
    return f"Times are relative to no reduction.{best} {link}"


def index(measured: Sequence[Table]) -> str:
    rows = []
    for family in FAMILIES.values():
        names = own_variants(family)
        params = [variant.params / 1e6 for variant in names.values() if variant.params]
        gmacs = [row.gmacs for row in costs() if row.model in names and row.reduction == "base"]
        sentence = re.sub(r" \((?:[^()]|\([^()]*\))*\)", "", about(family).split("\n\n")[0]).rstrip(".")
        rows.append(
            [
                f"[{title_of(family)}]({family.name}.md)",
                re.sub(rf"^{re.escape(title_of(family))}[:,] ", "", sentence),
                len(names),
                span(params, ".1f"),
                span(gmacs, ".1f"),
                "yes" if any(table.of(family) for table in measured) else "",
            ]
        )
    head = ["family", "what it is", "variants", "parameters, M", f"GMACs, {SIZE[0]}x{SIZE[1]}", "measured here"]
    return (
        "\n\n".join(
            [
                "# Families",
                "<!-- Made by docs/draw_families.py. -->",
                "Each is written from its paper, under Apache-2.0, and all take the same call, "
                "`set_inference_reduction()`. A page says what the family is, its variants with their costs by preset, "
                "its weights with what was published for them, and what was measured here.",
                grid(head, rows),
                "## Fewer tokens, measured",
                "![Change of mIoU over the share of the multiply-accumulates that is left](families.svg)",
                "The same trained weights with and without reduction, on street scenes. A point is a reduction: how "
                "much of the multiply-accumulates is left, and what the mIoU loses or wins against none.",
            ]
        )
        + "\n"
    )


def span(values: Sequence[float], form: str) -> str:
    texts = dict.fromkeys(format(value, form) for value in (min(values), max(values)))
    return " to ".join(texts)


# --- figures ----------------------------------------------------------------------------------------------------------

Series = Mapping[str, Sequence[tuple[float, float]]]  # name -> (x, y) of its points


def family_series(measured: Sequence[Table]) -> dict[str, Series]:
    """Data -> series of GMACs and mIoU; those of `arena.py` by kind of entry, others by reduction."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for table in measured:
        models = {other.points[0].model for other in measured if other.data == table.data}
        for point in table.points:
            if point.variant not in VARIANTS:
                name = point.model
            elif table.shrunk:
                name = table.series
            else:
                name = ", ".join([point.model] * (len(models) > 1) + [point.kind if point.share else point.reduction])
            found.setdefault(table.data, {}).setdefault(name, []).append((point.gmacs, point.miou))
    return found


def index_series(measured: Sequence[Table]) -> Series:
    """Model -> share of its MACs without reduction, points of mIoU against it; of presets and plans given by hand."""
    found: dict[str, list[tuple[float, float]]] = {}
    for table in measured:
        if table.data == "scenes" and table.base is not None:
            rows = [p for p in table.points if not p.share]
            found.setdefault(table.series, []).extend(
                (round(p.gmacs / table.base.gmacs, 4), round(100 * (p.miou - table.base.miou), 2)) for p in rows
            )
    return {name: points for name, points in found.items() if len(points) > 1}


def drawing(panels: Mapping[str, Series], x_label: str, y_label: str) -> str:
    """An SVG with a panel for each, in whose description the points stand."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "segzoo", "svg.fonttype": "none", "font.size": 10, "axes.spines.top": False}
    with matplotlib.rc_context({**style, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(len(panels), 1, figsize=(8, 3.8 * len(panels)), squeeze=False)
        for axis, (name, series) in zip(axes[:, 0], panels.items(), strict=True):
            draw_panel(axis, series)
            axis.set(title=name, xlabel=x_label, ylabel=y_label)
        figure.tight_layout()
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Description": json.dumps(panels)})
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def draw_panel(axis: Any, series: Series) -> None:
    """A mark for every series; their names stand on the right."""
    for number, (name, points) in enumerate(series.items()):
        x, y = zip(*points, strict=True)
        axis.plot(x, y, "osD^vP*Xph"[number % 9], label=name, markersize=8, alpha=0.85, clip_on=False)
    low, high = axis.get_ylim()
    spare = max(0.0, LEAST_SPAN - (high - low)) / 2
    axis.set_ylim(low - spare, high + spare)
    axis.margins(x=0.1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))


def drawn(svg: str) -> dict[str, Any]:
    """The points in the description of a drawing."""
    text = ElementTree.fromstring(svg).findtext(".//{http://purl.org/dc/elements/1.1/}description")
    return json.loads(text or "{}")


def family_panels(family: Family, measured: Sequence[Table]) -> dict[str, Series]:
    found = family_series([table for table in measured if table.of(family)])
    return {DATA[data]: series for data, series in found.items()}


# --- all together -----------------------------------------------------------------------------------------------------


def pages() -> dict[Path, str]:
    """What every page has to say."""
    measured = tables()
    made = {FOLDER / f"{family.name}.md": page(family, measured) for family in FAMILIES.values()}
    return {FOLDER / "index.md": index(measured), **made}


def pictures() -> dict[Path, dict[str, Series]]:
    """What every figure has to show: its panels."""
    measured = tables()
    found = {FOLDER / f"{family.name}.svg": family_panels(family, measured) for family in FAMILIES.values()}
    found[FOLDER / "families.svg"] = {"": index_series(measured)}
    return {path: panels for path, panels in found.items() if panels}


AXES = {"families.svg": ("share of the multiply-accumulates", "change of mIoU, points")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", action="store_true", help="count the costs anew first")
    if parser.parse_args().count:
        count_all()
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
    for path, panels in pictures().items():
        path.write_text(drawing(panels, *AXES.get(path.name, ("GMACs", "mIoU"))), encoding="utf-8")


if __name__ == "__main__":
    main()
