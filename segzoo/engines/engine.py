"""What stands in a model's place: its contract, with the scores made by a runner.

A runner takes normalised images and gives the tensors of the head's output; there is one a kind of engine in
`runners.py`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._errors import SegzooError
from ..labels import generic_labels
from ..models.base import WeightsState
from ..models.rows import PretrainedCfg, label_set
from ..models.segmenter import SegmentationModel
from ..plans import Plan, current_plan

ENGINES = ("eager", "inductor", "onnxruntime", "openvino")
PRECISIONS = ("f32", "bf16")

# What an engine needs beside torch.
PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino",)}

# Precisions that an engine has not, with the reason.
UNSUPPORTED = {("onnxruntime", "bf16"): "onnxruntime computes no bfloat16 on the processor; use engine='openvino'"}

Runner = Callable[[Tensor], tuple[Tensor, ...]]


def missing_packages(engine: str) -> list[str]:
    """What the engine needs and is not installed; nothing of it is imported."""
    return [name for name in PACKAGES.get(engine, ()) if importlib.util.find_spec(name) is None]


def check_engine(engine: str, precision: str, threads: int | None) -> None:
    """Raises SegzooError for a combination that does not exist."""
    for option, value, valid in (("engine", engine, ENGINES), ("precision", precision, PRECISIONS)):
        if value not in valid:
            raise SegzooError(f"{option} must be one of {', '.join(valid)}, not {value!r}")
    if (engine, precision) in UNSUPPORTED:
        raise SegzooError(f"precision={precision!r} with engine={engine!r}: {UNSUPPORTED[engine, precision]}")
    if threads is None:
        return
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise SegzooError(f"threads must be a whole number of at least 1, not {threads!r}")
    if engine in ("eager", "inductor"):
        raise SegzooError(
            f"threads={threads} with engine={engine!r}: torch has one number for the whole process; call "
            "torch.set_num_threads"
        )


class Engine:
    """A model as an engine runs it; `segzoo.predict` takes it in the model's place, from any thread.

    The plan is the one that was in force when it was made, and is part of it: other reductions are other engines.

    Args:
        model: what the scores are of; its parameters are not used.
        runner: makes them.
        engine, precision: what `runner` is.
    """

    def __init__(self, model: SegmentationModel, runner: Runner, *, engine: str, precision: str):
        self.upscaler = model
        self.runner = runner
        self.engine = engine
        self.precision = precision
        self.name = model.name or type(model).__name__
        self.in_chans = model.in_chans
        self.num_classes = model.num_classes
        self.row = model.pretrained_cfg or PretrainedCfg()
        self.label_set = label_set(self.row, model.num_classes) or generic_labels(model.num_classes)
        self.weights_state: WeightsState = model.weights_state
        self.plan: Plan = current_plan(model)
        self.like = torch.empty(0)  # engines take float32 and convert it themselves

    def head_output(self, x_BCHW: Tensor) -> Any:
        """Normalised images, float32 on the CPU -> what the model's `forward_head` returns, float32 on the CPU."""
        return self.upscaler.head_output_of(self.runner(x_BCHW), (x_BCHW.shape[2], x_BCHW.shape[3]))

    def set_inference_reduction(self, plan: object) -> Plan:
        """Refused: a plan is part of an engine."""
        raise SegzooError(
            f"the reduction of an engine is fixed ({self.plan}); set it on the model and call segzoo.compile again"
        )

    def __repr__(self) -> str:
        return f"Engine({self.name}, {self.engine}, {self.precision}, reduction={self.plan})"
