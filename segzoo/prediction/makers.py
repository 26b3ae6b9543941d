"""What the walk runs: a model's eval twin, or an engine in its place."""

from __future__ import annotations

import logging
import typing
import weakref
from typing import Any

from torch import Tensor, nn

from .._errors import SegzooError
from ..labels import LabelSet, generic_labels
from ..masks import Upscaler
from ..models.base import WeightsState
from ..models.rows import PretrainedCfg, label_set
from ..models.segmenter import SegmentationModel
from ..plans import Plan, current_plan
from ..twins import eval_twin

_log = logging.getLogger("segzoo")
_warned: weakref.WeakSet[Any] = weakref.WeakSet()  # models whose weights' state has been said


class ScoreMaker(typing.Protocol):
    """What the walk runs: a segmentation model, or whatever has these members in its place."""

    @property
    def name(self) -> str: ...

    @property
    def in_chans(self) -> int: ...

    @property
    def row(self) -> PretrainedCfg:
        """How images are prepared, and the test protocol."""
        ...

    @property
    def label_set(self) -> LabelSet: ...

    @property
    def weights_state(self) -> WeightsState: ...

    @property
    def plan(self) -> Plan:
        """The inference reduction that its scores are made with."""
        ...

    @property
    def like(self) -> Tensor:
        """Any tensor on the device and in the dtype in which images are taken."""
        ...

    def head_output(self, x_BCHW: Tensor) -> Any:
        """Normalised images -> what the model's `forward_head` returns."""
        ...

    @property
    def upscaler(self) -> Upscaler:
        """The model's `to_size` and `score_kind`."""
        ...


def score_maker(model: nn.Module | ScoreMaker) -> ScoreMaker:
    """What the walk runs for a model or an engine.

    Raises:
        SegzooError: it gives no scores of an image.
    """
    if not isinstance(model, nn.Module):
        return model
    inner = dict(model.named_children()).get("module")
    model = dict(model.named_children()).get("_orig_mod", model)  # torch.compile's wrapper: its parts are what is run
    if isinstance(model, SegmentationModel):
        return ModelScores(model)
    hint = "; pass its .module" if isinstance(inner, SegmentationModel) else ""
    raise SegzooError(f"{type(model).__name__} is no segmentation model; segzoo.list_models() lists them{hint}")


class ModelScores:
    """A model as a ScoreMaker: its twin in eval mode, with the reduction in force when this was made."""

    def __init__(self, model: SegmentationModel):
        twin = eval_twin(model)
        self.upscaler = self.twin = twin
        self.name = twin.name or type(twin).__name__
        self.in_chans = twin.in_chans
        self.row = twin.pretrained_cfg or PretrainedCfg()
        self.label_set = label_set(self.row, twin.num_classes) or generic_labels(twin.num_classes)
        self.weights_state: WeightsState = twin.weights_state
        self.plan = current_plan(twin)
        self.like = next(twin.parameters())

    def head_output(self, x_BCHW: Tensor) -> Any:
        return self.twin.forward_head(self.twin.forward_features(x_BCHW))


def mask_maker(model: nn.Module | ScoreMaker) -> ScoreMaker:
    """`score_maker` where masks are wanted; of a model that can only guess it is said, once.

    Raises:
        SegzooError: it gives no scores of classes.
    """
    maker = score_maker(model)
    if maker.upscaler.score_kind == "heatmap":
        raise SegzooError(
            f"{maker.name} gives heatmaps of keypoints, not classes; call segzoo.predict_keypoints(model, image)"
        )
    _say_weights_state(model, maker)
    return maker


def pose_maker(model: nn.Module | ScoreMaker) -> ScoreMaker:
    """`score_maker` where keypoints are wanted; of a model that can only guess it is said, once.

    Raises:
        SegzooError: it gives no heatmaps.
    """
    maker = score_maker(model)
    if maker.upscaler.score_kind != "heatmap":
        raise SegzooError(f"{maker.name} is no keypoint model; segzoo.list_models('*_keypoints*') lists them")
    _say_weights_state(model, maker)
    return maker


def _say_weights_state(model: object, maker: ScoreMaker) -> None:
    """Warn once a model, through logging, that what it finds means nothing."""
    if maker.weights_state == "pretrained" or model in _warned:
        return
    _warned.add(model)
    what = "all weights are" if maker.weights_state == "untrained" else "the classifier is"
    _log.warning(
        "%s: %s as drawn at random, so what it finds means nothing; give it weights with create_model(..., "
        "pretrained=True) or load_weights, or if you have trained it, set model.weights_state = 'pretrained'",
        maker.name,
        what,
    )
