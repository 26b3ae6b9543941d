"""torch.hub entry points: one for every name in segzoo's registry.

    torch.hub.load("OWNER/segzoo", "edaformer_t", pretrained=True)

Each takes the arguments of `segzoo.create_model` after the name.
"""

dependencies = ["torch", "timm", "safetensors", "huggingface_hub", "numpy", "PIL"]

# Names with an underscore are no entry points of torch.hub.
from segzoo.zoo import list_models as _list_models  # noqa: E402
from segzoo.zoo import model_entrypoint as _model_entrypoint  # noqa: E402

globals().update({name: _model_entrypoint(name) for name in _list_models(["*", "test_*"])})
