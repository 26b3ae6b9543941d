"""A factory a name: what `model_entrypoint`, `from segzoo.zoo import edaformer_b` and `torch.hub.load` give.

Made without torch; calling one loads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .._errors import SegzooError
from .index import known_models, list_modules, split_name

if TYPE_CHECKING:
    from ..models.base import FeaturePyramid, Model


def model_entrypoint(name: str, module_filter: str | None = None) -> Callable[..., Model | FeaturePyramid]:
    """The function that builds "variant"; the arguments are those of `segzoo.create_model` after the name.

    >>> import segzoo
    >>> segzoo.model_entrypoint("test_eft")(num_classes=3).num_classes
    3

    Args:
        name: a tag in it is left out, as in timm.
        module_filter: family that the name must belong to.

    Raises:
        SegzooError: no such variant (the message lists close ones), or one of another family.
    """
    models = known_models()
    variant, _ = split_name(name, {known: model.rows for known, model in models.items()})
    family = models[variant].family
    if module_filter not in (None, family):
        raise SegzooError(
            f"{variant} belongs to {family}, not {module_filter!r}; families: {', '.join(list_modules())}"
        )
    return _factory(variant)


@functools.cache
def _factory(variant: str) -> Callable[..., Model | FeaturePyramid]:
    def build(pretrained: bool = False, **options: Any) -> Model | FeaturePyramid:
        from .recipe import create_model

        return create_model(variant, pretrained, **options)

    model = known_models()[variant]
    size = f"{model.params:,} parameters" if model.params else "a tiny model for tests"
    build.__name__ = build.__qualname__ = variant
    build.__module__ = "segzoo.zoo"  # where it can be imported from
    build.__doc__ = (
        f"{variant}, {size}.\n\nWeights: {', '.join(model.rows) or 'none'}.\n"
        "Arguments as of segzoo.create_model: pretrained, checkpoint_path, num_classes, in_chans, features_only, ...\n"
    )
    return build
