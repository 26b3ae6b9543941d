"""What a training sees, in an order that depends on the seed alone: not on processes, workers, or where it went on.

Images form one endless stream: every epoch is a permutation of the data drawn from (seed, epoch), and the augmentation
of an image is drawn from (seed, its place in the stream). A step takes the next `batch_size` images, in turn one a
process and part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .._errors import SegzooError
from ..data.classification import ClassificationData
from ..data.segmentation import SceneData, SegmentationData, out_of_range
from ..data.transforms import classification_transform, mixup, segmentation_transform, to_tv
from ..labels import generic_labels
from ..preprocess import load_image
from .recipes import Recipe, Stage

Data = SegmentationData | ClassificationData
Batch = tuple[Tensor, Tensor]  # images (B, C, H, W), and labels (B, H, W), (B,) or, mixed, (B, K)


def random_seed(*parts: int | str) -> int:
    """A seed of 63 bits that is another one for other parts."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


@contextlib.contextmanager
def drawn_from(*parts: int | str) -> Iterator[None]:
    """Torch's random numbers inside come from these parts; outside nothing has happened."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(random_seed(*parts))
        yield


@dataclasses.dataclass(frozen=True)
class Share:
    """Which part of every step a process takes."""

    process: int = 0
    processes: int = 1
    parts: int = 1  # a step, one after the other

    def of_step(self, recipe: Recipe, step: int, part: int) -> range:
        """Places in the stream of the images of a part."""
        first, size = recipe.images_before(step), recipe.at(step).batch_size
        return range(first + part * self.processes + self.process, first + size, self.parts * self.processes)

    def check(self, recipe: Recipe) -> None:
        """Raises SegzooError for a batch that cannot be shared out evenly."""
        each = self.processes * self.parts
        for size in {recipe.batch_size, recipe.at(recipe.steps).batch_size}:
            if size % each:
                raise SegzooError(
                    f"a batch of {size} cannot be shared by {self.processes} processes in {self.parts} parts each; "
                    f"--batch-size must be a multiple of {each}"
                )


class Parts(Dataset[Batch]):
    """The parts of the steps of one process, in order: item i is part i % parts of step first + i // parts.

    Args:
        num_classes: of the model.
        mean, std: of the images' normalisation, one number a channel.
    """

    def __init__(
        self,
        data: Data,
        recipe: Recipe,
        *,
        share: Share,
        num_classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        first_step: int = 0,
    ):
        self.data = data
        self.recipe = recipe
        self.share = share
        self.num_classes = num_classes
        self.mean = mean
        self.std = std
        self.first_step = first_step

    def __len__(self) -> int:
        return (self.recipe.steps - self.first_step) * self.share.parts

    def __getitem__(self, index: int) -> Batch:
        step, part = self.first_step + index // self.share.parts, index % self.share.parts
        transform = self._transform_at(step)
        places = self.share.of_step(self.recipe, step, part)
        samples = []
        for place in places:
            with drawn_from(self.recipe.seed, "augment", place):
                samples.append(transform(self._index(place)))
        images_BCHW = torch.stack([image for image, _ in samples])
        labels = torch.stack([label for _, label in samples])
        if self.recipe.mixup and isinstance(self.data, ClassificationData):
            with drawn_from(self.recipe.seed, "mix", places[0]):
                images_BCHW, labels = mixup(self.num_classes, alpha=self.recipe.mixup)(images_BCHW, labels)
        return images_BCHW, labels

    def _index(self, place: int) -> int:
        """Which sample stands at a place of the stream."""
        epoch, within = divmod(place, len(self.data))
        return int(_order(self.recipe.seed, epoch, len(self.data))[within])

    def _transform_at(self, step: int) -> Callable[[int], tuple[Tensor, Tensor]]:
        late = step >= self.recipe.late_step()
        return self._late_transform if late else self._early_transform

    @cached_property
    def _early_transform(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        return self._make_transform(self.recipe.at(0))

    @cached_property
    def _late_transform(self) -> Callable[[int], tuple[Tensor, Tensor]]:
        return self._make_transform(self.recipe.at(self.recipe.steps))

    def _make_transform(self, stage: Stage) -> Callable[[int], tuple[Tensor, Tensor]]:
        """Index of a sample -> normalised image and label."""
        recipe, data = self.recipe, self.data
        statistics: dict[str, Any] = {"mean": self.mean, "std": self.std}
        if isinstance(data, ClassificationData):
            cut = classification_transform(size=stage.crop, scale=recipe.scale, **statistics)

            def show_image(index: int) -> tuple[Tensor, Tensor]:
                path, label = data[index]
                image_HWC = load_image(path, len(self.mean))
                image, _ = to_tv(image_HWC, np.zeros(image_HWC.shape[:2], np.uint8))
                return cut(image), torch.tensor(label)

            return show_image
        augment = segmentation_transform(
            crop=stage.crop,
            base=stage.size,
            scale=recipe.scale,
            max_class_share=recipe.max_class_share,
            distort=recipe.distort,
            ignore_index=data.ignore_index,
            **statistics,
        )

        def show_pixels(index: int) -> tuple[Tensor, Tensor]:
            sample = data[index]
            check_labels(sample.labels, sample.name, self.num_classes, data.ignore_index)
            return augment(*to_tv(sample.image, sample.labels))

        return show_pixels


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng(random_seed(seed, "order", epoch)).permutation(count)


def loader(parts: Parts, *, workers: int, pin: bool) -> Iterator[Batch]:
    """The parts in order, prepared by so many processes beside this one (0: by this one).

    Raises:
        SegzooError: a sample that is refused, in the words of who refused it.
    """
    generator = torch.Generator()  # else it would draw from the random numbers that the model draws from
    told = _Told(parts)
    for batch in DataLoader(told, batch_size=None, num_workers=workers, pin_memory=pin, generator=generator):
        if isinstance(batch, SegzooError):
            raise batch
        yield batch


class _Told(Dataset[Batch | SegzooError]):
    """Parts, or why one cannot be had: of an error raised in another process torch makes a traceback."""

    def __init__(self, parts: Parts):
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> Batch | SegzooError:
        try:
            return self.parts[index]
        except SegzooError as error:
            return error


def check_labels(labels_HW: np.ndarray, name: str, num_classes: int, ignore_index: int) -> None:
    """Raises SegzooError for labels that are no class."""
    wrong = out_of_range(labels_HW, num_classes, ignore_index)
    if wrong:
        raise SegzooError(
            f"{name}: labels {wrong[:5]} are none of the {num_classes} classes from 0 on nor {ignore_index} (ignored); "
            "`segzoo data check` says what is wrong with the masks"
        )


def check_data(data: Data, num_classes: int, *, most: int = 64) -> None:
    """Look at some samples, spread over the data, before a training does.

    Raises:
        SegzooError: other classes than the model's, or labels that are no class.
        ImageError: a file that cannot be read.
    """
    if isinstance(data, ClassificationData):
        if len(data.classes) != num_classes:
            raise SegzooError(f"the model has {num_classes} classes, but there are {len(data.classes)} class folders")
        return
    if data.num_classes not in (None, num_classes):
        raise SegzooError(f"the model has {num_classes} classes, but {data.name} has {data.num_classes}")
    if isinstance(data, SceneData):
        return  # right by construction, and drawn slowly
    for index in range(0, len(data), max(1, len(data) // most)):
        sample = data[index]
        check_labels(sample.labels, sample.name, num_classes, data.ignore_index)


def check_same_classes(data: Data, validation: Data) -> None:
    """Raises SegzooError where a number means one class in the data and another in the validation data."""
    trained, measured = _class_names(data), _class_names(validation)
    if trained is None or measured is None or trained == measured:
        return
    if len(trained) == len(measured):
        k = next(i for i in range(len(trained)) if trained[i] != measured[i])
        what = f"class {k} is {trained[k]!r} in the training data and {measured[k]!r} in the validation data"
    else:
        what = f"the training data have {len(trained)} classes and the validation data {len(measured)}"
    raise SegzooError(f"{what}; both need the same classes in the same order")


def _class_names(data: Data) -> tuple[str, ...] | None:
    """None where the data have numbers alone."""
    if isinstance(data, ClassificationData):
        return data.classes
    if data.labels is None or data.labels.name == generic_labels(len(data.labels)).name:
        return None
    return data.labels.classes


def class_frequencies(data: SegmentationData, num_classes: int, *, most: int = 200) -> np.ndarray:
    """(K,) shares of the labelled pixels, counted on some samples, spread over the data."""
    counts = np.zeros(num_classes, np.int64)
    for index in range(0, len(data), max(1, len(data) // most)):
        labels_HW = data[index].labels
        counts += np.bincount(labels_HW[labels_HW != data.ignore_index].ravel(), minlength=num_classes)[:num_classes]
    return counts / max(1, counts.sum())
