"""What a search for a reduction came to: the plan, what it changes, and what else could be had."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .._errors import SegzooError
from .._files import write_files
from ..layers.reduction import NEUTRAL
from ..plans import Plan


@dataclasses.dataclass(frozen=True)
class Point:
    """A plan, what it costs and how many mask pixels it changes against the model without reduction."""

    name: str  # "chosen", "front", or a preset's name
    plan: Plan
    macs: float  # multiply-accumulates as a share of those without reduction
    predicted_change: float  # share of the pixels, from the entries measured alone
    measured_change: float | None  # of the whole plan; None if it was not measured

    @property
    def change(self) -> float:
        return self.predicted_change if self.measured_change is None else self.measured_change


@dataclasses.dataclass(frozen=True)
class Resource:
    """A measured quantity that was the budget."""

    unit: str  # "latency_ms" or "memory_mb"
    base: float  # without reduction
    chosen: float  # with the chosen plan
    sizes: tuple[tuple[int, int], ...]  # (H, W) in pixels at which it was measured
    engine: str | None = None  # on which it was measured; None: the model itself, where it is
    precision: str | None = None  # of the engine
    threads: int | None = None  # of the engine; None: its default

    def __str__(self) -> str:
        where = f" on {self.engine} in {self.precision}" if self.engine else ""
        return f"{self.unit}{where}: {self.chosen:.1f} of {self.base:.1f}"


@dataclasses.dataclass(frozen=True)
class ReductionFit:
    """What `fit_reduction` found. `print` it for the table; `save` writes it with the figure."""

    plan: Plan  # the chosen plan, in force
    budget: dict[str, float]  # {"macs": 0.85}
    base_gmacs: float  # 10**9 multiply-accumulates an image without reduction, mean of the images
    macs: float  # of the plan, as a share of that
    predicted_change: float  # share of the mask's pixels, from the entries measured alone
    predicted_interval: tuple[float, float]  # 95 % bootstrap interval of its mean over images
    measured_change: float  # the whole plan measured on the same images
    measured_interval: tuple[float, float]  # 95 % bootstrap interval of its mean over images
    num_images: int
    sizes: tuple[tuple[int, int], ...]  # (H, W) in pixels at which the model saw them
    resource: Resource | None  # latency or memory, where that was the budget
    front: tuple[Point, ...]  # no choice of the tried entries is predicted to be better in both; most expensive first
    presets: tuple[Point, ...]  # the model's own presets, measured

    @property
    def chosen(self) -> Point:
        return Point("chosen", self.plan, self.macs, self.predicted_change, self.measured_change)

    @property
    def points(self) -> list[Point]:
        """The chosen plan, the presets and the rest of the front, most expensive first."""
        known = {point.plan.to_json() for point in (self.chosen, *self.presets)}
        rest = (point for point in self.front if point.plan.to_json() not in known)
        return sorted((self.chosen, *self.presets, *rest), key=lambda point: -point.macs)

    def __str__(self) -> str:
        sizes = ", ".join(f"{H}x{W}" for H, W in self.sizes)
        low, high = (100 * side for side in self.measured_interval)
        predicted_low, predicted_high = (100 * side for side in self.predicted_interval)
        lines = [
            f"{self.macs:.3f} of {self.base_gmacs:.3f} GMACs; of the mask's pixels {100 * self.measured_change:.2f} % "
            f"({low:.2f} to {high:.2f}) change on {self.num_images} images at {sizes}, predicted "
            f"{100 * self.predicted_change:.2f} % ({predicted_low:.2f} to {predicted_high:.2f})",
            f"{'MACs':>6} {'predicted':>10} {'measured':>10}  {'':<10} plan",
        ]
        if self.resource is not None:
            lines.insert(1, str(self.resource))
        lines += [
            f"{point.macs:>6.3f} {_percent(point.predicted_change):>10} {_percent(point.measured_change):>10}  "
            f"{point.name:<10} {_short(point.plan)}"
            for point in self.points
        ]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        record = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            **record,
            "plan": json.loads(self.plan.to_json()),
            "resource": dataclasses.asdict(self.resource) if self.resource else None,
            "front": [_point_dict(point) for point in self.front],
            "presets": [_point_dict(point) for point in self.presets],
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write `reduction.json`, the record with the plan, and `reduction.png`, the figure, into a folder.

        Raises:
            SegzooError: matplotlib is missing, a file exists and `overwrite` is not set, or one cannot be written.
        """
        record, picture = output_files(Path(folder))
        figure = self._figure()
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        writers = {
            record: lambda path: path.write_text(text, encoding="utf-8"),
            picture: lambda path: figure.savefig(path, dpi=150, format="png"),
        }
        write_files(writers, overwrite=overwrite)
        return [record, picture]

    def _figure(self) -> Any:
        figure_of = require_matplotlib()
        figure = figure_of(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([p.macs for p in self.front], [100 * p.change for p in self.front], ".-", color="0.6", label="front")
        presets = [point for point in self.presets if not point.plan.is_neutral]
        axes.plot([p.macs for p in presets], [100 * p.change for p in presets], "s", color="tab:blue", label="presets")
        for point in presets:
            axes.annotate(point.name, (point.macs, 100 * point.change), xytext=(4, 4), textcoords="offset points")
        below, above = (abs(100 * (side - self.measured_change)) for side in self.measured_interval)
        axes.errorbar(
            [self.macs], [100 * self.measured_change], [[below], [above]], fmt="o", color="tab:red", label="chosen"
        )
        axes.set_xlabel(f"multiply-accumulates, share of {self.base_gmacs:.3f} G")
        axes.set_ylabel("changed pixels of the mask, %")
        axes.legend()
        return figure


def output_files(folder: Path) -> tuple[Path, Path]:
    """The record and the figure."""
    return folder / "reduction.json", folder / "reduction.png"


def require_matplotlib() -> Any:
    """matplotlib's Figure, which draws to a file and needs no screen."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SegzooError("the figure needs matplotlib: pip install 'segzoo[plot]'") from None
    return Figure


def _point_dict(point: Point) -> dict[str, Any]:
    return {**dataclasses.asdict(point), "plan": json.loads(point.plan.to_json())}


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _short(plan: Plan) -> str:
    """What is not neutral, in JSON, which is itself a plan."""
    return Plan({site: entry for site, entry in plan.items() if entry != NEUTRAL}).to_json()
