"""The class map against exact bilinear interpolation in float64, and what it takes in operations and memory."""

from __future__ import annotations

import itertools
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import segzoo
from segzoo.masks import MIN_PIXELS_A_CELL, class_map, mask_dtype
from segzoo.models.segvit import MaskOutput

TOLERANCE = 2.0**-20


class Logits:
    """A model as far as its class map is concerned."""

    score_kind = "logits"

    @staticmethod
    def to_size(scores, size):
        return F.interpolate(scores, size=tuple(size), mode="bilinear")


def bilinear_weights(side: int, pixels: int, step: float | None = None) -> np.ndarray:
    """(pixels, side): half-pixel centres, clamped at the border, one pixel at a time."""
    weights = np.zeros((pixels, side))
    for i in range(pixels):
        at = min(max((i + 0.5) * (step or side / pixels) - 0.5, 0.0), side - 1.0)
        low = int(at)
        weights[i, low] += 1 - (at - low)
        weights[i, min(low + 1, side - 1)] += at - low
    return weights


def exact_scores(scores: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (bilinear_weights(side, pixels) for side, pixels in zip(scores.shape[2:], size, strict=True))
    return np.einsum("yr,bkrc,xc->bkyx", rows, scores.double().numpy(), columns, optimize=True)


def assert_best(mask: torch.Tensor, scores_BKHW: np.ndarray, tolerance: float) -> None:
    """Every pixel has the best score, or one so close to it that rounding may choose it."""
    chosen = np.take_along_axis(scores_BKHW, mask.numpy().astype(np.int64)[:, None], axis=1)[:, 0]
    assert (scores_BKHW.max(axis=1) - chosen).max() <= tolerance


def layouts(scores: torch.Tensor) -> dict[str, torch.Tensor]:
    B, K, H, W = scores.shape
    wide = torch.empty(B, K + 2, H, W + 3, dtype=scores.dtype)
    wide[:, 1:-1, :, 2:-1] = scores
    return {
        "channels first": scores.contiguous(),
        "channels last": scores.contiguous(memory_format=torch.channels_last),
        "part of a larger one": wide[:, 1:-1, :, 2:-1],
        "columns outermost": scores.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }


def blobs(K: int, size: tuple[int, int], cells: int, seed: int = 0) -> torch.Tensor:
    """Scores as smooth as a trained model's: most neighbours have the same best class."""
    scores = torch.randn(1, K, cells, cells, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(scores, size=size, mode="bicubic") * 6


@settings(max_examples=150, deadline=None)
@given(
    K=st.integers(1, 9),
    low=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    batch=st.integers(1, 2),
    layout=st.sampled_from(["channels first", "channels last", "part of a larger one", "columns outermost"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
    smooth=st.booleans(),
    chunk_bytes=st.sampled_from([1, 5000, 2**26]),
    seed=st.integers(0, 2**31),
)
def test_every_pixel_has_the_best_class(K, low, size, batch, layout, dtype, scale, smooth, chunk_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(batch, K, *low, generator=generator)
    if smooth:  # a few levels only: full of ties, and of cells whose corners agree
        scores = scores.round()
    scores = layouts((scores * scale).to(dtype))[layout]
    mask = class_map(Logits, scores, size, chunk_bytes)
    assert mask.shape == (batch, *size)
    exact = exact_scores(scores, size)
    plain = size[0] * size[1] < MIN_PIXELS_A_CELL * low[0] * low[1]  # torch's own resize, whose places are float32
    tolerance = (max(size) * 2.0**-22 if plain else TOLERANCE) * float(scores.double().abs().max())
    assert_best(mask, exact, tolerance)


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
@pytest.mark.parametrize("cells", [3, 12, 40])
def test_sparse_and_dense_strips_against_the_plain_path(layout, cells):
    """Maps of large and of small regions, with K large enough for both ways to be taken."""
    scores = layouts(blobs(40, (40, 48), cells))[layout]
    mask = class_map(Logits, scores, (163, 211))
    exact = exact_scores(scores, (163, 211))
    assert_best(mask, exact, TOLERANCE * float(scores.abs().max()))
    assert (mask.numpy() == exact.argmax(1)).mean() > 0.9999


def test_equal_classes_give_the_lower_one():
    scores = blobs(6, (20, 24), 9)
    doubled = torch.cat((scores, scores, scores), dim=1)
    for size in ((100, 130), (200, 30), (41, 48)):
        assert torch.equal(class_map(Logits, doubled, size), class_map(Logits, scores, size))


def test_a_tie_inside_a_cell_gives_the_lower_class():
    """Two classes that change places: in the middle column both are exactly equal."""
    scores = torch.tensor([[[[0.0, 1.0]], [[1.0, 0.0]]]]).flip(1)
    mask = class_map(Logits, scores, (2, 9))
    assert mask[0].tolist() == 2 * [[0, 0, 0, 0, 0, 1, 1, 1, 1]]  # class 0 falls from 1 to 0


def test_a_class_that_is_best_at_no_corner_can_win_inside():
    scores = torch.tensor([[[[4.0, 0.0]], [[0.0, 4.0]], [[3.0, 3.0]]]])
    assert class_map(Logits, scores, (1, 12)).unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("low", [(1, 1), (1, 5), (5, 1)])
def test_the_border_is_clamped(low):
    scores = torch.randn(2, 4, *low, generator=torch.Generator().manual_seed(0))
    mask = class_map(Logits, scores, (31, 29))
    corners = mask[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert torch.equal(corners.long(), scores[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].argmax(1))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 3e38])
@pytest.mark.parametrize("chunk_bytes", [1, 2**26])
def test_scores_without_bounds_take_the_plain_path(value, chunk_bytes):
    scores = blobs(7, (9, 8), 4)
    scores[0, 3, 4, 5] = value
    scores[0, 5, 4, 5] = -value
    mask = class_map(Logits, scores, (60, 70), chunk_bytes)
    assert torch.equal(mask.long(), Logits.to_size(scores, (60, 70)).argmax(1))


@pytest.mark.parametrize(("K", "dtype"), [(255, torch.uint8), (256, torch.uint8), (257, torch.uint16)])
@pytest.mark.parametrize("size", [(3, 4), (30, 40)])
def test_the_last_class_fits_into_the_mask(K, dtype, size):
    scores = torch.zeros(1, K, 4, 4)
    scores[:, -1, :2] = 1
    mask = class_map(Logits, scores, size)
    assert mask.dtype == dtype == mask_dtype(K)
    assert mask.numpy().max() == K - 1
    assert mask.numpy().min() == 0


def test_half_precision_is_widened_before_the_resize():
    """Class 1 goes from 1 - 2^-8 to 1 + 2^-7 and wins where it is over 1, from a third of the way on; in bfloat16, of
    which 1 + 2^-7 is the next number after 1, it would tie there."""
    scores = torch.tensor([[1, 1], [1 - 2**-8, 1 + 2**-7]], dtype=torch.bfloat16)
    for rows, size in ((2, (1, 8)), (1, (2, 8))):  # so small that all scores are made, and not
        mask = class_map(Logits, scores.view(1, 2, 1, 2).expand(1, 2, rows, 2), size)
        assert mask.tolist() == [[[0, 0, 0, 1, 1, 1, 1, 1]] * size[0]]


def test_every_model_of_logits_resizes_them_bilinearly():
    """The class map relies on it."""
    for name in segzoo.list_models("test_*"):
        model = segzoo.create_model(name)
        if getattr(model, "score_kind", None) == "logits":
            scores = torch.randn(1, 5, 6, 7)
            assert torch.equal(model.to_size(scores, (20, 15)), Logits.to_size(scores, (20, 15)))


# ---- products


def product_scores(output: MaskOutput, size: tuple[int, int]) -> np.ndarray:
    """Sums of class probability x sigmoid mask in float64, from the sizes that the output names."""
    logits = output.mask_logits.double().numpy()
    rows, columns = (
        bilinear_weights(side, out, side / padded * image / out)
        for side, out, padded, image in zip(logits.shape[2:], size, output.padded_size, output.image_size, strict=True)
    )
    masks = 1 / (1 + np.exp(-np.einsum("yr,bqrc,xc->bqyx", rows, logits, columns)))
    probability = output.class_logits.double().softmax(-1)[..., :-1].numpy()
    return np.einsum("bqk,bqyx->bkyx", probability, masks)


@settings(max_examples=60, deadline=None)
@given(
    K=st.integers(1, 9),
    grid=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    cut=st.tuples(st.integers(0, 15), st.integers(0, 15)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    batch=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    scale=st.sampled_from([0.1, 1.0, 20.0]),
    chunk_bytes=st.sampled_from([1, 20_000, 2**26]),
    seed=st.integers(0, 2**31),
)
def test_every_pixel_has_the_best_product(K, grid, cut, size, batch, dtype, scale, chunk_bytes, seed):
    generator = torch.Generator().manual_seed(seed)
    padded = (16 * grid[0], 16 * grid[1])
    output = MaskOutput(
        class_logits=(5 * torch.randn(batch, K, K + 1, generator=generator)).to(dtype),
        mask_logits=(scale * torch.randn(batch, K, *grid, generator=generator)).to(dtype),
        image_size=(padded[0] - cut[0], padded[1] - cut[1]),
        padded_size=padded,
    )
    model = segzoo.create_model("test_segvit")
    mask = class_map(model, output, size, chunk_bytes)
    scores = product_scores(output, size)
    assert_best(mask, scores, 2.0**-18 * scores.max())


def test_half_precision_is_widened_before_the_softmax():
    """Class 1 is the more probable by 3e-5, which bfloat16 does not tell apart."""
    logits = torch.tensor([0.001, 0.0011, -1], dtype=torch.bfloat16).view(1, 1, 3)
    output = MaskOutput(logits, torch.zeros(1, 1, 2, 2, dtype=torch.bfloat16), (32, 32), (32, 32))
    assert (class_map(segzoo.create_model("test_segvit"), output, (20, 20)) == 1).all()


def test_masks_without_bounds_take_the_plain_path():
    output = MaskOutput(torch.randn(1, 5, 6), torch.randn(1, 5, 4, 4), (64, 64), (64, 64))
    output.mask_logits[0, 2, 1, 1] = torch.inf
    model = segzoo.create_model("test_segvit")
    assert torch.equal(class_map(model, output, (70, 50)).long(), model.to_size(output, (70, 50)).argmax(1))


# ---- operations and memory


class Ledger(TorchDispatchMode):
    """Counts the numbers that operators write, and the memory that lives at once."""

    def __init__(self):
        super().__init__()
        self.written = self.live = self.peak = 0
        self._users: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata not in known:
                self.written += tensor.numel()
            elif storage._cdata not in self._users:
                continue  # a view of, or a write into, what was there before
            self._enter(tensor, storage)
        return result

    def _enter(self, tensor, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._users:
            self.live += size
            self.peak = max(self.peak, self.live)
        self._users[key] = self._users.get(key, 0) + 1
        weakref.finalize(tensor, self._leave, key, size)

    def _leave(self, key, size):
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.live -= size


def agreement(scores: torch.Tensor) -> float:
    best = F.pad(scores.argmax(1)[:, None].float(), (0, 1, 0, 1), mode="replicate")
    corners = [
        best[..., y : y + scores.shape[2], x : x + scores.shape[3]] for y, x in itertools.product((0, 1), (0, 1))
    ]
    return torch.stack([corner == corners[0] for corner in corners]).all(0).float().mean().item()


@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_most_scores_are_never_made(layout):
    K, low, size = 60, (48, 48), (180, 240)
    scores = layouts(blobs(K, low, 6))[layout]
    assert 0.6 < agreement(scores) < 0.85
    with Ledger() as ledger:
        class_map(Logits, scores, size)
    # The small map's own scores a few times over, and a few numbers a pixel; all scores would be K a pixel.
    assert ledger.written < 5 * scores.numel() + 20 * size[0] * size[1]
    assert ledger.written < 0.4 * K * size[0] * size[1]


def test_scores_of_products_are_never_all_made():
    output = MaskOutput(20 * torch.eye(40, 41)[None], blobs(40, (16, 16), 3), (256, 256), (256, 256))
    with Ledger() as ledger:
        class_map(segzoo.create_model("test_segvit"), output, (256, 256))
    assert ledger.written < 1.5 * 40 * 256 * 256  # in full: masks, their sigmoids and scores, three times 40 a pixel


@pytest.mark.parametrize("kind", ["noise", "blobs"])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_memory_keeps_to_its_bound(kind, layout):
    low, size, bound = (64, 96), (250, 380), 2**20
    scores = blobs(30, low, 8) if kind == "blobs" else torch.randn(1, 30, *low)
    scores = layouts(scores)[layout]
    mask_bytes = size[0] * size[1]
    with Ledger() as ledger:
        class_map(Logits, scores, size, chunk_bytes=bound)
    assert ledger.peak < 3 * bound + 2 * mask_bytes < 4 * 30 * size[0] * size[1] / 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "blobs"])
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_memory_of_a_large_photo(kind, layout):
    scores = blobs(150, (384, 512), 40) if kind == "blobs" else torch.randn(1, 150, 384, 512)
    scores = layouts(scores)[layout]
    with Ledger() as ledger:
        class_map(Logits, scores, (1536, 2048))
    assert ledger.peak < 0.2e9
