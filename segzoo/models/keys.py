"""Key rules: official names of parameters to segzoo's own, as ordered data beside each family."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

StateDict = dict[str, Any]  # name -> Tensor


@dataclasses.dataclass(frozen=True)
class Rename:
    """Replace what `pattern` matches, as `re.sub` does; the replacement may be a function of the match."""

    pattern: str
    replacement: str | Callable[[re.Match[str]], str]

    def __call__(self, state: StateDict) -> StateDict:
        substitute = re.compile(self.pattern).sub
        return {substitute(self.replacement, key): tensor for key, tensor in state.items()}


@dataclasses.dataclass(frozen=True)
class Drop:
    """Leave out keys that the forward pass never uses; `why` names the reason."""

    pattern: str
    why: str

    def __call__(self, state: StateDict) -> StateDict:
        return {key: tensor for key, tensor in state.items() if not re.search(self.pattern, key)}


@dataclasses.dataclass(frozen=True)
class Squeeze:
    """A 1x1 convolution's weight (out, in, 1, 1) becomes a Linear's (out, in)."""

    pattern: str

    def __call__(self, state: StateDict) -> StateDict:
        def squeeze(key: str, tensor: Tensor) -> Tensor:
            is_conv = re.search(self.pattern, key) and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
            return tensor[:, :, 0, 0] if is_conv else tensor

        return {key: squeeze(key, tensor) for key, tensor in state.items()}


@dataclasses.dataclass(frozen=True)
class Split:
    """Cut the tensors that `pattern` matches along their first axis; `pieces` gives each one's name and share."""

    pattern: str
    pieces: Sequence[tuple[str, int]]  # (replacement of the match, parts of the whole)

    def __call__(self, state: StateDict) -> StateDict:
        result: StateDict = {}
        shares = [share for _, share in self.pieces]
        for key, tensor in state.items():
            if not re.search(self.pattern, key) or len(tensor) % sum(shares):
                result[key] = tensor
                continue
            unit = len(tensor) // sum(shares)
            parts = tensor.split([unit * share for share in shares])
            for (replacement, _), part in zip(self.pieces, parts, strict=True):
                result[re.sub(self.pattern, replacement, key)] = part
        return result


@dataclasses.dataclass(frozen=True)
class Concat:
    """Join tensors along their first axis: what `patterns` match, in their order, under one name.

    Where one of them is missing, the others stay as they are and the strict check names them.
    """

    patterns: Sequence[str]
    replacement: str

    def __call__(self, state: StateDict) -> StateDict:
        groups = self._groups(state)
        whole = {name: keys for name, keys in groups.items() if len(keys) == len(self.patterns)}
        used = {key for keys in whole.values() for key in keys}
        joined = {name: torch.cat([state[key] for key in keys]) for name, keys in whole.items()}
        return {**{key: tensor for key, tensor in state.items() if key not in used}, **joined}

    def _groups(self, state: StateDict) -> dict[str, list[str]]:
        """What matches: the joined name -> names in the order of the patterns."""
        groups: dict[str, list[str]] = {}
        for pattern in self.patterns:
            for key in state:
                if re.search(pattern, key):
                    groups.setdefault(re.sub(pattern, self.replacement, key), []).append(key)
        return groups


@dataclasses.dataclass(frozen=True)
class Prefixed:
    """Apply rules to the keys under one prefix, seen without it; their results go under another prefix."""

    prefix: str
    new_prefix: str
    rules: Sequence[Callable[[StateDict], StateDict]]

    def __call__(self, state: StateDict) -> StateDict:
        inside = {key[len(self.prefix) :]: tensor for key, tensor in state.items() if key.startswith(self.prefix)}
        outside = {key: tensor for key, tensor in state.items() if not key.startswith(self.prefix)}
        return {**{self.new_prefix + key: tensor for key, tensor in apply_rules(inside, self.rules).items()}, **outside}


@dataclasses.dataclass(frozen=True)
class Layout:
    """An official way to name a family's parameters. `signature` matches some key of it and of no other layout."""

    name: str
    signature: str
    rules: Sequence[Callable[[StateDict], StateDict]]

    def matches(self, state: Mapping[str, Any]) -> bool:
        return any(re.search(self.signature, key) for key in state)


def apply_rules(state: StateDict, rules: Sequence[Callable[[StateDict], StateDict]]) -> StateDict:
    for rule in rules:
        state = rule(state)
    return state
