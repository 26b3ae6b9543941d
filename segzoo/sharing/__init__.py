"""Sharing models: a folder that `create_model` restores, official checkpoints turned into one, and the only upload."""

from .card import model_card
from .converting import ConversionReport, convert
from .saving import save_pretrained
from .uploading import Published, publish, push_to_hub

__all__ = ["ConversionReport", "Published", "convert", "model_card", "publish", "push_to_hub", "save_pretrained"]
