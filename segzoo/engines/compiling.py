"""`segzoo.compile`: a model in this process becomes an engine."""

from __future__ import annotations

import torch
from torch import nn

from .._errors import SegzooError
from ..folding import fold
from ..models.segmenter import SegmentationModel
from ..twins import eval_twin
from .engine import Engine, Runner, check_engine
from .forms import HeadForm, plain_twin
from .runners import InductorRunner, OnnxRunners, OpenVINORunners, eager_runner

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def compile(model: nn.Module, engine: str = "openvino", precision: str = "f32", threads: int | None = None) -> Engine:
    """What `segzoo.predict` takes in place of a model, run by an engine on the processor.

    The model is folded, and the reduction that is in force now is part of the engine. Images of any size and number are
    taken: the first few sizes are compiled each for itself, further ones share a dynamic form.

    >>> import numpy as np, segzoo
    >>> model = segzoo.create_model("test_segformer")
    >>> engine = segzoo.compile(model, engine="eager")
    >>> segzoo.predict(engine, np.zeros((64, 96, 3), np.uint8)).mask.shape
    (64, 96)

    Args:
        model: a segmentation model in float32 on the CPU, in any mode; it is copied and never touched.
        engine: "openvino" (extra `openvino`), "onnxruntime" (extra `onnx`), "inductor" (torch.compile), or "eager".
        precision: "f32", or "bf16": matrix products in bfloat16, which changes some pixels; `segzoo certify` says how
            many.
        threads: of onnxruntime and openvino; default: all cores.

    Raises:
        SegzooError: an engine, or a precision of it, that does not exist, a package that is not installed, or a model
            that is no such model.
    """
    check_engine(engine, precision, threads)
    source = segmenter_of(model)
    return Engine(
        eval_twin(source), make_runner(source, engine, precision, threads), engine=engine, precision=precision
    )


def make_runner(
    model: SegmentationModel,
    engine: str,
    precision: str,
    threads: int | None = None,
    form: type[HeadForm] = HeadForm,
) -> Runner:
    """The runner of one form of a model."""
    if engine == "eager":
        return eager_runner(form(fold(eval_twin(model))), dtype=DTYPES[precision])
    plain = form(plain_twin(model))
    if engine == "inductor":
        return InductorRunner(plain, dtype=DTYPES[precision])
    if engine == "onnxruntime":
        return OnnxRunners(plain, threads=threads)
    return OpenVINORunners(plain, precision=precision, threads=threads)


def segmenter_of(model: nn.Module) -> SegmentationModel:
    """A model that an engine can be made of. Raises SegzooError."""
    if not isinstance(model, SegmentationModel):
        raise SegzooError(
            f"{type(model).__name__} is no segmentation model; segzoo.list_models() lists them, and of a compiled or "
            "wrapped model the original is needed"
        )
    places = {(tensor.device.type, tensor.dtype) for tensor in model.parameters()}
    if places != {("cpu", torch.float32)}:
        found = ", ".join(sorted(f"{dtype} on {device}" for device, dtype in places))
        raise SegzooError(
            f"engines are made of a model in float32 on the CPU, not of {found}; call model.float().cpu()"
        )
    return model
