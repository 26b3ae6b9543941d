"""Loading: every accepted wrapping, every refusal, and the adaption to other classes and channels."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
import re

import numpy as np
import pytest
import torch
from golden_data import golden_json, golden_state_dict
from safetensors.torch import save_file

import segzoo
from segzoo.zoo.checkpoint import build_with_weights


def fresh(name: str = "test_edaformer", seed: int = 0, **options):
    torch.manual_seed(seed)
    return segzoo.create_model(name, **options).eval()


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture
def trained():
    return fresh(seed=1)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
def test_files(trained, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(trained.state_dict(), path)
    else:
        torch.save(trained.state_dict(), path)
    for source in (path, str(path)):
        model = fresh()
        assert not same(model, trained)
        segzoo.load_weights(model, source)
        assert same(model, trained)
    assert same(segzoo.create_model("test_edaformer", checkpoint_path=path), trained)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "meta": {"epoch": 3}},
        lambda state: {"model": state},
        lambda state: {"state_dict": fresh().state_dict(), "state_dict_ema": state, "epoch": 3},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {"state_dict": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
        lambda state: {f"module._orig_mod.{key}": value for key, value in state.items()},
        lambda state: {key: value.numpy() for key, value in state.items()},
    ],
)
def test_wrappings(trained, wrap):
    model = fresh()
    segzoo.load_weights(model, wrap(trained.state_dict()))
    assert same(model, trained)


def test_a_checkpoint_with_the_options_of_its_training(trained, tmp_path):
    options = argparse.Namespace(model="test_edaformer", lr=1e-3, betas=(0.9, 0.999), resume=None)
    path = tmp_path / "checkpoint-3.pth.tar"
    torch.save({"epoch": 3, "state_dict": trained.state_dict(), "args": options}, path)
    torch.serialization.add_safe_globals([argparse.Namespace])  # by the user, too: it stays
    assert same(segzoo.create_model("test_edaformer", checkpoint_path=path), trained)
    assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_models_that_nothing_can_be_loaded_into(trained):
    state = trained.state_dict()
    for model, weights, message in (
        (torch.nn.DataParallel(fresh()), state, r"not a DataParallel; pass its \.module"),
        (torch.nn.Linear(2, 2), state, "a model from create_model, not a Linear$"),
        (fresh(), None, "weights must be a file or a mapping.*not a NoneType"),
    ):
        with pytest.raises(segzoo.SegzooError, match=message):
            segzoo.load_weights(model, weights)


def test_a_model_on_the_meta_device_is_only_checked(trained, caplog):
    with torch.device("meta"):
        model = segzoo.create_model("test_edaformer")
    segzoo.load_weights(model, trained.state_dict())
    assert "test_edaformer is on the meta device: names and shapes fit, but nothing could be loaded" in caplog.text
    caplog.clear()
    segzoo.load_weights(model, model.state_dict())  # shapes for shapes: nothing is lost
    assert not caplog.text


def test_a_compiled_model_is_its_original(trained):
    model = fresh()
    segzoo.load_weights(torch.compile(model), torch.compile(trained).state_dict())
    assert same(model, trained)


@pytest.mark.parametrize("how", ["checkpoint_path", "load_weights"])
def test_tied_tensors_of_a_file_are_parameters_of_their_own(trained, tmp_path, how):
    """Two names for one tensor in a .pth: training one parameter must not move the other."""
    names = ("encoder.stages.0.norm.weight", "encoder.stages.0.blocks.0.norm1.weight")
    shared = torch.randn(8)
    path = tmp_path / "tied.pth"
    torch.save({**trained.state_dict(), **dict.fromkeys(names, shared)}, path)
    if how == "checkpoint_path":
        model = segzoo.create_model("test_edaformer", checkpoint_path=path)
    else:
        segzoo.load_weights(model := fresh(), path)
    one, other = (model.get_parameter(name) for name in names)
    assert torch.equal(one, shared) and torch.equal(other, shared)
    with torch.no_grad():
        one.add_(1)
    assert torch.equal(other, shared)


@pytest.mark.parametrize("keep_mapped", [False, True])
def test_tied_tensors_of_a_file_stay_apart_when_assigned(trained, tmp_path, keep_mapped):
    """As files from a cache are read, whose tensors become the model's own."""
    names = ("encoder.stages.0.norm.weight", "encoder.stages.0.blocks.0.norm1.weight")
    path = tmp_path / "tied.pth"
    torch.save({**trained.state_dict(), **dict.fromkeys(names, torch.randn(8))}, path)
    model = build_with_weights(fresh, path, keep_mapped=keep_mapped)
    one, other = (model.get_parameter(name) for name in names)
    assert torch.equal(one, other)
    before = other.clone()
    with torch.no_grad():
        one.add_(1)
    assert torch.equal(other, before)


def test_double_weights_lose_nothing():
    record = golden_json("eft_t_encoder")
    state = golden_state_dict(record["state_dict"])
    model = segzoo.create_model("eft_t", num_classes=0).double()
    segzoo.load_weights(model, state)
    assert torch.equal(model.stages[0].blocks[0].mlp.fc1.weight, state["block1.0.mlp.fc1.weight"])


def test_strictness_names_the_keys(trained):
    state = trained.state_dict()
    before = fresh()
    model = fresh()
    cases = {
        "missing: encoder.stages.0.norm.weight": {
            k: v for k, v in state.items() if k != "encoder.stages.0.norm.weight"
        },
        "left over: surplus": {**state, "surplus": torch.zeros(1)},
        r"mis-shaped: decoder.fuse.bn.bias is \(3,\), needs \(32,\)": {**state, "decoder.fuse.bn.bias": torch.zeros(3)},
        "is no tensor": {**state, "decoder.fuse.bn.bias": "text"},
        "it is empty": {},
    }
    for message, wrong in cases.items():
        with pytest.raises(segzoo.SegzooError, match=message):
            segzoo.load_weights(model, wrong)
        assert same(model, before)


def test_weights_of_another_model(tmp_path):
    path = tmp_path / "eft.safetensors"
    save_file(fresh("test_eft").state_dict(), path)
    with pytest.raises(segzoo.SegzooError, match=re.escape(str(path))):
        segzoo.load_weights(fresh(), path)


def test_other_classes_renew_the_classifier(trained, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    model = segzoo.create_model("test_edaformer", checkpoint_path=path, num_classes=4)
    assert model.get_classifier().out_channels == 4
    assert torch.equal(model.decoder.fuse.conv.weight, trained.decoder.fuse.conv.weight)
    assert torch.equal(
        segzoo.create_model("test_edaformer", checkpoint_path=path, num_classes=13).decoder.classifier.weight,
        trained.decoder.classifier.weight,
    )
    save_file(fresh(num_classes=4).state_dict(), path)
    with pytest.raises(segzoo.SegzooError, match="num_classes="):
        segzoo.create_model("test_edaformer", checkpoint_path=path)


def test_other_channels_keep_the_response(trained, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(trained.state_dict(), path)
    grey = torch.randn(1, 1, 32, 32)
    single = segzoo.create_model("test_edaformer", checkpoint_path=path, in_chans=1).eval()
    double = segzoo.create_model("test_edaformer", checkpoint_path=path, in_chans=6).eval()
    # The LayerNorm behind the convolution hides a wrong scale of the weight, so the weight itself is compared.
    weight = "encoder.stages.0.patch_embed.proj.weight"
    rgb = trained.state_dict()[weight]
    torch.testing.assert_close(single.state_dict()[weight], rgb[:, :1] + rgb[:, 1:2] + rgb[:, 2:])
    torch.testing.assert_close(double.state_dict()[weight], torch.cat([rgb, rgb], dim=1) / 2)
    four = segzoo.create_model("test_edaformer", checkpoint_path=path, in_chans=4).state_dict()[weight]
    torch.testing.assert_close(four, torch.cat([rgb, rgb[:, :1]], dim=1) * 3 / 4)
    with torch.no_grad():
        expected = trained(grey.expand(-1, 3, -1, -1))
        torch.testing.assert_close(single(grey), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(double(grey.expand(-1, 6, -1, -1)), expected, rtol=1e-4, atol=1e-5)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_nothing_in_a_pickle_is_run(tmp_path, suffix):
    executed = tmp_path / "executed"
    for number, write in enumerate((torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)))):
        path = tmp_path / f"evil{number}{suffix}"
        write({"state_dict": {"a": Malicious(executed)}}, path)
        with pytest.raises(segzoo.SegzooError, match=path.name):
            segzoo.load_weights(fresh(), path)
    assert not executed.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(trained, tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save(trained.state_dict(), path)
    else:
        save_file(trained.state_dict(), path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:20], b"no weights at all", b""):
        path.write_bytes(data)
        with pytest.raises(segzoo.SegzooError, match=path.name):
            segzoo.load_weights(fresh(), path)
    torch.save(torch.zeros(3), tmp_path / "tensor.pth")
    with pytest.raises(segzoo.SegzooError, match="state dict"):
        segzoo.load_weights(fresh(), tmp_path / "tensor.pth")
    with pytest.raises(segzoo.SegzooError, match="no such file"):
        segzoo.load_weights(fresh(), tmp_path / "none")
    with pytest.raises(segzoo.SegzooError, match="directory"):
        segzoo.load_weights(fresh(), tmp_path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pdparams"])
def test_files_that_cannot_be_read(suffix, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"whole")
    with monkeypatch.context() as patch, pytest.raises(segzoo.SegzooError, match=r"cannot be read \(Permission denied"):
        patch.setattr(pathlib.Path, "open", refuse)
        segzoo.load_weights(fresh(), path)
    with pytest.raises(segzoo.SegzooError, match=r"cannot be read \(File name too long"):
        segzoo.load_weights(fresh(), tmp_path / f"{'x' * 300}{suffix}")


def test_unpublished_rows_say_how_to_get_them():
    with pytest.raises(segzoo.SegzooError, match="edaformer_mit_b0.ade20k are not published.*train the model"):
        segzoo.create_model("edaformer_mit_b0", pretrained=True)
    with pytest.raises(segzoo.SegzooError, match="has no weights"):
        segzoo.create_model("test_edaformer", pretrained=True)


def test_bundled_default():
    model = segzoo.create_model("edaformer_t", pretrained=True)
    assert model.name == "edaformer_t.scenes"
    assert model.num_classes == 13
    assert "edaformer_t.scenes" in segzoo.list_models(pretrained=True)
    other = segzoo.create_model("edaformer_t", pretrained=True, num_classes=4)
    assert other.num_classes == other.get_classifier().out_channels == 4
    assert np.isfinite(model.decoder.classifier.weight.detach().numpy()).all()


def test_names_and_tags():
    assert segzoo.list_models("edaformer_?") == ["edaformer_b", "edaformer_t"]
    assert segzoo.list_models(["eft_*", "edaformer_t"], exclude_filters="*_b") == ["edaformer_t", "eft_t"]
    assert segzoo.create_model("test_edaformer").num_classes == 13
    with torch.device("meta"):
        city = segzoo.create_model("edaformer_t.cityscapes")
    assert city.num_classes == 19
    assert city.pretrained_cfg.test_mode == "slide"
    with pytest.raises(segzoo.SegzooError, match="edaformer_t"):
        segzoo.create_model("edaformer-t")
    with pytest.raises(segzoo.SegzooError, match="its tags: .*ade20k"):
        segzoo.create_model("edaformer_t.ade")
    with pytest.raises(segzoo.SegzooError, match="encoder.*depth.*depths"):
        segzoo.create_model("test_edaformer", encoder={"depth": 3})


def test_overlay():
    with torch.device("meta"):
        model = segzoo.create_model("edaformer_t.ade20k", pretrained_cfg_overlay={"mean": (0.5, 0.5, 0.5)})
    assert model.pretrained_cfg.mean == (0.5, 0.5, 0.5)
    for overlay, message in (
        ({"meen": 1}, "meen.*mean"),
        ({"resize": "keep ratio"}, "resize of a weights row must be one of keep_ratio, exact, none, not 'keep ratio'"),
        ({"test_mode": "tiles"}, "whole, slide, not 'tiles'"),
        ({"state": "file"}, "bundled, hub, url, drive, unpublished, not 'file'"),
        ({"label_names": ("road", "road")}, "label_names must be 2 different names"),
    ):
        with pytest.raises(segzoo.SegzooError, match=message):
            segzoo.create_model("test_edaformer", pretrained_cfg_overlay=overlay)


@pytest.mark.parametrize(
    ("name", "least", "wrong"),
    [
        ("test_edaformer", 1, 0),
        ("test_rtformer", 1, 0),
        ("test_segvit", 1, -1),
        ("test_mit", 0, -1),
        ("test_mit", 0, 2.5),
    ],
)
def test_impossible_numbers_of_classes(name, least, wrong, tmp_path):
    with pytest.raises(segzoo.SegzooError, match=f"num_classes of {name} must be .* at least {least}, not {wrong}"):
        segzoo.create_model(name, num_classes=wrong)
    assert segzoo.create_model(name, num_classes=least).num_classes == least
    folder = segzoo.save_pretrained(segzoo.create_model(name), tmp_path)
    with pytest.raises(segzoo.SegzooError, match=f"at least {least}, not {wrong}"):
        segzoo.create_model(f"local-dir:{folder}", num_classes=wrong)


def test_unknown_options_read_as_a_sentence():
    with pytest.raises(segzoo.SegzooError, match="has no option 'zzz'; options: encoder, "):
        segzoo.create_model("test_edaformer", zzz=1)
    with pytest.raises(segzoo.SegzooError, match="'dropuot'; did you mean dropout[?] Options: encoder, "):
        segzoo.create_model("test_edaformer", dropuot=1)
