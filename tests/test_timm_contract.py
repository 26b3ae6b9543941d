"""What timm's tools and timm's own tests expect of a model, asked of segzoo's with timm's own functions.

`docs/timm.md` is the table: promises that are kept stand here as tests, the others there with the reason.
"""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config, resolve_model_data_config
from timm.models import FeatureInfo, group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import freeze, unfreeze

import segzoo
import segzoo.interop.timm
from segzoo.models import Encoder, SegmentationModel

TINY = segzoo.list_models("test_*")
IN_TIMM = ["eft_t", "segzoo_mit_b0"]
SHALLOW = {"depths": (1, 1, 1, 1)}
IMAGES = torch.linspace(-2, 2, 2 * 3 * 64 * 96).reshape(2, 3, 64, 96)


def make(name: str, **options):
    torch.manual_seed(0)
    return segzoo.create_model(name, **options)


def tiny(kind: type) -> list[str]:
    with torch.device("meta"):
        return [name for name in TINY if isinstance(segzoo.create_model(name), kind)]


ENCODERS, SEGMENTERS = tiny(Encoder), tiny(SegmentationModel)

# --- timm's data configuration


def test_timm_reads_a_weights_row():
    model = make("rtformer_slim.cityscapes")
    config = resolve_data_config({}, model=model)
    assert config["input_size"] == (3, 512, 1024)  # the paper's crop, channels first as timm has it
    assert (config["mean"], config["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 1.0)
    assert resolve_model_data_config(model, {"img_size": 96})["input_size"] == (3, 96, 96)
    image = Image.fromarray(np.zeros((700, 900, 3), np.uint8))
    assert create_transform(**resolve_data_config({"img_size": 64}, model=model))(image).shape == (3, 64, 64)


def test_an_imagenet_row_has_imagenets_protocol():
    config = resolve_data_config({}, model=make("mit_b0"))
    assert config["input_size"] == (3, 224, 224)
    assert (config["interpolation"], config["crop_pct"]) == ("bicubic", 0.875)


@pytest.mark.parametrize("name", TINY)
def test_timm_finds_a_configuration_in_every_model(name):
    """Also in one without weights, and in a pyramid."""
    for model in (make(name), make(name, features_only=True)):
        create_transform(**resolve_data_config({}, model=model))


def test_a_row_is_a_mapping_in_timms_terms():
    row = segzoo.get_pretrained_cfg("edaformer_t.ade20k")
    assert row.input_size == (512, 512)  # segzoo's attribute
    assert row["input_size"] == row.get("input_size") == dict(row)["input_size"] == (3, 512, 512)
    assert (row.get("num_classes"), row.get("test_crop_pct"), row.get("none", 7)) == (150, None, 7)
    assert "mean" in row and "classifier" not in row
    with pytest.raises(KeyError):
        row["classifier"]
    assert segzoo.get_pretrained_cfg("segvit_small") is None


@pytest.mark.parametrize("name", TINY)
def test_default_cfg_names_parts_of_the_model(name):
    model = make(name, in_chans=4, num_classes=5)
    cfg, state = model.default_cfg, model.state_dict()
    assert state[f"{cfg['classifier']}.weight"] is not None
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == 4
    assert (cfg["num_classes"], cfg["input_size"][0], cfg["architecture"]) == (5, 4, name)
    assert model.get_submodule(cfg["classifier"]) is model.get_classifier()


# --- optimisers, freezing


@pytest.mark.parametrize("name", TINY)
def test_layer_decay(name):
    model = make(name)
    parameters = sorted(key for key, _ in model.named_parameters())
    for coarse in (True, False):
        groups = group_parameters(model, model.group_matcher(coarse))
        assert sorted(key for keys in groups.values() for key in keys) == parameters
        assert list(groups) == list(range(len(groups)))
        assert model.default_cfg["first_conv"] + ".weight" in groups[0]
        assert model.default_cfg["classifier"] + ".weight" in groups[len(groups) - 1]
        assert len(groups) >= 5
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = {group["lr_scale"] for group in optimizer.param_groups}
    assert scales == {0.5**i for i in range(len(groups))}
    undecayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(dict(model.named_parameters())[key]) in undecayed for key in model.no_weight_decay())


def test_blocks_are_grouped_in_the_order_of_the_data():
    """By hand: test_edaformer has 1, 1, 2, 1 blocks; RTFormer's layer3 takes along what is beside it."""
    model = make("test_edaformer")
    fine = group_parameters(model, model.group_matcher())
    assert [keys[0] for keys in fine.values()][4] == "encoder.stages.2.blocks.1.norm1.weight"
    assert len(fine) == 1 + 5 + 1  # stem, blocks, decoder
    assert "encoder.stages.2.norm.weight" in fine[4]
    rtformer = group_parameters(make("test_rtformer"), make("test_rtformer").group_matcher(coarse=True))
    assert len(rtformer) == 1 + 3 + 2 + 1
    assert any("compress3" in key for key in rtformer[3])


@pytest.mark.parametrize("name", TINY)
def test_freeze_and_unfreeze(name):
    model = make(name)
    top = [child for child, _ in model.named_children()][0]
    freeze(model, [top])
    frozen = {key for key, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {key for key, _ in model.named_parameters() if key.startswith(f"{top}.")}
    model.train()(IMAGES)
    unfreeze(model, [top])
    assert all(p.requires_grad for p in model.parameters())


# --- features


@pytest.mark.parametrize("name", TINY)
def test_feature_info_answers_as_timms(name):
    info = make(name).feature_info
    theirs = FeatureInfo(copy.deepcopy(list(info)), out_indices=range(len(info)))
    assert isinstance(info, list) and info[0]["num_chs"] > 0
    for question in ("channels", "reduction", "module_name"):
        for idx in (None, 1, -1, [0, -1]):
            assert getattr(info, question)(idx) == getattr(theirs, question)(idx)
    assert info.get_dicts(["reduction"]) == theirs.get_dicts(["reduction"])
    assert info.get_dicts(idx=0)["module"] == theirs.get_dicts(idx=0)["module"]
    assert info.out_indices == tuple(theirs.out_indices)
    assert pickle.loads(pickle.dumps(info)) == copy.deepcopy(info) == info
    module_names = {key for key, _ in make(name).named_modules()}
    prefix = "encoder." if name in SEGMENTERS else ""
    assert {prefix + module for module in info.module_name()} <= module_names


@pytest.mark.parametrize("name", TINY)
def test_forward_intermediates(name):
    model = make(name).eval()
    with torch.no_grad():
        maps = list(model.forward_features(IMAGES))
        features, intermediates = model.forward_intermediates(IMAGES)
        assert all(map(torch.equal, intermediates, maps)) and all(map(torch.equal, features, maps))
        assert name in SEGMENTERS or torch.equal(model.forward_head(features), model(IMAGES))
        first, last = model.forward_intermediates(IMAGES, indices=[0, -1], intermediates_only=True, stop_early=True)
        assert torch.equal(first, maps[0]) and torch.equal(last, maps[-1])
        (tokens,) = model.forward_intermediates(IMAGES, 1, norm=True, output_fmt="NLC", intermediates_only=True)
        H, W = maps[-1].shape[2:]
        assert torch.equal(tokens.unflatten(1, (H, W)).permute(0, 3, 1, 2), maps[-1])
    with pytest.raises(segzoo.SegzooError, match="out_indices must be from"):
        model.forward_intermediates(IMAGES, indices=[9])
    with pytest.raises(segzoo.SegzooError, match="output_fmt must be"):
        model.forward_intermediates(IMAGES, output_fmt="NHWC")


def test_out_indices_as_one_number_are_the_last_maps():
    pyramid = segzoo.create_model("test_mit", features_only=True, out_indices=2)
    assert pyramid.feature_info.channels() == [24, 32]
    for wrong in (0, 5, "2", 1.5, (), [0.5]):
        with pytest.raises(segzoo.SegzooError, match="out_indices must be from -4 to 3, or one number from 1 to 4"):
            segzoo.create_model("test_mit", features_only=True, out_indices=wrong)


# --- the classifier


@pytest.mark.parametrize("name", TINY)
def test_the_sizes_that_timm_asks_for(name):
    model = make(name)
    assert model.num_features == model.feature_info.channels()[-1]
    classifier = dict(model.named_parameters())[model.default_cfg["classifier"] + ".weight"]
    assert model.head_hidden_size == classifier.shape[1]


@pytest.mark.parametrize("name", ENCODERS)
def test_reset_classifier_of_an_encoder(name):
    model = make(name).eval()
    model.reset_classifier(7, "avg")
    assert model(IMAGES).shape == (2, 7)
    model.reset_classifier(0)
    assert model(IMAGES).shape == (2, model.num_features)
    with pytest.raises(segzoo.SegzooError, match="global_pool must be 'avg', not ''; forward_features gives the maps"):
        model.reset_classifier(0, "")


@pytest.mark.parametrize("name", SEGMENTERS)
def test_reset_classifier_of_a_segmenter(name):
    model = make(name).eval()
    model.reset_classifier(7, global_pool=None)
    assert model(IMAGES).shape[1] == model.num_classes == 7
    for wrong, sentence in (((0,), "at least one class, not 0; features_only=True"), ((7, "avg"), "pools nothing")):
        with pytest.raises(segzoo.SegzooError, match=sentence):
            model.reset_classifier(*wrong)
    assert model.num_classes == 7


@pytest.mark.parametrize("name", TINY)
def test_set_input_size(name):
    model = make(name).eval()
    model.set_input_size(None)
    with torch.no_grad():
        before = model(IMAGES)
        model.set_input_size((64, 96))
        after = model(IMAGES)
    torch.testing.assert_close(after, before)  # a position embedding is resized now instead of in every forward
    fresh = segzoo.create_model(name, img_size=(64, 96))
    assert {key: p.shape for key, p in fresh.named_parameters()} == {
        key: p.shape for key, p in model.named_parameters()
    }
    assert fresh.cfg == model.cfg
    model.set_input_size(32)
    assert model(IMAGES).isfinite().all()


def test_a_wrong_input_size_changes_nothing():
    model = make("test_segvit_shrunk")
    before = {key: p.shape for key, p in model.named_parameters()}
    for wrong in (0, (64,), "big", 1.5):
        with pytest.raises(segzoo.SegzooError, match="img_size must be"):
            model.set_input_size(wrong)
    assert {key: p.shape for key, p in model.named_parameters()} == before


# --- create_model's arguments


@pytest.mark.parametrize("name", TINY)
def test_arguments_of_timms_scripts(name):
    """What timm's train.py and validate.py pass for an untouched command line."""
    model = segzoo.create_model(
        model_name=name,
        pretrained=False,
        pretrained_cfg=None,
        pretrained_cfg_overlay=None,
        checkpoint_path="",
        cache_dir=None,
        in_chans=3,
        num_classes=6,
        drop_rate=0.0,
        drop_path_rate=None,
        drop_block_rate=None,
        global_pool=None,
        bn_momentum=None,
        bn_eps=None,
        scriptable=False,
        exportable=None,
        no_jit=None,
        img_size=64,
        features_only=False,
        out_indices=None,
    )
    assert model.num_classes == 6


def test_options_that_mean_something():
    assert segzoo.create_model("test_segvit", img_size=160).encoder.pos_embed.shape[1:3] == (10, 10)
    assert segzoo.create_model("test_edaformer", img_size=160, drop_rate=0.3).decoder.dropout.p == 0.3
    assert segzoo.create_model("test_edaformer", False, "").num_classes == 13
    shrunk = segzoo.create_model("test_segvit_shrunk", downsample_block=None, upsample=False)
    assert shrunk.cfg.encoder.downsample_block is None  # None is a value where the config says so
    vit = segzoo.models.vit.ViTConfig(img_size=(64, 64), embed_dim=24, depth=4, num_heads=2, stages=(0, 1, 2, 3))
    model = segzoo.create_model("test_segformer", encoder=vit, img_size=96)
    assert model.cfg.encoder.img_size == (96, 96)


def test_pretrained_cfg_as_argument():
    tagged = segzoo.create_model("segformer_b0", False, "nvidia_cityscapes_1024")
    assert (tagged.name, tagged.num_classes) == ("segformer_b0.nvidia_cityscapes_1024", 19)
    row = segzoo.models.PretrainedCfg(num_classes=4, mean=(0.1, 0.2, 0.3))
    model = segzoo.create_model("test_eft", pretrained_cfg=row)
    assert (model.num_classes, model.pretrained_cfg) == (4, row)
    assert segzoo.create_model("test_eft", pretrained_cfg=segzoo.models.PretrainedCfg(num_classes=4)).num_classes == 4
    assert not segzoo.create_model("test_eft").pretrained_cfg  # a row that records nothing
    model = segzoo.create_model("mit_b0.imagenet", pretrained_cfg={"mean": (0.1, 0.2, 0.3)})
    assert model.pretrained_cfg.mean == (0.1, 0.2, 0.3) and model.pretrained_cfg.dataset == "imagenet"


@pytest.mark.parametrize("wrong", ["weights.pth", Path("weights.pth"), 3])
def test_a_file_in_the_place_of_pretrained_cfg(wrong):
    """The third argument is timm's; it used to be the file."""
    with pytest.raises(segzoo.SegzooError, match=r"is no tag of test_eft; give one, .* a file as checkpoint_path="):
        segzoo.create_model("test_eft", False, wrong)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"scriptable": True}, "no scriptable: .*torch.export"),
        ({"global_pool": "max"}, "no global_pool: .*mean"),
        ({"drop_rate": 0.5}, "no drop_rate: "),
        ({"output_stride": 16}, "no output_stride: "),
        ({"img_sizes": 3}, "no option 'img_sizes'"),
    ],
)
def test_options_that_only_timms_models_have(options, sentence):
    with pytest.raises(segzoo.SegzooError, match=sentence):
        segzoo.create_model("test_eft", **options)


# --- the registry


def test_listing():
    assert segzoo.list_modules() == sorted({segzoo.model_info(name).family for name in segzoo.list_models()})
    assert segzoo.list_models("*", "rtformer") == ["rtformer_base", "rtformer_slim"]
    assert segzoo.list_models("*_t", module="edaformer", include_tags=True) == segzoo.list_pretrained("edaformer_t.*")
    assert segzoo.list_models("segvit_small*", include_tags=True) == ["segvit_small"]  # without weights
    assert segzoo.list_models("edaformer_*", pretrained=True, include_tags=False) == ["edaformer_b", "edaformer_t"]
    for wrong in ("rtformers", True):
        with pytest.raises(
            segzoo.SegzooError, match=r"module is a family's name, one of edaformer, eft.*pretrained=True"
        ):
            segzoo.list_models("*", wrong)


def test_is_model():
    assert segzoo.is_model("edaformer_b") and segzoo.is_model("edaformer_b.ade20k")
    assert not segzoo.is_model("edaformer_b.imagenet22k") and not segzoo.is_model("resnet18")


def test_a_factory_a_name():
    from segzoo.zoo import test_eft as factory

    assert factory is segzoo.model_entrypoint("test_eft") is segzoo.model_entrypoint("test_eft", "eft")
    assert pickle.loads(pickle.dumps(factory)) is factory
    assert (factory.__name__, factory.__module__) == ("test_eft", "segzoo.zoo")
    model = factory(pretrained=False, num_classes=3)
    assert (model.name, model.num_classes) == ("test_eft", 3)
    assert "4,929,914 parameters" in segzoo.model_entrypoint("edaformer_t.scenes").__doc__
    with pytest.raises(segzoo.SegzooError, match="unknown model 'edaformer_x'"):
        segzoo.model_entrypoint("edaformer_x")
    with pytest.raises(segzoo.SegzooError, match="test_eft belongs to eft, not 'mit'"):
        segzoo.model_entrypoint("test_eft", "mit")
    with pytest.raises(ImportError):
        from segzoo.zoo import no_such_model  # noqa: F401


# --- presets


@pytest.mark.parametrize("name", TINY)
def test_three_presets_in_every_family_with_sites(name):
    model = make(name).eval()
    assert {"base", "optimal", "fast"} <= set(model.reduction_presets)
    assert model.set_inference_reduction("base").is_neutral
    macs = {}
    for preset in ("base", "optimal", "fast"):
        model.set_inference_reduction(preset)
        macs[preset] = segzoo.cost(model, (256, 256)).macs
    assert macs["base"] > macs["optimal"] > macs["fast"], macs
    assert set(model.preset_accuracy) == set(model.reduction_presets)
    assert all(
        re.fullmatch("as trained|not measured|published, in the weights rows", text)
        for text in model.preset_accuracy.values()
    )


# --- timm's own tests of its models, on the encoders that are registered in timm

# torchvision's advice where the graphs of the two modes differ, as by stochastic depth.
ALSO_IN_TRAINING = pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing:UserWarning")


@pytest.mark.parametrize("name", IN_TIMM)
def test_forward_and_backward(name):
    model = timm.create_model(name, num_classes=42, **SHALLOW).train()
    outputs = model(IMAGES)
    outputs.mean().backward()
    assert outputs.shape == (2, 42) and not outputs.isnan().any()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", IN_TIMM)
def test_default_cfg(name):
    model = timm.create_model(name, **SHALLOW).eval()
    cfg, state = model.default_cfg, model.state_dict()
    assert f"{cfg['classifier']}.weight" in state and f"{cfg['first_conv']}.weight" in state
    x = torch.zeros(1, *cfg["input_size"])
    assert model.forward_features(x).shape[2:] == cfg["pool_size"]
    model.reset_classifier(0)
    assert model(x).shape == (1, model.num_features)
    model.reset_classifier(0, "")
    assert model(x).shape[2:] == cfg["pool_size"]


@ALSO_IN_TRAINING
@pytest.mark.parametrize("feature_cls", [None, "fx"])
@pytest.mark.parametrize("name", IN_TIMM)
def test_features_of_fx_are_those_of_forward(name, feature_cls):
    options = {"features_only": True, **SHALLOW} | ({"feature_cls": feature_cls} if feature_cls else {})
    model = timm.create_model(name, **options).eval()
    maps = model(IMAGES)
    assert [m.shape[1] for m in maps] == model.feature_info.channels()
    assert [64 // m.shape[2] for m in maps] == model.feature_info.reduction()


@ALSO_IN_TRAINING
@pytest.mark.parametrize("name", IN_TIMM)
def test_fx_forward_and_backward(name):
    """The graph is that of a model with neutral leaves or any others: an attention is one node of it."""
    model = timm.create_model(name, num_classes=5, drop_path_rate=0.0, **SHALLOW).eval()
    graph = timm.models.create_feature_extractor(model, return_nodes=["head"])
    assert torch.equal(graph(IMAGES)["head"], model(IMAGES))
    model.set_inference_reduction(2)
    reduced = model(IMAGES)
    graph.load_state_dict(model.state_dict())
    segzoo.set_inference_reduction(graph, 2)
    assert torch.equal(graph(IMAGES)["head"], reduced)
    graph.train()(IMAGES)["head"].mean().backward()
    assert all(parameter.grad is not None for parameter in graph.parameters())


@pytest.mark.parametrize("name", IN_TIMM)
def test_reduction_is_a_method(name):
    for model in (timm.create_model(name, **SHALLOW), timm.create_model(name, features_only=True, **SHALLOW)):
        assert model.set_inference_reduction("optimal") == segzoo.set_inference_reduction(model, "optimal")
        assert not model.set_inference_reduction("fast").is_neutral
        assert model.set_inference_reduction(None).is_neutral
        if hasattr(model, "set_input_size"):
            model.set_input_size(img_size=96)


@pytest.mark.parametrize("name", TINY)
def test_native_models_export(name):
    """timm's tests ask for TorchScript by scripting, which is not kept; these are."""
    model = make(name).eval()
    with torch.no_grad():
        expected = model(IMAGES)
        torch.testing.assert_close(torch.export.export(model, (IMAGES,)).module()(IMAGES), expected)
