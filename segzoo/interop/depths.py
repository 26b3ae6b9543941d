"""How deep every parameter lies, as timm counts layers for layer-wise learning rates."""

from __future__ import annotations

from timm.models import group_parameters

from ..models.base import Model


def parameter_depths(model: Model) -> dict[str, int]:
    """Parameter name -> number of its layer from the input on, by the model's own `group_matcher`."""
    return group_parameters(model, model.group_matcher(coarse=False), reverse=True)
