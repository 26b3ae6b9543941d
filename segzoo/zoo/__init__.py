"""A name becomes a model: names and listing, recipe and assembly, config.json, checkpoints, downloads.

What is public is resolved on first use, so that names can be listed without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_weights
    from .index import list_models, list_pretrained
    from .names import model_info
    from .recipe import create_model

__all__ = ["create_model", "list_models", "list_pretrained", "load_weights", "model_info"]

_HOMES = {
    "create_model": "recipe",
    "list_models": "index",
    "list_pretrained": "index",
    "load_weights": "checkpoint",
    "model_info": "names",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'segzoo.zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
