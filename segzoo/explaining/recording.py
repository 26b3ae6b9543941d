"""What one attention layer did in a forward pass, recorded from outside, so that no layer knows of it.

The protocol that a layer follows anyway: it owns a `KeyValueReduction` and, if its queries can be reduced, a
`QueryReduction`, which are called with maps; it calls torch's fused attention once, with the tokens that these leave;
and it returns a map. Hooks see the maps, and a mode of torch the arguments of the attention, from which its weights are
computed again for the queries that are asked for.

Shape letters: B batch, C channels, H, W map, L heads, D channels of a head, N query tokens, M key and value tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._errors import SegzooError
from ..layers.reduction import KeyValueReduction, QueryReduction
from ..models.segmenter import SegmentationModel


@dataclasses.dataclass(frozen=True)
class Record:
    """One attention of one image."""

    queries: Tensor  # (L, N, D)
    keys: Tensor  # (L, M, D)
    scale: float  # of their products
    query_of: Tensor  # (H, W) number of the query token that each position of the queries' map went into
    key_of: Tensor  # (H, W) the same of keys and values, on their own map; -1 for positions that a pool leaves out
    output: Tensor  # (H, W, C) what the layer returned

    def weights(self, tokens: Sequence[int]) -> Tensor:
        """The attention of some query tokens to every position of the keys' map: (tokens, H, W), each summing to 1.

        Mean over the heads. Where a token stands for several positions, they share its weight.
        """
        scores_LNM = self.queries[:, list(tokens)] @ self.keys.transpose(-2, -1) * self.scale
        weights_NM = scores_LNM.softmax(dim=-1).mean(dim=0)
        taken_HW = self.key_of >= 0
        count_M = torch.bincount(self.key_of[taken_HW], minlength=weights_NM.shape[1]).clamp(min=1)
        shared_NM = weights_NM / count_M
        return shared_NM[:, self.key_of.clamp(min=0)] * taken_HW


class _FusedCalls(TorchFunctionMode):
    """The arguments of each call of the fused attention while `watching`."""

    def __init__(self) -> None:
        super().__init__()
        self.watching = False
        self.calls: list[tuple[Tensor, Tensor, float | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.watching and func is F.scaled_dot_product_attention:
            self.calls.append((args[0], args[1], kwargs.get("scale")))
        return func(*args, **kwargs)


def record(model: SegmentationModel, attention: nn.Module, x_BCHW: Tensor) -> tuple[Record, Any]:
    """Run a segmentation model, in eval mode, on one image.

    Returns:
        what `attention`, one of its modules, did, and the head's output.

    Raises:
        SegzooError: the layer does not follow the protocol.
    """
    kv_leaf = _leaf(attention, KeyValueReduction)
    q_leaf = _leaf(attention, QueryReduction)
    seen: dict[str, Tensor] = {}
    mode = _FusedCalls()

    def enter(module: nn.Module, args: Any) -> None:
        mode.watching = True
        seen["input"] = args[0]

    def leave(module: nn.Module, args: Any, output: Tensor) -> None:
        mode.watching = False
        seen["output"] = output

    def keep(name: str) -> Any:
        return lambda module, args, output: seen.update({name: args[0]})

    with contextlib.ExitStack() as hooks, torch.no_grad():
        hooks.enter_context(_hook(attention.register_forward_pre_hook(enter)))
        hooks.enter_context(_hook(attention.register_forward_hook(leave)))
        hooks.enter_context(_hook(kv_leaf.register_forward_hook(keep("keys"))))
        if q_leaf is not None:
            hooks.enter_context(_hook(q_leaf.register_forward_hook(keep("queries"))))
        with mode:
            head_output = model.forward_head(model.forward_features(x_BCHW))
        if len(mode.calls) != 1:
            raise SegzooError(
                f"site {kv_leaf.site}: its layer has {len(mode.calls)} attentions, not one; choose another"
            )
        q, k, scale = mode.calls[0]
        queries_BHWC = seen.get("queries", seen["input"])
        H, W = queries_BHWC.shape[1:3]
        query_of_BHW = (
            torch.arange(H * W, device=q.device).view(1, H, W) if q_leaf is None else q_leaf.assignment(queries_BHWC)
        )
        return Record(
            queries=q[0].float(),
            keys=k[0].float(),
            scale=1 / math.sqrt(q.shape[-1]) if scale is None else scale,
            query_of=query_of_BHW[0],
            key_of=kv_leaf.assignment(seen["keys"])[0],
            output=seen["output"][0].float(),
        ), head_output


@contextlib.contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def _leaf(attention: nn.Module, kind: type) -> Any:
    return next((leaf for leaf in attention.children() if isinstance(leaf, kind)), None)
