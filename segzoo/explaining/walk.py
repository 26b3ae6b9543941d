"""The walk: one image through a model with and without a reduction, and what a block did in both.

Shape letters: H, W rows and columns of a map or of the image, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._errors import SegzooError
from ..layers.reduction import NEUTRAL, KeyValueReduction
from ..plans import Plan, reduction_sites, set_inference_reduction
from ..prediction import mask_maker
from ..preprocess import ImageSource, load_image, model_size, to_input
from ..twins import eval_twin
from .explanation import Explanation, View, seen_image
from .recording import Record, record

# Where the queries stand if none are given, as shares of the image's height and width.
QUERIES = ((0.3, 0.25), (0.3, 0.75), (0.75, 0.25), (0.75, 0.75))
MOST_CLASSES = 8  # of which similarity maps are shown


def explain(
    model: nn.Module,
    image: ImageSource,
    *,
    site: str | None = None,
    reduction: object = "fast",
    queries: Sequence[tuple[int, int]] | None = None,
    block: int = -1,
    resize: tuple[int, int] | None = None,
) -> Explanation:
    """What a reduction does to one block on one image: its attention, features and tokens. The model is untouched.

    >>> import numpy, segzoo
    >>> model = segzoo.create_model("test_edaformer")
    >>> shown = segzoo.explain(model, numpy.zeros((64, 96, 3), numpy.uint8), site="encoder.0", reduction=2)
    >>> shown.without.keys.max() + 1, shown.reduced.keys.max() + 1
    (6, 1)

    Args:
        model: a segmentation model.
        image: as for `predict`.
        site: a stage or level with keys and values, "encoder.2"; default: the first one that the plan reduces.
        reduction: any plan of `set_inference_reduction`.
        queries: (row, column) in pixels of the image whose attention is shown; default: four points.
        block: which of the site's blocks, from 0; -1 is the last.
        resize: exact (H, W) at which the model sees the image.

    Raises:
        SegzooError: a wrong site, plan, block or query, or a site whose attention does not look at one map.
    """
    if not isinstance(model, nn.Module):
        raise SegzooError("explain looks into the modules of a model, which an engine has not; give the model itself")
    maker: Any = mask_maker(model)
    image_HWC = load_image(image, maker.in_chans)
    size = model_size(image_HWC.shape[:2], maker.row, resize)
    x_BCHW = to_input(image_HWC, size, maker.row, maker.like)
    plain, reduced = eval_twin(maker.twin), eval_twin(maker.twin)
    set_inference_reduction(plain, None)
    plan = set_inference_reduction(reduced, reduction)
    site = site or _first_reduced(plan)
    points = _points(queries, image_HWC.shape[:2], size)
    covered = tuple(math.ceil(side / plain.encoder.size_multiple) * plain.encoder.size_multiple for side in size)
    views, classes = [], None
    for twin in (plain, reduced):
        name, attention = _attention_at(twin, site, block)
        found, head_output = record(twin, attention, x_BCHW)
        maps, classes = _similarity(maker, head_output, size, classes)
        views.append(_view(found, points, covered, maps))
    return Explanation(
        site=site,
        block=name,
        plan=plan,
        image=seen_image(image_HWC, size),
        covered_size=covered,
        queries=points,
        without=views[0],
        reduced=views[1],
    )


def _first_reduced(plan: Plan) -> str:
    site = next((site for site, entry in plan.items() if entry != NEUTRAL), None)
    if site is None:
        raise SegzooError(f"this plan reduces nothing; sites to look at are {', '.join(plan) or 'none in this model'}")
    return site.removesuffix(".q")


def _attention_at(model: nn.Module, site: str, block: int) -> tuple[str, nn.Module]:
    """The name and the layer of one of a site's blocks."""
    sites = {
        name: leaves for name, leaves in reduction_sites(model).items() if isinstance(leaves[0], KeyValueReduction)
    }
    leaves = sites.get(site.removesuffix(".q"))
    if leaves is None:
        raise SegzooError(
            f"no attention over one map at {site!r}; this model's sites with one: {', '.join(sites) or 'none'}"
        )
    if not -len(leaves) <= block < len(leaves):
        raise SegzooError(f"site {site} has {len(leaves)} blocks; block must be from 0 to {len(leaves) - 1}")
    leaf = leaves[block]
    return next((name, owner) for name, owner in model.named_modules() if any(leaf is c for c in owner.children()))


def _points(
    queries: Sequence[tuple[int, int]] | None, image_size: tuple[int, ...], size: tuple[int, int]
) -> tuple[tuple[int, int], ...]:
    """The queries in pixels of the image as the model sees it."""
    H, W = image_size[:2]
    if queries is None:
        queries = [(int(row * H), int(column * W)) for row, column in QUERIES]
    for row, column in queries:
        if not (0 <= row < H and 0 <= column < W):
            raise SegzooError(f"query ({row}, {column}) is outside the image of {H}x{W} pixels; rows come first")
    if not queries:
        raise SegzooError("give at least one query (row, column)")
    return tuple((int((row + 0.5) * size[0] / H), int((column + 0.5) * size[1] / W)) for row, column in queries)


def _view(found: Record, points: Sequence[tuple[int, int]], covered: Sequence[int], maps: Mapping[str, Any]) -> View:
    H, W = found.query_of.shape
    at = [(row * H // covered[0], column * W // covered[1]) for row, column in points]
    tokens = [int(found.query_of[row, column]) for row, column in at]
    return View(
        attention=_array(found.weights(tokens)),
        features=_array(found.output.norm(dim=-1)),
        keys=found.key_of.cpu().numpy(),
        queries=found.query_of.cpu().numpy(),
        similarity=maps,
    )


def _similarity(
    maker: Any, head_output: Any, size: tuple[int, int], classes: Sequence[int] | None
) -> tuple[dict[str, np.ndarray], Sequence[int] | None]:
    """SegViT's masks of `classes`, or else of those that its class map has most of; nothing of other models."""
    if maker.upscaler.score_kind != "product":
        return {}, None
    if classes is None:
        with torch.no_grad():
            mask_HW = maker.upscaler.to_size(head_output, size)[0].argmax(dim=0)
        area_K = torch.bincount(mask_HW.flatten(), minlength=len(maker.label_set))
        classes = [int(index) for index in area_K.argsort(descending=True)[:MOST_CLASSES] if area_K[index]]
    masks_KHW = head_output.mask_logits[0].sigmoid()
    return {maker.label_set.classes[index]: _array(masks_KHW[index]) for index in classes}, classes


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
