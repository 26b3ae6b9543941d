"""What an evaluation found, as a record, and as files: JSON, CSV and a chart."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .._errors import SegzooError
from ..plans import Plan
from ..visualize import bar_chart
from .metrics import ConfusionMatrix


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one model reached on one data set, and under which conditions."""

    model: str
    data: str
    split: str
    samples: int
    protocol: str  # name, as given
    protocol_text: str  # what was done
    reduction: str  # preset or plan as given; "as is" where none was
    plan: Plan  # in force
    metrics: Mapping[str, float]  # figures in [0, 1]; NaN where there was nothing to count
    published: float | None  # the paper's main figure with this reduction, in [0, 1]
    published_protocol: str
    conditions: Mapping[str, str | None]  # engine, device, dtype, versions, commit
    class_names: tuple[str, ...] = ()
    confusion: ConfusionMatrix | None = None

    @property
    def main(self) -> str:
        """Name of the figure that the published one stands beside."""
        return next(iter(self.metrics))

    def row(self) -> dict[str, Any]:
        """Flat, for a table: figures in percent with two decimals."""
        figures = {name: None if np.isnan(value) else round(100 * value, 2) for name, value in self.metrics.items()}
        return {
            "model": self.model,
            "data": self.data,
            "split": self.split,
            "samples": self.samples,
            "protocol": self.protocol,
            "reduction": self.reduction,
            **figures,
            f"published {self.main}": None if self.published is None else round(100 * self.published, 2),
            "published protocol": self.published_protocol,
            "protocol in words": self.protocol_text,
            "plan": self.plan.to_json(),
            **self.conditions,
        }

    def class_rows(self) -> list[dict[str, Any]]:
        """A row a class: figures in percent, None for a class that does not occur."""
        if self.confusion is None:
            return []
        columns = {"IoU": self.confusion.iou(), "accuracy": self.confusion.class_accuracy()}
        pixels = self.confusion.counts_TP.sum(1)
        return [
            {
                "class": i,
                "name": name,
                **{
                    key: None if np.isnan(values[i]) else round(100 * float(values[i]), 2)
                    for key, values in columns.items()
                },
                "pixels": int(pixels[i]),
            }
            for i, name in enumerate(self.class_names)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain data without NaN."""
        confusion = None if self.confusion is None else self.confusion.counts_TP.tolist()
        return {
            **self.row(),
            "plan": json.loads(self.plan.to_json()),
            "classes": self.class_rows(),
            "confusion": confusion,
        }


def write_results(results: Sequence[Evaluation], folder: Path) -> list[Path]:
    """Write evaluations of one model and data set, one a reduction, as files; returns their paths.

    `results.json` has everything; `results.csv` a row an evaluation; for segmentation also `classes.csv`, a row a class
    and evaluation, and `classes.png`, bars of the classes' IoU.
    """
    rows = [result.row() for result in results]
    paths = [_write(folder / "results.json", json.dumps([result.to_dict() for result in results], indent=1) + "\n")]
    paths.append(_write(folder / "results.csv", _csv(rows)))
    classes = [{"reduction": r.reduction, **row} for r in results for row in r.class_rows()]
    if classes:
        paths.append(_write(folder / "classes.csv", _csv(classes)))
        series = {
            f"{r.reduction}: {100 * r.metrics[r.main]:.2f}": (100 * r.confusion.iou()).tolist()
            for r in results
            if r.confusion is not None
        }
        title = f"{results[0].model} on {results[0].data} {results[0].split}"
        chart = folder / "classes.png"
        bar_chart(series, results[0].class_names, chart, title=title, unit="IoU in percent (legend: mean)")
        paths.append(chart)
    return paths


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, rows[0], lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _write(path: Path, text: str) -> Path:
    """A file that appears whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise SegzooError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
    return path
