"""How many pixels of the masks change, measured and predicted, and how sure that is with so few images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from ..layers.reduction import Entry
from ..models.segmenter import SegmentationModel
from ..plans import Plan, inference_reduction
from ..prediction import protocol_of, score_maker, segment_one

POWERS = np.arange(10, 41) / 10  # from changes that add up to changes of which only the largest shows
RESAMPLES = 2000


class Changes:
    """The masks of a model without reduction, to compare with.

    Args:
        model: a model that nobody else uses meanwhile; it gets plans and is neutral again after each.
        images: uint8 (H, W, C) each.
        resize: (H, W) in pixels at which the model sees them; None: the rule of its weights row.
        advance: called after every image that was segmented.
    """

    def __init__(
        self,
        model: SegmentationModel,
        images: Sequence[np.ndarray],
        *,
        resize: tuple[int, int] | None,
        advance: Callable[[], object],
    ):
        self.model, self.images, self.resize, self.advance = model, images, resize, advance
        self.neutral = list(self._masks())
        self.half_a_pixel = 0.5 / max(mask_HW.size for mask_HW in self.neutral)

    def measure(self, plan: Mapping[str, Entry]) -> np.ndarray:
        """(images,) share of the pixels whose class is another with this plan, 0 to 1."""
        with inference_reduction(self.model, plan):
            changes = [np.mean(new != old) for new, old in zip(self._masks(), self.neutral, strict=True)]
        return np.array(changes)

    def _masks(self) -> Iterator[np.ndarray]:
        maker = score_maker(self.model)
        protocol = protocol_of(maker.row, resize=self.resize)
        for image_HWC in self.images:
            yield segment_one(maker, image_HWC, protocol).mask
            self.advance()


class Forecast:
    """The change of a whole plan out of the changes of its entries, each measured alone: a p-norm, image by image.

    Entries that flip the same pixels make p large, entries that flip pixels of their own make it 1.
    """

    def __init__(self, alone: Mapping[tuple[str, Entry], np.ndarray], power: float = 2.0):
        self.alone = alone  # (site, entry) -> (images,) change
        self.power = power

    def calibrated(self, measured: Sequence[tuple[Plan, np.ndarray]], half_a_pixel: float) -> Forecast:
        """With the power that comes nearest to what whole plans were measured to change, in relative terms."""

        def distance(power: float) -> float:
            forecast = Forecast(self.alone, power)
            ratios = [
                (forecast.of(plan).mean() + half_a_pixel) / (change.mean() + half_a_pixel) for plan, change in measured
            ]
            return float(np.square(np.log(ratios)).sum())

        return Forecast(self.alone, float(min(POWERS, key=distance))) if measured else self

    def of(self, entries: Mapping[str, Entry]) -> np.ndarray:
        """(images,) predicted change."""
        changes_SI = np.array([self.alone[item] for item in entries.items() if item in self.alone])
        if not len(changes_SI):
            return np.zeros(len(next(iter(self.alone.values()), ())))
        return np.minimum((changes_SI**self.power).sum(axis=0) ** (1 / self.power), 1.0)

    def weight(self, entries: Mapping[str, Entry]) -> float:
        """What entries contribute to a plan's change; weights add up, and their order is that of the changes."""
        return float(sum(self.alone[item].mean() ** self.power for item in entries.items() if item in self.alone))


def bootstrap_interval(values: np.ndarray, share: float = 0.95) -> tuple[float, float]:
    """Interval of the mean over images, by resampling them (percentile method); the same at every call."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)
