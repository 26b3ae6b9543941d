"""What a model says of its weights, on every way to a model, and that nobody predicts with random ones unwarned."""

from __future__ import annotations

import copy
import json
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import segzoo
from segzoo.prediction import predict_keypoints
from segzoo.twins import eval_twin

IMAGE = np.zeros((32, 32, 3), np.uint8)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(segzoo.create_model("test_edaformer", num_classes=7).state_dict(), path)
    return path


def test_built_and_loaded(file):
    assert segzoo.create_model("test_edaformer").weights_state == "untrained"
    assert segzoo.create_model("edaformer_t", pretrained=True).weights_state == "pretrained"
    assert segzoo.create_model("edaformer_t", pretrained=True, num_classes=5).weights_state == "fresh classifier"
    by_hand = segzoo.create_model("test_edaformer", checkpoint_path=file, num_classes=7)
    assert (by_hand.weights_state, by_hand.encoder.weights_state) == ("pretrained", "pretrained")
    renewed = segzoo.create_model("test_edaformer", checkpoint_path=file, num_classes=5)
    assert (renewed.weights_state, renewed.encoder.weights_state) == ("fresh classifier", "pretrained")
    pyramid = segzoo.create_model("edaformer_t", pretrained=True, features_only=True)
    assert pyramid.encoder.weights_state == "pretrained"


def test_loaded_later(file):
    model = segzoo.create_model("test_edaformer", num_classes=7)
    segzoo.load_weights(model.encoder, dict(model.encoder.state_dict()))
    assert (model.weights_state, model.encoder.weights_state) == ("untrained", "pretrained")
    segzoo.load_weights(model, file)
    assert model.weights_state == "pretrained"
    with torch.device("meta"):
        empty = segzoo.create_model("test_edaformer", num_classes=7)
    segzoo.load_weights(empty, file)  # says that nothing could be loaded
    assert empty.weights_state == "untrained"
    by_torch = segzoo.create_model("test_edaformer", num_classes=7)
    partial = {name: tensor for name, tensor in model.state_dict().items() if "classifier" not in name}
    by_torch.load_state_dict(partial, strict=False)
    assert by_torch.weights_state == "untrained"
    by_torch.load_state_dict(model.state_dict())
    assert by_torch.weights_state == "pretrained"


def test_a_refused_file_changes_nothing(file):
    model = segzoo.create_model("test_edaformer", num_classes=6)
    with pytest.raises(segzoo.SegzooError, match="mis-shaped"):
        segzoo.load_weights(model, file)
    assert model.weights_state == "untrained"


@pytest.mark.parametrize("name", segzoo.list_models("test_*", exclude_filters="*_backbone"))
def test_new_classes(name):
    model = segzoo.create_model(name)
    model.reset_classifier(5)
    assert model.weights_state == "untrained"
    model.weights_state = "pretrained"
    model.reset_classifier(6)
    assert model.weights_state == "fresh classifier"


def test_an_encoder_without_classes_has_no_fresh_classifier():
    model = segzoo.create_model("test_eft")
    model.weights_state = "fresh classifier"
    model.reset_classifier(0)
    assert model.weights_state == "pretrained"


@pytest.mark.parametrize("state", ["pretrained", "fresh classifier", "untrained"])
def test_copies_and_folders_keep_it(state, tmp_path):
    model = segzoo.create_model("test_edaformer").eval()
    model.mark_loaded(state)
    for other in (copy.deepcopy(model), eval_twin(model), segzoo.fold(model)):
        assert other.weights_state == state
    segzoo.save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["segzoo"]["weights_state"] == state
    restored = segzoo.create_model(f"local-dir:{tmp_path}")
    assert restored.weights_state == state
    assert segzoo.predict(restored.eval(), IMAGE).weights_state == state
    other_classes = segzoo.create_model(f"local-dir:{tmp_path}", num_classes=9).weights_state
    assert other_classes == ("untrained" if state == "untrained" else "fresh classifier")


def test_folders_that_do_not_say_it_or_say_nonsense(tmp_path):
    segzoo.save_pretrained(segzoo.create_model("test_edaformer"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["segzoo"]["weights_state"] = "perfect"
    path.write_text(json.dumps(config))
    with pytest.raises(segzoo.SegzooError, match="weights_state must be one of .*, not 'perfect'"):
        segzoo.create_model(f"local-dir:{tmp_path}")
    del config["segzoo"]["weights_state"]
    path.write_text(json.dumps(config))
    assert segzoo.create_model(f"local-dir:{tmp_path}").weights_state == "pretrained"  # saved by an older segzoo


def test_predict_warns_once_a_model(caplog):
    caplog.set_level(logging.WARNING, logger="segzoo")
    model = segzoo.create_model("test_edaformer")
    for _ in range(3):
        assert segzoo.predict(model, IMAGE).weights_state == "untrained"
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("test_edaformer: all weights are as drawn at random")
    assert "pretrained=True" in message
    model.mark_loaded("fresh classifier")
    segzoo.predict(segzoo.create_model("edaformer_t", pretrained=True, num_classes=5), IMAGE)
    assert "the classifier is as drawn" in caplog.records[-1].getMessage()
    predict_keypoints(segzoo.create_model("test_segformer_keypoints"), IMAGE, resize=(32, 32))
    assert len(caplog.records) == 3
    trained = segzoo.create_model("test_edaformer")
    trained.weights_state = "pretrained"
    segzoo.predict(trained, IMAGE)
    segzoo.predict(segzoo.create_model("edaformer_t", pretrained=True), IMAGE)
    assert len(caplog.records) == 3


def test_advice_names_weights_that_exist():
    advice = {name: segzoo.model_info(name).pretrained_cfg.advice for name in segzoo.list_pretrained()}
    scenes = advice["edaformer_t.scenes"]
    assert scenes.startswith("not for photographs")
    for name in ("segformer_b0.nvidia_ade20k_512", "rtformer_slim.cityscapes"):
        assert f"--model {name}`" in scenes
        assert segzoo.model_info(name).pretrained_cfg.loadable
    assert segzoo.model_info("rtformer_slim.cityscapes").pretrained_cfg.license == "apache-2.0"
    assert segzoo.model_info("segformer_b0.nvidia_ade20k_512").pretrained_cfg.commercial_use is False
