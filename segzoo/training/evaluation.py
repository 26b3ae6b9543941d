"""How good a model is on a data set: by the protocol of its paper, with any reduction, at the labels' own size.

    data = open_data("cityscapes:/data/cityscapes")
    result = evaluate(model, data, protocol="cityscapes+ms", reduction="fast")
    result.metrics["mIoU"], result.published

A segmenter gets mIoU, small-class mIoU and pixel accuracy, a classifier top-1 and top-5, a keypoint model PCK and, on
COCO, average precision. Of several processes (torch.distributed) each takes its own pictures, none of them twice, and
every one returns the figures of all; keypoints are few, so that every process takes all of them. Counting is
torchmetrics' (extra `train`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from .._errors import SegzooError
from .._version import __version__
from ..data.car_corners import CarCrop
from ..data.classification import ClassificationData
from ..data.coco_keypoints import CocoKeypointData, Person
from ..data.segmentation import SegmentationData, out_of_range
from ..engines import Engine
from ..keypoints import pck
from ..labels import LabelSet, generic_labels
from ..layers.reduction import entry_to_json
from ..models.base import Encoder, Model, WeightsState
from ..models.rows import PretrainedCfg
from ..models.segmenter import SegmentationModel
from ..plans import Plan, current_plan, inference_reduction, reduction_sites, resolve_plan
from ..prediction import ScoreMaker, predict_keypoints, protocol_of, score_maker, segment_one
from ..preprocess import load_image, to_input
from ..twins import eval_twin
from .metrics import PAIRED_CLASSES, SMALL_CLASSES, ConfusionMatrix
from .protocols import NamedProtocol
from .reports import Evaluation

KeypointData = CocoKeypointData | Sequence[CarCrop]
Progress = Callable[[Sequence[int]], Any]

PCK_THRESHOLDS = (0.05, 0.1, 0.2)  # of the longer side of a box
CENTRE_CROP = 0.875  # of an image's short side, at which ImageNet classifiers are tested
BOX_MARGIN = 1.25  # a person's box is widened by it, as top-down models are trained


def evaluate(
    model: nn.Module | ScoreMaker,
    data: SegmentationData | ClassificationData | KeypointData,
    *,
    protocol: str = "row",
    reduction: object = None,
    progress: Progress = iter,
) -> Evaluation:
    """Run a model over a data set and count.

    Args:
        model: of `create_model`, in any mode, or an engine that `predict` takes in its place.
        data: of `open_data`, `open_classification` or `open_coco_keypoints`, or a list of `car_crops`.
        protocol: of segmentation, one of `segzoo.training.protocols.PROTOCOLS`; "+ms" (six scales and flip) or "+flip"
            may follow.
        reduction: a plan for the time of the evaluation; None: as the model is. Of an engine the one that it was made
            with, to be recorded by its name.
        progress: wraps the indices of the samples, as tqdm does.

    Raises:
        SegzooError: a model of another kind than the data, other classes, or a protocol that does not exist.
        ImageError: a sample that cannot be read.
    """
    set_plan = contextlib.nullcontext()
    if reduction is not None:
        if isinstance(model, nn.Module):
            set_plan = inference_reduction(model, reduction)
        else:
            _check_plan(model, reduction)
    with set_plan, torch.inference_mode():
        subject = _subject(model)
        if isinstance(data, SegmentationData):
            result = _segmentation(model, data, protocol, progress)
        elif protocol != "row":
            raise SegzooError(f"protocol {protocol!r} is for segmentation; leave it out")
        elif isinstance(data, ClassificationData):
            result = _classification(model, data, progress)
        else:
            result = _keypoints(model, data, progress)
    labels = data.labels if isinstance(data, SegmentationData) else None
    published, published_protocol = published_figure(subject.row, labels.name if labels else None, reduction)
    return dataclasses.replace(
        result,
        model=subject.name,
        reduction=_as_text(reduction),
        plan=subject.plan,
        published=published,
        published_protocol=published_protocol,
        conditions=_conditions(subject),
    )


def _check_plan(maker: ScoreMaker, reduction: object) -> None:
    """Raises SegzooError where a score maker was not made with this reduction."""
    source = maker.upscaler
    if isinstance(source, SegmentationModel):
        plan = resolve_plan(reduction, reduction_sites(source), source.reduction_presets)
        if plan == maker.plan:
            return
    raise SegzooError(f"an engine keeps the reduction that it was made with ({maker.plan}); make one with {reduction}")


def _as_text(reduction: object) -> str:
    if reduction is None:
        return "as is"
    return reduction if isinstance(reduction, str) else json.dumps(reduction, default=entry_to_json)


def published_figure(row: PretrainedCfg | None, label_set: str | None, reduction: object) -> tuple[float | None, str]:
    """The main figure that the weights' authors published for a reduction, in [0, 1], and its protocol.

    None for data of another label set than the row's, and for a reduction without a figure.
    """
    preset = "base" if reduction is None else reduction
    if row is None or row.label_set != label_set or not isinstance(preset, str):
        return None, ""
    score = row.score(preset)
    return (score.value / 100, score.protocol) if score else (None, "")


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What is known of a model, a classifier or an engine alike."""

    name: str
    row: PretrainedCfg
    plan: Plan
    like: torch.Tensor
    engine: str
    dtype: str  # of the computation


def _subject(model: nn.Module | ScoreMaker) -> _Subject:
    if isinstance(model, Encoder):
        row = model.pretrained_cfg or PretrainedCfg(resize="exact", test_size=(224, 224))
        like = next(model.parameters())
        return _Subject(_name(model), row, current_plan(model), like, "torch", _dtype(like))
    maker = score_maker(model)
    if isinstance(maker, Engine):
        engine, dtype = maker.engine, {"f32": "float32", "bf16": "bfloat16"}[maker.precision]
    else:
        engine, dtype = "torch" if isinstance(model, nn.Module) else type(model).__name__, _dtype(maker.like)
    return _Subject(maker.name, maker.row, maker.plan, maker.like, engine, dtype)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class _Shown:
    """A score maker that sees images as another row says."""

    def __init__(self, maker: ScoreMaker, row: PretrainedCfg):
        self.maker = maker
        self.row = row
        self.name, self.in_chans, self.label_set = maker.name, maker.in_chans, maker.label_set
        self.plan, self.like, self.upscaler = maker.plan, maker.like, maker.upscaler
        self.weights_state: WeightsState = maker.weights_state

    def head_output(self, x_BCHW: torch.Tensor) -> Any:
        return self.maker.head_output(x_BCHW)


def _segmentation(model: nn.Module | ScoreMaker, data: SegmentationData, name: str, progress: Progress) -> Evaluation:
    maker = score_maker(model)
    if maker.upscaler.score_kind == "heatmap":
        raise SegzooError(f"{maker.name} gives no mask; it cannot be evaluated on labels of pixels")
    K = len(maker.label_set)
    if data.num_classes not in (None, K):
        raise SegzooError(f"{maker.name} has {K} classes, but {data.name} has {data.num_classes}")
    protocol = NamedProtocol.of(name, maker.row)
    shown = _Shown(maker, protocol.row)
    look = protocol_of(protocol.row, scales=protocol.scales, flip=protocol.flip)
    device = _counting_device(maker.like)
    counted = _torchmetrics().MulticlassConfusionMatrix(K, ignore_index=data.ignore_index, validate_args=False)
    counted = counted.to(device)
    for i in progress(_own_samples(len(data))):
        sample = data[i]
        wrong = out_of_range(sample.labels, K, data.ignore_index)
        if wrong:
            raise SegzooError(f"{sample.name}: labels {wrong[:5]} are no classes of the model, which has {K}")
        mask_HW = segment_one(shown, sample.image, look).mask
        counted.update(*(torch.from_numpy(array.astype(np.int64)).to(device) for array in (mask_HW, sample.labels)))
    confusion = ConfusionMatrix.of(counted.compute().cpu().numpy())
    labels = data.labels
    if labels is None or labels.name == generic_labels(K).name:
        labels = maker.label_set
    return _result(
        data.name,
        data.split,
        len(data),
        _figures(confusion, labels),
        protocol=name,
        protocol_text=str(protocol),
        class_names=labels.classes,
        confusion=confusion,
    )


def _figures(confusion: ConfusionMatrix, labels: LabelSet) -> dict[str, float]:
    figures = {"mIoU": confusion.miou()}
    for kind, sets in (("small", SMALL_CLASSES), ("paired", PAIRED_CLASSES)):
        if labels.name in sets:
            figures[f"{kind} mIoU"] = confusion.miou([labels.classes.index(name) for name in sets[labels.name]])
    figures["pixel accuracy"] = confusion.pixel_accuracy()
    figures["mean accuracy"] = confusion.mean_accuracy()
    return figures


def _classification(model: nn.Module | ScoreMaker, data: ClassificationData, progress: Progress) -> Evaluation:
    if not isinstance(model, Encoder):
        raise SegzooError(f"{_name(model)} is no classifier; segzoo.list_models('mit_*') lists some")
    K = model.num_classes
    if len(data.classes) != K:
        raise SegzooError(f"{_name(model)} has {K} classes, but there are {len(data.classes)} class folders")
    row, like = _subject(model).row, next(model.parameters())
    make = _torchmetrics().MulticlassAccuracy
    device = _counting_device(like)
    counted = {f"top-{k}": make(K, top_k=k, average="micro").to(device) for k in (1, 5) if k <= K}
    twin = eval_twin(model)
    for i in progress(_own_samples(len(data))):
        path, truth = data[i]
        image_HWC = centre_crop(load_image(path, model.in_chans), row.test_size)
        logits_BK = twin(to_input(image_HWC, row.test_size, row, like)).float().to(device)
        for accuracy in counted.values():
            accuracy.update(logits_BK, torch.tensor([truth], device=device))
    return _result(
        "imagenet folder",
        data.split,
        len(data),
        {name: float(accuracy.compute()) for name, accuracy in counted.items()},
        protocol="row",
        protocol_text=f"short side to {row.test_size[0]} / {CENTRE_CROP}, bicubic; centre {row.test_size[0]}x"
        f"{row.test_size[1]}",
    )


def centre_crop(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre of an image, `CENTRE_CROP` of its short side, at `size`: resized first (bicubic), then cut."""
    H, W = image_HWC.shape[:2]
    scale = max(size[0] / H, size[1] / W) / CENTRE_CROP
    height, width = max(size[0], round(H * scale)), max(size[1], round(W * scale))
    channels = [image_HWC[..., i] for i in range(image_HWC.shape[2])]
    resized = [Image.fromarray(channel).resize((width, height), Image.Resampling.BICUBIC) for channel in channels]
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return np.dstack([np.asarray(image)[top : top + size[0], left : left + size[1]] for image in resized])


def _keypoints(model: nn.Module | ScoreMaker, data: KeypointData, progress: Progress) -> Evaluation:
    if not isinstance(model, nn.Module):
        raise SegzooError("keypoints are measured of a model, not of an engine; leave out the engine")
    if not isinstance(model, Model) or not len(data):
        raise SegzooError(f"{_name(model)} is no keypoint model, or there are no samples")
    found, results = [], []
    for i in progress(range(len(data))):
        sample = data[i]
        box = _padded_box(sample.box, model) if isinstance(sample, Person) else None
        keypoints = predict_keypoints(model, sample.image, box=box)
        if len(keypoints.score) != len(sample.visible):
            raise SegzooError(f"the model has {len(keypoints.score)} keypoints, the data {len(sample.visible)}")
        found.append(keypoints.xy)
        if isinstance(sample, Person):
            results.append(_coco_result(sample, keypoints.xy, keypoints.score))
    metrics = _pck_figures(torch.stack(found), data)
    if not isinstance(data, CocoKeypointData):
        return _result("car corners", "", len(data), metrics, protocol="row", protocol_text="whole crop")
    return _result(
        "coco keypoints",
        data.split,
        len(data),
        {**_average_precision(data.coco, results), **metrics},
        protocol="row",
        protocol_text=f"true boxes, {BOX_MARGIN} times as wide, at the model's ratio",
    )


def _padded_box(box: tuple[float, float, float, float], model: Model) -> tuple[float, float, float, float]:
    """The box widened by `BOX_MARGIN`, and further on one side to the ratio of the model's input."""
    x0, y0, x1, y1 = box
    H, W = (model.pretrained_cfg or PretrainedCfg(input_size=(256, 192))).input_size
    width = max(x1 - x0, (y1 - y0) * W / H) * BOX_MARGIN
    height = width * H / W
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _pck_figures(xy_NK2: torch.Tensor, data: KeypointData) -> dict[str, float]:
    truth_NK2 = torch.from_numpy(np.stack([sample.xy for sample in data]))
    visible_NK = torch.from_numpy(np.stack([sample.visible for sample in data]))
    length_N = torch.tensor([sample.length for sample in data], dtype=torch.float32)
    return {f"PCK@{t}": pck(xy_NK2, truth_NK2, visible_NK, length_N, t=t) for t in PCK_THRESHOLDS}


def _coco_result(person: Person, xy_K2: torch.Tensor, score_K: torch.Tensor) -> dict[str, Any]:
    """A detection as COCO wants it; its own pixels count from 0."""
    keypoints_K3 = torch.cat([xy_K2 - 0.5, score_K[:, None]], dim=1)
    return {
        "image_id": person.image_id,
        "category_id": 1,
        "keypoints": keypoints_K3.flatten().tolist(),
        "score": score_K.mean().item(),
    }


def _average_precision(coco: Any, results: list[dict[str, Any]]) -> dict[str, float]:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints its table
        judge = COCOeval(coco, coco.loadRes(results), "keypoints")
        judge.params.imgIds = sorted({result["image_id"] for result in results})
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    names = {"AP": 0, "AP50": 1, "AP75": 2, "AR": 5}
    return {name: float(judge.stats[i]) for name, i in names.items()}


def _result(data: str, split: str, samples: int, metrics: Mapping[str, float], **fields: Any) -> Evaluation:
    """What the loops know; `evaluate` adds the model's side."""
    unknown = {"model": "", "reduction": "", "plan": Plan(), "published": None, "published_protocol": ""}
    return Evaluation(data=data, split=split, samples=samples, metrics=metrics, conditions={}, **unknown, **fields)


def _torchmetrics() -> Any:
    try:
        import torchmetrics.classification
    except ImportError:
        raise SegzooError("evaluation needs torchmetrics: pip install 'segzoo[train]'") from None
    return torchmetrics.classification


def _own_samples(count: int) -> range:
    """The samples of this process: every n-th, none repeated to fill up."""
    if dist.is_available() and dist.is_initialized():
        return range(dist.get_rank(), count, dist.get_world_size())
    return range(count)


def _counting_device(like: torch.Tensor) -> torch.device:
    """Where to count: the processor, but of several processes a GPU, whose counts alone its backend can add up."""
    several = dist.is_available() and dist.is_initialized()
    return like.device if several and like.is_cuda else torch.device("cpu")


def _name(model: nn.Module | ScoreMaker) -> str:
    return (model.name if isinstance(model, Model) or not isinstance(model, nn.Module) else "") or type(model).__name__


def _conditions(subject: _Subject) -> dict[str, str | None]:
    like = subject.like
    return {
        "engine": subject.engine,
        "device": torch.cuda.get_device_name(like.device) if like.is_cuda else f"{like.device} {platform.machine()}",
        "dtype": subject.dtype,
        "segzoo": __version__,
        "commit": commit(),
        "torch": torch.__version__,
    }


def commit() -> str | None:
    """Of segzoo's own checkout, with "+" after it where files differ; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "-uno").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
