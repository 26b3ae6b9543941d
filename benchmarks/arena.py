"""Every way to have fewer tokens, on the same trained weights, at equal multiply-accumulates.

    python benchmarks/arena.py edaformer_t.scenes
    python benchmarks/arena.py segvit_small --checkpoint runs/segvit_small/weights.safetensors --data context

For each kind of entry, at keys and values, at queries, or at both, the plan is searched that keeps to 0.9, 0.8, 0.7 and
0.6 of the model's multiply-accumulates and changes as few pixels as it can: the search of `segzoo.fit_reduction`,
with entries of that kind alone, on --fit scenes of their own and without labels. So each kind shows the best that it
can do, and all cost the same. What a kind cannot reach is recorded with its floor and no figures.

Every plan is then measured on the same held-out scenes: mIoU, mIoU of the small classes (of "context" of the paired
ones, too), and the share of pixels that are another class than without reduction, with a bootstrap interval over the
scenes. Times are of the forward pass, all plans in turn, round by round, as ratios to no reduction: with torch's fused
attention, and with the one that holds the matrix of scores. Plans at equal time are found in that column. Peak memory
is that of live tensors. The search takes an hour or so and may share the machine, the times may not:

    python benchmarks/arena.py edaformer_t.scenes --rounds 0
    python benchmarks/arena.py edaformer_t.scenes --times benchmarks/results/arena_edaformer_t.scenes_scenes_....csv
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recording import RESULTS, conditions, write_table
from timing import interleaved
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import segzoo
from segzoo.data import scenes
from segzoo.data.scenes import context
from segzoo.layers.reduction import NEUTRAL
from segzoo.models.segmenter import SegmentationModel
from segzoo.plans import Plan
from segzoo.prediction import protocol_of, score_maker, segment_one
from segzoo.preprocess import to_input
from segzoo.training.metrics import ConfusionMatrix
from segzoo.tuning.candidates import Group, entries_by_site, groups_of
from segzoo.tuning.changes import Changes, Forecast, bootstrap_interval
from segzoo.tuning.macs import only_what_saves, option_macs
from segzoo.tuning.resources import memory_mb
from segzoo.tuning.search import Price, choose

FIRST_FIT_SEED, FIRST_HELD_OUT_SEED = 2_000_000, 1_000_000
SHARES = (0.9, 0.8, 0.7, 0.6)
SIDES = ("kv", "q", "kv+q")
# From gentle to strong; what a leaf does not take is left out at its site.
KINDS: Mapping[str, Sequence[Any]] = {
    "Pool": [2, 3, 4, 6, 8],
    "Pool max": [segzoo.Pool(n, "max") for n in (2, 3, 4, 6, 8)],
    "OverlapPool": [segzoo.OverlapPool(n) for n in (2, 3, 4, 6, 8)],
    "Window": [segzoo.Window(n) for n in (2, 3, 4, 6, 9, 12, 16, 24)],
    "Bipartite": [segzoo.Bipartite(r, s) for r, s in ((0.3, 2), (0.5, 2), (0.7, 2), (0.8, 4), (0.9, 4))],
    "LocalGlobal": [segzoo.LocalGlobal(2, x, r) for x, r in ((0.3, 0.2), (0.5, 0.3), (0.7, 0.5), (0.9, 0.5))],
    "EnergyProtected": [segzoo.EnergyProtected(r) for r in (0.2, 0.35, 0.5)],
    "GridMerge": [segzoo.GridMerge(f) for f in (1.5, 2, 3, 4)],
    "Neighbour2d": [segzoo.Neighbour2d(s) for s in (2, 3, 4)],
    "Neighbour1d": [segzoo.Neighbour1d(s) for s in (2, 4, 8, 16)],
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A plan of one kind, or the floor where its kind cannot reach the share."""

    kind: str
    side: str  # "kv", "q", "kv+q", or of a preset its name
    share: float | None  # of the multiply-accumulates at most
    macs: float  # of the plan, as a share
    plan: Plan | None


@dataclasses.dataclass(frozen=True)
class Data:
    """Scenes and what is asked of them."""

    render: Callable[..., tuple[np.ndarray, np.ndarray]]
    classes: tuple[str, ...]
    small: tuple[str, ...]
    paired: tuple[str, ...] = ()


DATA = {
    "scenes": Data(scenes.render, scenes.CLASSES, scenes.SMALL_CLASSES),
    "context": Data(context.render, context.CLASSES, context.SMALL_CLASSES, context.PAIRED_CLASSES),
}


def load(name: str, checkpoint: str | None, num_classes: int) -> SegmentationModel:
    if checkpoint is None:
        return segzoo.create_model(name, pretrained=True).eval()
    return segzoo.create_model(name, checkpoint_path=checkpoint, num_classes=num_classes).eval()


# --- the plans --------------------------------------------------------------------------------------------------------


def contestants(
    model: SegmentationModel, images: Sequence[np.ndarray], size: tuple[int, int], kinds: Sequence[str]
) -> list[Contestant]:
    """The presets, and of every kind and side the plan for each share."""
    base = segzoo.cost(model, size).macs
    found = []
    for name in model.reduction_presets:
        with segzoo.inference_reduction(model, name) as plan:
            found.append(Contestant("preset", name, None, segzoo.cost(model, size).macs / base, plan))
    for kind in kinds:
        for side in SIDES:
            say(f"{kind} at {side}")
            found += of_kind(model, images, size, kind, side, KINDS[kind])
    return found


def of_kind(
    model: SegmentationModel,
    images: Sequence[np.ndarray],
    size: tuple[int, int],
    kind: str,
    side: str,
    entries: Sequence[Any],
) -> list[Contestant]:
    """The plans of one kind; none where no site takes it or nothing is saved."""
    sites = segzoo.reduction_sites(model)
    sides = side.split("+")
    try:
        tried = entries_by_site(sites, {}, entries if "kv" in sides else [], entries if "q" in sides else [])
    except segzoo.SegzooError:  # no leaf of that side takes the kind
        return []
    groups = groups_of(sites, tried)
    base, macs = option_macs(model, groups, Counter({size: 1}))
    groups, macs = only_what_saves(groups, macs)
    if all(len(group.options) == 1 for group in groups):  # neutral alone
        return []
    prices = priced(model, images, size, groups, macs)
    fixed = base - sum(costs[0] for costs in macs)
    floor = (fixed + sum(min(costs) for costs in macs)) / base
    result = []
    for share in SHARES:
        choice = choose(prices, share * base - fixed)
        if choice is None:
            result.append(Contestant(kind, side, share, floor, None))
            continue
        plan = Plan.fromkeys(sites, NEUTRAL)
        for group, index in zip(groups, choice, strict=True):
            plan.update(group.options[index])
        cost = fixed + sum(costs[index] for costs, index in zip(macs, choice, strict=True))
        result.append(Contestant(kind, side, share, cost / base, plan))
    return result


def priced(
    model: SegmentationModel,
    images: Sequence[np.ndarray],
    size: tuple[int, int],
    groups: Sequence[Group],
    macs: Sequence[Sequence[int]],
) -> list[list[Price]]:
    """What every option of every group costs, and how much it changes alone."""
    options = {item: None for group in groups for option in group.options for item in option.items()}
    changes = Changes(model, images, resize=size, advance=lambda: None)
    alone = {(site, entry): changes.measure({site: entry}) for site, entry in options if entry != NEUTRAL}
    forecast = Forecast(alone)
    return [
        [Price(cost, forecast.weight(option)) for cost, option in zip(costs, group.options, strict=True)]
        for group, costs in zip(groups, macs, strict=True)
    ]


# --- the measurements -------------------------------------------------------------------------------------------------


def accuracy(
    model: SegmentationModel, plans: Sequence[Plan], data: Data, count: int, size: tuple[int, int]
) -> tuple[list[ConfusionMatrix], np.ndarray]:
    """Confusion of every plan over the same scenes, and the share of changed pixels (plans, scenes)."""
    confusion = [ConfusionMatrix(len(data.classes)) for _ in plans]
    changed = np.zeros((len(plans), count))
    for i in range(count):
        image, truth = data.render(seed=FIRST_HELD_OUT_SEED + i, size=size)
        masks = [mask_of(model, plan, image, size) for plan in (None, *plans)]
        for p, mask in enumerate(masks[1:]):
            confusion[p].update(mask.astype(np.int64), truth)
            changed[p, i] = np.mean(mask != masks[0])
        say(f"{i + 1}/{count} scenes")
    return confusion, changed


def mask_of(model: SegmentationModel, plan: Plan | None, image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    with segzoo.inference_reduction(model, plan):
        maker = score_maker(model)
        return segment_one(maker, image, protocol_of(maker.row, resize=size)).mask


def time_ratios(model: SegmentationModel, plans: Sequence[Plan], x: Tensor, rounds: int, *, fused: bool) -> list[float]:
    """Median over rounds of each plan's time over that of no reduction in the same round."""

    @torch.inference_mode()
    def run(plan: Plan | None) -> None:
        with segzoo.inference_reduction(model, plan), nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
            model.forward_head(model.forward_features(x))

    forms = {"none": partial(run, None), **{str(i): partial(run, plan) for i, plan in enumerate(plans)}}
    seconds = interleaved(forms, rounds)
    base = seconds.pop("none")
    return [statistics.median(own / none for own, none in zip(times, base, strict=True)) for times in seconds.values()]


def memory(model: SegmentationModel, plan: Plan, x: Tensor) -> float:
    with segzoo.inference_reduction(model, plan):
        return memory_mb(model, [(x, 1)])


def rounded(value: float) -> float:
    return round(value, 4)


def rows_of(args: argparse.Namespace, model: SegmentationModel, field: Sequence[Contestant]) -> list[dict[str, Any]]:
    data, size = DATA[args.data], tuple(args.size)
    base = segzoo.cost(model, size).macs
    plans = [contestant.plan for contestant in field if contestant.plan is not None]
    confusion, changed = accuracy(model, plans, data, args.scenes, size)
    x = input_of(model, data, size)
    measured = iter(zip(plans, confusion, changed, strict=True))
    rows = []
    for contestant in field:
        row: dict[str, Any] = {
            "model": args.model,
            "data": args.data,
            "kind": contestant.kind,
            "side": contestant.side,
            "macs_share": contestant.share or "",
            "macs": rounded(contestant.macs),
            "gmacs": rounded(contestant.macs * base / 1e9),
            **dict.fromkeys(("miou", "small_miou", "paired_miou", "changed", "changed_low", "changed_high"), ""),
            **dict.fromkeys(("time_fused", "time_materialised", "memory_mb", "plan"), ""),
            "scenes": args.scenes,
            "fit_scenes": args.fit,
            "rounds": args.rounds,
            "size": f"{size[0]}x{size[1]}",
            "threads": args.threads,
            **conditions(torch, segzoo),
        }
        if contestant.plan is not None:
            plan, matrix, changes = next(measured)
            low, high = bootstrap_interval(changes)
            row |= {
                "miou": rounded(matrix.miou()),
                "small_miou": rounded(matrix.miou([data.classes.index(name) for name in data.small])),
                "changed": rounded(changes.mean()),
                "changed_low": rounded(low),
                "changed_high": rounded(high),
                "memory_mb": round(memory(model, plan, x), 1),
                "plan": json.dumps({site: value for site, value in json.loads(plan.to_json()).items() if value != 1}),
            }
            if data.paired:
                row["paired_miou"] = rounded(matrix.miou([data.classes.index(name) for name in data.paired]))
        rows.append(row)
    return rows


def input_of(model: SegmentationModel, data: Data, size: tuple[int, int]) -> Tensor:
    maker = score_maker(model)
    return to_input(data.render(seed=FIRST_HELD_OUT_SEED, size=size)[0], size, maker.row, maker.like)


def add_times(rows: Sequence[dict[str, Any]], model: SegmentationModel, x: Tensor, rounds: int) -> None:
    """The time ratios of every row that has a plan, and the conditions under which they were measured."""
    planned = [row for row in rows if row["plan"]]
    plans = [plan_of(model, row["plan"]) for row in planned]
    for column, fused in (("time_fused", True), ("time_materialised", False)):
        for row, ratio in zip(planned, time_ratios(model, plans, x, rounds, fused=fused), strict=True):
            row |= {column: rounded(ratio), "rounds": rounds, "threads": torch.get_num_threads()}


def plan_of(model: SegmentationModel, text: str) -> Plan:
    """The plan of a row; the model is left as it was."""
    with segzoo.inference_reduction(model, json.loads(text)) as plan:
        return plan


def read_table(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def winners(rows: Sequence[Mapping[str, Any]]) -> None:
    """At each share the three kinds with the highest mIoU."""
    for share in SHARES:
        reached = [row for row in rows if row["macs_share"] in (share, str(share)) and row["miou"] != ""]
        best = sorted(reached, key=lambda row: -float(row["miou"]))[:3]
        text = ", ".join(f"{row['kind']} at {row['side']} {row['miou']} (time {row['time_fused']})" for row in best)
        print(f"{share} of the MACs: {text or 'nobody reaches it'}")


def say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<60}", end="", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name.tag, or a name with --checkpoint")
    parser.add_argument("--checkpoint", help="weights trained on the scenes")
    parser.add_argument("--data", choices=DATA, default="scenes", help="kind of scenes (default: %(default)s)")
    parser.add_argument("--fit", type=int, default=8, help="scenes on which plans are searched")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512), metavar=("H", "W"))
    parser.add_argument("--rounds", type=int, default=15, help="paired timing rounds; 0: no times")
    parser.add_argument("--times", type=Path, help="measure the times of this table's plans, and nothing else")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of entries (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path, help="file of the table (default: in benchmarks/results)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    data, size = DATA[args.data], tuple(args.size)
    model = load(args.model, args.checkpoint, len(data.classes))
    if args.times:
        rows = read_table(args.times)
    else:
        images = [data.render(seed=FIRST_FIT_SEED + i, size=size)[0] for i in range(args.fit)]
        rows = rows_of(args, model, contestants(model, images, size, args.kinds))
    if args.rounds:
        add_times(rows, model, input_of(model, data, size), args.rounds)
    winners(rows)
    write_table(
        rows,
        args.csv or args.times or RESULTS / f"arena_{args.model}_{args.data}_{size[0]}x{size[1]}_cpu{args.threads}.csv",
    )


if __name__ == "__main__":
    main()
