"""The walk: images -> what each entry changes alone -> plans -> the plan for a budget, measured."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor, nn

from .._errors import SegzooError
from ..engines import compile
from ..engines.compiling import segmenter_of
from ..engines.engine import check_engine
from ..layers.reduction import NEUTRAL, Entry
from ..models.segmenter import SegmentationModel
from ..plans import Plan, reduction_sites, resolve_plan, set_inference_reduction
from ..prediction import ScoreMaker, mask_maker, protocol_of, score_maker, windows
from ..preprocess import ImageSource, load_image, model_size, to_input
from ..twins import eval_twin
from .candidates import Group, entries_by_site, groups_of
from .changes import Changes, Forecast, bootstrap_interval
from .macs import Passes, only_what_saves, option_macs
from .record import Point, ReductionFit, Resource
from .resources import ENGINE_SIZES, EngineOptions, Latency, Memory
from .search import Choice, Price, choose, floor, front

FACTORS = (2, 3, 4, 6, 8)  # tried at every site of keys and values, and on RTFormer's grid
FRONT_POINTS = 24
CALIBRATIONS = 4  # plans of the front that are measured as a whole, besides the presets

Reach = Callable[[Plan], tuple[float, float]]  # plan -> what is needed without reduction, and with the plan


def fit_reduction(
    model: nn.Module,
    images: ImageSource | list[ImageSource] | tuple[ImageSource, ...],
    *,
    macs: float | None = None,
    latency_ms: float | None = None,
    memory_mb: float | None = None,
    max_change: float | None = None,
    entries: Sequence[object] = FACTORS,
    queries: Sequence[object] = (),
    resize: tuple[int, int] | None = None,
    engine: str | None = None,
    precision: str = "f32",
    threads: int | None = None,
    progress: bool = True,
) -> ReductionFit:
    """Choose an inference reduction for a budget on a few images of your own, without labels, and set it.

    Each entry is tried alone at each site: how many pixels of the masks change against the model without reduction.
    What it saves is counted exactly. Plans are searched in these tables, greedily by saving per changed pixel and then
    by pairs of sites; a few whole plans are measured to learn how the changes of single entries combine, and so is the
    chosen one. Choosing by `macs` or `max_change` gives the same plan at every call.

    >>> import segzoo
    >>> from segzoo.data import scenes
    >>> model = segzoo.create_model("edaformer_t", pretrained=True)
    >>> fit = segzoo.fit_reduction(model, [scenes.render(seed=7, size=(64, 128))[0]], macs=0.95, entries=[2])
    >>> fit.macs <= 0.95, fit.plan == model.set_inference_reduction(fit.plan)
    (True, True)

    Args:
        model: a segmentation model of segzoo with reduction sites; in any mode.
        images: one or, better, eight and more images such as the model will see, as for `predict`.
        macs: multiply-accumulates at most, as a share of those without reduction.
        latency_ms: milliseconds at most of a forward pass of one image on the model's device, or on the engine, from
            the prepared image to the scores at the decoder's resolution; the mean where images or windows differ in
            size. Measured in rounds that alternate with the model without reduction: do nothing else on the machine
            meanwhile.
        memory_mb: megabytes (10**6 bytes) at most of all tensors alive during the forward pass of the largest size.
        max_change: share of the mask's pixels at most that may change, mean of these images.
        entries: what is tried at sites of keys and values and on grids: whole numbers (factors) or plan entries. What
            the model's presets say for a site is always tried, too.
        queries: what is tried at sites of queries, such as `Neighbour2d(2)`; by default what the presets say alone.
        resize: (H, W) in pixels at which the model sees the images; default: the rule of its weights row.
        engine: on which `latency_ms` is measured, as for `segzoo.compile`; default: the model itself. At most seven
            plans are compiled, each for the four most frequent sizes. Changed pixels are always those of the model.
        precision, threads: of the engine, as for `segzoo.compile`.
        progress: show a progress bar on a terminal.

    Returns:
        A record with `.plan`, which is in force now.

    Raises:
        SegzooError: not exactly one budget, one that cannot be reached (the error names the floor), a model without
            sites, an entry that no site takes, or an engine that cannot be had; the model is as it was.
        ImageError: an image that cannot be read; the model is as it was.
    """
    name, budget = _the_budget(macs=macs, latency_ms=latency_ms, memory_mb=memory_mb, max_change=max_change)
    mask_maker(model)  # says what is wrong with a module that gives no masks
    if not isinstance(model, SegmentationModel):
        raise SegzooError(
            "fit_reduction takes a model, whose reduction can still be chosen; compile or export it after"
        )
    options = _engine_options(name, model, engine=engine, precision=precision, threads=threads)
    sources = list(images) if isinstance(images, (list, tuple)) else [images]
    if not sources:
        raise SegzooError("fit_reduction needs at least one image")
    arrays = [load_image(source, model.in_chans) for source in sources]
    twin = eval_twin(model)  # what is tried is never seen by anyone who uses the model meanwhile
    set_inference_reduction(twin, None)
    walk = _Fit(twin, arrays, entries=entries, queries=queries, resize=resize, engine=options, progress=progress)
    fit = walk.run(name, budget)
    set_inference_reduction(model, fit.plan)
    return fit


def _the_budget(**budgets: float | None) -> tuple[str, float]:
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise SegzooError(f"give exactly one budget of {', '.join(budgets)}, not {', '.join(given) or 'none'}")
    ((name, value),) = given.items()
    if _in_range(name, value):
        return name, float(value)
    if name in ("macs", "max_change"):
        raise SegzooError(f"{name} is a share, such as {0.85 if name == 'macs' else 0.01}, not {value!r}")
    raise SegzooError(f"{name} must be a positive number, not {value!r}")


def _in_range(name: str, value: object) -> bool:
    """Whether a budget is a share (0 only of change), or a positive number for what is measured in units."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    if name == "max_change":
        return 0 <= value <= 1
    return 0 < value <= 1 if name == "macs" else 0 < value < float("inf")


def _engine_options(
    budget: str, model: SegmentationModel, *, engine: str | None, precision: str, threads: int | None
) -> EngineOptions | None:
    """What a latency is measured on; None: the model itself. Raises SegzooError before any work."""
    if engine is None:
        if precision != "f32" or threads is not None:
            raise SegzooError("precision= and threads= are of an engine; add engine='openvino', for example")
        return None
    if budget != "latency_ms":
        raise SegzooError(f"engine={engine!r} is what latency_ms= is measured on, not {budget}=; leave it out")
    check_engine(engine, precision, threads)
    segmenter_of(model)
    return EngineOptions(engine, precision, threads)


@dataclasses.dataclass(frozen=True)
class _Tables:
    """What a plan costs and changes, by addition over groups."""

    groups: list[Group]  # with the options that save anything
    macs: list[list[int]]  # of every group's attention by option
    fixed: int  # multiply-accumulates of what no option changes
    forecast: Forecast

    @functools.cached_property
    def prices(self) -> list[list[Price]]:
        return [
            [Price(cost, self.forecast.weight(option)) for cost, option in zip(costs, group.options, strict=True)]
            for group, costs in zip(self.groups, self.macs, strict=True)
        ]

    @property
    def least(self) -> float:
        """Multiply-accumulates of the strongest plan."""
        return self.fixed + sum(min(costs) for costs in self.macs)

    def plan(self, choice: Choice) -> Plan:
        chosen = (group.options[index] for group, index in zip(self.groups, choice, strict=True))
        return Plan(item for option in chosen for item in option.items())


class _Fit:
    """One call: its images, its tables, and the ways to a plan."""

    def __init__(
        self,
        model: SegmentationModel,
        arrays: Sequence[np.ndarray],
        *,
        entries: Sequence[object],
        queries: Sequence[object],
        resize: tuple[int, int] | None,
        engine: EngineOptions | None,
        progress: bool,
    ):
        self.model, self.arrays, self.resize, self.engine, self.progress = model, arrays, resize, engine, progress
        sites = reduction_sites(model)
        if not sites:
            raise SegzooError(f"{model.name or type(model).__name__} has no reduction sites; there is nothing to fit")
        self.presets = {name: resolve_plan(name, sites, model.reduction_presets) for name in model.reduction_presets}
        tried = entries_by_site(sites, model.reduction_presets, entries, queries)
        self.passes = passes_of(model, arrays, resize)
        self.groups = groups_of(sites, tried)
        self.base, self.macs = option_macs(model, self.groups, self.passes)
        groups, macs = only_what_saves(self.groups, self.macs)
        fixed = self.base - sum(costs[0] for costs in macs)
        self.tables = _Tables(groups, macs, fixed, Forecast({}))
        self.measured: dict[str, np.ndarray] = {}  # plan as JSON -> (images,) change

    def run(self, name: str, budget: float) -> ReductionFit:
        tables = self.tables
        reach = self._reach(name)
        if name == "macs":
            self._require_reach(name, budget, tables.least / self.base)
        elif reach is not None:
            _, least = reach(self._complete(tables.plan(floor(tables.prices))))
            self._require_reach(name, budget, least)
        self._measure_changes()
        choices = front(self.tables.prices, FRONT_POINTS)
        if name == "macs":
            choice = choose(self.tables.prices, budget * self.base - self.tables.fixed)
            chosen = self.tables.plan(choice) if choice else Plan()
        elif reach is None:
            chosen = self._within_change(choices, budget)
        else:
            chosen = self._within_reach(choices, budget, reach)
        return self._record({name: budget}, chosen, choices, reach)

    def _require_reach(self, name: str, budget: float, least: float) -> None:
        if least <= budget:
            return
        what = f"{least:.3f} of the multiply-accumulates" if name == "macs" else f"{least:.1f} ({name})"
        raise SegzooError(
            f"{name}={budget:g} cannot be reached: the strongest plan of the entries tried leaves {what}; allow that "
            "much, or give more entries= and queries="
        )

    # --- measuring ----------------------------------------------------------------------------------------------------

    def _measure_changes(self) -> None:
        """What every entry changes alone, and how changes combine in whole plans."""
        from tqdm import tqdm  # comes with huggingface-hub

        plans = [plan for plan in self.presets.values() if not plan.is_neutral]
        alone = self._entries_alone(plans)
        runs = 1 + len(alone) + len(plans) + CALIBRATIONS
        hidden = not self.progress or not sys.stderr.isatty()
        with tqdm(total=runs * len(self.arrays), desc="images", leave=False, disable=hidden, file=sys.stderr) as bar:
            self.changes = Changes(self.model, self.arrays, resize=self.resize, advance=bar.update)
            changes = {(site, entry): self.changes.measure({site: entry}) for site, entry in alone}
            tables = dataclasses.replace(self.tables, forecast=Forecast(changes))
            known = [(plan, self._measure(plan)) for plan in (*plans, *_calibrations(tables))]
            forecast = tables.forecast.calibrated(known, self.changes.half_a_pixel)
            self.tables = dataclasses.replace(self.tables, forecast=forecast)

    def _entries_alone(self, plans: Sequence[Plan]) -> list[tuple[str, Entry]]:
        """Every entry that an option or one of the plans gives to a site, once."""
        options = [option for group in self.tables.groups for option in group.options]
        items = [item for option in (*options, *plans) for item in option.items()]
        return [(site, entry) for site, entry in dict.fromkeys(items) if entry != NEUTRAL]

    def _measure(self, plan: Plan) -> np.ndarray:
        key = self._complete(plan).to_json()
        if key not in self.measured:
            self.measured[key] = self.changes.measure(plan)
        return self.measured[key]

    def _reach(self, budget: str) -> Reach | None:
        """What measures a plan for this budget; None where it is counted."""
        if budget == "latency_ms":
            return Latency(self._maker_of, self._inputs())
        return Memory(self.model, self._inputs()) if budget == "memory_mb" else None

    def _maker_of(self, plan: Plan) -> ScoreMaker:
        """The model with a plan, or the engine of it."""
        twin = eval_twin(self.model)
        set_inference_reduction(twin, plan)
        return compile(twin, **dataclasses.asdict(self.engine)) if self.engine else score_maker(twin)

    def _inputs(self) -> list[tuple[Tensor, int]]:
        """A prepared image of every size at which the model runs, and how often it does; of an engine, which compiles
        for each, of the most frequent ones."""
        maker = score_maker(self.model)
        passes = self.passes.most_common(ENGINE_SIZES if self.engine else None)
        return [(to_input(self.arrays[0], size, maker.row, maker.like), times) for size, times in passes]

    # --- choosing -----------------------------------------------------------------------------------------------------

    def _within_change(self, choices: Sequence[Choice], budget: float) -> Plan:
        """The cheapest plan of the front whose measured change keeps to the budget."""
        for choice in reversed(choices):
            plan = self.tables.plan(choice)
            if self.tables.forecast.of(plan).mean() <= budget and self._measure(plan).mean() <= budget:
                return plan
        return Plan()

    def _within_reach(self, choices: Sequence[Choice], budget: float, reach: Reach) -> Plan:
        """The plan of the front with the least change that keeps to a measured budget, found by halving."""
        low, high = 0, len(choices) - 1
        while low < high:
            middle = (low + high) // 2
            _, needed = reach(self._complete(self.tables.plan(choices[middle])))
            low, high = (low, middle) if needed <= budget else (middle + 1, high)
        return self.tables.plan(choices[high])

    # --- reporting ----------------------------------------------------------------------------------------------------

    def _record(
        self, budget: dict[str, float], chosen: Plan, choices: Sequence[Choice], reach: Reach | None
    ) -> ReductionFit:
        plan = self._complete(chosen)
        predicted_I, measured_I = self.tables.forecast.of(plan), self._measure(plan)
        return ReductionFit(
            plan=plan,
            budget=budget,
            base_gmacs=self.base / len(self.arrays) / 1e9,
            macs=self._share(plan),
            predicted_change=float(predicted_I.mean()),
            predicted_interval=bootstrap_interval(predicted_I),
            measured_change=float(measured_I.mean()),
            measured_interval=bootstrap_interval(measured_I),
            num_images=len(self.arrays),
            sizes=tuple(self.passes),
            resource=self._resource(next(iter(budget)), plan, reach),
            front=tuple(self._point("front", self.tables.plan(choice)) for choice in choices),
            presets=tuple(self._point(name, preset) for name, preset in self.presets.items() if not preset.is_neutral),
        )

    def _resource(self, unit: str, plan: Plan, reach: Reach | None) -> Resource | None:
        if reach is None:
            return None
        base, chosen = reach(plan)
        sizes = tuple((x_BCHW.shape[2], x_BCHW.shape[3]) for x_BCHW, _ in self._inputs())
        return Resource(unit, base, chosen, sizes, **(dataclasses.asdict(self.engine) if self.engine else {}))

    def _point(self, name: str, plan: Plan) -> Point:
        plan = self._complete(plan)
        measured = self.measured.get(plan.to_json())
        return Point(
            name=name,
            plan=plan,
            macs=self._share(plan),
            predicted_change=float(self.tables.forecast.of(plan).mean()),
            measured_change=None if measured is None else float(measured.mean()),
        )

    def _complete(self, plan: Plan) -> Plan:
        """With an entry for every site, in the order of the sites."""
        return Plan((site, plan.get(site, NEUTRAL)) for site in reduction_sites(self.model))

    def _share(self, plan: Plan) -> float:
        """Multiply-accumulates of a plan whose entries were all tried, as a share of those without reduction."""
        costs = (
            of_group[group.options.index({site: plan[site] for site in group.sites})]
            for group, of_group in zip(self.groups, self.macs, strict=True)
        )
        return (self.tables.fixed + sum(costs)) / self.base


def _calibrations(tables: _Tables) -> list[Plan]:
    """Plans spread over the front, which are measured as a whole."""
    choices = front(tables.prices, FRONT_POINTS)[1:]
    spread = {round(i) for i in np.linspace(0, len(choices) - 1, CALIBRATIONS)} if choices else ()
    return [tables.plan(choices[index]) for index in sorted(spread)]


def passes_of(model: SegmentationModel, arrays: Sequence[np.ndarray], resize: tuple[int, int] | None) -> Passes:
    """At which sizes, and how often, `predict` runs the model for these images."""
    row = score_maker(model).row
    protocol = protocol_of(row, resize=resize)
    passes = Passes()
    for array_HWC in arrays:
        size = model_size((array_HWC.shape[0], array_HWC.shape[1]), row, protocol.resize)
        if protocol.mode == "whole":
            passes[size] += 1
            continue
        for rows, columns in windows(size, protocol.crop, protocol.stride):
            passes[min(rows.stop, size[0]) - rows.start, min(columns.stop, size[1]) - columns.start] += 1
    return passes
