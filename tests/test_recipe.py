"""A name becomes a recipe, and a recipe a model: what is decided before anything is built."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import segzoo
from segzoo import SegzooError
from segzoo.zoo.recipe import Recipe, Request, assemble, resolve


def test_a_variant_is_drawn():
    recipe = resolve(Request(name="test_edaformer", options={"decoder_dim": 16}))
    assert (recipe.name, recipe.source, recipe.plan) == ("test_edaformer", None, None)
    assert recipe.cfg.decoder_dim == 16
    torch.manual_seed(0)
    drawn = assemble(recipe)
    torch.manual_seed(0)
    again = segzoo.create_model("test_edaformer", decoder_dim=16)
    assert all(map(torch.equal, drawn.state_dict().values(), again.state_dict().values()))


def test_a_tag_decides_the_classes_also_without_its_weights():
    recipe = resolve(Request(name="edaformer_t.ade20k"))
    assert (recipe.name, recipe.source, recipe.cfg.num_classes) == ("edaformer_t.ade20k", None, 150)
    assert recipe.row.dataset == "ade20k"
    assert resolve(Request(name="edaformer_t.ade20k", num_classes=7)).cfg.num_classes == 7


def test_pretrained_weights_keep_their_classes_until_they_are_loaded():
    recipe = resolve(Request(name="edaformer_t", pretrained=True, num_classes=3))
    assert recipe.name == "edaformer_t.scenes"
    assert Path(recipe.source.path).name == "edaformer_t.scenes.safetensors"
    assert (recipe.cfg.num_classes, recipe.num_classes) == (13, 3)
    assert assemble(recipe).num_classes == 3


def test_a_checkpoint_of_one_s_own(tmp_path):
    file = tmp_path / "weights.pth"
    torch.save(segzoo.create_model("test_edaformer", num_classes=5).state_dict(), file)
    recipe = resolve(Request(name="test_edaformer", checkpoint_path=file, num_classes=5))
    assert recipe.source.by_hand
    assert (recipe.source.path, recipe.cfg.num_classes) == (file, 5)
    assert all(map(torch.equal, assemble(recipe).state_dict().values(), torch.load(file).values()))


def test_a_saved_model_comes_with_its_plan(tmp_path):
    model = segzoo.create_model("test_edaformer", num_classes=4).half()
    model.set_inference_reduction({"encoder.0": 2}, during_training=True)
    segzoo.save_pretrained(model, tmp_path)
    recipe = resolve(Request(name=f"local-dir:{tmp_path}"))
    assert (recipe.name, recipe.config_file) == ("test_edaformer", tmp_path / "config.json")
    assert (recipe.cfg, recipe.during_training) == (model.cfg, True)
    assert recipe.plan["encoder.0"] == 2
    assert next(assemble(recipe).parameters()).dtype is torch.float16
    with pytest.raises(SegzooError, match=r"config.json: .*encoder.9"):
        assemble(dataclasses.replace(recipe, plan={"encoder.9": 2}))


def test_resolving_builds_nothing(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__init__", lambda *_, **__: pytest.fail("a module was made"))
    for request in (
        Request(name="edaformer_t", pretrained=True),
        Request(name="segvit_base.ade20k"),
        Request(name="test_mit", checkpoint_path="no.pth", num_classes=2),
    ):
        assert isinstance(resolve(request), Recipe)


def test_features_only_gives_the_encoder():
    pyramid = segzoo.create_model("test_edaformer", features_only=True, out_indices=(0, 2))
    assert [tuple(map_BCHW.shape[2:]) for map_BCHW in pyramid(torch.zeros(1, 3, 64, 64))] == [(16, 16), (4, 4)]
    with pytest.raises(SegzooError, match="out_indices needs features_only"):
        segzoo.create_model("test_edaformer", out_indices=(0,))


@pytest.mark.parametrize(
    ("overlay", "known"),
    [
        ({"hf_hub_id": "org/other"}, False),
        ({"hf_revision": "main"}, False),
        ({"mean": (0.5, 0.5, 0.5)}, True),
        ({"hf_hub_id": "org/other", "sha256": "a" * 64, "size": 7}, True),
    ],
)
def test_a_row_that_points_elsewhere_forgets_its_hash(overlay, known):
    """Size and hash belong to the file that the row named, unless others are given with the place."""
    row = resolve(Request(name="segformer_b0.nvidia_ade20k_512", overlay=overlay)).row
    assert (row.sha256 is not None, row.size is not None) == (known, known)
    assert row.sha256 == overlay.get("sha256", row.sha256)


def test_a_row_that_says_nowhere_is_refused():
    overlay = {"state": "url", "url": None}
    with pytest.raises(SegzooError, match=r"'url' and has no url; give it with pretrained_cfg_overlay=\{'url': ...\}"):
        resolve(Request(name="rtformer_slim.cityscapes", pretrained=True, overlay=overlay))
