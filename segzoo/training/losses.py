"""Losses that a family needs beyond cross-entropy: SegViT's classification-plus-mask loss, and that of heatmaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .._errors import SegzooError
from ..keypoints import gaussian_heatmaps
from ..layers.shapes import resize_image_part


class _Targets(NamedTuple):
    """What a batch of label maps asks of the queries; P counts the pairs (image, class present in it)."""

    classes: Tensor  # (B, K) int64: class k where image b has it, else K ("no object"), or -1 (not taught)
    image: Tensor  # (P,) int64
    label: Tensor  # (P,) int64
    masks: Tensor  # (P, N): 1 where the pixel has the class
    counted: Tensor | None  # (P, N): 1 where the pixel counts; None: all do
    num_masks: Tensor  # pairs per process, at least 1


class ATMLoss(nn.Module):
    """Loss of attention-to-mask (SegViT, section 3.2, and its released code): query c owns class c.

    Per supervised prediction: cross-entropy of every query against its class, or "no object" where the image has not
    that class, plus focal and dice loss on the masks of the classes that are present. All predictions weigh the same.
    Masks are resized bilinearly to the label map; focal and dice terms are summed over the masks and divided by
    the number of (image, class) pairs, averaged over processes if torch.distributed is initialised.

    Args:
        class_weight, focal_weight, dice_weight: weights of the three terms.
        no_object_weight: weight of "no object" in the cross-entropy, which is a weighted mean over the queries.
        focal_alpha, focal_gamma: of the focal loss.
        ignore_index: label of pixels without truth.
        ignored: "negative" as in the released code: ignored pixels belong to no mask, and an image without any label
            has no object; "exclude": ignored pixels count in no term, and an image without any label teaches nothing.
    """

    def __init__(
        self,
        *,
        class_weight: float = 1.0,
        focal_weight: float = 20.0,
        dice_weight: float = 1.0,
        no_object_weight: float = 0.1,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        ignore_index: int = 255,
        ignored: str = "negative",
    ):
        super().__init__()
        if ignored not in ("negative", "exclude"):
            raise SegzooError(f"ignored must be 'negative' or 'exclude', not {ignored!r}")
        self.class_weight = class_weight
        self.focal_weight = focal_weight
        self.dice_weight = dice_weight
        self.no_object_weight = no_object_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma
        self.ignore_index = ignore_index
        self.ignored = ignored

    def forward(self, outputs: Mapping[str, Any], labels_BHW: Tensor) -> Tensor:
        """`forward_train`'s dict and labels (B, H, W), integers in 0..K-1 or `ignore_index` -> a scalar to minimise."""
        return torch.stack(list(self.terms(outputs, labels_BHW).values())).sum()

    def terms(self, outputs: Mapping[str, Any], labels_BHW: Tensor) -> dict[str, Tensor]:
        """The weighted terms, which add up to the loss: "class", "focal", "dice", and for the auxiliary prediction i
        "auxiliary.i.class" and so on.

        Raises:
            SegzooError: labels of another shape, that are no integers, or that are no class of the model.
        """
        output = outputs["output"]
        targets = self._targets(labels_BHW, output)
        predictions = {"": output}
        predictions.update({f"auxiliary.{i}.": auxiliary for i, auxiliary in enumerate(outputs["auxiliary"])})
        terms = {}
        _, H, W = labels_BHW.shape
        for prefix, prediction in predictions.items():
            masks_PN = self._masks(prediction, targets, (H, W))
            terms[f"{prefix}class"] = self.class_weight * self._class_term(prediction.class_logits, targets)
            terms[f"{prefix}focal"] = self.focal_weight * self._focal_term(masks_PN, targets)
            terms[f"{prefix}dice"] = self.dice_weight * self._dice_term(masks_PN, targets)
        return terms

    def extra_repr(self) -> str:
        return (
            f"class={self.class_weight:g}, focal={self.focal_weight:g}, dice={self.dice_weight:g}, "
            f"no_object={self.no_object_weight:g}, ignored={self.ignored}"
        )

    def _targets(self, labels_BHW: Tensor, output: Any) -> _Targets:
        B, K = output.class_logits.shape[:2]
        if labels_BHW.ndim != 3 or labels_BHW.shape[0] != B:
            raise SegzooError(f"labels must be ({B}, H, W), not {tuple(labels_BHW.shape)}")
        if labels_BHW.dtype == torch.bool or labels_BHW.is_floating_point() or labels_BHW.is_complex():
            raise SegzooError(f"labels must be integers, not {labels_BHW.dtype}; convert them with labels.long()")
        labels_BHW = labels_BHW.long()
        ignored_BHW = labels_BHW == self.ignore_index
        if ((labels_BHW < 0) | (labels_BHW >= K)).logical_and(~ignored_BHW).any():
            raise SegzooError(f"labels must be 0 to {K - 1} or {self.ignore_index} (ignored) for this model")
        # Ignored pixels are counted in a column of their own, which is cut off.
        labels_BN = torch.where(ignored_BHW, K, labels_BHW).flatten(1)
        pixels_BK = labels_BN.new_zeros(B, K + 1).scatter_add_(1, labels_BN, torch.ones_like(labels_BN))[:, :K]
        present_BK = pixels_BK > 0
        image_P, label_P = present_BK.nonzero(as_tuple=True)
        classes_BK = torch.where(present_BK, torch.arange(K, device=labels_BN.device), K)
        dtype = _at_least_float32(output.mask_logits).dtype
        excluded = self.ignored == "exclude"
        if excluded:
            # -1 is left out of the cross-entropy.
            classes_BK = torch.where(present_BK.any(dim=1, keepdim=True), classes_BK, -1)
        return _Targets(
            classes=classes_BK,
            image=image_P,
            label=label_P,
            masks=(labels_BN[image_P] == label_P[:, None]).to(dtype),
            counted=(labels_BN != K)[image_P].to(dtype) if excluded else None,
            num_masks=_mean_over_processes(present_BK.sum().to(dtype)).clamp(min=1),
        )

    def _masks(self, prediction: Any, targets: _Targets, size: tuple[int, int]) -> Tensor:
        """Mask logits of the pairs at the size of the labels; only these are ever made that large."""
        masks_PHW = _at_least_float32(prediction.mask_logits[targets.image, targets.label])
        return resize_image_part(
            masks_PHW[:, None],
            size,
            image_size=prediction.image_size,
            padded_size=prediction.padded_size,
        ).flatten(1)

    def _class_term(self, class_logits_BKC: Tensor, targets: _Targets) -> Tensor:
        class_logits_BKC = _at_least_float32(class_logits_BKC)
        weights_C = class_logits_BKC.new_ones(class_logits_BKC.shape[-1])
        weights_C[-1] = self.no_object_weight
        if (targets.classes < 0).all():
            return class_logits_BKC.sum() * 0  # no image with a label: zero, still connected to the parameters
        return F.cross_entropy(class_logits_BKC.transpose(1, 2), targets.classes, weights_C, ignore_index=-1)

    def _focal_term(self, masks_PN: Tensor, targets: _Targets) -> Tensor:
        truth_PN = targets.masks
        loss_PN = F.binary_cross_entropy_with_logits(masks_PN, truth_PN, reduction="none")
        probability_PN = masks_PN.sigmoid()
        miss_PN = probability_PN * (1 - truth_PN) + (1 - probability_PN) * truth_PN  # 1 - probability of the truth
        alpha_PN = self.focal_alpha * truth_PN + (1 - self.focal_alpha) * (1 - truth_PN)
        loss_PN = alpha_PN * miss_PN**self.focal_gamma * loss_PN
        if targets.counted is None:
            loss_P = loss_PN.mean(dim=1)
        else:
            loss_P = (loss_PN * targets.counted).sum(dim=1) / targets.counted.sum(dim=1)
        return loss_P.sum() / targets.num_masks

    def _dice_term(self, masks_PN: Tensor, targets: _Targets) -> Tensor:
        probability_PN = masks_PN.sigmoid()
        if targets.counted is not None:
            probability_PN = probability_PN * targets.counted
        overlap_P = 2 * (probability_PN * targets.masks).sum(dim=1)
        total_P = probability_PN.sum(dim=1) + targets.masks.sum(dim=1)
        return (1 - (overlap_P + 1) / (total_P + 1)).sum() / targets.num_masks


class HeatmapLoss(nn.Module):
    """Mean squared error of heatmaps against Gaussians at the keypoints, as top-down pose models are trained.

    The error of a heatmap is the mean over its cells. Heatmaps are averaged over the keypoints that count (visible,
    and not far outside the map), so that a batch with few of them teaches as much as others; without any the loss is
    zero, still connected to the parameters.

    Args:
        sigma: standard deviation of the Gaussians in cells of the heatmaps; 2 is usual for 64x48 cells.
    """

    def __init__(self, *, sigma: float = 2.0):
        super().__init__()
        self.sigma = sigma

    def forward(self, outputs: Mapping[str, Tensor], xy_BK2: Tensor, visible_BK: Tensor) -> Tensor:
        """`forward_train`'s dict of a keypoint model, positions (B, K, 2) in pixels of its input, and (B, K) which
        of them are known -> a scalar to minimise.

        Raises:
            SegzooError: another number of keypoints than the model has.
        """
        heatmaps_BKHW = _at_least_float32(outputs["heatmaps"])
        if heatmaps_BKHW.shape[:2] != xy_BK2.shape[:2]:
            raise SegzooError(
                f"keypoints must be ({', '.join(map(str, heatmaps_BKHW.shape[:2]))}, 2) for this model, not "
                f"{tuple(xy_BK2.shape)}"
            )
        (H, W), (h, w) = outputs["scores"].shape[2:], heatmaps_BKHW.shape[2:]
        targets_BKHW, weights_BK = gaussian_heatmaps(
            xy_BK2.to(heatmaps_BKHW.dtype),
            visible_BK,
            image_size=(H, W),
            map_size=(h, w),
            sigma=self.sigma,
        )
        error_BK = (heatmaps_BKHW - targets_BKHW).square().mean(dim=(2, 3))
        return (weights_BK * error_BK).sum() / weights_BK.sum().clamp(min=1)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}"


def _mean_over_processes(count: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count = count / dist.get_world_size()
    return count


def _at_least_float32(x: Tensor) -> Tensor:
    """The terms are sums over pixels, for which 16 bits are too few."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
