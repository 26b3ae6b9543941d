"""What a reduction plan may say (presets, JSON, refusals), and the walk that finds the leaves it speaks of.

`reduction_sites` finds leaves in any module tree; a plan gives an entry to each site. Nothing here knows a family.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ._errors import SegzooError
from .layers.reduction import (
    NEUTRAL,
    Entry,
    KeyValueReduction,
    Pool,
    Reduction,
    Window,
    entry_to_json,
    entry_to_text,
    parse_entry,
)

# Held while the entries of a model are set, or read together, so that no thread sees half of a plan.
plan_lock = threading.Lock()


class Plan(dict):
    """A plan as it is in force: site name -> entry, one for every site. Itself a valid plan."""

    def to_json(self) -> str:
        return json.dumps({site: entry_to_json(entry) for site, entry in self.items()})

    def __repr__(self) -> str:
        return "{" + ", ".join(f"{site}: {entry_to_text(entry)}" for site, entry in self.items()) + "}"

    @property
    def is_neutral(self) -> bool:
        return all(entry == NEUTRAL for entry in self.values())


def reduction_sites(model: nn.Module) -> dict[str, tuple[Reduction, ...]]:
    """Every site of a module tree with its leaves, in the order in which the data flows: {"encoder.0": (...), ...}.

    >>> import segzoo
    >>> list(segzoo.reduction_sites(segzoo.create_model("test_rtformer")))
    ['encoder.grid']
    """
    sites: dict[str, tuple[Reduction, ...]] = {}
    for module in model.modules():
        if isinstance(module, Reduction):
            sites[module.site] = sites.get(module.site, ()) + (module,)
    return sites


def set_inference_reduction(model: nn.Module, plan: object, *, during_training: bool = False) -> Plan:
    """Choose after training how many tokens attention sees, in any module tree that owns reduction leaves.

    >>> import segzoo
    >>> model = segzoo.create_model("test_eft")
    >>> segzoo.set_inference_reduction(model, {"encoder": (2, 2, 1, 1)})["encoder.1"]
    Pool(factor=2, kind='avg')
    >>> segzoo.set_inference_reduction(model, None).is_neutral
    True

    Args:
        plan: a preset's name; an int or entry for every key/value and grid site; a dict whose keys are parts
            ("encoder", "decoder", "encoder.q") with one entry per level or one for all, or single sites
            ("encoder.2", "encoder.2.q"), which win over their part; the JSON text of such a dict; EDAFormer's own
            notation "[16,8,2,1]-[2,4,8]", the sides of all pooled windows, for models trained with windows; or None,
            which makes every site neutral and restores the trained model bit-exactly. Sites not named become neutral.
        during_training: also reduce in training mode, for fine-tuning with the reduction in place.

    Returns:
        The whole plan in force, one entry a site.

    Raises:
        SegzooError: a wrong preset, site, length or entry; lists the valid ones and leaves the model as it was.
    """
    sites = reduction_sites(model)
    resolved = resolve_plan(plan, sites, getattr(model, "reduction_presets", {}))
    with plan_lock:
        for site, leaves in sites.items():
            for leaf in leaves:
                leaf.entry, leaf.during_training = resolved[site], during_training and resolved[site] != NEUTRAL
    return resolved


@contextlib.contextmanager
def inference_reduction(model: nn.Module, plan: object, *, during_training: bool = False) -> Iterator[Plan]:
    """`with inference_reduction(model, plan):` sets a plan and restores what was set before on the way out.

    >>> import segzoo
    >>> model = segzoo.create_model("test_eft")
    >>> with segzoo.inference_reduction(model, "fast") as plan:
    ...     plan.is_neutral
    False
    >>> {leaf.entry for leaf in segzoo.reduction_sites(model)["encoder.0"]}
    {Pool(factor=1, kind='avg')}
    """
    leaves = [leaf for leaves in reduction_sites(model).values() for leaf in leaves]
    with plan_lock:
        before = [(leaf.entry, leaf.during_training) for leaf in leaves]
    try:
        yield set_inference_reduction(model, plan, during_training=during_training)
    finally:
        with plan_lock:
            for leaf, (entry, during) in zip(leaves, before, strict=True):
                leaf.entry, leaf.during_training = entry, during


def current_plan(model: nn.Module) -> Plan:
    """The plan that is set now (also while training mode makes it neutral)."""
    with plan_lock:
        return Plan((site, leaves[0].entry) for site, leaves in reduction_sites(model).items())


def resolve_plan(
    plan: object, sites: Mapping[str, Sequence[Reduction]], presets: Mapping[str, Mapping[str, Any]]
) -> Plan:
    """The form in force of any accepted form of a plan; raises SegzooError without having changed anything."""
    resolved = Plan((site, NEUTRAL) for site in sites)
    if isinstance(plan, str):
        plan = _parse_text(plan, sites, presets)
    if plan is None:
        return resolved
    if not sites:
        raise SegzooError("this model has no reduction sites: none of its attention layers owns a reduction leaf")
    try:
        resolved.update(_resolve_entries(plan, sites))
        for site, leaves in sites.items():
            for leaf in leaves:
                leaf.check(resolved[site])
    except SegzooError as error:
        hint = f"; presets: {', '.join(presets)}" if presets else ""
        raise SegzooError(f"reduction plan refused: {error}. Sites of this model: {', '.join(sites)}{hint}") from None
    return resolved


def _parse_text(
    text: str, sites: Mapping[str, Sequence[Reduction]], presets: Mapping[str, Mapping[str, Any]]
) -> object:
    if text in presets:
        return presets[text]
    if text.lstrip().startswith("["):
        return _parse_notation(text, sites)
    if text.lstrip().startswith("{") or text.strip().isdigit():
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            raise SegzooError(f"reduction plan refused: not valid JSON ({error}): {text[:200]}") from None
    names = ", ".join(presets) or "none for this model"
    raise SegzooError(
        f"reduction plan refused: no preset is called {text!r}; presets: {names}; or an int or a JSON dict"
    )


def _parse_notation(text: str, sites: Mapping[str, Sequence[Reduction]]) -> dict[str, Entry]:
    """EDAFormer's own notation "[16,8,2,1]-[2,4,8]": the side of every pooled window, level by level, encoder first.

    What is a multiple of the trained side is a `Pool` of that factor, what is none a `Window`.
    """
    parts = _trained_sides(sites)
    if not parts or any(max(sides.values()) == 1 for sides in parts.values()):
        raise SegzooError(
            f"reduction plan refused: {text!r} counts from trained pooling windows, which not every part of this model "
            "has; give a dict of entries a part, whose whole numbers are factors"
        )
    notation = "-".join(f"[{','.join(map(str, sides.values()))}]" for sides in parts.values())
    groups = _read_sides(text, [len(sides) for sides in parts.values()])
    if groups is None:
        raise SegzooError(
            f"reduction plan refused: {text!r} is not of the form {notation}, the windows this model was trained with"
        )
    entries: dict[str, Entry] = {}
    for sides, group in zip(parts.values(), groups, strict=True):
        for (site, trained), side in zip(sides.items(), group, strict=True):
            if side < trained:
                raise SegzooError(
                    f"reduction plan refused: {text!r} has a window of {side} where {site} was trained with {trained}; "
                    f"this model was trained with {notation}, and windows can only grow"
                )
            entries[site] = Window(side) if side % trained else Pool(side // trained)
    return entries


def _trained_sides(sites: Mapping[str, Sequence[Reduction]]) -> dict[str, dict[str, int]]:
    """Side of the trained window of every key/value site: part -> {site: side}, in the order of the levels."""
    leaves = [leaves[0] for leaves in sites.values() if isinstance(leaves[0], KeyValueReduction)]
    parts: dict[str, dict[str, int]] = {leaf.part: {} for leaf in leaves}
    for leaf in sorted(leaves, key=lambda leaf: leaf.level):
        parts[leaf.part][leaf.site] = leaf.trained
    return parts


def _read_sides(text: str, levels: list[int]) -> list[list[int]] | None:
    """The numbers of each bracket; None for other text, and for another number of brackets or of their levels."""
    is_notation = re.fullmatch(r"\s*\[[\d\s,-]+\](\s*-?\s*\[[\d\s,-]+\])*\s*", text)
    groups = [[int(side) for side in re.findall(r"\d+", group)] for group in re.findall(r"\[([^][]*)\]", text)]
    return groups if is_notation and [len(group) for group in groups] == levels else None


def _resolve_entries(plan: object, sites: Mapping[str, Sequence[Reduction]]) -> Iterator[tuple[str, Entry]]:
    if isinstance(plan, Mapping) and "type" not in plan:
        # Parts first, so that a single site wins over its part whatever the order of the keys.
        for key in sorted(plan, key=lambda key: key in sites):
            yield from _resolve_key(key, plan[key], sites)
    else:
        entry = parse_entry(plan)
        yield from ((site, entry) for site, leaves in sites.items() if leaves[0].side != "q")


def _resolve_key(key: object, value: object, sites: Mapping[str, Sequence[Reduction]]) -> Iterator[tuple[str, Entry]]:
    if isinstance(key, str) and key in sites:
        yield key, parse_entry(value)
        return
    part, _, side = str(key).partition(".")
    wanted = ("q",) if side == "q" else ("kv", "grid")
    covered = [site for site, leaves in sites.items() if leaves[0].part == part and leaves[0].side in wanted]
    covered.sort(key=lambda site: sites[site][0].level)
    if side not in ("", "q") or not covered:
        raise SegzooError(f"there is no part or site {key!r}")
    for site, item in zip(covered, _value_by_site(key, value, covered), strict=True):
        yield site, parse_entry(item)


def _value_by_site(key: object, value: object, covered: Sequence[str]) -> Sequence[object]:
    """The values of a list, which has one for each site that the key covers, or one value for all of them."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [value] * len(covered)
    if len(value) != len(covered):
        raise SegzooError(f"{key!r} has {len(covered)} levels ({', '.join(covered)}), but {len(value)} entries given")
    return value
