"""EFT and MiT as timm's models: the same numbers as segzoo's, in timm itself, smp and transformers."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import timm.loss
import timm.utils
import torch
from golden_data import golden_json, golden_state_dict
from huggingface_hub import constants
from timm.models import group_parameters, save_for_hf
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from transformers import TimmBackbone, TimmBackboneConfig, TimmWrapperConfig, TimmWrapperForImageClassification

import segzoo
from segzoo.interop import timm as bridge

ROOT = Path(__file__).parents[1]
PAIRS = [("eft_t", "eft_t"), ("segzoo_mit_b0", "mit_b0")]  # name in timm, name in segzoo
BAND4 = torch.linspace(-2, 2, 2 * 4 * 64 * 96).reshape(2, 4, 64, 96)
RGB = BAND4[:, :3]


def twins(theirs: str, ours: str, **options):
    """The same random weights in timm's model and in segzoo's."""
    encoder = segzoo.create_model(ours, **{key: options[key] for key in options.keys() & {"in_chans", "num_classes"}})
    model = timm.create_model(theirs, **options)
    inner = model.model if hasattr(model, "model") else model
    inner.load_state_dict({key: encoder.state_dict()[key] for key in inner.state_dict()})
    return model.eval(), encoder.eval()


def assert_equal(maps, expected):
    for a, b in zip(maps, expected, strict=True):
        assert torch.equal(a, b)


# --- the registry of timm


def test_names_are_listed_and_no_other_changes():
    """In a fresh process, because this one has imported the bridge."""
    code = """
        import timm, warnings
        warnings.simplefilter("error")
        before = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
        weights = set(timm.list_pretrained())
        import segzoo.interop.timm
        after = {name: timm.models.model_entrypoint(name) for name in timm.list_models()}
        assert len(before) > 1000 and all(after[name] is function for name, function in before.items())
        assert sorted(after.keys() - before.keys()) == sorted(segzoo.interop.timm.MODELS)
        assert weights <= set(timm.list_pretrained())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, cwd=ROOT)


def test_names():
    expected = ["eft_b", "eft_t", *(f"segzoo_mit_b{i}" for i in range(6))]
    assert timm.list_models(["eft_*", "segzoo_*"]) == expected
    # What timm lists as pretrained is what segzoo can load.
    loadable = {name.partition(".")[0] for name in segzoo.list_models(pretrained=True)}
    listed = timm.list_models(["eft_*", "segzoo_*"], pretrained=True)
    assert {name.partition(".")[0] for name in listed} == {a for a, b in bridge.MODELS.items() if b in loadable}


def test_importing_again_changes_nothing():
    entry_points = {name: timm.models.model_entrypoint(name) for name in bridge.MODELS}
    importlib.reload(bridge)  # warns, here an error, if a name is overwritten
    assert {name: timm.models.model_entrypoint(name) for name in bridge.MODELS} == entry_points


def test_a_foreign_name_is_never_replaced(monkeypatch):
    resnet = timm.models.model_entrypoint("resnet18")
    monkeypatch.setattr(bridge, "MODELS", {"segzoo_new": "eft_t", "resnet18": "eft_t"})
    with pytest.raises(segzoo.SegzooError, match=r"resnet18 \(timm\.models\.resnet\), which segzoo does not replace"):
        bridge._register()
    assert timm.models.model_entrypoint("resnet18") is resnet
    assert not timm.models.is_model("segzoo_new")


def test_the_configuration_comes_from_the_weights_row():
    cfg = timm.models.get_pretrained_cfg("segzoo_mit_b2")
    row = segzoo.model_info("mit_b2.imagenet").pretrained_cfg
    assert (cfg.tag, cfg.num_classes, cfg.mean, cfg.std) == ("imagenet", 1000, row.mean, row.std)
    assert cfg.hf_hub_id == f"{row.hf_hub_id}@{row.hf_revision}"
    assert (cfg.license, cfg.origin_url) == (row.license, row.license_url)
    model = timm.create_model("segzoo_mit_b0", num_classes=5)
    assert model.get_submodule(cfg.first_conv).weight.shape[1] == 3
    assert model.get_submodule(cfg.classifier) is model.get_classifier()
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 224, 224)


# --- features


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_features_are_segzoos(theirs, ours):
    backbone, encoder = twins(theirs, ours, features_only=True, in_chans=4)
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert backbone.feature_info.channels() == [info["num_chs"] for info in encoder.feature_info]
    assert backbone.feature_info.module_name() == ["stages.0", "stages.1", "stages.2", "stages.3"]
    maps = backbone(BAND4)
    assert [tuple(m.shape[2:]) for m in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert_equal(maps, encoder.forward_features(BAND4))


@pytest.mark.parametrize(
    ("out_indices", "chosen", "stages"), [((0, 2), [0, 2], 3), ((1,), [1], 2), ((-1,), [3], 4), (2, [2, 3], 4)]
)
def test_out_indices_and_pruning(out_indices, chosen, stages):
    backbone, encoder = twins("eft_t", "eft_t", features_only=True, out_indices=out_indices)
    assert_equal(backbone(RGB), [encoder.forward_features(RGB)[i] for i in chosen])
    assert backbone.feature_info.channels() == [encoder.feature_info[i]["num_chs"] for i in chosen]
    assert len(backbone.model.stages) == stages
    assert not any("head" in name for name, _ in backbone.named_parameters())
    backbone.train()
    sum(m.sum() for m in backbone(RGB)).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())  # as DDP wants it


@pytest.mark.parametrize("out_indices", [(4,), (-5,), (), 0, 5])
def test_wrong_out_indices_are_refused(out_indices):
    with pytest.raises(segzoo.SegzooError, match="out_indices must be from -4 to 3"):
        timm.create_model("eft_t", features_only=True, out_indices=out_indices)


def test_other_feature_extractors_of_timm():
    model, encoder = twins("eft_t", "eft_t")
    hooked = timm.create_model("eft_t", features_only=True, feature_cls="hook", out_indices=(1, 3)).eval()
    hooked.body.load_state_dict(model.state_dict(), strict=False)
    assert_equal(hooked(RGB), [encoder.forward_features(RGB)[i] for i in (1, 3)])


def test_forward_intermediates():
    model, encoder = twins("eft_t", "eft_t")
    maps = encoder.forward_features(RGB)
    last, intermediates = model.forward_intermediates(RGB)
    assert_equal([last, *intermediates], [maps[-1], *maps])
    assert torch.equal(model.forward_features(RGB), maps[-1])
    assert_equal(model.forward_intermediates(RGB, indices=[2, 0], intermediates_only=True), [maps[2], maps[0]])
    last, intermediates = model.forward_intermediates(RGB, indices=[0, 1], stop_early=True)
    assert_equal([last, *intermediates], [maps[1], maps[0], maps[1]])
    with pytest.raises(segzoo.SegzooError, match="output_fmt"):
        model.forward_intermediates(RGB, output_fmt="NLC")


def test_reduction_acts_inside_other_libraries_models():
    backbone, encoder = twins("segzoo_mit_b0", "mit_b0", features_only=True)
    full = encoder.forward_features(RGB)
    plan = {"encoder": (2, 2, 1, 1)}
    assert segzoo.set_inference_reduction(backbone, plan) == segzoo.set_inference_reduction(encoder, plan)
    reduced = backbone(RGB)
    assert_equal(reduced, encoder.forward_features(RGB))
    assert not torch.equal(reduced[0], full[0])
    segzoo.set_inference_reduction(backbone, None)
    assert_equal(backbone(RGB), full)
    classifier = timm.create_model("segzoo_mit_b0")
    assert segzoo.set_inference_reduction(classifier, "isr")["encoder.0"] == segzoo.Pool(2)


# --- the classifier


@pytest.mark.parametrize(("theirs", "ours"), PAIRS)
def test_classifier_is_segzoos(theirs, ours):
    model, encoder = twins(theirs, ours, num_classes=7)
    assert torch.equal(model(RGB), encoder(RGB))
    features = model.forward_features(RGB)
    assert torch.equal(model.forward_head(features, pre_logits=True), features.mean(dim=(2, 3)))
    assert torch.equal(model.forward_head(features), model(RGB))
    assert (model.num_classes, model.num_features, model.head_hidden_size) == (7, 256, 256)


def test_reset_classifier_and_global_pool():
    model = timm.create_model("eft_t", num_classes=7, global_pool="avg").eval()
    stages = copy.deepcopy(model.stages.state_dict())
    model.reset_classifier(11)
    assert model(RGB).shape == (2, 11) and model.num_classes == model.get_classifier().out_features == 11
    model.reset_classifier(0)
    assert model(RGB).shape == (2, 256) and isinstance(model.get_classifier(), torch.nn.Identity)
    model.reset_classifier(0, "")
    assert model(RGB).shape == (2, 256, 2, 3)
    with pytest.raises(segzoo.SegzooError, match="use num_classes=0 or 'avg'"):
        model.reset_classifier(3)
    model.reset_classifier(3, "avg")
    assert model(RGB).shape == (2, 3)
    assert all(torch.equal(stages[name], tensor) for name, tensor in model.stages.state_dict().items())
    assert timm.create_model("eft_t", num_classes=0, global_pool="").eval()(RGB).shape == (2, 256, 2, 3)
    with pytest.raises(segzoo.SegzooError, match="global_pool must be 'avg' or ''"):
        timm.create_model("eft_t", global_pool="max")


def test_options():
    model = timm.create_model("eft_t", drop_path_rate=0.3, drop_rate=0.5, dtype=torch.float64, depths=(1, 1, 1, 1))
    assert model.stages[3].blocks[-1].drop_path.drop_prob == pytest.approx(0.3)
    assert model.head_drop.p == 0.5
    assert model.head.weight.dtype == torch.float64
    assert [len(stage.blocks) for stage in model.stages] == [1, 1, 1, 1]
    with pytest.raises(segzoo.SegzooError, match="no option 'num_clases'; did you mean num_classes"):
        timm.create_model("eft_t", num_clases=7)


def test_the_head_has_dropout():
    """In training mode only, on the pooled features: what is dropped there is no class's evidence."""
    torch.manual_seed(0)
    model = timm.create_model("eft_t", drop_rate=0.5, drop_path_rate=0.0, depths=(1, 1, 1, 1), num_classes=3)
    with torch.no_grad():
        assert not torch.equal(model(RGB), model(RGB))
        model.head_drop.p = 0.0
        assert torch.equal(model(RGB), model(RGB))
        model.head_drop.p = 0.5
        assert torch.equal(model.eval()(RGB), model(RGB))


@pytest.mark.parametrize("name", bridge.MODELS)
def test_every_name_builds_without_memory(name):
    with torch.device("meta"):  # as smp does first
        model = timm.create_model(name)
        backbone = timm.create_model(name, features_only=True)
    assert sum(p.numel() for p in model.parameters()) == segzoo.model_info(bridge.MODELS[name]).params
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]


def test_groups_for_layer_decay():
    model = timm.create_model("eft_t")
    groups = group_parameters(model, model.group_matcher(coarse=True))
    assert list(groups) == [0, 1, 2, 3, 4, 5]  # stem, stages, head
    assert groups[5] == ["head.weight", "head.bias"]
    groups = group_parameters(model, model.group_matcher())
    assert len(groups) == 1 + 2 + 2 + 10 + 2 + 1  # stem, blocks, head
    assert {name.split(".")[1] for name in groups[2]} == {"0"} and "stages.0.norm.weight" in groups[2]
    assert sorted(name for names in groups.values() for name in names) == sorted(n for n, _ in model.named_parameters())
    scales = {group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.5)}
    assert scales == {0.5**i for i in range(18)}


@pytest.mark.parametrize("name", [theirs for theirs, _ in PAIRS])
def test_checkpointing_gives_the_same_gradients(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, drop_path_rate=0.0).train()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing(True)
    for net in (model, other):
        net(RGB).square().sum().backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("name", [theirs for theirs, _ in PAIRS])
def test_training_steps_as_timms_script_drives_them(name):
    """create_model and create_optimizer_v2 with the arguments of train.py; the loss on one batch must fall."""
    torch.manual_seed(0)
    model = timm.create_model(
        name,
        pretrained=False,
        in_chans=3,
        num_classes=2,
        drop_rate=0.0,
        drop_path_rate=0.0,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        checkpoint_path="",
    ).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=3e-4, weight_decay=0.05, layer_decay=0.9)
    loss_fn = timm.loss.LabelSmoothingCrossEntropy(smoothing=0.1)
    target = torch.tensor([0, 1, 0, 1])
    images = torch.rand(4, 3, 64, 64) * 0.2 + target.view(4, 1, 1, 1)  # dark or bright
    losses = []
    for _ in range(8):
        loss = loss_fn(model(images), target)
        optimizer.zero_grad()
        loss.backward()
        timm.utils.dispatch_clip_grad(timm.models.model_parameters(model), value=1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses
    assert timm.utils.accuracy(model.eval()(images), target)[0] == 100


# --- weights


@pytest.mark.parametrize("golden", ["mit_b0_encoder", "eft_t_encoder"])
def test_official_file_through_timm(tmp_path, golden):
    theirs, ours = ("segzoo_mit_b0", "mit_b0") if golden.startswith("mit") else ("eft_t", "eft_t")
    state = {key: t.float() for key, t in golden_state_dict(golden_json(golden)["state_dict"]).items()}
    torch.save(state, tmp_path / "official.pth")
    encoder = segzoo.create_model(ours, num_classes=0).eval()
    segzoo.load_weights(encoder, state)
    source = {"file": str(tmp_path / "official.pth")}
    options = {"pretrained": True, "pretrained_cfg_overlay": source, "features_only": True}
    assert_equal(timm.create_model(theirs, **options).eval()(RGB), encoder.forward_features(RGB))
    four_bands = timm.create_model(theirs, in_chans=4, **options).eval()(BAND4)
    torch.save(dict(list(state.items())[5:]), tmp_path / "official.pth")
    with pytest.raises(segzoo.SegzooError, match="the weights do not fit TimmEncoder: stages.0"):
        timm.create_model(theirs, **options)
    adapted = segzoo.create_model(ours, num_classes=0, in_chans=4).eval()
    torch.save(state, tmp_path / "official.pth")
    adapted = segzoo.create_model(ours, num_classes=0, in_chans=4, checkpoint_path=tmp_path / "official.pth").eval()
    for a, b in zip(four_bands, adapted.forward_features(BAND4), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_that_cannot_be_had_refuse_with_the_recipe(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("SEGZOO_CACHE", str(tmp_path))
    for options in ({}, {"features_only": True}, {"pretrained_cfg": "imagenet"}):
        with pytest.raises(
            segzoo.SegzooError, match=r"weights of eft_t\.imagenet(.|\n)*offline(.|\n)*pretrained_cfg_overlay"
        ):
            timm.create_model("eft_t", pretrained=True, **options)
    with pytest.raises(segzoo.SegzooError, match="offline"):
        smp.Unet("tu-eft_t", encoder_weights=True)


@pytest.mark.parametrize("name", ["segzoo_mit_b0", "segzoo_mit_b0.imagenet"])
def test_segzoos_rows_are_loaded_by_segzoo(monkeypatch, name):
    seen = []

    def load(name, pretrained, **options):
        seen.append((name, pretrained, options))
        return segzoo.create_model(name, pretrained=False, **options)

    monkeypatch.setattr(bridge, "create_model", load)
    timm.create_model(name, pretrained=True, num_classes=5, in_chans=4)
    timm.create_model(name, pretrained=True, cache_dir="here")
    assert seen == [
        ("mit_b0.imagenet", True, {"num_classes": 5, "in_chans": 4, "cache_dir": None}),
        ("mit_b0.imagenet", True, {"num_classes": 1000, "in_chans": 3, "cache_dir": "here"}),
    ]


def test_saved_by_timm_and_restored(tmp_path):
    model = timm.create_model("eft_t", num_classes=3, in_chans=4).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == "eft_t"
    restored = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3, in_chans=4).eval()
    assert torch.equal(restored(BAND4), model(BAND4))
    back = segzoo.create_model("eft_t", num_classes=3, in_chans=4, checkpoint_path=tmp_path / "model.safetensors")
    assert torch.equal(back.eval()(BAND4), model(BAND4))


def test_a_whole_model_can_be_pickled(tmp_path):
    model = timm.create_model("segzoo_mit_b0", num_classes=3).eval()
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(RGB), model(RGB))


# --- smp and transformers


def train_once(model: torch.nn.Module, x: torch.Tensor, classes: int):
    target = torch.arange(x[:, 0].numel()).reshape(x[:, 0].shape) % classes
    loss = smp.losses.DiceLoss("multiclass")(model.train()(x), target)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("theirs", [theirs for theirs, _ in PAIRS])
@pytest.mark.parametrize("segmenter", [smp.Unet, smp.Segformer])
def test_smp(segmenter, theirs):
    model = segmenter(f"tu-{theirs}", encoder_weights=None, in_channels=4, classes=5).eval()
    encoder = segzoo.create_model(bridge.MODELS[theirs], in_chans=4, num_classes=0).eval()
    encoder.load_state_dict(model.encoder.model.model.state_dict())
    image, half, *maps = model.encoder(BAND4)
    assert torch.equal(image, BAND4) and half.shape == (2, 0, 32, 48)
    assert_equal(maps, encoder.forward_features(BAND4))
    assert model.encoder.out_channels == [4, 0, *(info["num_chs"] for info in encoder.feature_info)]
    assert model(BAND4).shape == (2, 5, 64, 96)
    train_once(model, BAND4, 5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("segmenter", "theirs"),
    [
        *(("Unet", theirs) for theirs in bridge.MODELS),
        *((segmenter, "eft_t") for segmenter in ("Segformer", "FPN", "UPerNet", "MAnet", "PAN", "Linknet", "PSPNet")),
    ],
)
def test_smp_segmenters(segmenter, theirs):
    options = {"encoder_output_stride": 32} if segmenter == "PAN" else {}
    model = getattr(smp, segmenter)(f"tu-{theirs}", encoder_weights=None, classes=5, **options).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, 256, 256)).shape == (1, 5, 256, 256)


def test_strides_are_not_adjustable():
    """What DeepLabV3 asks of its encoder; a pyramid of patch embeddings has no dilation to offer."""
    with pytest.raises(segzoo.SegzooError, match="segzoo's models have no output_stride"):
        smp.DeepLabV3Plus("tu-eft_t", encoder_weights=None)


def test_smp_depth_and_preprocessing():
    model = smp.Unet("tu-eft_t", encoder_weights=None, encoder_depth=4, decoder_channels=(64, 32, 16, 8)).eval()
    assert len(model.encoder.model.model.stages) == 3
    assert model(RGB).shape == (2, 1, 64, 96)
    row = segzoo.model_info("mit_b0.imagenet").pretrained_cfg
    assert smp.encoders.get_preprocessing_params("tu-segzoo_mit_b0")["mean"] == list(row.mean)


@pytest.mark.parametrize("theirs", [theirs for theirs, _ in PAIRS])
def test_transformers_timm_backbone(theirs):
    config = TimmBackboneConfig(backbone=theirs, out_indices=[0, 2], num_channels=4)
    model = TimmBackbone(config).eval()
    encoder = segzoo.create_model(bridge.MODELS[theirs], in_chans=4, num_classes=0).eval()
    encoder.load_state_dict(model._backbone.model.state_dict(), strict=False)
    maps = model(BAND4).feature_maps
    assert_equal(maps, [encoder.forward_features(BAND4)[i] for i in (0, 2)])
    assert model.channels == [encoder.feature_info[i]["num_chs"] for i in (0, 2)]
    assert model.stage_names == [f"stages.{i}" for i in range(4)]
    sum(m.sum() for m in model.train()(BAND4).feature_maps).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_transformers_hidden_states_are_the_chosen_maps():
    """The limit that docs/interop.md states: a getter of features gives transformers no others."""
    model = TimmBackbone(TimmBackboneConfig(backbone="eft_t", out_indices=[0, 1, 2, 3])).eval()
    output = model(RGB, output_hidden_states=True)
    assert_equal(output.hidden_states, output.feature_maps)
    some = TimmBackbone(TimmBackboneConfig(backbone="eft_t", out_indices=[1, 3])).eval()
    with pytest.raises(IndexError):
        some(RGB, output_hidden_states=True)


def test_transformers_timm_wrapper():
    config = TimmWrapperConfig(architecture="eft_t", num_labels=3)
    model = TimmWrapperForImageClassification(config).eval()
    assert torch.equal(model(RGB).logits, model.timm_model(RGB)) and model(RGB).logits.shape == (2, 3)


@pytest.mark.slow
def test_compile_and_export():
    backbone = timm.create_model("eft_t", features_only=True).eval()
    with torch.no_grad():
        maps = backbone(RGB)
        assert_equal(torch.compile(backbone, fullgraph=True, backend="eager")(RGB), maps)
        for a, b in zip(torch.export.export(backbone, (RGB,)).module()(RGB), maps, strict=True):
            torch.testing.assert_close(a, b)
