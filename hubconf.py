"""torch.hub entry points: one for every name in segzoo's registry.

    torch.hub.load("OWNER/segzoo", "edaformer_t", pretrained=True)

Each takes the arguments of `segzoo.create_model` after the name.
"""

import functools

dependencies = ["torch", "timm", "safetensors", "huggingface_hub", "numpy", "PIL"]

# Names with an underscore are no entry points of torch.hub.
from segzoo.zoo import create_model as _create_model  # noqa: E402
from segzoo.zoo import list_models as _list_models  # noqa: E402
from segzoo.zoo import list_pretrained as _list_pretrained  # noqa: E402
from segzoo.zoo.names import variant_of as _variant_of  # noqa: E402


def _entry_point(name):
    entry_point = functools.partial(_create_model, name)
    params = _variant_of(name).params  # from the table: torch.hub runs this file at every load, so it builds nothing
    size = f"{params:,} parameters" if params else "a tiny model for tests"
    tags = ", ".join(row.partition(".")[2] for row in _list_pretrained(f"{name}.*"))
    entry_point.__doc__ = (
        f"{name}, {size}.\n\nWeights: {tags or 'none'}.\n"
        "Arguments as of segzoo.create_model: pretrained, checkpoint_path, num_classes, in_chans, features_only, ...\n"
    )
    return entry_point


globals().update({name: _entry_point(name) for name in _list_models(["*", "test_*"])})
