"""The golden numbers of the official models and the rule that makes their weights. See `tests/golden/README.md`."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"


def golden_json(name: str) -> dict:
    """A missing golden file fails: it must never turn a proof into a skip."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays}


def golden_tensor(key: str, shape: list[int]) -> torch.Tensor:
    """The rule that draws weights: the float64 tensor of an official key, which decides by itself what it holds."""
    value = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape)
    if key.endswith(("running_var", "_variance")):
        value = 0.5 + np.abs(value) * 0.5
    elif key.endswith(("running_mean", "_mean")):
        value = 0.1 * value
    elif key.endswith("num_batches_tracked"):
        return torch.tensor(0)
    elif key.endswith("criterion.empty_weight"):
        value = np.ones(shape)
        value[-1] = 0.1
    elif len(shape) <= 1:
        value = 1 + 0.1 * value if key.endswith("weight") else 0.05 * value
    else:
        value = value / math.sqrt(math.prod(shape[1:]))
    return torch.from_numpy(np.asarray(value))


def golden_state_dict(manifest: list) -> dict[str, torch.Tensor]:
    """Deterministic float64 weights for a list of [key, shape]."""
    return {key: golden_tensor(key, shape) for key, shape in manifest}


def golden_input(shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(0)).standard_normal(shape))
