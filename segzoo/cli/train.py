"""`segzoo train`: a model learns one's own data; the same command goes on where it was stopped."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import SegzooError, WeightsError
from ..zoo.index import check_name
from .arguments import named_value, positive
from .output import print_json, print_table, progress, say

if TYPE_CHECKING:
    from ..models.base import Model
    from ..training.engine import Trained
    from ..training.recipes import Recipe

SUMMARY = "train a model on one's own data, by a paper's recipe; the same command goes on after a stop"
# Options that are values of the recipe.
SHORT_CUTS = ("lr", "steps", "batch_size", "crop", "size", "precision", "accumulation", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="name, name.tag, local-dir:DIR or hf-hub:OWNER/NAME")
    parser.add_argument("--data", required=True, metavar="DIR", help="as of `segzoo eval`; a classifier: CLASS folders")
    parser.add_argument("--split", metavar="NAME", help="to train on (default: train, or all there is)")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N samples")
    parser.add_argument("--val", metavar="DIR", help="validation data, if elsewhere (a list file has no splits)")
    parser.add_argument("--val-split", metavar="NAME", help="(default: val, if there is one)")
    parser.add_argument("--val-limit", type=positive, metavar="N", help="only the first N of them")
    parser.add_argument("--num-classes", type=positive, metavar="K", help="classes, where the data do not say")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RUN", help="folder of the training")
    start = parser.add_argument_group("what it begins with")
    start.add_argument("--pretrained", action="store_true", help="the name's weights (default: from scratch)")
    start.add_argument("--checkpoint", metavar="FILE", help="weights in a file")
    recipe = parser.add_argument_group("how; what is not said is the recipe's")
    recipe.add_argument(
        "--recipe", metavar="NAME", help="a paper's, or a .json file (default: that of the model's paper)"
    )
    recipe.add_argument("--lr", type=float, metavar="RATE")
    recipe.add_argument("--steps", type=positive, metavar="N", help="of the optimizer; the warm-up shrinks with it")
    recipe.add_argument("--batch-size", type=positive, metavar="N", help="images a step, of all processes together")
    recipe.add_argument("--accumulation", type=positive, metavar="N", help="parts in which a process takes its share")
    recipe.add_argument("--crop", type=positive, nargs=2, metavar=("H", "W"))
    recipe.add_argument("--size", type=positive, nargs=2, metavar=("SHORT", "LONG"), help="images are fitted into it")
    recipe.add_argument("--precision", choices=("no", "bf16", "fp16"), help="16-bit arithmetic where it is safe")
    recipe.add_argument("--seed", type=int, metavar="N")
    recipe.add_argument(
        "--set",
        action="append",
        type=named_value,
        default=[],
        metavar="NAME=VALUE",
        help="any value of the recipe; a wrong name lists all",
    )
    recipe.add_argument("--reduction", metavar="PLAN", help="in force when evaluating")
    recipe.add_argument("--during-training", action="store_true", help="the reduction is in force in training, too")
    machine = parser.add_argument_group("on what; several GPUs by `accelerate launch -m segzoo train ...`")
    machine.add_argument("--cpu", action="store_true", help="even if there is a GPU")
    machine.add_argument("--workers", type=int, default=0, metavar="N", help="processes that prepare images")
    machine.add_argument("--tensorboard", action="store_true", help="write RUN/tensorboard, too")


def run(args: argparse.Namespace) -> int:
    check_name(args.model)  # before torch is loaded
    if args.during_training and not args.reduction:
        raise SegzooError("--during-training says when a reduction is in force; add --reduction PLAN")
    if args.workers < 0:
        raise SegzooError(f"--workers must not be negative, not {args.workers}")
    from ..training.engine import train

    data, validation = _open(args)
    recipe = _recipe(args, data)
    model, start = _model(args, data, recipe)
    report = _Report(args.json)
    shown = f"{recipe.steps} steps of {recipe.batch_size} of {len(data)} images"
    held_out = "no validation data" if validation is None else f"validated on {len(validation)}"
    report.say(f"{model.name} {start}, recipe {recipe.name}: {shown}, {held_out}")
    try:
        trained = train(
            model,
            data,
            recipe=recipe,
            folder=args.output,
            validation=validation,
            reduction=args.reduction,
            during_training=args.during_training,
            start=start,
            workers=args.workers,
            cpu=args.cpu,
            command=shlex.join(["segzoo", *sys.argv[1:]]),
            tensorboard=args.tensorboard,
            progress=report.steps,
            watch=report.watch,
        )
    except KeyboardInterrupt:
        report.say("stopped; the same command goes on after the last checkpoint")
        raise
    if report.is_main:
        _print(trained, args)
    return 0


def _recipe(args: argparse.Namespace, data: Any) -> Recipe:
    from ..training.recipes import list_recipes, load_recipe, recipe_of

    name = args.recipe or recipe_of(args.model) or _saved_recipe(args.model)
    if name is None:
        raise SegzooError(f"{args.model} has no recipe of its own; name one: --recipe {' or '.join(list_recipes())}")
    labels = getattr(data, "labels", None)
    recipe = load_recipe(name, label_set=labels.name if labels else None)
    values: dict[str, Any] = {}
    for name, value in args.set:
        key = name.replace("-", "_")
        if getattr(args, key, None) is not None and key in SHORT_CUTS:
            raise SegzooError(f"--set {name} and --{key.replace('_', '-')} say the same; leave one of them out")
        values[key] = value
    values |= {name: getattr(args, name) for name in SHORT_CUTS if getattr(args, name) is not None}
    if isinstance(values.get("steps"), int):
        recipe = recipe.lasting(values["steps"])
    return recipe.with_values(values)


def _saved_recipe(model: str) -> str | None:
    """Of a model that was saved: that of its paper."""
    from ..training.recipes import recipe_of
    from ..zoo.recipe import blueprint

    return recipe_of(blueprint(model).name)


def _open(args: argparse.Namespace) -> tuple[Any, Any]:
    """Training and validation data, of the kind that the model takes; None for no validation."""
    from ..models.base import Encoder
    from ..zoo.recipe import blueprint

    data, held_out = (_open_classes if isinstance(blueprint(args.model), Encoder) else _open_masks)(args)
    return data.first(args.limit), held_out.first(args.val_limit) if held_out is not None else None


def _open_classes(args: argparse.Namespace) -> tuple[Any, Any]:
    from ..data.classification import open_classification

    root = Path(args.data)
    has = [name for name in ("train", "val") if (root / name).is_dir()]
    split, val_split = _chosen_splits(args, has)
    data = open_classification(root, split=split)
    if args.num_classes not in (None, len(data.classes)):
        raise SegzooError(
            f"--num-classes {args.num_classes}: there are {len(data.classes)} class folders; leave it out"
        )
    held_out = open_classification(args.val or root, split=val_split) if args.val or val_split else None
    return data, held_out


def _open_masks(args: argparse.Namespace) -> tuple[Any, Any]:
    from ..data.segmentation import open_data

    split, val_split = _chosen_splits(args, _splits(args.data))
    data = open_data(args.data, split=split, num_classes=args.num_classes)
    held_out = None
    if args.val or val_split:
        held_out = open_data(args.val or args.data, split=val_split, num_classes=args.num_classes)
    return data, held_out


def _chosen_splits(args: argparse.Namespace, has: Sequence[str]) -> tuple[str | None, str | None]:
    """Of training and validation; None: what is there, or for validation none, if --val names no place.

    Raises:
        SegzooError: there are splits, but none that is surely for training.
    """
    split = args.split or ("train" if "train" in has else "all" if has == ["all"] else None)  # all has val in it
    if split is None and has:
        raise SegzooError(f"--data {args.data} has no split train, but {', '.join(has)}; say which with --split")
    beside = "val" if "val" in has and split not in ("val", "all") and args.val is None else None
    return split, args.val_split or beside


def _splits(where: str) -> list[str]:
    """What a place has; nothing of a list file."""
    from ..data.layouts import LAYOUTS, find_layouts, splits_of
    from ..data.segmentation import DRAWN, DRAWN_SPLITS

    if where in DRAWN:
        return list(DRAWN_SPLITS)
    prefix, _, rest = where.partition(":")
    layouts, path = ([LAYOUTS[prefix]], Path(rest)) if prefix in LAYOUTS and rest else (None, Path(where))
    found = find_layouts(path) if layouts is None and path.is_dir() else layouts or []
    return [split for layout in found for split in splits_of(layout, path)]


def _model(args: argparse.Namespace, data: Any, recipe: Recipe) -> tuple[Model, str]:
    """The model for the classes of the data, and what its weights are; what is fresh in it is drawn from the seed."""
    import torch

    from ..zoo import create_model
    from ..zoo.index import SAVED_PREFIXES

    classes = _num_classes(args, data)
    saved = args.model.startswith(SAVED_PREFIXES)
    if args.pretrained and (saved or args.checkpoint):
        raise SegzooError(
            f"--pretrained means the weights of a name; {'the folder' if saved else 'the file'} has its own"
        )
    torch.manual_seed(recipe.seed)
    options: dict[str, Any] = {} if recipe.drop_path_rate is None else {"drop_path_rate": recipe.drop_path_rate}
    try:
        model = create_model(
            args.model,
            pretrained=args.pretrained,
            checkpoint_path=args.checkpoint,
            num_classes=classes,
            **options,
        )
    except WeightsError as error:
        raise WeightsError(str(error).replace("checkpoint_path=", "--checkpoint FILE")) from error
    if args.checkpoint:
        return model, f"from {args.checkpoint}"
    if args.pretrained:
        return model, f"from {model.name}"
    return model, f"from {args.model}" if saved else "from scratch"


def _num_classes(args: argparse.Namespace, data: Any) -> int:
    classes = data.num_classes if hasattr(data, "num_classes") else len(data.classes)
    if classes is None:
        raise SegzooError(
            f"--data {args.data} does not say how many classes there are: add --num-classes, or a dataset.json with "
            '{"classes": ["road", "car", ...]} in it'
        )
    return classes


class _Report:
    """What is said while it runs: a bar on a terminal, a line a row of the log elsewhere."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.bar: Any = None
        self.begin = self.first = 0.0
        self.total = 0
        self.latest = ""  # figure of an evaluation
        self.is_main = int(os.environ.get("RANK", "0")) == 0  # of the processes of torchrun or accelerate

    def say(self, text: str) -> None:
        if self.is_main and not self.as_json:
            say(text, sys.stderr)

    def steps(self, steps: range) -> Iterable[int]:
        if steps.start:
            self.say(f"going on after step {steps.start}" if steps else f"finished before, in {steps.start} steps")
        self.begin, self.first, self.total = time.perf_counter(), steps.start, steps.stop
        self.bar = progress(steps, as_json=self.as_json or not self.is_main, unit="step")
        return self.bar

    def watch(self, row: Mapping[str, Any]) -> None:
        for name in ("mIoU", "top-1"):
            if name in row:
                self.latest = f", {name} {100 * row[name]:.2f}"
        text = f"loss {row['loss']:.4f}{self.latest}"
        if self.bar is not None and not self.bar.disable:
            self.bar.set_postfix_str(text)
        else:
            done = row["step"] - self.first
            left = (time.perf_counter() - self.begin) / max(1, done) * (self.total - row["step"])
            self.say(f"step {row['step']}/{self.total}  {text}, {_duration(left)} left")


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{round(seconds)} s" if seconds < 90 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _print(trained: Trained, args: argparse.Namespace) -> None:
    figures = {name: None if math.isnan(value) else round(100 * value, 2) for name, value in trained.metrics.items()}
    if args.json:
        print_json({"folder": str(trained.folder), "step": trained.step, **figures})
        return
    if figures:
        print_table([{"step": trained.step, **figures}])
    print(f"the model of step {trained.step} is local-dir:{trained.folder}")
