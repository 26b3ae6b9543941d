"""One file a family, plus the contract (`_base`), the registry, and the weights. Importing registers every family."""

from . import edaformer, eft, mit, rtformer, segformer, segvit
from ._base import Encoder, FeaturePyramid, Model, SegmentationModel
from ._checkpoint import load_weights
from ._pretrained import PretrainedCfg
from ._registry import create_model, list_models, list_pretrained, model_info

__all__ = [
    "Encoder",
    "FeaturePyramid",
    "Model",
    "PretrainedCfg",
    "SegmentationModel",
    "create_model",
    "edaformer",
    "eft",
    "list_models",
    "list_pretrained",
    "load_weights",
    "mit",
    "model_info",
    "rtformer",
    "segformer",
    "segvit",
]
