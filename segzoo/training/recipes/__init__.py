"""How a model is trained, as data: a recipe a paper, in JSON files beside this one, each of which says where its values
are from.

    recipe = load_recipe("edaformer", label_set="cityscapes").with_values({"steps": 2000, "lr": 1e-4})
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..._errors import SegzooError, shown
from ...models.fields import describe, fits, type_hints

CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("poly", "cosine", "constant"),
    "loss": ("ce", "ohem", "atm"),
    "precision": ("no", "bf16", "fp16"),
}
POSITIVE = (
    "steps",
    "batch_size",
    "crop",
    "size",
    "scale",
    "lr",
    "power",
    "ohem_min_kept",
    "late_crop",
    "late_size",
) + (
    *("late_batch_size", "window", "stride", "clip_grad", "accumulation", "evaluations", "save_every", "log_every"),
    "head_lr_multiplier",
)
NOT_NEGATIVE = ("weight_decay", "min_lr", "warmup_steps", "aux_weight", "dice_weight", "seed", "mixup", "class_balance")
SHARES = ("momentum", "warmup_ratio", "label_smoothing", "late_from", "layer_decay", "ema_decay", "drop_path_rate") + (
    *("ohem_threshold", "max_class_share"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides a training beside the model and the data. Sizes are (H, W) in pixels.

    Raises:
        SegzooError: a field of a wrong type or out of range; names it.
    """

    name: str = "own"
    source: str = ""  # where the values are from, and which of them are segzoo's
    # How long, and on how much at once.
    steps: int = 160_000  # of the optimizer
    batch_size: int = 16  # images a step, of all processes and accumulated parts together
    accumulation: int = 1  # parts that a process takes its share of a batch in
    # What the model is shown.
    crop: tuple[int, int] = (512, 512)
    size: tuple[int, int] | None = (512, 2048)  # (short, long) side that an image is fitted into, also when predicting;
    # None: its own
    scale: tuple[float, float] = (
        0.5,
        2.0,
    )  # random factor on that size; of a classifier, range of the area that is cut
    max_class_share: float = 0.75  # of a crop; 1: any crop
    distort: bool = True  # brightness, contrast, saturation and hue
    mixup: float = 0.0  # alpha, of classifiers; 0: none
    late_from: float = 1.0  # share of the steps after which the following three hold, where they are given
    late_crop: tuple[int, int] | None = None
    late_size: tuple[int, int] | None = None
    late_batch_size: int | None = None
    window: tuple[int, int] | None = None  # predictions are made through this sliding window; None: of whole images
    stride: tuple[int, int] | None = None  # of the window
    # What is minimised.
    loss: str = "ce"  # ce: cross-entropy, ohem: of the hardest pixels, atm: SegViT's
    aux_weight: float = 0.4  # of auxiliary scores, where a family has them
    dice_weight: float = 0.0  # of dice beside cross-entropy
    ohem_threshold: float = 0.7  # pixels whose class has a smaller probability are hard
    ohem_min_kept: int = 100_000  # so many of the hardest pixels of a process's part count at least
    label_smoothing: float = 0.0
    class_balance: float = 0.0  # cross-entropy weighs a class by its frequency to the power of minus this
    # How.
    optimizer: str = "adamw"
    lr: float = 6e-5
    head_lr_multiplier: float = 1.0  # of everything but the encoder
    layer_decay: float | None = None  # a block learns so many times as fast as the next one
    weight_decay: float = 0.01  # not of the encoder's norms and biases
    momentum: float = 0.9  # of sgd
    schedule: str = "poly"
    power: float = 1.0  # of poly
    min_lr: float = 0.0  # at the end
    warmup_steps: int = 0
    warmup_ratio: float = 1e-6  # share of the learning rate at the first step
    clip_grad: float | None = None  # longest gradient
    drop_path_rate: float | None = None  # None: the model's own
    ema_decay: float | None = None  # the moving average of the weights is evaluated and saved; None: the weights
    freeze_batch_norm: bool = False  # its statistics stay as they are
    sync_batch_norm: bool = True  # statistics over all processes, on GPUs
    precision: str = "no"  # float32, or mixed with 16 bits
    grad_checkpointing: bool = False
    compile: bool = False  # by torch.compile
    # Accounts.
    seed: int = 0
    evaluations: int = 10  # on the validation data, spread evenly; the last is at the end
    save_every: int = 500  # steps
    log_every: int = 50  # steps

    def __post_init__(self) -> None:
        hints = type_hints(Recipe)
        for field, hint in hints.items():
            value = getattr(self, field)
            self._require(fits(value, hint), field, f"must be {describe(hint)}")
        for field, choices in CHOICES.items():
            self._require(getattr(self, field) in choices, field, f"must be one of {', '.join(choices)}")
        self._require_all(POSITIVE, lambda number: 0 < number < 1e12, "must be above 0 and below 1e12")
        self._require_all(NOT_NEGATIVE, lambda number: 0 <= number < 1e12, "must be from 0 to below 1e12")
        self._require_all(SHARES, lambda number: 0 <= number <= 1, "must be from 0 to 1")
        self._require(self.scale[0] <= self.scale[1], "scale", "must be (smallest, largest)")
        self._require(self.max_class_share > 0, "max_class_share", "must be above 0")

    def _require_all(self, fields: tuple[str, ...], holds: Any, what: str) -> None:
        for field in fields:
            value = getattr(self, field)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            self._require(all(holds(number) for number in numbers), field, what)

    def _require(self, holds: bool, field: str, what: str) -> None:
        if not holds:
            raise SegzooError(f"{field} of a training recipe {what}, not {shown(getattr(self, field))}")

    def with_values(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with other values, given by name; a list is taken for a tuple.

        Raises:
            SegzooError: a name that no recipe has, with the nearest one, or a value that is refused.
        """
        names = list(type_hints(Recipe))
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                hint = f"did you mean {close[0]}? It has" if close else "it has"
                raise SegzooError(f"a training recipe has no {name!r}; {hint}: {', '.join(names)}")
        return dataclasses.replace(self, **{name: _from_json(value) for name, value in values.items()})

    def lasting(self, steps: int) -> Recipe:
        """The recipe in another number of steps; its warm-up is the same share of them."""
        return self.with_values({"steps": steps, "warmup_steps": round(self.warmup_steps * steps / self.steps)})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def late_step(self) -> int:
        """The first step at which the `late_*` values hold."""
        return round(self.late_from * self.steps)

    def at(self, step: int) -> Stage:
        """What is shown at a step of the optimizer, counted from 0."""
        if step < self.late_step() or self.late_step() >= self.steps:  # or never
            return Stage(self.crop, self.size, self.batch_size)
        return Stage(self.late_crop or self.crop, self.late_size or self.size, self.late_batch_size or self.batch_size)

    def images_before(self, step: int) -> int:
        """How many images were seen before a step."""
        early = min(step, self.late_step())
        return early * self.batch_size + (step - early) * self.at(self.steps).batch_size


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a recipe shows at a step."""

    crop: tuple[int, int]
    size: tuple[int, int] | None
    batch_size: int


def list_recipes() -> list[str]:
    """The names of all recipes, sorted."""
    return list(_names())


def load_recipe(name: str | Path, *, label_set: str | None = None) -> Recipe:
    """A recipe by name, or of a JSON file such as a run's `recipe.json`.

    Args:
        label_set: of the data; a paper's recipe has other values for some.

    Raises:
        SegzooError: no such recipe (the message lists them), or a file that holds none.
    """
    if str(name) in _names():
        record = json.loads(files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8"))
    elif str(name).endswith(".json"):
        record = _read(Path(name))
    else:
        raise SegzooError(f"no recipe is called {str(name)!r}; recipes: {', '.join(_names())}, or a file NAME.json")
    for_data = record.pop("data", {})
    try:
        return Recipe().with_values({**record, **for_data.get(label_set, {})})
    except SegzooError as error:
        raise SegzooError(f"{name}: {error}") from None


def recipe_of(model_name: str) -> str | None:
    """The recipe of a model's paper, or that of all classifiers; None for a model without one."""
    variant = model_name.partition(".")[0].removeprefix("test_")
    encoders = dict.fromkeys(("eft", "mit", "pvt", "swin"), "eft")
    known = {**encoders, "segformerpp": "segformer"} | {name: name for name in _names()}
    found = [family for family in known if variant.startswith(family)]
    return known[max(found, key=len)] if found else None


@cache
def _names() -> tuple[str, ...]:
    names = (entry.name for entry in files(__name__).iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SegzooError(f"{path} is no recipe in JSON ({error}); recipes: {', '.join(_names())}") from None
    if not isinstance(record, dict):
        raise SegzooError(f'{path} must hold an object, such as {{"steps": 1000, "lr": 1e-4}}')
    for_data = record.get("data", {})
    if not isinstance(for_data, dict) or not all(isinstance(values, dict) for values in for_data.values()):
        raise SegzooError(f'{path}: data must hold an object a label set, such as {{"cityscapes": {{"lr": 1e-4}}}}')
    return record


def _from_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
