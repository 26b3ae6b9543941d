"""What every option saves, exactly: the cost of one attention does not depend on what the others are set to."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..costing import cost
from ..layers.reduction import NEUTRAL, Entry
from ..plans import inference_reduction
from .candidates import Group

Passes = Counter[tuple[int, int]]  # (H, W) in pixels -> how often the model runs at that size


def option_macs(model: nn.Module, groups: Sequence[Group], passes: Passes) -> tuple[int, list[list[int]]]:
    """Multiply-accumulates over all passes: of the neutral model, and of every group's attention by option.

    The options of all groups are counted side by side, so that there are as many runs as the largest group has options.
    """
    total = 0
    macs = [[0] * len(group.options) for group in groups]
    for size, times in passes.items():
        for index in range(max(len(group.options) for group in groups)):
            chosen = [group.options[index if index < len(group.options) else 0] for group in groups]
            with inference_reduction(model, {site: entry for option in chosen for site, entry in option.items()}):
                counted = cost(model, size)
            total += times * counted.macs if index == 0 else 0
            for group, of_group in zip(groups, macs, strict=True):
                if index < len(group.options):
                    of_group[index] += times * counted.sites[group.sites[0]]
    return total, macs


def only_what_saves(groups: Sequence[Group], macs: Sequence[Sequence[int]]) -> tuple[list[Group], list[list[int]]]:
    """Without the entries that, alone at their site, save nothing, or no more than a gentler one of their kind that
    stands before them (as where a window has grown to the size of the map)."""
    kept_groups, kept_macs = [], []
    for group, costs in zip(groups, macs, strict=True):
        seen: set[Any] = set()
        useless: set[tuple[str, Entry]] = set()
        for option, of_option in zip(group.options, costs, strict=True):
            tried = [(site, entry) for site, entry in option.items() if entry != NEUTRAL]
            if len(tried) != 1:
                continue
            ((site, entry),) = tried
            kind = (site, type(entry), dataclasses.astuple(entry)[1:], of_option)
            if of_option >= costs[0] or kind in seen:
                useless.add((site, entry))
            seen.add(kind)
        kept = [index for index, option in enumerate(group.options) if not useless.intersection(option.items())]
        kept_groups.append(Group(group.sites, tuple(group.options[index] for index in kept)))
        kept_macs.append([costs[index] for index in kept])
    return kept_groups, kept_macs
