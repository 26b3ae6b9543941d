"""The contract of DESIGN.md over `list_models()`: a new row of a variants table is tested without a new test.

The fast tier takes the tiny `test_*` variants, the slow tier every name at one small size.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import segzoo
from segzoo.models import Encoder, FeaturePyramid, SegmentationModel
from segzoo.zoo.names import variant_of

TINY = segzoo.list_models("test_*")
FULL = segzoo.list_models(exclude_filters="test_*")
ODD_SIZES = [(1, 1), (17, 23), (97, 131), (33, 1025)]


def make(name: str, **options) -> nn.Module:
    torch.manual_seed(0)
    return segzoo.create_model(name, **options)


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(kind: type) -> list[str]:
    with torch.device("meta"):
        return [name for name in TINY if isinstance(segzoo.create_model(name), kind)]


TINY_SEGMENTERS = tiny(SegmentationModel)
TINY_ENCODERS = tiny(Encoder)


@pytest.mark.parametrize("size", ODD_SIZES)
@pytest.mark.parametrize("name", TINY)
def test_any_size_in_eval(name, size):
    model = make(name).eval()
    with torch.no_grad():
        scores = model(image(2, 3, *size))
    expected = (2, model.num_classes, *size) if isinstance(model, SegmentationModel) else (2, model.num_classes)
    assert scores.shape == expected
    assert scores.isfinite().all()


@pytest.mark.parametrize("name", TINY_SEGMENTERS)
def test_forward_is_its_parts(name):
    model = make(name).eval()
    x = image(2, 3, 60, 92)
    with torch.no_grad():
        assert torch.equal(model(x), model.to_size(model.forward_head(model.forward_features(x)), x.shape[2:]))


@pytest.mark.parametrize("name", TINY_SEGMENTERS)
def test_images_of_a_batch_do_not_mix(name):
    model = make(name).double().eval()
    x = image(2, 3, 64, 96).double()
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:], model(x[1:]), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", TINY_SEGMENTERS)
def test_scores_are_one_tensor_in_train_and_eval(name):
    model = make(name)
    assert model.score_kind in ("logits", "product", "heatmap")
    for mode in (True, False):
        scores = model.train(mode)(image(2, 3, 64, 64))
        assert isinstance(scores, torch.Tensor)
        assert scores.shape == (2, model.num_classes, 64, 64)


@pytest.mark.parametrize("name", TINY)
def test_features_are_as_feature_info_says(name):
    model = make(name).eval()
    with torch.no_grad():
        features = model.forward_features(image(1, 3, 128, 192))
    assert len(features) == len(model.feature_info)
    for feature, info in zip(features, model.feature_info, strict=True):
        assert feature.shape == (1, info["num_chs"], 128 // info["reduction"], 192 // info["reduction"])
    strides = [info["reduction"] for info in model.feature_info]
    assert strides == sorted(strides)


@pytest.mark.parametrize("name", TINY)
def test_gradients_reach_every_parameter(name):
    model = make(name).train()
    outputs = model.forward_train(image(2, 3, 96, 96))
    total_loss(outputs).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def total_loss(outputs) -> torch.Tensor:
    """A loss that uses everything that forward_train returned."""
    if isinstance(outputs, torch.Tensor):
        return outputs.float().square().mean() + outputs.float().mean()
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return sum(total_loss(value) for value in values if isinstance(value, (torch.Tensor, dict, list, tuple)))


@pytest.mark.parametrize("name", TINY)
def test_reset_classifier_renews_only_the_classifier(name):
    model = make(name).eval()
    classifier = model.classifier_parameters()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.reset_classifier(5)
    assert model.num_classes == model.cfg.num_classes == 5
    kept = {key for key in before if key not in classifier}
    after = model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in kept)
    with torch.no_grad():
        assert model(image(1, 3, 64, 64)).shape[1] == 5
    assert any(module is model.get_classifier() for module in model.modules())
    assert not any(module.training for module in model.modules())
    segzoo.fold(model)  # takes models in eval mode only


@pytest.mark.parametrize("name", TINY)
def test_features_only(name):
    pyramid = make(name, features_only=True).eval()
    assert isinstance(pyramid, FeaturePyramid)
    with torch.no_grad():
        maps = pyramid(image(1, 3, 64, 64))
    assert [tuple(m.shape) for m in maps] == [
        (1, info["num_chs"], 64 // info["reduction"], 64 // info["reduction"]) for info in pyramid.feature_info
    ]
    last = make(name, features_only=True, out_indices=(-1,)).eval()
    with torch.no_grad():
        assert torch.equal(last(image(1, 3, 64, 64))[0], maps[-1])
    with pytest.raises(segzoo.SegzooError, match="out_indices"):
        make(name, features_only=True, out_indices=(9,))


@pytest.mark.parametrize("name", TINY)
def test_state_dict_round_trip(name):
    model, other = make(name).eval(), make(name).eval()
    for parameter in other.parameters():
        nn.init.constant_(parameter, 0.5)
    segzoo.load_weights(other, model.state_dict())
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("name", TINY)
def test_compiles_without_graph_breaks(name):
    model = make(name).eval()
    x = image(1, 3, 64, 96)
    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


@pytest.mark.parametrize("name", TINY)
def test_builds_on_the_meta_device(name):
    with torch.device("meta"):
        model = segzoo.create_model(name)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", TINY)
def test_in_chans(name):
    model = make(name, in_chans=5).eval()
    assert model.in_chans == 5
    with torch.no_grad():
        model(image(1, 5, 64, 64))


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_changes_no_gradient(name):
    model = make(name, drop_path_rate=0.0).double()
    # Dropout draws random numbers, which recomputation repeats but a second model does not share.
    for module in model.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)) or type(module).__name__ == "DropPath":
            for attribute in ("p", "drop_prob"):
                if hasattr(module, attribute):
                    setattr(module, attribute, 0.0)
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    x = image(2, 3, 64, 64).double()
    for each in (model, other):
        total_loss(each.train().forward_train(x)).backward()
    for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", TINY_SEGMENTERS)
def test_param_groups(name):
    model = make(name)
    groups = model.param_groups(lr=1e-4, weight_decay=0.05, head_lr_multiplier=10)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates["head"] == pytest.approx(1e-3)
    assert rates["encoder"] == pytest.approx(1e-4)
    parameters = dict(model.named_parameters())
    assert model.no_weight_decay() <= parameters.keys()
    spared = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    assert spared >= {id(parameters[name]) for name in model.no_weight_decay()}


@pytest.mark.parametrize("name", TINY)
def test_unknown_options_are_refused(name):
    with pytest.raises(segzoo.SegzooError, match="num_clases.*num_classes"):
        segzoo.create_model(name, num_clases=7)


@pytest.mark.parametrize("name", TINY)
def test_encoder_sites_reduce_and_restore_bit_exactly(name):
    model = make(name).eval()
    sites = segzoo.reduction_sites(model)
    assert sites
    x = image(1, 3, 128, 128)
    with torch.no_grad():
        before = model(x)
        keys = list(model.state_dict())
        plan = model.set_inference_reduction(2)
        assert set(plan) == set(sites)
        reduced = model(x)
        assert not torch.equal(before, reduced)
        assert reduced.isfinite().all()
        assert list(model.state_dict()) == keys
        model.set_inference_reduction(None)
        assert torch.equal(before, model(x))


@pytest.mark.parametrize("name", TINY)
def test_reduction_is_neutral_in_training(name):
    model = make(name)
    leaves = [leaf for leaves in segzoo.reduction_sites(model).values() for leaf in leaves]
    model.set_inference_reduction(2)
    model.train()
    assert all(leaf.in_force == segzoo.Pool(1) for leaf in leaves)
    model.eval()
    assert any(leaf.in_force == segzoo.Pool(2) for leaf in leaves)
    model.set_inference_reduction(2, during_training=True)
    model.train()
    assert any(leaf.in_force == segzoo.Pool(2) for leaf in leaves)


@pytest.mark.parametrize("name", TINY)
def test_presets_can_be_set(name):
    model = make(name).eval()
    for preset in model.reduction_presets:
        model.set_inference_reduction(preset)
        with torch.no_grad():
            assert model(image(1, 3, 64, 96)).isfinite().all()


@pytest.mark.parametrize("name", TINY)
def test_cost_is_counted_without_running_the_model(name):
    model = make(name)
    result = segzoo.cost(model, (64, 96))
    assert result.params == sum(parameter.numel() for parameter in model.parameters())
    assert 0 < sum(result.stages.values()) <= result.macs
    assert model.training
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", FULL)
def test_recorded_parameter_count(name):
    recorded = variant_of(name).params
    if recorded is None:
        pytest.fail(f"{name}: its variants table has no parameter count")
    with torch.device("meta"):
        model = segzoo.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == recorded


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_every_name_runs(name):
    """Shapes in eval at an odd size, and gradients of a training pass, for the real sizes."""
    model = make(name).eval()
    with torch.no_grad():
        scores = model(image(1, 3, 49, 70))
        assert scores.isfinite().all()
        assert scores.shape[:2] == (1, model.num_classes or model.num_features)
        model.set_inference_reduction(2)
        assert model(image(1, 3, 64, 64)).isfinite().all()
    total_loss(model.train().forward_train(image(2, 3, 64, 64))).backward()
    assert not [key for key, parameter in model.named_parameters() if parameter.grad is None]
