"""torch.hub from a local directory: the same models as create_model, light dependencies, helpful texts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import segzoo

ROOT = str(Path(__file__).parents[1])


def test_every_name_is_an_entry_point():
    names = torch.hub.list(ROOT, source="local")
    assert set(segzoo.list_models()) <= set(names)
    assert "4,929,914 parameters" in torch.hub.help(ROOT, "edaformer_t", source="local")


@pytest.mark.parametrize(("name", "options"), [("edaformer_t", {"pretrained": True}), ("test_eft", {"num_classes": 3})])
def test_load_equals_create_model(name, options):
    torch.manual_seed(0)
    loaded = torch.hub.load(ROOT, name, source="local", **options)
    torch.manual_seed(0)
    created = segzoo.create_model(name, **options)
    assert loaded.name == created.name
    for (key, a), b in zip(loaded.state_dict().items(), created.state_dict().values(), strict=True):
        assert torch.equal(a, b), key


def test_dependencies_are_the_packages_own():
    spec = importlib.util.spec_from_file_location("hubconf", f"{ROOT}/hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert set(module.dependencies) == {"torch", "timm", "safetensors", "huggingface_hub", "numpy", "PIL"}
