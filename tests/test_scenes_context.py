"""The paired landscapes: what a cue changes in a picture, and how far that is from what it decides."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from segzoo.data.scenes import context
from segzoo.data.scenes.context import CLASSES, CUES, PAIRS, render
from segzoo.training.metrics import ConfusionMatrix

NEAR = 64  # pixels; a net that sees at most so far in each direction has a field of 129
SEEDS = (0, 1_000_000)
NO_CUE = (False, False, False)


def indices(names: tuple[str, ...]) -> list[int]:
    return [CLASSES.index(name) for name in names]


def within(mask: np.ndarray, reach: int) -> np.ndarray:
    """Pixels that have one of the mask in the square of `reach` pixels around them."""
    mask_11HW = torch.from_numpy(mask)[None, None].float()
    rows = F.max_pool2d(mask_11HW, (2 * reach + 1, 1), 1, (reach, 0))
    return F.max_pool2d(rows, (1, 2 * reach + 1), 1, (0, reach))[0, 0].numpy() > 0


@pytest.mark.parametrize("cue", range(3))
@pytest.mark.parametrize("seed", SEEDS)
def test_a_cue_renames_its_pair_and_changes_nothing_near_it(seed, cue):
    flipped = (cue == 0, cue == 1, cue == 2)
    (image, labels), (other_image, other_labels) = render(seed=seed, cues=NO_CUE), render(seed=seed, cues=flipped)
    first, second = indices(PAIRS[cue])
    paired = np.isin(labels, (first, second))
    assert paired.sum() > 400
    assert np.array_equal(other_labels[paired], first + second - labels[paired])
    changed = (image != other_image).any(axis=-1) | ((labels != other_labels) & ~paired)
    assert changed.any() and not (within(changed, NEAR) & paired).any()
    kinds = [np.isin(maps, indices(CUES[cue])) for maps in (labels, other_labels)]
    assert not (changed & ~within(kinds[0] | kinds[1], 4)).any(), "only the cue and what its blur touches"


@pytest.mark.parametrize("size", [(128, 256), (64, 128)])
def test_the_distance_shrinks_with_the_picture(size):
    reach = NEAR * size[0] // 256
    for cue in range(3):
        images = [render(seed=3, size=size, cues=tuple(bool(i == cue and bit) for i in range(3))) for bit in (0, 1)]
        changed = (images[0][0] != images[1][0]).any(axis=-1)
        assert not (within(changed, reach) & np.isin(images[0][1], indices(PAIRS[cue]))).any()


def test_the_net_of_the_benchmark_sees_64_pixels_and_no_cue(monkeypatch):
    """With any weights its scores of a pair are the same bits in both pictures, at the size that it is trained at."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    benchmark = importlib.import_module("context_scenes")
    torch.manual_seed(0)
    model = benchmark.NearSighted(num_classes=len(CLASSES)).eval()
    assert 33 < benchmark.field(model) <= 64
    flips = [NO_CUE, *((cue == 0, cue == 1, cue == 2) for cue in range(3))]
    pictures = [render(seed=5, size=benchmark.SIZE, cues=cues) for cues in flips]
    with torch.no_grad():
        plain, *flipped = [model(benchmark.normalised(image[None]))[0] for image, _ in pictures]
    for pair, scores in zip(PAIRS, flipped, strict=True):
        paired = torch.from_numpy(np.isin(pictures[0][1], indices(pair)))
        assert paired.any() and torch.equal(plain[:, paired], scores[:, paired])
        assert not torch.equal(plain, scores)


def test_what_sees_64_pixels_gets_a_third_at_best():
    """A predictor that knows everything but the cues, over pictures with both values of each: it guesses."""
    rng = np.random.default_rng(0)
    confusion = ConfusionMatrix(len(CLASSES))
    for seed in range(3):
        _, labels = render(seed=seed, size=(128, 256), cues=NO_CUE)
        guess = labels.copy()
        for pair in PAIRS:
            paired = np.isin(labels, indices(pair))
            guess[paired] = rng.choice(indices(pair), paired.sum())
        for cues in (NO_CUE, (True, True, True)):
            confusion.update(guess, render(seed=seed, size=(128, 256), cues=cues)[1])
    assert confusion.miou(indices(context.PAIRED_CLASSES)) == pytest.approx(1 / 3, abs=0.001)


def test_the_cues_are_drawn_evenly_and_independently():
    seen = []
    for seed in range(60):
        labels = render(seed=seed, size=(64, 128))[1]
        hill = labels == CLASSES.index("hill pasture")
        right = hill[:, 64:].sum() > hill[:, :64].sum()
        seen.append([(labels == CLASSES.index("church")).any(), right, (labels == CLASSES.index("blue flag")).any()])
    shares = np.array(seen).mean(axis=0)
    assert np.abs(shares - 0.5).max() < 0.2
    assert np.abs(np.corrcoef(np.array(seen).T) - np.eye(3)).max() < 0.4


def test_every_class_occurs():
    counts = sum(np.bincount(render(seed=s, size=(128, 256))[1].ravel(), minlength=len(CLASSES)) for s in range(12))
    assert (counts > 0).all()


def test_a_seed_always_gives_the_same_picture_at_any_size():
    first, second = render(seed=7), render(seed=7)
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[1], render(seed=8)[1])
    for size in ((1, 1), (1, 40), (17, 23)):
        image, labels = render(seed=7, size=size)
        assert image.shape == (*size, 3) and labels.shape == size and image.dtype == labels.dtype == np.uint8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"seed": 0, "size": (0, 4)}, "size must be"),
        ({"seed": 0, "cues": (True, False)}, "three booleans"),
        ({"seed": 0, "cues": (1, 0, 1)}, "three booleans"),
    ],
)
def test_wrong_arguments_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        render(**wrong)
