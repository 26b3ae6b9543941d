"""torch.hub from a local directory: the same models as create_model, light dependencies, helpful texts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import segzoo

ROOT = str(Path(__file__).parents[1])


def hubconf():
    spec = importlib.util.spec_from_file_location("hubconf", f"{ROOT}/hubconf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_name_is_an_entry_point():
    module = hubconf()
    entry_points = [name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")]
    assert sorted(entry_points) == sorted(segzoo.list_models())  # as torch.hub.list finds them
    assert "4,929,914 parameters" in module.edaformer_t.__doc__


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
    assert set(hubconf().dependencies) == {"torch", "timm", "safetensors", "huggingface_hub", "numpy", "PIL"}
