"""Recipes are what the papers say, learning rates follow mmsegmentation's formula, and groups learn as told."""

from __future__ import annotations

import json

import pytest
import torch

import segzoo
from segzoo._errors import SegzooError
from segzoo.training.recipes import Recipe, list_recipes, load_recipe, recipe_of
from segzoo.training.schedules import learning_rate, make_optimizer, set_learning_rate

# Read in the papers and the official configurations, not here.
PUBLISHED = {
    ("edaformer", "ade20k"): {"lr": 6e-5, "weight_decay": 0.01, "steps": 160_000, "batch_size": 16, "crop": (512, 512)},
    ("edaformer", "cityscapes"): {"lr": 6e-5, "batch_size": 8, "crop": (1024, 1024), "stride": (768, 768)},
    ("segformer", "ade20k"): {"lr": 6e-5, "head_lr_multiplier": 10.0, "warmup_steps": 1500, "power": 1.0},
    ("segformer", "coco_stuff"): {"steps": 80_000, "batch_size": 16},
    ("rtformer", "cityscapes"): {"lr": 4e-4, "weight_decay": 0.0125, "steps": 120_000, "batch_size": 12},
    ("rtformer", "ade20k"): {"lr": 1e-4, "weight_decay": 0.05, "steps": 160_000, "aux_weight": 0.4},
    ("segvit", "ade20k"): {"lr": 2e-5, "weight_decay": 0.01, "clip_grad": 35.0, "loss": "atm", "stride": (608, 608)},
    ("segvit", "coco_stuff"): {"weight_decay": 0.02, "power": 2.0, "steps": 80_000, "crop": (512, 512)},
    ("segvit", "pascal_context_59"): {"weight_decay": 0.03, "power": 1.0, "steps": 80_000, "window": (480, 480)},
}


@pytest.mark.parametrize(("name", "data"), PUBLISHED)
def test_published_values(name, data):
    recipe = load_recipe(name, label_set=data)
    assert {key: getattr(recipe, key) for key in PUBLISHED[name, data]} == PUBLISHED[name, data]


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_says_where_it_is_from(name):
    recipe = load_recipe(name)
    assert recipe.name == name and len(recipe.source) > 80
    assert Recipe().with_values(json.loads(json.dumps(recipe.to_dict()))) == recipe  # as a run writes it


def test_every_model_has_one():
    assert [name for name in segzoo.list_models() + segzoo.list_models("test_*") if recipe_of(name) is None] == []
    assert recipe_of("test_segvit_shrunk") == "segvit" and recipe_of("mit_b0") == "eft"
    assert recipe_of("fcn_r50") is None


def test_refusals(tmp_path):
    with pytest.raises(SegzooError, match="no recipe is called 'edaformr'; recipes: .*edaformer"):
        load_recipe("edaformr")
    with pytest.raises(SegzooError, match="no 'weigth_decay'; did you mean weight_decay"):
        Recipe().with_values({"weigth_decay": 0.1})
    for values, field in (
        ({"lr": -1.0}, "lr"),
        ({"crop": 512}, "crop"),
        ({"schedule": "step"}, "schedule"),
        ({"ema_decay": 1.5}, "ema_decay"),
        ({"scale": [2.0, 0.5]}, "scale"),
        ({"lr": float("nan")}, "lr"),
        ({"steps": True}, "steps"),
    ):
        with pytest.raises(SegzooError, match=f"{field} of a training recipe must"):
            Recipe().with_values(values)
    own = tmp_path / "own.json"
    own.write_text('{"steps": "many"}')
    with pytest.raises(SegzooError, match=r"own\.json: steps of a training recipe must be a whole number"):
        load_recipe(own)
    own.write_text("[1]")
    with pytest.raises(SegzooError, match="must hold an object"):
        load_recipe(own)
    own.write_text('{"data": {"cityscapes": 5}}')
    with pytest.raises(SegzooError, match="data must hold an object a label set"):
        load_recipe(own, label_set="cityscapes")
    with pytest.raises(SegzooError, match="is no recipe in JSON"):
        load_recipe(tmp_path / "none.json")


def test_poly_with_warm_up_by_hand():
    """mmsegmentation: 6e-5 * (1 - i / 160000), times 1 - (1 - i / 1500) * (1 - 1e-6) before step 1500."""
    recipe = load_recipe("edaformer")
    for step, rate in (
        (0, 6e-11),
        (750, 6e-5 * 0.9953125 * 0.5000005),
        (1499, 6e-5 * (158501 / 160000) * (1 - (1 / 1500) * 0.999999)),
        (1500, 5.94375e-5),
        (80_000, 3e-5),
        (159_999, 3.75e-10),
    ):
        assert learning_rate(recipe, step, recipe.lr) == pytest.approx(rate, rel=1e-9)


def test_other_schedules_by_hand():
    poly = Recipe(steps=100, lr=1.0, power=2.0, min_lr=0.2)
    assert learning_rate(poly, 50, 1.0) == pytest.approx(0.2 + 0.8 * 0.25)
    cosine = Recipe(steps=100, lr=1.0, schedule="cosine")
    assert [learning_rate(cosine, step, 1.0) for step in (0, 50, 75)] == pytest.approx([1, 0.5, 0.1464466094])
    assert learning_rate(Recipe(steps=100, schedule="constant", power=5.0), 99, 0.5) == 0.5


def test_head_and_norms():
    model = segzoo.create_model("test_segformer", num_classes=3)
    recipe = Recipe(steps=10, lr=1e-3, weight_decay=0.05, head_lr_multiplier=10.0, warmup_steps=0)
    optimizer = make_optimizer(model, recipe)
    assert set_learning_rate(optimizer, recipe, 5) == pytest.approx(5e-4)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == {name for name, _ in model.named_parameters()}
    assert found["encoder.stages.0.norm.weight"] == (pytest.approx(5e-4), 0)
    assert found["encoder.stages.0.patch_embed.proj.weight"] == (pytest.approx(5e-4), 0.05)
    assert found["decoder.classifier.weight"] == (pytest.approx(5e-3), 0.05)


def test_layer_decay():
    model = segzoo.create_model("test_segformer", num_classes=3)
    optimizer = make_optimizer(model, Recipe(steps=10, lr=1.0, layer_decay=0.5))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {
        names[id(parameter)]: group["base_lr"] for group in optimizer.param_groups for parameter in group["params"]
    }
    assert rates["decoder.classifier.weight"] == 1.0
    stems = [rates[f"encoder.stages.{stage}.patch_embed.proj.weight"] for stage in range(4)]
    assert stems == sorted(stems) and len(set(stems)) == 4 and stems[3] < 1.0
    powers = sorted(set(rates.values()))
    assert all(after == 2 * before for before, after in zip(powers, powers[1:], strict=False))


def test_sgd():
    model = segzoo.create_model("test_segformer", num_classes=3)
    optimizer = make_optimizer(model, Recipe(optimizer="sgd", momentum=0.8))
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[0]["momentum"] == 0.8


def test_the_late_part():
    recipe = Recipe(steps=10, batch_size=8, late_from=0.6, late_crop=(64, 128), late_batch_size=4, crop=(32, 32))
    assert recipe.at(5).crop == (32, 32) and recipe.at(6).crop == (64, 128)
    assert [recipe.images_before(step) for step in (0, 6, 7, 10)] == [0, 48, 52, 64]


def test_a_shorter_training_warms_up_shorter():
    recipe = load_recipe("edaformer").lasting(320)
    assert (recipe.steps, recipe.warmup_steps) == (320, 3)


def test_a_late_part_that_never_comes_says_nothing_of_the_size():
    never = Recipe(steps=2, late_from=0.9, size=(32, 32), late_size=(64, 64), late_batch_size=3)
    assert never.late_step() == 2 and never.at(2).size == (32, 32) and never.at(2).batch_size == never.batch_size
