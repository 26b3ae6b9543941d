"""Official checkpoints turned into segzoo folders, every key accounted for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .._errors import SegzooError, WeightsError
from ..models.keys import Concat, Prefixed, StateDict
from ..zoo.checkpoint import find_layout, load_weights, read_tensors
from ..zoo.recipe import create_model
from .saving import save_with_row

Rule = Callable[[StateDict], StateDict]
Origins = dict[str, tuple[str, ...]]  # a name -> the official keys that it is made of


def convert(official_file: str | Path, name: str, directory: str | Path) -> ConversionReport:
    """Turn an official checkpoint into a segzoo folder, by the same strict rules as `load_weights`.

    Args:
        official_file: any file that `load_weights` reads.
        name: the weights row that the file is, "variant.tag".
        directory: as for `save_pretrained`. The row's published mIoU goes into the card.

    Raises:
        WeightsError: the file cannot be read or does not fit; nothing is written then.
    """
    if "." not in name:
        raise SegzooError(f"{name!r} names no weights; give variant.tag, see segzoo.list_pretrained({name + '*'!r})")
    model = create_model(name)
    row = model.pretrained_cfg
    assert row is not None  # a tag has a row
    load_weights(model, official_file)
    state = {key: torch.empty_like(tensor, device="meta") for key, tensor in read_tensors(official_file).items()}
    layout = find_layout(model, state)
    names, dropped = trace(state, layout.rules if layout else ())
    own = model.state_dict()
    _drop_surplus(names, dropped, own)
    save_with_row(model, Path(directory), row)
    return ConversionReport(
        file=str(official_file),
        name=name,
        directory=str(directory),
        layout=layout.name if layout else "segzoo",
        loaded={name: names[name] for name in own if name in names},
        dropped=dropped,
        defaulted=tuple(name for name in own if name not in names),
    )


def _drop_surplus(names: Origins, dropped: dict[str, str], own: StateDict) -> None:
    """Move the keys of what the model does not have from `names` to `dropped`."""
    for surplus in [name for name in names if name not in own]:
        dropped.update(dict.fromkeys(names.pop(surplus), "the classifier, which this model does not have"))


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What became of every key of an official checkpoint; `print` shows it key by key."""

    file: str
    name: str  # "variant.tag"
    directory: str
    layout: str  # of the file's names; "segzoo" for the model's own
    loaded: Origins  # the model's parameter -> the file's keys that it was made of
    dropped: dict[str, str]  # the file's key -> why the model has no use for it
    defaulted: tuple[str, ...]  # the model's buffers that the file lacks and that do not change its scores

    @property
    def renamed(self) -> Origins:
        return {name: keys for name, keys in self.loaded.items() if keys != (name,)}

    def to_dict(self) -> dict[str, Any]:
        counts = {"loaded": len(self.loaded), "renamed": len(self.renamed), "dropped": len(self.dropped)}
        return {**dataclasses.asdict(self), "counts": {**counts, "defaulted": len(self.defaulted)}}

    def __str__(self) -> str:
        lines = [f"{' + '.join(keys)} -> {name}" for name, keys in self.renamed.items()]
        lines += [f"{key} dropped: {why}" for key, why in self.dropped.items()]
        lines += [f"{name} not in the file: set to its initial value" for name in self.defaulted]
        return "\n".join(
            [
                *lines,
                f"{self.file} (layout: {self.layout}) -> {self.directory}: every key and shape of {self.name} checked; "
                f"{len(self.loaded)} loaded ({len(self.renamed)} of them renamed), {len(self.dropped)} dropped, "
                f"{len(self.defaulted)} not in the file",
            ]
        )


def trace(state: StateDict, rules: Sequence[Rule]) -> tuple[Origins, dict[str, str]]:
    """Follow every key through the rules: ({new name: the keys that it is made of}, {dropped key: why}).

    Raises:
        WeightsError: two keys become one.
    """
    origins: Origins = {key: (key,) for key in state}
    dropped: dict[str, str] = {}
    for rule in rules:
        made, gone = _trace_rule(state, rule)
        dropped.update({origin: why for key, why in gone.items() for origin in origins[key]})
        origins = {name: tuple(origin for key in keys for origin in origins[key]) for name, keys in made.items()}
        state = rule(state)
    return origins, dropped


def _trace_rule(state: StateDict, rule: Rule) -> tuple[Origins, dict[str, str]]:
    if isinstance(rule, Prefixed):
        return _trace_prefixed(state, rule)
    if isinstance(rule, Concat):
        return _trace_concat(state, rule), {}
    return _trace_each(state, rule)


def _trace_prefixed(state: StateDict, rule: Prefixed) -> tuple[Origins, dict[str, str]]:
    inside = {key.removeprefix(rule.prefix): state[key] for key in state if key.startswith(rule.prefix)}
    names, gone = trace(inside, rule.rules)
    made = {rule.new_prefix + name: tuple(rule.prefix + key for key in keys) for name, keys in names.items()}
    made.update({key: (key,) for key in state if not key.startswith(rule.prefix)})
    return made, {rule.prefix + key: why for key, why in gone.items()}


def _trace_concat(state: StateDict, rule: Concat) -> Origins:
    after = rule(state)
    made: Origins = {key: (key,) for key in after if key in state}
    for pattern in rule.patterns:
        for key in state.keys() - after.keys():
            if re.search(pattern, key):
                name = re.sub(pattern, rule.replacement, key)
                made[name] = (*made.get(name, ()), key)
    return made


def _trace_each(state: StateDict, rule: Any) -> tuple[Origins, dict[str, str]]:
    """A rule that treats every key by itself; one that leaves keys out says `why`."""
    made: Origins = {}
    gone: dict[str, str] = {}
    for key, tensor in state.items():
        names = rule({key: tensor})
        if not names:
            gone[key] = rule.why
        for name in names:
            if name in made:
                raise WeightsError(f"the keys {made[name][0]} and {key} both become {name}; one of them is too many")
            made[name] = (key,)
    return made, gone
