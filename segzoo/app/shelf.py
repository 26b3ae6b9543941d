"""Which models are at hand without fetching anything, and how to get the others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .._errors import SegzooError
from ..models.base import Model
from ..models.segmenter import SegmentationModel
from ..zoo.download import is_here
from ..zoo.index import SAVED_PREFIXES, known_models
from ..zoo.names import default_tag, get_pretrained_cfg, parse_name, rows_of
from ..zoo.options import trained_cfg
from ..zoo.recipe import blueprint, create_model


def names_here() -> list[str]:
    """`name.tag` of every model for masks whose weights come with the package or are in a cache, the former first.

    Names that are another one's weights with a reduction set are left out: the page sets it.
    """
    found = []
    for variant_name, listed in known_models().items():
        if listed.reduction is not None:
            continue
        for tag, row in rows_of(variant_name).items():
            name = f"{variant_name}.{tag}"
            if is_here(name, row, trained_cfg(variant_name, row)) and makes_masks(blueprint(name)):
                found.append((row.state != "bundled", name))
    return [name for _, name in sorted(found, key=lambda item: item[0])]


def makes_masks(model: Model) -> bool:
    return isinstance(model, SegmentationModel) and model.score_kind != "heatmap"


def fetch(name: str) -> None:
    """Get the weights of a model, if they are not here.

    Raises:
        SegzooError: no such name, or a model that makes no masks.
        WeightsError: weights that cannot be had.
    """
    if not makes_masks(create_model(full_name(name), pretrained=True)):
        raise SegzooError(how_to_get(full_name(name)))


def full_name(name: str) -> str:
    """The name with its tag, which for a variant alone is that of its default weights; a saved model's as it is.

    Raises:
        SegzooError: no such name; the message lists close ones.
    """
    if name.startswith(SAVED_PREFIXES):
        return name
    variant_name, tag = parse_name(name)
    tag = tag or default_tag(rows_of(variant_name))
    return f"{variant_name}.{tag}" if tag else variant_name


def find(name: str, offered: Sequence[str]) -> str:
    """The offered name that `name` stands for.

    Raises:
        SegzooError: it is none; the message says how to get it.
    """
    name = full_name(name.strip())
    if name not in offered:
        raise SegzooError(how_to_get(name))
    return name


def how_to_get(name: str) -> str:
    """A sentence for a name that is not offered."""
    start = f"`segzoo app --model {name}`"
    if name.startswith(SAVED_PREFIXES):
        return f"{name} is not offered here; it is if the page is started with {start}"
    if not makes_masks(blueprint(name)):
        return f"{name} makes no masks of classes, so there is nothing to show; choose a segmentation model"
    row = get_pretrained_cfg(name)
    if row is None:
        return f"{name} has no weights; train it, and start the page with `segzoo app --model local-dir:RUN`"
    if not row.loadable:
        return f"the weights of {name} are not published in a loadable form yet: {row.how_to_get}"
    size = "" if row.size is None else f"{row.size / 1e6:.0f} MB, "
    terms = ", not for commercial use" if row.commercial_use is False else ""
    return (
        f"the weights of {name} are not on this machine; {start} fetches them once ({size}licence: "
        f"{row.license}{terms}) and offers it here"
    )


def offer(wanted: Iterable[str], here: Iterable[str]) -> list[str]:
    """What the page offers: what was asked for, then what is here, each once."""
    return list(dict.fromkeys([*map(full_name, wanted), *here]))
