"""What may be set where: the entries that are tried at each site, in groups whose costs do not depend on each other."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

from .._errors import SegzooError
from ..layers.reduction import NEUTRAL, Entry, Reduction, entry_to_text, parse_entry
from ..plans import resolve_plan

Option = dict[str, Entry]  # site -> entry, one for every site of a group


@dataclasses.dataclass(frozen=True)
class Group:
    """The sites of one attention, whose queries and keys multiply, and every combination of their entries."""

    sites: tuple[str, ...]
    options: tuple[Option, ...]  # the first is neutral


def entries_by_site(
    sites: Mapping[str, Sequence[Reduction]],
    presets: Mapping[str, Mapping[str, Any]],
    entries: Sequence[object],
    queries: Sequence[object],
) -> dict[str, list[Entry]]:
    """What is tried at each site besides leaving it neutral, without repetition: what the caller gives, and what the
    model's presets say for it.

    Raises:
        SegzooError: an entry that no site takes.
    """
    of_presets = [resolve_plan(name, sites, presets) for name in presets]
    found: dict[str, list[Entry]] = {}
    taken: set[Entry] = set()
    for site, leaves in sites.items():
        given = [parse_entry(value) for value in (queries if leaves[0].side == "q" else entries)]
        given = [entry for entry in given if _takes(leaves, entry)]
        taken.update(given)
        tried = [*given, *(plan[site] for plan in of_presets)]
        found[site] = [entry for entry in dict.fromkeys(tried) if entry != NEUTRAL]
    _require_use(taken, sites, entries, queries)
    return found


def groups_of(sites: Mapping[str, Sequence[Reduction]], entries: Mapping[str, Sequence[Entry]]) -> list[Group]:
    """Sites of one part and level belong to the same attention layers."""
    members: dict[tuple[str, int], list[str]] = {}
    for site, leaves in sites.items():
        members.setdefault((leaves[0].part, leaves[0].level), []).append(site)
    groups = []
    for names in members.values():
        combinations = itertools.product(*([NEUTRAL, *entries[site]] for site in names))
        options = tuple(dict(zip(names, combination, strict=True)) for combination in combinations)
        groups.append(Group(sites=tuple(names), options=options))
    return groups


def _takes(leaves: Sequence[Reduction], entry: Entry) -> bool:
    try:
        for leaf in leaves:
            leaf.check(entry)
    except SegzooError:
        return False
    return True


def _require_use(
    taken: Set[Entry],
    sites: Mapping[str, Sequence[Reduction]],
    entries: Sequence[object],
    queries: Sequence[object],
) -> None:
    """Refuse every query entry that no site took, and the other entries where nothing was taken at all."""
    unused = [entry for entry in map(parse_entry, queries) if entry not in taken]
    if not taken and entries:
        unused += map(parse_entry, entries)
    if unused:
        text = ", ".join(map(entry_to_text, dict.fromkeys(unused)))
        raise SegzooError(f"no site of this model takes {text}; its sites: {', '.join(sites)}")
