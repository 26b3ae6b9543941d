"""The papers: one file a family, plus the contract (`base`), what a family registers, and its weights rows.

Importing registers every family.
"""

from . import edaformer, eft, mit, pvt, rtformer, rtformer_backbone, segformer, segvit, swin
from .base import Encoder, FeaturePyramid, Model, Pyramid
from .rows import PretrainedCfg
from .segmenter import SegmentationModel

__all__ = [
    "Encoder",
    "FeaturePyramid",
    "Model",
    "PretrainedCfg",
    "Pyramid",
    "SegmentationModel",
    "edaformer",
    "eft",
    "mit",
    "pvt",
    "rtformer",
    "rtformer_backbone",
    "segformer",
    "segvit",
    "swin",
]
