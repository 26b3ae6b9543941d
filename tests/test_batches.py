"""What a training sees depends on the seed and the step alone."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from segzoo._errors import SegzooError
from segzoo.data.classification import ClassificationData
from segzoo.data.segmentation import Sample, SegmentationData
from segzoo.labels import generic_labels
from segzoo.training.batches import Parts, Share, check_data, check_same_classes, class_frequencies, drawn_from, loader
from segzoo.training.recipes import Recipe

RECIPE = Recipe(steps=5, batch_size=4, crop=(8, 8), size=None, seed=3, scale=(1.0, 1.0), max_class_share=1.0)


@dataclasses.dataclass(frozen=True)
class Numbered(SegmentationData):
    """Pictures whose labels are all the picture's number."""

    count: int = 5
    side: int = 12

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        noise = np.random.default_rng(index).integers(0, 256, (self.side, self.side, 3), dtype=np.uint8)
        return Sample(noise, np.full((self.side, self.side), index, np.uint8), f"number {index}")

    def first(self, count):
        return dataclasses.replace(self, count=min(self.count, count or self.count))


DATA = Numbered(name="numbered", split="train", labels=generic_labels(5))


def parts(recipe=RECIPE, share=None, first_step=0, data=DATA):
    options = {"num_classes": 5, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    return Parts(data, recipe, share=share or Share(), first_step=first_step, **options)


def test_every_picture_once_an_epoch_in_another_order():
    numbers = [int(label[0, 0]) for _, labels in loader(parts(), workers=0, pin=False) for label in labels]
    assert len(numbers) == 20
    epochs = [numbers[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    other = [int(label[0, 0]) for i in range(5) for label in parts(dataclasses.replace(RECIPE, seed=4))[i][1]]
    assert other != numbers


def test_processes_parts_workers_and_the_beginning_change_nothing():
    whole = parts()
    two = [parts(share=Share(process, 2, 2)) for process in range(2)]
    for step in range(5):
        images, labels = whole[step]
        # Part p of process r has the images p * 2 + r of the step.
        for part in range(2):
            for process in range(2):
                own_images, own_labels = two[process][step * 2 + part]
                assert torch.equal(own_images[0], images[part * 2 + process])
                assert torch.equal(own_labels[0], labels[part * 2 + process])
    assert torch.equal(parts(first_step=3)[1][0], whole[4][0])
    assert torch.equal(whole[2][0], parts()[2][0])
    for (a, _), (b, _) in zip(loader(parts(), workers=1, pin=False), (whole[i] for i in range(5)), strict=True):
        assert torch.equal(a, b)


def test_random_numbers_outside_stay_as_they_were():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    with drawn_from(0, "augment", 1):
        first = torch.rand(3)
    for _ in loader(parts(), workers=0, pin=False):
        pass
    assert torch.equal(torch.get_rng_state(), before)
    with drawn_from(0, "augment", 1):
        assert torch.equal(torch.rand(3), first)
    with drawn_from(0, "augment", 2):
        assert not torch.equal(torch.rand(3), first)


def test_the_late_part_is_larger():
    late = dataclasses.replace(RECIPE, late_from=0.6, late_crop=(12, 10), late_batch_size=2)
    shapes = [tuple(images.shape) for images, _ in loader(parts(late), workers=0, pin=False)]
    assert shapes == [(4, 3, 8, 8)] * 3 + [(2, 3, 12, 10)] * 2
    seen = Counter(int(label[0, 0]) for i in range(5) for label in parts(late)[i][1])
    assert sum(seen.values()) == 16 and max(seen.values()) - min(seen.values()) <= 1


def test_a_batch_must_be_shared_out_evenly():
    with pytest.raises(SegzooError, match="a batch of 4 cannot be shared by 3 processes in 1 parts each"):
        Share(0, 3, 1).check(RECIPE)
    Share(1, 2, 2).check(RECIPE)


def test_labels_that_are_no_class_are_found_early():
    with pytest.raises(SegzooError, match=r"number 4: labels \[4\] are none of the 4 classes"):
        check_data(dataclasses.replace(DATA, labels=None), 4)
    with pytest.raises(SegzooError, match="the model has 4 classes, but numbered has 5"):
        check_data(DATA, 4)
    check_data(DATA, 5)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_refusal_is_the_same_sentence_from_another_process(workers):
    refused = Parts(DATA, RECIPE, share=Share(), num_classes=2, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(
        SegzooError, match=r"^number [234]: labels \[[234]\] are none of the 2 classes .* with the masks$"
    ):
        list(loader(refused, workers=workers, pin=False))


def test_the_same_number_is_the_same_class():
    def named(*names):
        return dataclasses.replace(DATA, labels=dataclasses.replace(generic_labels(2), name="own", classes=names))

    check_same_classes(named("a", "b"), named("a", "b"))
    check_same_classes(named("a", "b"), dataclasses.replace(DATA, labels=generic_labels(2)))
    with pytest.raises(SegzooError, match="class 0 is 'a' in the training data and 'b' in the validation data"):
        check_same_classes(named("a", "b"), named("b", "a"))
    cats, eels = (ClassificationData(split="train", classes=names, items=()) for names in (("cat",), ("cat", "eel")))
    with pytest.raises(SegzooError, match="the training data have 1 classes and the validation data 2"):
        check_same_classes(cats, eels)


def test_class_frequencies():
    assert class_frequencies(DATA, 5).tolist() == pytest.approx([0.2] * 5)
