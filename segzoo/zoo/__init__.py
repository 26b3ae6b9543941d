"""A name becomes a model: names and listing, recipe and assembly, config.json, checkpoints, downloads."""

from .. import models  # registers every family
from .checkpoint import load_weights
from .names import list_models, list_pretrained, model_info
from .recipe import create_model

__all__ = ["create_model", "list_models", "list_pretrained", "load_weights", "model_info", "models"]
