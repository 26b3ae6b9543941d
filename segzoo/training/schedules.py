"""The optimizer of a recipe, and its learning rate at every step."""

from __future__ import annotations

import math
from typing import Any

import torch

from .._errors import SegzooError
from ..models.base import Model
from .recipes import Recipe


def learning_rate(recipe: Recipe, step: int, base: float) -> float:
    """At a step counted from 0, of parameters whose learning rate is `base`, as mmsegmentation 0.x defines it: the
    schedule runs from the first step on, and the warm-up multiplies it by a factor from `warmup_ratio` up to 1."""
    share = step / recipe.steps
    if recipe.schedule == "poly":
        left = (1 - share) ** recipe.power
    elif recipe.schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * share))
    else:
        left = 1.0
    rate = recipe.min_lr + (base - recipe.min_lr) * left
    if step < recipe.warmup_steps:
        rate *= 1 - (1 - step / recipe.warmup_steps) * (1 - recipe.warmup_ratio)
    return rate


def make_optimizer(model: Model, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW or SGD with the model's parameter groups, whose "base_lr" `set_learning_rate` follows."""
    groups = model.param_groups(
        lr=recipe.lr, weight_decay=recipe.weight_decay, head_lr_multiplier=recipe.head_lr_multiplier
    )
    if recipe.layer_decay is not None:
        groups = _by_depth(model, groups, recipe.layer_decay)
    if not groups:
        raise SegzooError(f"{model.name} has no parameter that learns")
    groups = [{**group, "base_lr": group["lr"]} for group in groups]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> float:
    """Give every group its learning rate of this step; returns that of the first."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, step, group["base_lr"])
    return optimizer.param_groups[0]["lr"]


def _by_depth(model: Model, groups: list[dict[str, Any]], decay: float) -> list[dict[str, Any]]:
    """Every group parted by the depth of its parameters: one layer down learns `decay` times as fast."""
    from ..interop.depths import parameter_depths

    depths = parameter_depths(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    last = max(depths.values())
    parted: dict[tuple[str, int], dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            depth = depths[names[id(parameter)]]
            key = (group["name"], depth)
            if key not in parted:
                lr = group["lr"] * decay ** (last - depth)
                parted[key] = {**group, "name": f"{group['name']}_{depth}", "params": [], "lr": lr}
            parted[key]["params"].append(parameter)
    return list(parted.values())
