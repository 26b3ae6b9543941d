"""Time and memory of a forward pass, measured where the model is."""

from __future__ import annotations

import statistics
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..models.segmenter import SegmentationModel
from ..prediction import score_maker

WARM_UPS, REPEATS = 2, 7


@torch.inference_mode()
def latency_ms(model: SegmentationModel, inputs: Sequence[tuple[Tensor, int]]) -> float:
    """Milliseconds from normalised images to the scores at the decoder's resolution: of each input (1, C, H, W) the
    median of several runs, and of these the mean, weighted by how often each counts. What decodes images and makes
    masks of scores is not in it."""
    maker = score_maker(model)
    weighted = 0.0
    for x_BCHW, times_it_counts in inputs:
        times = []
        for _ in range(WARM_UPS + REPEATS):
            _finish(x_BCHW)
            start = time.perf_counter()
            maker.head_output(x_BCHW)
            _finish(x_BCHW)
            times.append(time.perf_counter() - start)
        weighted += times_it_counts * statistics.median(times[WARM_UPS:])
    return 1000 * weighted / sum(times_it_counts for _, times_it_counts in inputs)


@torch.inference_mode()
def memory_mb(model: SegmentationModel, inputs: Sequence[tuple[Tensor, int]]) -> float:
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


def _finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
