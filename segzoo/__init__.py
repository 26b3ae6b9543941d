"""segzoo: a model zoo of efficient transformers for semantic segmentation.

The public names are resolved on first use, so that `import segzoo` loads no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from ._version import __version__

_HOMES = {
    "create_model": "zoo",
    "get_pretrained_cfg": "zoo",
    "is_model": "zoo",
    "list_models": "zoo",
    "list_modules": "zoo",
    "list_pretrained": "zoo",
    "load_weights": "zoo",
    "model_entrypoint": "zoo",
    "model_info": "zoo",
    "inference_reduction": "plans",
    "reduction_sites": "plans",
    "reduce": "interop.timm_reduction",
    "set_inference_reduction": "plans",
    "Pool": "layers.reduction",
    "OverlapPool": "layers.reduction",
    "Window": "layers.reduction",
    "Bipartite": "layers.reduction",
    "LocalGlobal": "layers.reduction",
    "EnergyProtected": "layers.reduction",
    "GridMerge": "layers.reduction",
    "Neighbour1d": "layers.reduction",
    "Neighbour2d": "layers.reduction",
    "cost": "costing",
    "compile": "engines",
    "export": "engines",
    "load_engine": "engines",
    "fold": "folding",
    "fit_reduction": "tuning",
    "explain": "explaining",
    "push_to_hub": "sharing",
    "save_pretrained": "sharing",
    "predict": "prediction",
    "predict_keypoints": "prediction",
    "Pose": "results",
    "Segmentation": "results",
    "SegzooError": "_errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'segzoo' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
