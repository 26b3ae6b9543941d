"""What a weights row records: where the weights come from, how images must be prepared, what they reached."""

from __future__ import annotations

import dataclasses
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class PretrainedCfg:
    """One row of weights, and the preprocessing and test protocol that belong to them."""

    # Where the weights are.
    state: str = "unpublished"  # "bundled" | "hub" | "url" | "unpublished"
    file: str | None = None  # bundled: file name in segzoo/weights; url: name in the cache where the URL has none
    hf_hub_id: str | None = None  # hub: repository, "org/name"
    hf_hub_filename: str | None = None  # hub: file in the repository; None = model.safetensors, then older formats
    hf_revision: str | None = None  # hub: full commit id (40 hex digits), or a branch or tag; None follows "main"
    url: str | None = None  # url: official direct link
    sha256: str | None = None  # of the file, where known
    size: int | None = None  # of the file in bytes, where known
    how_to_get: str = ""  # unpublished: the recipe that makes them loadable
    # What they were trained on.
    dataset: str = ""  # "ade20k", "cityscapes", ...
    label_set: str | None = None  # name for segzoo.labels.load_labels; None for ImageNet
    label_names: tuple[str, ...] | None = None  # names of the classes, where they are in no label set
    num_classes: int = 1000
    cfg_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # options of the variant's config
    # Preprocessing: RGB in [0, 1], then (x - mean) / std.
    input_size: tuple[int, int] = (512, 512)  # training crop (H, W) in pixels
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    resize: str = "keep_ratio"  # "keep_ratio": into test_size, "exact": to test_size, "none"
    test_size: tuple[int, int] = (512, 2048)  # keep_ratio: (short side, long side) in pixels; exact: (H, W)
    test_min_side: int = 1  # keep_ratio: both sides have at least so many pixels, even if test_size is then exceeded
    size_divisor: int = 1  # both sides are rounded up to a multiple of it
    test_mode: str = "whole"  # "whole" | "slide"
    crop: tuple[int, int] | None = None  # slide: window (H, W)
    stride: tuple[int, int] | None = None  # slide: step (H, W)
    # What they reached.
    miou: float | None = None  # published, in percent
    miou_protocol: str = ""  # "single scale", ...
    recommended_reduction: str | None = None  # never applied silently
    # Terms.
    license: str = "unknown"  # SPDX identifier in lower case, else the licence's own name, or "unknown"
    license_url: str | None = None
    commercial_use: bool | None = None  # None = unknown
    origin: str = ""  # paper or repository

    @property
    def loadable(self) -> bool:
        return self.state != "unpublished"

    @property
    def from_text(self) -> str:
        """Where the file is, in short: "org/name@1234567" (or @main, which may move), a host, or nothing."""
        if self.state == "hub":
            return f"{self.hf_hub_id}@{(self.hf_revision or 'main')[:7]}"
        return self.url.split("/")[2] if self.state == "url" and self.url else ""


# The test protocols of mmseg's configurations for two data sets, which more than one family follows.
MMSEG_ADE20K = PretrainedCfg(
    dataset="ade20k",
    label_set="ade20k",
    num_classes=150,
    test_size=(512, 2048),
    size_divisor=32,
    miou_protocol="single scale, whole image",
)
MMSEG_CITYSCAPES = PretrainedCfg(
    dataset="cityscapes",
    label_set="cityscapes",
    num_classes=19,
    input_size=(1024, 1024),
    test_size=(1024, 2048),
    size_divisor=32,
    test_mode="slide",
    crop=(1024, 1024),
    stride=(768, 768),
    miou_protocol="single scale, sliding window 1024 stride 768",
)
