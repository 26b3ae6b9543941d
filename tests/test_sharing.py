"""Sharing: what is saved comes back the same, official files are converted by the strict rules, and nothing is left
by halves. Uploads go through the real client to a Hub stand-in, in a process of its own.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from golden_data import golden_json, golden_state_dict
from hub_stand_in import HubStandIn
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import save_file
from timm.models import PretrainedCfg as TimmCfg
from timm.models._hub import load_model_config_from_path

import segzoo
from segzoo.labels import load_labels
from segzoo.models import SegmentationModel
from segzoo.models.keys import Concat, Drop, Prefixed, Rename, Split
from segzoo.models.vit_weights import MMSEG_RULES
from segzoo.plans import current_plan, reduction_sites
from segzoo.sharing import convert, model_card, publish
from segzoo.sharing.converting import trace
from segzoo.zoo.config import config_to_dict, read_config

TINY = segzoo.list_models("test_*")
SMALL = ("test_", "eft_t", "edaformer_t", "mit_b0", "segformer_b0", "rtformer_slim", "segvit_base")
FILES = ["README.md", "config.json", "model.safetensors"]


def tiers(names: list[str]) -> list:
    """Every name in the slow tier, small models also in the fast one."""
    return [name if name.startswith(SMALL) else pytest.param(name, marks=pytest.mark.slow) for name in names]


def make(name: str = "test_edaformer", seed: int = 0, **options):
    torch.manual_seed(seed)
    model = segzoo.create_model(name, **options).eval()
    # Numbers as after training, so that a forgotten buffer shows.
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked.fill_(7)
    return model


def restore(folder: Path, **options):
    return segzoo.create_model(f"local-dir:{folder}", **options).eval()


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_same(a, b) -> None:
    """Class, options, weights in their dtype, plan, and scores."""
    assert type(a) is type(b)
    assert (a.name, a.num_classes, a.in_chans) == (b.name, b.num_classes, b.in_chans)
    assert a.cfg == b.cfg
    one, other = a.state_dict(), b.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype
        assert torch.equal(tensor, other[name]), name
    assert current_plan(a) == current_plan(b)
    x = torch.randn(1, a.in_chans, 64, 96, generator=torch.Generator().manual_seed(1))
    x = x.to(next(a.parameters()).dtype)
    with torch.no_grad():
        assert torch.equal(a(x), b(x))


# --- round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY)
def test_what_is_saved_comes_back(name, tmp_path):
    model = make(name, in_chans=4, drop_path_rate=0.0)
    model.reset_classifier(6)
    sites = reduction_sites(model)
    if sites:
        model.set_inference_reduction({next(iter(sites)): 2} if "rtformer" in name else 2)
    folder = segzoo.save_pretrained(model, tmp_path / "deep" / "folder")
    assert files(folder) == FILES
    restored = restore(folder)
    assert_same(model, restored)
    assert current_plan(restored) == current_plan(model) and current_plan(restored).is_neutral == (not sites)
    assert restored.cfg.num_classes == 6
    assert getattr(restored, "encoder", restored).cfg.drop_path_rate == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_comes_back(dtype, tmp_path):
    model = make().to(dtype)
    with torch.no_grad():
        model.decoder.classifier.weight += torch.randn_like(model.decoder.classifier.weight)  # all digits are used
    folder = segzoo.save_pretrained(model, tmp_path)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("decoder.classifier.weight").dtype == dtype
    assert_same(model, restore(folder))


def test_models_of_other_options(tmp_path):
    cases = {
        "nested": make(
            encoder={"embed_dims": (8, 16, 24, 48), "depths": (1, 2, 1, 1), "embedding_free": False},
            decoder_depths=(1, 1, 2),
        ),
        "other_encoder": make(encoder=segzoo.models.mit.TEST_MIT),
        "decoder": make("test_segformer", decoder="segformerpp"),
        "headless": make("test_mit", num_classes=0),
        "none_and_bool": make("test_segvit", downsample_block=2, downsample="conv", upsample=True, stages=(1, 3)),
    }
    for case, model in cases.items():
        assert_same(model, restore(segzoo.save_pretrained(model, tmp_path / case)))
    assert read_config(tmp_path / "nested").cfg.encoder.embed_dims == (8, 16, 24, 48)
    assert isinstance(restore(tmp_path / "other_encoder").encoder, segzoo.models.mit.MiT)


def test_channels_last_and_mixed_layouts_come_back(tmp_path):
    model = make().to(memory_format=torch.channels_last)
    assert_same(model, restore(segzoo.save_pretrained(model, tmp_path)))


def test_every_entry_of_a_plan_comes_back(tmp_path):
    model = make("test_segformer")
    plan = {
        "encoder.0": segzoo.Bipartite(0.6, 2),
        "encoder.1": segzoo.Pool(2, "max"),
        "encoder.2": segzoo.OverlapPool(2),
        "encoder.3": segzoo.Neighbour1d(3),
        "encoder.3.q": segzoo.Neighbour2d(2),
    }
    model.set_inference_reduction(plan, during_training=True)
    restored = restore(segzoo.save_pretrained(model, tmp_path))
    assert_same(model, restored)
    during = [leaf.during_training for leaves in reduction_sites(model).values() for leaf in leaves]
    assert during == [leaf.during_training for leaves in reduction_sites(restored).values() for leaf in leaves]
    assert any(during)


def test_a_preset_of_the_name_is_not_set_again(tmp_path):
    with torch.device("meta"):
        model = segzoo.create_model("segformerpp_b0_hq")
    model = model.to_empty(device="cpu")
    for parameter in model.state_dict().values():
        parameter.zero_()
    assert not current_plan(model).is_neutral
    model.set_inference_reduction(None)
    restored = restore(segzoo.save_pretrained(model, tmp_path))
    assert current_plan(restored).is_neutral


def test_saving_into_the_folder_that_it_came_from(tmp_path):
    """The weights of a restored model may be mapped from the very file that is replaced."""
    segzoo.save_pretrained(make(), tmp_path)
    model = restore(tmp_path)
    with torch.no_grad():
        model.decoder.classifier.weight.mul_(2)
    segzoo.save_pretrained(model, tmp_path)
    assert_same(model, restore(tmp_path))
    assert torch.equal(model.decoder.classifier.weight, 2 * make().decoder.classifier.weight)


# --- the files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiers(segzoo.list_models(["*", "test_*"]) + segzoo.list_pretrained()))
def test_config_of_every_name(name, tmp_path):
    """It comes back, and timm reads it: its own keys only, and modules that exist."""
    with torch.device("meta"):
        model = segzoo.create_model(name)
    config = json.loads(json.dumps(config_to_dict(model)))
    saved = read_config(config)
    assert (saved.name, saved.cfg, saved.dtype) == (name, model.cfg, torch.float32)
    modules = dict(model.named_modules())
    assert modules[config["pretrained_cfg"]["classifier"]] is model.get_classifier()
    assert modules[config["pretrained_cfg"]["first_conv"]].weight.shape[1] == 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    row, architecture, _ = load_model_config_from_path(tmp_path)
    assert architecture == name.partition(".")[0]
    timm_cfg = TimmCfg(**row)
    assert timm_cfg.num_classes == model.num_classes
    if model.pretrained_cfg:
        assert tuple(timm_cfg.mean) == model.pretrained_cfg.mean
        assert saved.pretrained_cfg.test_mode == model.pretrained_cfg.test_mode


def test_preprocessing_and_labels_come_back(tmp_path):
    model = make("edaformer_t.cityscapes", encoder=segzoo.models.eft.TEST_EFT, decoder_num_heads=(4, 3, 2))
    folder = segzoo.save_pretrained(model, tmp_path)
    block = json.loads((folder / "config.json").read_text())["segzoo"]
    assert block["labels"] == {"palette": "cityscapes", "names": list(load_labels("cityscapes").classes)}
    assert block["pretrained_cfg"]["crop"] == [1024, 1024]
    row = restore(folder).pretrained_cfg
    for field in ("test_mode", "crop", "stride", "mean", "std", "resize", "test_size", "size_divisor", "label_set"):
        assert getattr(row, field) == getattr(model.pretrained_cfg, field)


def test_names_of_own_classes(tmp_path):
    model = make(num_classes=2)
    overlay = {"dataset": "roofs", "label_names": ["ground", "roof"], "license": "cc-by-4.0"}
    overlay["published"] = [{"value": 71.5, "protocol": "whole image"}]
    folder = segzoo.save_pretrained(model, tmp_path, pretrained_cfg_overlay=overlay)
    restored = restore(folder)
    result = segzoo.predict(restored, torch.zeros(64, 64, 3, dtype=torch.uint8).numpy())
    assert result.label_set.classes == ("ground", "roof")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-4.0"
    assert card.data.datasets == ["roofs"]
    assert card.data.eval_results[0].metric_value == 71.5
    assert "| 71.5 | mIoU | base | whole image | not stated (could not be confirmed) |" in card.text
    assert restored.pretrained_cfg.miou == 71.5
    for wrong in (["roof"], ["roof", "roof"]):
        with pytest.raises(segzoo.SegzooError, match="label_names must be 2 different names"):
            segzoo.save_pretrained(model, folder, pretrained_cfg_overlay={"label_names": wrong})
    with pytest.raises(segzoo.SegzooError, match="'licence'.*license"):
        segzoo.save_pretrained(model, folder, pretrained_cfg_overlay={"licence": "mit"})


def test_card(tmp_path):
    model = segzoo.create_model("edaformer_t.scenes", pretrained=True)
    plan = model.set_inference_reduction("optimal")
    card = ModelCard.load(segzoo.save_pretrained(model, tmp_path) / "README.md")
    assert card.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "segzoo",
        "pipeline_tag": "image-segmentation",
        "tags": ["segzoo", "edaformer_t", "semantic-segmentation"],
        "datasets": ["scenes"],
    }
    assert plan.to_json() in card.text
    for part in ("traffic light", "short side 256, long side 512", "Commercial use: allowed", "hf-hub:OWNER/NAME"):
        assert part in card.text
    # The code in it runs.
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1].replace("hf-hub:OWNER/NAME", f"local-dir:{tmp_path}")
    code = code.replace('"image.jpg"', "numpy.zeros((64, 96, 3), numpy.uint8)").replace("mask.png", f"{tmp_path}/m.png")
    exec(f"import numpy\n{code}", {})
    assert (tmp_path / "m.png").is_file()


def test_card_of_a_keypoint_model(tmp_path):
    model = make("test_segformer_keypoints")
    card = ModelCard.load(segzoo.save_pretrained(model, tmp_path) / "README.md")
    assert card.data.pipeline_tag == "keypoint-detection"
    assert card.data.tags == ["segzoo", "test_segformer_keypoints"]
    assert f"a keypoint model of segzoo {segzoo.__version__}: {model.num_classes} keypoints" in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1].replace("hf-hub:OWNER/NAME", f"local-dir:{tmp_path}")
    code = code.replace('"image.jpg"', "numpy.zeros((64, 96, 3), numpy.uint8)")
    names: dict = {}
    exec("import numpy\n" + code.replace("keypoints.png", f"{tmp_path}/k.png"), names)
    assert names["pose"].xy.shape == (model.num_classes, 2)
    assert (tmp_path / "k_keypoints.json").is_file()


@pytest.mark.parametrize("name", tiers(segzoo.list_pretrained()))
def test_cards_of_every_row(name):
    """The header is valid and says no more than the row knows."""
    with torch.device("meta"):
        model = segzoo.create_model(name)
    row = model.pretrained_cfg
    card = ModelCard(model_card(model, row))
    data = card.data.to_dict()
    if row.license == "unknown":
        assert data["license"] == "unknown"
        assert "No licence is stated" in card.text
    elif row.license == "apache-2.0":
        assert data["license"] == "apache-2.0"
    else:
        assert data["license"] == "other"
        assert data["license_name"] == row.license
        assert data["license_link"] == row.license_url
    assert ("model-index" in data) == any(
        score.metric != "miou_small" and not score.training for score in row.published
    )
    assert {True: "allowed", False: "not allowed", None: "unknown"}[row.commercial_use] in card.text
    kind = "image-segmentation" if isinstance(model, SegmentationModel) else "image-"
    assert data["pipeline_tag"].startswith(kind)
    if row.test_mode == "slide":
        assert f"sliding window {row.crop[0]}, {row.crop[1]}, stride {row.stride[0]}" in card.text


def test_claims_that_may_no_longer_hold_are_left_out(tmp_path):
    tiny = {"encoder": segzoo.models.mit.TEST_MIT, "decoder_dim": 16}
    tagged = make("segformer_b0.nvidia_ade20k_512", **tiny)
    assert tagged.pretrained_cfg.miou is not None
    row = read_config(segzoo.save_pretrained(tagged, tmp_path / "tagged")).pretrained_cfg
    assert (row.published, row.dataset, row.license) == ((), "ade20k", tagged.pretrained_cfg.license)
    tagged.reset_classifier(7)
    row = read_config(segzoo.save_pretrained(tagged, tmp_path / "renewed")).pretrained_cfg
    assert (row.published, row.dataset, row.label_set, row.license) == ((), "", None, tagged.pretrained_cfg.license)
    row = read_config(segzoo.save_pretrained(make("segformer_b0", **tiny), tmp_path / "untagged")).pretrained_cfg
    assert (row.dataset, row.license, row.commercial_use, row.origin) == ("", "unknown", None, "")


# --- refusals -------------------------------------------------------------------------------------------------------


def test_models_that_could_not_be_restored(tmp_path):
    with torch.device("meta"):
        meta = segzoo.create_model("test_edaformer")
    mixed = make()
    mixed.decoder.half()
    altered = make()
    altered.decoder.classifier = torch.nn.Conv2d(32, 13, 3)
    nameless = make()
    nameless.name = ""
    cases = {
        "meta device": meta,
        "float16 and float32": mixed,
        "folded or altered": segzoo.fold(make()),
        "does not have the parameters": altered,
        "no registered name": nameless,
        r"\.encoder": segzoo.create_model("test_eft", features_only=True),
        "not a Linear": torch.nn.Linear(1, 1),
    }
    for message, model in cases.items():
        with pytest.raises(segzoo.SegzooError, match=message):
            segzoo.save_pretrained(model, tmp_path / "folder")
        assert files(tmp_path) == [], message


def test_directories_that_hold_something_else(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(segzoo.SegzooError, match="file is a file"):
        segzoo.save_pretrained(make(), tmp_path / "file")
    with pytest.raises(segzoo.SegzooError, match="not empty and no segzoo folder.*file"):
        segzoo.save_pretrained(make(), tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(segzoo.SegzooError, match="no segzoo folder"):
        segzoo.save_pretrained(make(), tmp_path)
    assert files(tmp_path) == ["config.json", "file"]
    folder = tmp_path / "folder"
    segzoo.save_pretrained(make(), folder)
    (folder / "LICENSE").write_text("mine")
    segzoo.save_pretrained(make(seed=1), folder)
    assert files(folder) == ["LICENSE", *FILES]
    assert_same(make(seed=1), restore(folder))


@pytest.mark.parametrize("failing", ["safetensors", "config", "unwritable"])
def test_nothing_is_left_by_halves(failing, tmp_path, monkeypatch):
    old = make()
    segzoo.save_pretrained(old, tmp_path / "old")
    if failing == "safetensors":
        monkeypatch.setattr("segzoo.sharing.saving.save_file", raiser(OSError(28, "No space left on device")))
    elif failing == "config":
        monkeypatch.setattr(Path, "write_text", raiser(OSError(28, "No space left on device")))
    else:
        monkeypatch.setattr("tempfile.mkdtemp", raiser(PermissionError(13, "Permission denied")))
    for folder in ("old", "new/deep"):
        with pytest.raises(segzoo.SegzooError, match=rf"{folder} cannot be written.*(No space|denied)"):
            segzoo.save_pretrained(make(seed=1), tmp_path / folder)
    monkeypatch.undo()
    assert files(tmp_path) == ["old"]
    assert files(tmp_path / "old") == FILES
    assert_same(old, restore(tmp_path / "old"))


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_no_moment_has_the_config_of_one_model_beside_the_weights_of_another(moved, tmp_path, monkeypatch):
    """Killed between two renames: `moved` of the three files have come to their place."""
    segzoo.save_pretrained(make(), tmp_path)
    rename, done = Path.replace, []

    def killed(self: Path, target: Path) -> Path:
        if len(done) == moved:
            raise KeyboardInterrupt
        done.append(target)
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", killed)
        segzoo.save_pretrained(make(seed=1), tmp_path)
    assert "config.json" not in files(tmp_path)
    with pytest.raises(segzoo.SegzooError, match="config.json"):
        restore(tmp_path)


def raiser(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


def edited(tmp_path: Path, edit) -> Path:
    folder = segzoo.save_pretrained(make(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("segzoo"), 'no "segzoo" block'),
        (lambda c: c.update(segzoo=[1]), 'no "segzoo" block'),
        (lambda c: c["segzoo"].update(version=2, segzoo_version="9.0"), "version 2 .*segzoo 9.0.*upgrade"),
        (lambda c: c["segzoo"].update(name="test_edaformr"), "unknown model 'test_edaformr'.*test_edaformer"),
        (lambda c: c["segzoo"].update(name=None), "unknown model None"),
        (lambda c: c.update(architecture="eft_t"), "architecture is 'eft_t'"),
        (lambda c: c["segzoo"].update(dtype="int8"), "dtype must be one of float32.*not 'int8'"),
        (lambda c: c["segzoo"].pop("cfg"), "segzoo.cfg is no known config"),
        (lambda c: c["segzoo"]["cfg"].update(type="Popen"), "segzoo.cfg is no known config.*'Popen'"),
        (lambda c: c["segzoo"]["cfg"].update(type="EFTConfig"), "segzoo.cfg has an unknown field"),
        (lambda c: c["segzoo"].update(cfg={"type": "EFTConfig"}), "is a EFTConfig, but test_edaformer has another"),
        (lambda c: c["segzoo"]["cfg"].update(depthes=[1]), "unknown field 'depthes'"),
        (lambda c: c["segzoo"]["cfg"].update(decoder_dim="32"), "segzoo.cfg.decoder_dim is '32'"),
        (lambda c: c["segzoo"]["cfg"].update(decoder_dim=True), "segzoo.cfg.decoder_dim is True"),
        (lambda c: c["segzoo"]["cfg"].update(decoder_depths=[1, "2", 1]), "segzoo.cfg.decoder_depths"),
        (lambda c: c["segzoo"]["cfg"]["encoder"].update(depths=3), "segzoo.cfg.encoder.depths is 3"),
        (lambda c: c["segzoo"]["cfg"].update(encoder=None), "segzoo.cfg.encoder is None"),
        (lambda c: c.update(num_classes=5), "num_classes is 5, but segzoo.cfg says 13"),
        (lambda c: c["segzoo"].update(in_chans=1), "in_chans is 1, but segzoo.cfg says 3"),
        (lambda c: c["segzoo"].update(pretrained_cfg={"url": "http://x"}), "unknown field 'url'"),
        (lambda c: c["segzoo"].update(pretrained_cfg={"crop": [1]}), "pretrained_cfg.crop is"),
        (lambda c: c["segzoo"].update(pretrained_cfg={"resize": "no"}), "segzoo.pretrained_cfg: resize .*not 'no'"),
        (lambda c: c["segzoo"].update(reduction=3), "reduction is 3, not a plan"),
        (lambda c: c["segzoo"].update(reduction={"encoder.0": "x"}), "segzoo.reduction: encoder.0"),
        (lambda c: c["segzoo"].update(reduction={"encoder.7": 2}), "encoder.7"),
        (lambda c: c["segzoo"]["cfg"]["encoder"].update(depths=[1]), "depths must have 4 entries, one a stage"),
    ],
)
def test_bad_configs(tmp_path, edit, message):
    folder = edited(tmp_path, edit)
    with pytest.raises(segzoo.SegzooError, match=message) as refusal:
        restore(folder)
    assert str(folder) in str(refusal.value)


def row_with(**fields):
    return lambda config: config["segzoo"].update(pretrained_cfg=fields)


def encoder_with(**fields):
    return lambda config: config["segzoo"]["cfg"]["encoder"].update(fields)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (row_with(size_divisor=0), "size_divisor of a weights row must be from 1 to 1024, not 0"),
        (row_with(size_divisor=100_000), "size_divisor .* not 100000"),
        (row_with(mean=[]), "mean of a weights row must be a finite number a channel, not "),
        (row_with(mean=[0.5]), "std of a weights row must have 1 numbers, as mean has"),
        (row_with(std=[]), "std of a weights row must be a finite number"),
        (row_with(std=[0, 0, 0]), "std of a weights row must be positive"),
        (row_with(std=[1, 1, float("inf")]), "Infinity is no number of JSON"),
        (row_with(mean=[0, 0, float("nan")]), "NaN is no number of JSON"),
        (row_with(mean=[0, 0, 10**400]), "mean of a weights row"),
        (row_with(crop=[0, 0], stride=[0, 0]), r"crop of a weights row must be from 1 to 65536, not \(0, 0\)"),
        (row_with(stride=[-1, 3]), "stride of a weights row"),
        (row_with(test_size=[10**9, 10**9]), "test_size of a weights row must be from 1 to 65536"),
        (row_with(input_size=[-8, 8]), "input_size"),
        (row_with(test_min_side=0), "test_min_side"),
        (row_with(label_set="nosuch"), "label_set of a weights row must be one of .*ade20k"),
        (row_with(miou=101.0), "value of a published score must be in percent"),
        (encoder_with(num_heads=[0, 1, 1, 1]), "num_heads"),
        (encoder_with(depths=[100_000] * 4), "depths must be finite and at most 65536"),
        (encoder_with(depths=[200, 200, 200, 200]), "depths must be at most 512 in all"),
        (encoder_with(embed_dims=[10**9] * 4), "embed_dims must be finite and at most 65536"),
        (encoder_with(mlp_ratio=1e300), "mlp_ratio must be finite"),
        (lambda c: c["segzoo"].update(labels=json.loads("[" * 300 + "]" * 300)), "nested more than 32 deep"),
        (lambda c: c["segzoo"].update(labels="x" * (3 << 20)), "more than 2,097,152 bytes"),
    ],
)
def test_configs_that_cannot_be_meant(tmp_path, edit, message):
    folder = edited(tmp_path, edit)
    with pytest.raises(segzoo.zoo.checkpoint.WeightsError, match=message) as refusal:
        restore(folder)
    assert str(folder) in str(refusal.value)
    assert len(str(refusal.value)) < 1000


def test_sizes_are_compared_before_memory_is_taken(tmp_path):
    """A config within every range whose parameters would take 100 GB, beside the file of a tiny model."""
    folder = edited(tmp_path, encoder_with(embed_dims=[24_576] * 4, num_heads=[1] * 4))
    with pytest.raises(segzoo.zoo.checkpoint.WeightsError, match="mis-shaped"):
        restore(folder)


def test_files_that_are_no_config(tmp_path):
    segzoo.save_pretrained(make(), tmp_path)
    for text in ("", "{", "[1, 2]", '"text"', '{"segzoo": ' + "[" * 100_000, "\ud800"):
        (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(segzoo.SegzooError, match=re.escape(str(tmp_path / "config.json"))):
            restore(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(segzoo.SegzooError, match=re.escape(str(tmp_path))):
        restore(tmp_path)


def test_an_older_config_lacks_fields(tmp_path):
    """What a later version adds has the default that means what models did before."""

    def edit(config):
        del config["segzoo"]["cfg"]["dropout"], config["segzoo"]["reduction_during_training"]

    assert_same(make(), restore(edited(tmp_path, edit)))


# --- conversion -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A checkpoint as EDAFormer's authors save theirs."""
    state = golden_state_dict(golden_json("edaformer_t_ade")["state_dict"])
    path = tmp_path_factory.mktemp("official") / "edaformer_t.pth"
    torch.save({"meta": {"epoch": 160}, "state_dict": {k: v.float() for k, v in state.items()}, "optimizer": {}}, path)
    return path


def test_convert(official, tmp_path):
    report = convert(official, "edaformer_t.ade20k", tmp_path / "out")
    expected = segzoo.create_model("edaformer_t.ade20k").eval()
    segzoo.load_weights(expected, official)
    assert_same(expected, restore(tmp_path / "out"))
    direct = segzoo.create_model("edaformer_t", checkpoint_path=tmp_path / "out" / "model.safetensors").eval()
    assert torch.equal(direct.decoder.classifier.weight, expected.decoder.classifier.weight)

    record = golden_json("edaformer_t_ade")["state_dict"]
    assert report.layout == "official"
    assert list(report.loaded) == list(expected.state_dict())
    used = [key for keys in report.loaded.values() for key in keys]
    assert sorted(used + list(report.dropped)) == sorted(key for key, _ in record)
    assert set(report.dropped) == {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    assert report.loaded["decoder.classifier.bias"] == ("decode_head.linear_pred.bias",)
    assert report.defaulted == ()
    text = str(report)
    assert "decode_head.conv_seg.bias dropped: mmseg's classifier" in text
    assert "decode_head.linear_pred.bias -> decoder.classifier.bias" in text
    assert f"{len(record) - 2} loaded" in text
    assert json.loads(json.dumps(report.to_dict()))["counts"]["dropped"] == 2
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "unknown"


OTHER_LAYOUTS = [
    ("rtformer_slim.cityscapes", "rtformer_slim_cityscapes", None),
    ("segformer_b0.nvidia_cityscapes_1024", "segformer_b0", None),
    ("segformer_b0.nvidia_ade20k_512", "manifests/hf_segformer_manifests_v4_hub", "B0"),
    pytest.param("segvit_base.ade20k", "segvit_b_ade_s128", None, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "golden", "size"), OTHER_LAYOUTS)
def test_every_key_of_other_layouts_is_accounted_for(name, golden, size, tmp_path):
    record = golden_json(golden)
    manifest = (record["models"][size] if size else record)["state_dict"]
    path = tmp_path / "official.safetensors"
    save_file({key: tensor.float().contiguous() for key, tensor in golden_state_dict(manifest).items()}, path)
    report = convert(path, name, tmp_path / "out")
    used = {key for keys in report.loaded.values() for key in keys}
    assert used | set(report.dropped) == {key for key, _ in manifest}
    assert not used & set(report.dropped)
    assert all(report.dropped.values())
    model = restore(tmp_path / "out")
    assert set(report.loaded) | set(report.defaulted) == set(model.state_dict())
    expected = segzoo.create_model(name).eval()
    segzoo.load_weights(expected, path)
    assert_same(expected, model)


def test_the_trace_agrees_with_the_rules():
    """Also where a tensor is cut or several are joined, under a prefix, and where names collide."""
    rules = [
        Prefixed(
            "net.", "enc.", [Rename(r"^old\.", "new."), Drop(r"\.spare$", "spare"), Split(r"kv$", [("k", 1), ("v", 1)])]
        ),
        Concat([r"\.q$", r"\.k$"], ".qk"),
        Drop(r"^head\.", "head"),
    ]
    state = {"net.old.q": 2, "net.old.kv": 4, "net.x.spare": 1, "head.w": 3, "other": 1}
    state = {key: torch.empty(size, device="meta") for key, size in state.items()}
    made, dropped = trace(state, rules)
    assert made == {"enc.new.qk": ("net.old.q", "net.old.kv"), "enc.new.v": ("net.old.kv",), "other": ("other",)}
    assert dropped == {"net.x.spare": "spare", "head.w": "head"}
    token = {"cls_token": torch.empty(1, 1, 8, device="meta"), "pos_embed": torch.empty(1, 5, 8, device="meta")}
    made_vit, dropped_vit = trace(token, MMSEG_RULES)
    assert (made_vit, list(dropped_vit)) == ({"pos_embed": ("pos_embed",)}, ["cls_token"])
    for rule in rules:
        state = rule(state)
    assert set(state) == set(made)
    with pytest.raises(segzoo.SegzooError, match="a.w and b.w both become c.w"):
        trace(dict.fromkeys(("a.w", "b.w"), torch.empty(1, device="meta")), [Rename(r"^[ab]", "c")])


def test_conversions_that_are_refused(official, tmp_path):
    state = torch.load(official, weights_only=True)["state_dict"]
    out = tmp_path / "out"
    with pytest.raises(segzoo.SegzooError, match="'edaformer_t' names no weights; give variant.tag"):
        convert(official, "edaformer_t", out)
    with pytest.raises(segzoo.SegzooError, match="no weights tagged 'ade'; its tags: ade20k"):
        convert(official, "edaformer_t.ade", out)
    with pytest.raises(segzoo.SegzooError, match="mis-shaped: decoder.classifier.weight"):
        convert(official, "edaformer_t.cityscapes", out)
    with pytest.raises(segzoo.SegzooError, match=f"{re.escape(str(official))} does not fit segvit_base"):
        convert(official, "segvit_base.ade20k", out)
    for change in ({"surplus": torch.zeros(1)}, {"decode_head.linear_pred.bias": torch.zeros(3)}):
        torch.save({**state, **change}, tmp_path / "changed.pth")
        with pytest.raises(segzoo.SegzooError, match="left over: surplus|mis-shaped: decoder.classifier.bias"):
            convert(tmp_path / "changed.pth", "edaformer_t.ade20k", out)
    assert not out.exists()


def test_a_segzoo_file_is_converted_as_it_is(tmp_path):
    model = make("edaformer_t.scenes", seed=3)
    save_file(model.state_dict(), tmp_path / "own.safetensors")
    report = convert(tmp_path / "own.safetensors", "edaformer_t.scenes", tmp_path / "out")
    assert (report.layout, report.renamed, report.dropped) == ("segzoo", {}, {})
    assert_same(model, restore(tmp_path / "out"))


# --- uploads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    with HubStandIn() as hub:
        yield hub


def client(hub: HubStandIn, tmp_path: Path, *command: object, token: str | None = HubStandIn.token, **env: str):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        env=hub.environment(tmp_path / "cache", token=token, **env),
        timeout=300,
    )


# The client sends large files in a way that its own transport warns of.
STRICT = ("-W", "error", "-W", "ignore:Use 'content=<...>' to upload:DeprecationWarning")


def python(hub: HubStandIn, tmp_path: Path, code: str, **env: str) -> str:
    result = client(hub, tmp_path, *STRICT, "-c", textwrap.dedent(code), **env)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_push_and_pull(hub, tmp_path):
    python(
        hub,
        tmp_path,
        """
        import torch, segzoo

        def model(seed):
            torch.manual_seed(seed)
            model = segzoo.create_model("test_segformer", num_classes=4, in_chans=5).half().eval()
            model.set_inference_reduction({"encoder.0": segzoo.Bipartite(0.5, 2)})
            return model

        def same(a, b):
            states = a.state_dict(), b.state_dict()
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(t, states[1][k]) and t.dtype == states[1][k].dtype for k, t in states[0].items())
            assert a.cfg == b.cfg and repr(a) == repr(b.eval())

        first = segzoo.push_to_hub(model(0), "org/tiny", private=True)
        same(model(0), segzoo.create_model("hf-hub:org/tiny"))
        second = segzoo.push_to_hub(model(1), "org/tiny", commit_message="better")
        assert first.commit != second.commit
        same(model(0), segzoo.create_model(f"hf-hub:org/tiny@{first.commit}"))
        same(model(1), segzoo.create_model(f"hf-hub:org/tiny@{second.commit}"))
        third = segzoo.push_to_hub(model(2), "org/tiny", revision="trial")
        same(model(2), segzoo.create_model("hf-hub:org/tiny@trial"))
        same(model(1), segzoo.create_model("hf-hub:org/tiny"))
        """,
    )
    repository = hub.repositories["org/tiny"]
    assert repository.private
    tree = repository.commits[repository.refs["main"]]
    assert sorted(tree) == [".gitattributes", *FILES]
    card = ModelCard(tree["README.md"].decode())
    assert 'create_model("hf-hub:org/tiny")' in card.text
    assert "Bipartite" in card.text
    assert card.data.library_name == "segzoo"


@pytest.mark.slow
def test_convert_publish_and_load_by_name(hub, official, tmp_path):
    """What an organisation does once makes the plain name work for everyone who sets its namespace."""
    out = tmp_path / "out"
    converted = client(hub, tmp_path, "-m", "segzoo", "convert", official, "edaformer_t.ade20k", "-o", out, "--json")
    assert converted.returncode == 0, converted.stderr
    assert json.loads(converted.stdout)["counts"]["dropped"] == 2
    assert not hub.requests
    (out / "LICENSE.txt").write_text("terms")
    (out / "notes.txt").write_text("private")
    published = client(hub, tmp_path, "-m", "segzoo", "publish", out, "org/edaformer_t.ade20k", "--json")
    assert published.returncode == 0, published.stderr
    assert "no licence is stated" in published.stderr
    commit = json.loads(published.stdout)["commit"]
    assert sorted(hub.repositories["org/edaformer_t.ade20k"].commits[commit]) == sorted(
        [".gitattributes", "LICENSE.txt", *FILES]
    )
    code = f"""
        import torch, segzoo
        expected = segzoo.create_model("edaformer_t.ade20k").eval()
        segzoo.load_weights(expected, {str(official)!r})
        model = segzoo.create_model("edaformer_t.ade20k", pretrained=True).eval()
        x = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            assert torch.equal(model(x), expected(x))
    """
    python(hub, tmp_path, code, SEGZOO_HUB_NAMESPACE="org")
    hub.reset()
    refused = client(
        hub, tmp_path, "-c", textwrap.dedent(code), HF_HUB_OFFLINE="1"
    )  # the default is their authors' Drive
    assert "HF_HUB_OFFLINE" in refused.stderr and "drive.google.com" in refused.stderr
    assert not hub.requests


@pytest.mark.slow
def test_uploads_that_fail(hub, tmp_path):
    folder = segzoo.save_pretrained(make(), tmp_path / "folder")

    def refused(*words: str, repo: str = "org/tiny", token: str | None = HubStandIn.token, args=(), **env: str) -> None:
        result = client(hub, tmp_path, "-m", "segzoo", "publish", folder, repo, *args, token=token, **env)
        assert result.returncode == 2, result.stderr
        assert "Traceback" not in result.stderr
        for word in words:
            assert word in result.stderr

    refused("org/tiny was not uploaded", "hf auth login", token=None)
    refused("org/tiny was not uploaded", "hf auth login", token="hf_wrong")
    refused("unset HF_HUB_OFFLINE", HF_HUB_OFFLINE="1")
    refused("owner/name", repo="not/a/name")
    assert not hub.repositories
    hub.fail("POST .*/commit/", status=500, times=None)
    refused("org/tiny was not uploaded", "try again")
    hub.reset()
    hub.add("org/public", {"README.md": b"mine"})
    refused("is public, so nothing was uploaded", repo="org/public", args=["--private"])
    assert hub.repositories["org/public"].commits[hub.repositories["org/public"].refs["main"]] == {"README.md": b"mine"}
    # And after all that it works.
    assert client(hub, tmp_path, "-m", "segzoo", "publish", folder, "org/tiny").returncode == 0
    assert set(FILES) < set(hub.repositories["org/tiny"].commits[hub.repositories["org/tiny"].refs["main"]])


def test_folders_that_are_not_published(tmp_path):
    folder = segzoo.save_pretrained(make(), tmp_path / "folder")
    weights = (folder / "model.safetensors").read_bytes()
    other = segzoo.save_pretrained(make(num_classes=4), tmp_path / "other")
    for damaged, message in (
        (weights[: len(weights) // 2], "cannot be read"),
        ((other / "model.safetensors").read_bytes(), "does not have the parameters of test_edaformer"),
    ):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(segzoo.SegzooError, match=message):
            publish(folder, "org/name")
    for name, message in (("README.md", "README.md: no such file"), ("config.json", "config.json: no such file")):
        (other / name).unlink()
        with pytest.raises(segzoo.SegzooError, match=message):
            publish(other, "org/name")
