"""Time and memory of a forward pass, measured where the model is, and time on an engine."""

from __future__ import annotations

import dataclasses
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..models.segmenter import SegmentationModel
from ..plans import Plan, inference_reduction
from ..prediction import ScoreMaker, score_maker

WARM_UPS, REPEATS = 2, 7
ENGINE_SIZES = 4  # image sizes at most for which an engine compiles every plan

Inputs = Sequence[tuple[Tensor, int]]  # normalised image (1, C, H, W), and how often it counts


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What `segzoo.compile` takes beside the model."""

    engine: str
    precision: str
    threads: int | None


class Latency:
    """Milliseconds of a forward pass without reduction and with a plan, in rounds that alternate between the two, so
    that what else the machine does meets both.

    A pass is from normalised images to the scores at the decoder's resolution: of each input the median of several
    runs, and of these the mean, weighted by how often each counts. What decodes images and makes masks of scores is not
    in it. Every plan is made (on an engine: compiled) and measured once, and at most two are kept at a time.

    Args:
        maker_of: what runs a plan.
        inputs: at least one.
    """

    def __init__(self, maker_of: Callable[[Plan], ScoreMaker], inputs: Inputs):
        self.maker_of, self.inputs = maker_of, inputs
        self.neutral = maker_of(Plan())
        self.found: dict[str, tuple[float, float]] = {}

    def __call__(self, plan: Plan) -> tuple[float, float]:
        """Milliseconds without reduction, and with the plan."""
        key = plan.to_json()
        if key not in self.found:
            self.found[key] = self._measure(self.neutral if plan.is_neutral else self.maker_of(plan))
        return self.found[key]

    @torch.inference_mode()
    def _measure(self, maker: ScoreMaker) -> tuple[float, float]:
        makers = (self.neutral,) if maker is self.neutral else (self.neutral, maker)
        total = np.zeros(len(makers))
        for x_BCHW, times_it_counts in self.inputs:
            rounds = [[_seconds(maker, x_BCHW) for maker in makers] for _ in range(WARM_UPS + REPEATS)]
            total += times_it_counts * np.median(rounds[WARM_UPS:], axis=0)
        milliseconds = 1000 * total / sum(times_it_counts for _, times_it_counts in self.inputs)
        return float(milliseconds[0]), float(milliseconds[-1])


class Memory:
    """Megabytes of a forward pass without reduction and with a plan, as `memory_mb` counts them.

    Args:
        model: one that nobody else uses meanwhile, without reduction; it gets plans and is neutral again after each.
    """

    def __init__(self, model: SegmentationModel, inputs: Inputs):
        self.model, self.inputs = model, inputs
        self.neutral = memory_mb(model, inputs)

    def __call__(self, plan: Plan) -> tuple[float, float]:
        with inference_reduction(self.model, plan):
            return self.neutral, memory_mb(self.model, self.inputs)


@torch.inference_mode()
def memory_mb(model: SegmentationModel, inputs: Inputs) -> float:
    """Megabytes (10**6 bytes) of the tensors that are alive at the worst moment of a forward pass, weights and input
    included, of the largest of the inputs: on CUDA as its allocator says, elsewhere counted operator by operator, which
    leaves out what a single operator needs inside."""
    maker = score_maker(model)
    x_BCHW = max((x for x, _ in inputs), key=lambda x: x.numel())
    if x_BCHW.is_cuda:
        torch.cuda.reset_peak_memory_stats(x_BCHW.device)
        maker.head_output(x_BCHW)
        _finish(x_BCHW)
        return torch.cuda.max_memory_allocated(x_BCHW.device) / 1e6
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), x_BCHW))
    with LiveBytes() as live:
        maker.head_output(x_BCHW)
    return (held + live.peak) / 1e6


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operators make while it is on, and of those alive at a time the most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.holders: Counter[int] = Counter()  # address of a storage -> tensors that hold it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._hold(leaf, given)
        self.peak = max(self.peak, self.now)
        return result

    def _hold(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if self.holders[address] == 0:
            if address in given:  # a view of the input or of a weight
                return
            self.now += size
        self.holders[address] += 1
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self.holders[address] -= 1
        if self.holders[address] == 0:
            self.now -= size


def _seconds(maker: ScoreMaker, x_BCHW: Tensor) -> float:
    _finish(x_BCHW)
    start = time.perf_counter()
    maker.head_output(x_BCHW)
    _finish(x_BCHW)
    return time.perf_counter() - start


def _finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
