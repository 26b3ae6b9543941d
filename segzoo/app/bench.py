"""What a click computes: a picture segmented by a model as it was trained and with a reduction, and what both cost.

Nothing here knows a page, and nothing of a picture is kept. Models and engines are, a few of each; a model that is kept
is never changed, since every click works with twins of its own (`segzoo.twins`), so that visitors cannot meet each
other's reductions.
"""

from __future__ import annotations

import dataclasses
import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image

from .._errors import ImageError, SegzooError
from ..costing import cost
from ..data import scenes
from ..engines import compile
from ..engines.engine import missing_packages
from ..engines.runners import BySize
from ..layers.reduction import Pool
from ..models.rows import PretrainedCfg
from ..models.segmenter import SegmentationModel
from ..plans import current_plan, reduction_sites
from ..prediction import ScoreMaker, mask_maker, predict
from ..preprocess import load_image
from ..results import Segmentation
from ..tuning.fitting import passes_of
from ..twins import eval_twin
from ..zoo import create_model
from ..zoo.download.cache import fetching_nothing
from .shelf import find, makes_masks

MAX_BYTES = 20 * 2**20  # of a picture's file
MAX_PIXELS = 25_000_000  # of a picture
MODELS_KEPT = 2
ENGINES_KEPT = 4  # two clicks' worth
COSTS_KEPT = 1000  # numbers
ROUNDS = (2, 6)  # of the timing, at least and at most
SECONDS = 2.0  # after which no round is begun beyond the least
SCENES = (2_000_001, 2_000_002, 2_000_003)  # seeds, those of `segzoo demo`
ENGINES = ("torch", "openvino", "onnxruntime")  # that are offered, where they are installed

Reduction = str | Mapping[str, int] | None  # a preset, a factor a site, or none


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as a file has it."""

    name: str  # of the file
    data: bytes


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a visitor has chosen beside the picture."""

    model: str
    reduction: Reduction = None
    engine: str = "torch"


@dataclasses.dataclass(frozen=True)
class Form:
    """A model as it was trained, or with the reduction, at work on the picture."""

    result: Segmentation
    macs: int  # exact multiply-accumulates of the model, before an engine folds it
    seconds: float  # from the decoded picture to the mask, median


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a click found out."""

    choice: Choice
    trained: Form
    reduced: Form
    sizes: Mapping[tuple[int, int], int]  # (H, W) in pixels -> how often the model looks at the picture in that size
    row: PretrainedCfg  # of the weights
    code: str  # Python that gives the reduced form's mask

    @property
    def changed_pixels(self) -> int:
        """Those that have another class than without reduction."""
        return int((self.trained.result.mask != self.reduced.result.mask).sum())

    @property
    def changed(self) -> float:
        """Their share, 0 to 1."""
        return self.changed_pixels / self.reduced.result.mask.size


def installed_engines() -> list[str]:
    return [name for name in ENGINES if not missing_packages(name)]


def scene(seed: int) -> Picture:
    """A drawn scene, as the file of a picture."""
    stream = io.BytesIO()
    Image.fromarray(scenes.render(seed=seed)[0]).save(stream, format="PNG")
    return Picture(f"scene_{seed}.png", stream.getvalue())


class Bench:
    """Answers clicks, from any thread.

    Args:
        names: the models that are offered, each there without fetching anything.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        self._models: BySize[SegmentationModel] = BySize(_trained_model, None, most=MODELS_KEPT)
        self._engines: BySize[ScoreMaker] = BySize(self._compiled, None, most=ENGINES_KEPT)
        self._macs: BySize[int] = BySize(self._counted, None, most=COSTS_KEPT)
        self._scenes = {seed: scene(seed) for seed in SCENES}

    def scene(self, seed: int) -> Picture:
        return self._scenes[seed]

    def presets(self, name: str) -> list[str]:
        """The reductions that a model knows by name; none of one without sites."""
        return list(self._model(name).reduction_presets)

    def sites(self, name: str) -> list[str]:
        """Where a model can be reduced: keys, values and grids first, then queries."""
        return sorted(reduction_sites(self._model(name)), key=lambda site: site.endswith(".q"))

    def factors(self, name: str, reduction: Reduction) -> dict[str, int]:
        """Site -> its factor with this reduction, 1 where that is no factor of an average pool."""
        plan = current_plan(_twin(self._model(name), reduction))
        return {
            site: entry.factor if isinstance(entry, Pool) and entry.kind == "avg" else 1 for site, entry in plan.items()
        }

    def answer(self, picture: Picture, choice: Choice) -> Answer:
        """Segment a picture with and without the reduction.

        Raises:
            ImageError: no picture, a damaged one, or one that is too large.
            SegzooError: a model, reduction or engine that cannot be had; the message says why and what to do.
        """
        name = find(choice.model, self.names)
        model = self._models[name]
        image_HWC = decoded(picture, model.in_chans)
        twins = [_twin(model, plan) for plan in (None, choice.reduction)]
        plans = [current_plan(twin).to_json() for twin in twins]
        if choice.engine == "torch":
            makers: list[ScoreMaker] = [mask_maker(twin) for twin in twins]
        else:
            makers = [self._engines[name, plan, choice.engine] for plan in plans]
        results = [predict(maker, image_HWC) for maker in makers]  # also what warms both up
        seconds = take_turns([lambda maker=maker: predict(maker, image_HWC) for maker in makers])
        sizes = passes_of(model, [image_HWC], None)
        macs = [sum(times * self._macs[name, plan, size] for size, times in sizes.items()) for plan in plans]
        trained, reduced = (Form(*values) for values in zip(results, macs, seconds, strict=True))
        return Answer(choice, trained, reduced, sizes, makers[0].row, self.code(picture, choice))

    def code(self, picture: Picture, choice: Choice) -> str:
        """Python that does what the reduced form does."""
        lines = ["import segzoo"]
        image = repr(picture.name)
        seed = next((seed for seed in SCENES if self._scenes[seed].data == picture.data), None)
        if seed is not None:
            lines.append("from segzoo.data import scenes")
            image = f"scenes.render(seed={seed})[0]"
        lines += [
            "",
            f"model = segzoo.create_model({find(choice.model, self.names)!r}, pretrained=True).eval()",
            f"model.set_inference_reduction({choice.reduction!r})",
        ]
        if choice.engine != "torch":
            lines.append(f"model = segzoo.compile(model, engine={choice.engine!r})")
        return "\n".join([*lines, f"result = segzoo.predict(model, {image})"])

    def _model(self, name: str) -> SegmentationModel:
        return self._models[find(name, self.names)]

    def _compiled(self, key: tuple[str, str, str]) -> ScoreMaker:
        name, plan, engine = key
        return compile(_twin(self._models[name], plan), engine)

    def _counted(self, key: tuple[str, str, tuple[int, int]]) -> int:
        name, plan, size = key
        return cost(_twin(self._models[name], plan), size).macs


def decoded(picture: Picture, in_chans: int) -> np.ndarray:
    """(H, W, in_chans) uint8, upright.

    Raises:
        ImageError: too many bytes, too many pixels (which the head of the file says, so nothing is decoded), or no
            picture.
    """
    if len(picture.data) > MAX_BYTES:
        raise ImageError(
            f"{picture.name} has {len(picture.data) / 2**20:.0f} MiB, and the page takes {MAX_BYTES // 2**20}; make it "
            "smaller, or use segzoo predict"
        )
    if _too_many_pixels(picture.data):
        raise ImageError(
            f"{picture.name} has more than {MAX_PIXELS:,} pixels, which are as many as the page takes; make it "
            "smaller, or use segzoo predict"
        )
    stream = io.BytesIO(picture.data)
    stream.name = picture.name  # type: ignore[attr-defined]  # by which messages call it
    return load_image(stream, in_chans)


def _too_many_pixels(data: bytes) -> bool:
    """What the head of a file says; what it does not say is left to the decoding."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width * image.height > MAX_PIXELS
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return True
    except Exception:  # Pillow lets through what a decoder stumbles over, of any kind
        return False


def take_turns(forms: Sequence[Callable[[], object]], *, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """Median seconds of each form, over rounds in which all take their turn, so that what else the machine does meets
    all of them; every second round runs backwards.

    Args:
        clock: gives seconds.
    """
    start = clock()
    taken: list[list[float]] = [[] for _ in forms]
    least, most = ROUNDS
    for turn in range(most):
        order = list(enumerate(forms))
        for place, form in order if turn % 2 == 0 else reversed(order):
            before = clock()
            form()
            taken[place].append(clock() - before)
        if turn + 1 >= least and clock() - start > SECONDS:
            break
    return [statistics.median(seconds) for seconds in taken]


def _trained_model(name: str) -> SegmentationModel:
    """The model of an offered name; nothing is fetched.

    Raises:
        SegzooError: it makes no masks.
        WeightsError: its weights are no longer here.
    """
    with fetching_nothing():
        model = create_model(name, pretrained=True).eval()
    if not isinstance(model, SegmentationModel) or not makes_masks(model):
        raise SegzooError(f"{name} makes no masks of classes, so there is nothing to show")
    return model


def _twin(model: SegmentationModel, plan: object) -> SegmentationModel:
    twin = eval_twin(model)
    twin.set_inference_reduction(plan)
    return twin
