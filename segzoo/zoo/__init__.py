"""A name becomes a model: names and listing, recipe and assembly, config.json, checkpoints, downloads.

What is public is resolved on first use, so that names can be listed without torch. Every variant can be imported as its
factory: `from segzoo.zoo import edaformer_b`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_weights
    from .entrypoints import model_entrypoint
    from .index import is_model, list_models, list_modules, list_pretrained
    from .names import get_pretrained_cfg, model_info
    from .recipe import create_model

__all__ = [
    "create_model",
    "get_pretrained_cfg",
    "is_model",
    "list_models",
    "list_modules",
    "list_pretrained",
    "load_weights",
    "model_entrypoint",
    "model_info",
]

_HOMES = {
    "create_model": "recipe",
    "get_pretrained_cfg": "names",
    "is_model": "index",
    "list_models": "index",
    "list_modules": "index",
    "list_pretrained": "index",
    "load_weights": "checkpoint",
    "model_entrypoint": "entrypoints",
    "model_info": "names",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        if not name.startswith("_"):  # Python's own questions
            index = importlib.import_module(".index", __name__)
            if name in index.known_models():
                return importlib.import_module(".entrypoints", __name__).model_entrypoint(name)
        raise AttributeError(f"module 'segzoo.zoo' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
