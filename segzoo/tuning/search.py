"""Plans out of tables: of every group one option, so that the cost keeps to a budget and the change is small.

Pure arithmetic on numbers that add up over groups; nothing here knows a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple


class Price(NamedTuple):
    """What an option of a group costs and how much it changes; the first option of a group changes nothing."""

    cost: float
    weight: float


Groups = Sequence[Sequence[Price]]
Choice = tuple[int, ...]  # index of the option of every group


def total(groups: Groups, choice: Choice) -> Price:
    prices = [options[index] for options, index in zip(groups, choice, strict=True)]
    return Price(sum(price.cost for price in prices), sum(price.weight for price in prices))


def floor(groups: Groups) -> Choice:
    """The cheapest choice, and of those the one with the least change."""
    return tuple(min(range(len(options)), key=lambda index: options[index]) for options in groups)


def choose(groups: Groups, budget: float) -> Choice | None:
    """A choice within the budget with little change: greedy, then refined. None if even the floor is beyond it."""
    if total(groups, floor(groups)).cost > budget:
        return None
    return refined(groups, greedy(groups, budget), budget)


def greedy(groups: Groups, budget: float) -> Choice:
    """From no reduction on, always the move that saves most per change, until the budget is kept."""
    choice = tuple(0 for _ in groups)
    while total(groups, choice).cost > budget:

        def gain(move: tuple[int, int], choice: Choice = choice) -> tuple[float, float]:
            group, index = move
            now, then = groups[group][choice[group]], groups[group][index]
            saved, added = now.cost - then.cost, then.weight - now.weight
            return (saved / added if added > 0 else float("inf"), saved)

        group, index = max(_savings(groups, choice), key=gain)
        choice = (*choice[:group], index, *choice[group + 1 :])
    return choice


def refined(groups: Groups, choice: Choice, budget: float) -> Choice:
    """Better options for any one or two groups at a time, within the budget, until no pair can be bettered."""
    pairs = list(itertools.combinations(range(len(groups)), 2)) or [(0, 0)]
    best = total(groups, choice)
    while True:
        before = choice
        for first, second in pairs:
            for i, j in itertools.product(range(len(groups[first])), range(len(groups[second]))):
                other = list(choice)
                other[second], other[first] = j, i
                price = total(groups, tuple(other))
                if price.cost <= budget and (price.weight, price.cost) < (best.weight, best.cost):
                    choice, best = tuple(other), price
        if choice == before:
            return choice


def front(groups: Groups, points: int) -> list[Choice]:
    """Choices for as many budgets from no reduction to the floor, without those that another beats in both."""
    most, least = total(groups, tuple(0 for _ in groups)).cost, total(groups, floor(groups)).cost
    budgets = [most - (most - least) * index / (points - 1) for index in range(points - 1)] + [least]
    found = {choose(groups, budget): None for budget in budgets}
    choices = sorted((choice for choice in found if choice is not None), key=lambda choice: total(groups, choice))
    kept: list[Choice] = []
    for choice in reversed(choices):  # from the most expensive on
        while kept and total(groups, kept[-1]).weight >= total(groups, choice).weight:
            kept.pop()
        kept.append(choice)
    return kept


def _savings(groups: Groups, choice: Choice) -> Iterator[tuple[int, int]]:
    for group, options in enumerate(groups):
        for index, price in enumerate(options):
            if price.cost < options[choice[group]].cost:
                yield group, index
