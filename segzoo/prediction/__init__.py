"""From an image to a Segmentation or a Pose: what runs (`makers`), how it looks (`protocol`, `viewing`, `sliding`), and
the walks themselves (`segmenting`, `posing`).
"""

from .makers import ScoreMaker, mask_maker, pose_maker, score_maker
from .posing import pose_many, predict_keypoints
from .protocol import Protocol, protocol_of
from .segmenting import predict, segment_many, segment_one
from .sliding import slide_strips, strip_windows, windows
from .viewing import AVERAGED, OnLook, views

__all__ = [
    "AVERAGED",
    "OnLook",
    "Protocol",
    "ScoreMaker",
    "mask_maker",
    "pose_maker",
    "pose_many",
    "predict",
    "predict_keypoints",
    "protocol_of",
    "score_maker",
    "segment_many",
    "segment_one",
    "slide_strips",
    "strip_windows",
    "views",
    "windows",
]
