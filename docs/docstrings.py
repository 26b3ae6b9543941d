"""Griffe extension for the site: what segzoo's docstrings and lazy packages need to be read as they are meant.

`segzoo` and `segzoo.zoo` resolve public names on first use, by a table `_HOMES` of name -> module below them; it is
read as it stands in the source. Examples (`>>>`) become blocks of code, and arguments that a docstring describes
together ("crop, stride: ...") are described each.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Container
from typing import Any

import griffe

TABLE = "_HOMES"
EXAMPLE = re.compile(r"^([ \t]*)>>>.*(?:\n\1(?=\S).*)*", flags=re.MULTILINE)  # up to an empty line
TOGETHER = re.compile(r"^([ \t]+)(\w+(?:, \w+)+)(:.*(?:\n\1[ \t]+.*)*)", flags=re.MULTILINE)


def with_blocks(text: str) -> str:
    """A docstring with its examples fenced."""
    return EXAMPLE.sub(r"\1```pycon\n\g<0>\n\1```", text)


def one_by_one(text: str, parameters: Container[str]) -> str:
    """A docstring with an entry for each of the arguments that it describes together."""

    def replace(match: re.Match[str]) -> str:
        margin, names, description = match.groups()
        if not all(name in parameters for name in names.split(", ")):
            return match[0]
        return "\n".join(f"{margin}{name}{description}" for name in names.split(", "))

    return TOGETHER.sub(replace, text)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            parameters = {p.name for p in obj.parameters} if isinstance(obj, griffe.Function | griffe.Class) else set()
            obj.docstring.value = one_by_one(with_blocks(obj.docstring.value), parameters)

    def on_module(self, *, mod: griffe.Module, **kwargs: Any) -> None:
        table = mod.members.get(TABLE)
        if isinstance(table, griffe.Attribute):
            for name, home in ast.literal_eval(str(table.value)).items():
                mod.set_member(name, griffe.Alias(name, f"{mod.path}.{home}.{name}", parent=mod))
