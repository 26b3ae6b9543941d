"""Twins: the same tensors and scores, and nothing that happens to the one reaches the other, from any thread."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import segzoo
import segzoo.plans
from segzoo.prediction import predict_keypoints
from segzoo.twins import eval_twin

PHOTOS = np.random.default_rng(0).integers(0, 256, (40, 32, 48, 3), dtype=np.uint8)
SIZE = (32, 48)
THREADS = 8


def tiny(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return segzoo.create_model(name, **options)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", segzoo.list_models("test_*"))
def test_a_twin_computes_what_the_model_in_eval_mode_does(name):
    model = tiny(name).eval()
    x_BCHW = torch.randn(1, model.in_chans, 64, 96)
    with torch.inference_mode():
        expected = model(x_BCHW)
        model.train()
        assert torch.equal(eval_twin(model)(x_BCHW), expected)
    assert all(module.training for module in model.modules())


def test_tensors_are_shared_and_modules_are_not():
    model = tiny("test_edaformer")
    twin = eval_twin(model)
    assert type(twin) is type(model)
    assert {name: id(tensor) for name, tensor in twin.state_dict(keep_vars=True).items()} == {
        name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()
    }
    assert not {id(module) for module in twin.modules()} & {id(module) for module in model.modules()}
    assert not any(module.training for module in twin.modules())


def test_a_plan_belongs_to_one_of_the_two():
    model = tiny("test_edaformer")
    model.set_inference_reduction(2)
    twin = eval_twin(model)
    model.set_inference_reduction(None)
    plan = segzoo.plans.current_plan(twin)
    assert {entry for site, entry in plan.items() if not site.endswith(".q")} == {segzoo.Pool(2)}
    twin.set_inference_reduction(3)
    assert segzoo.plans.current_plan(model).is_neutral


class Odd(nn.Module):
    """Keeps modules in every place that is no child, and tells by whom and in what mode it was run."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.method = self.inner
        self.listed = [self.drop]
        self.mapped = {"drop": (self.drop,)}
        object.__setattr__(self, "hidden", self.drop)

    def inner(self) -> list[bool]:
        return [self.training, self.listed[0].training, self.mapped["drop"][0].training, self.hidden.training]

    def forward(self) -> list[bool]:
        return self.method()


def test_modules_kept_outside_the_children_are_twins_too():
    odd = Odd()
    assert eval_twin(odd)() == [False] * 4
    assert odd() == [True] * 4


def test_hooks_are_kept():
    model, seen = tiny("test_edaformer"), []
    handle = model.encoder.stages[0].register_forward_hook(lambda module, *_: seen.append(module.training))
    segzoo.predict(model, PHOTOS[0], resize=SIZE)
    handle.remove()
    segzoo.predict(model, PHOTOS[0], resize=SIZE)
    assert seen == [False]


def test_what_is_compiled_needs_the_model_in_eval_mode():
    """It is bound to the model itself, whose mode it would take."""
    for bind in (
        lambda model: setattr(model, "forward_features", torch.compile(model.forward_features, backend="eager")),
        lambda model: model.encoder.compile(backend="eager"),
        lambda model: setattr(model, "decoder", torch.compile(model.decoder, backend="eager")),
    ):
        model = tiny("test_segformer")
        bind(model)
        with pytest.raises(segzoo.SegzooError, match="compiled.*model.eval"):
            segzoo.predict(model, PHOTOS[0], resize=SIZE)
        assert model.training
        eval_twin(model.eval())
    with pytest.raises(segzoo.SegzooError, match="TorchScript"):
        eval_twin(nn.Sequential(torch.jit.ScriptModule()))


def test_a_compiled_model_is_run_by_its_parts():
    model = tiny("test_segformer")
    expected = segzoo.predict(model, PHOTOS[0], resize=SIZE).mask
    assert np.array_equal(segzoo.predict(torch.compile(model), PHOTOS[0], resize=SIZE).mask, expected)


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_edaformer", "test_segvit"])
def test_threads_share_a_model_in_training_mode(name):
    model = tiny(name)
    expected = [segzoo.predict(model, photo, resize=SIZE).mask for photo in PHOTOS]
    before = state_of(model)
    with ThreadPoolExecutor(THREADS) as pool:
        masks = list(pool.map(lambda photo: segzoo.predict(model, photo, resize=SIZE).mask, PHOTOS))
    assert all(np.array_equal(mask, wanted) for mask, wanted in zip(masks, expected, strict=True))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_threads_while_plans_change():
    """Every mask is the one of the plan that its result names, and that is one of the plans that were set."""
    model = tiny("test_edaformer")
    plans = [None, 2, {"encoder": 3}, {"decoder": 4}]
    expected = {}
    for plan in plans:
        name = repr(model.set_inference_reduction(plan))
        expected[name] = [segzoo.predict(model, photo, resize=SIZE).mask for photo in PHOTOS]

    def run(i: int) -> segzoo.Segmentation:
        model.set_inference_reduction(plans[i % len(plans)])
        return segzoo.predict(model, PHOTOS[i], resize=SIZE)

    with ThreadPoolExecutor(THREADS) as pool:
        results = list(pool.map(run, range(len(PHOTOS))))
    assert {repr(result.plan) for result in results} <= expected.keys()
    assert all(np.array_equal(result.mask, expected[repr(result.plan)][i]) for i, result in enumerate(results))


def test_threads_find_keypoints_with_a_model_in_training_mode():
    model = tiny("test_segformer_keypoints")
    expected = [predict_keypoints(model, photo, resize=SIZE).xy for photo in PHOTOS]
    before = state_of(model)
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda photo: predict_keypoints(model, photo, resize=SIZE).xy, PHOTOS))
    assert all(torch.equal(xy, wanted) for xy, wanted in zip(found, expected, strict=True))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
