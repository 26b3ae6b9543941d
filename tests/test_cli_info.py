"""What `segzoo info` says about a name, a tag and a saved model."""

from __future__ import annotations

import json

import pytest

import segzoo
from segzoo.cli import main


@pytest.fixture
def info(capsys):
    def info(*arguments: str) -> str:
        assert main(["info", *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return info


@pytest.mark.parametrize("name", ["edaformer_t", "edaformer_t.ade20k", "rtformer_slim", "segformerpp_b2_hq"])
def test_classes_and_parameters_are_those_of_the_weights(info, name):
    """Counted on a model that is really built with these classes."""
    said = json.loads(info(name, "--size", "64", "64", "--json"))
    row = segzoo.model_info(name).pretrained_cfg
    model = segzoo.create_model(f"{name}.{segzoo.model_info(name).tag}" if "." not in name else name)
    params = sum(parameter.numel() for parameter in model.parameters())
    assert (said["num_classes"], said["params"], said["dataset"]) == (row.num_classes, params, row.dataset)
    assert segzoo.model_info(name).params == params
    assert segzoo.model_info(name).cfg.num_classes == row.num_classes


def test_the_default_weights(info):
    text = info("EDAFormer_T", "--size", "64", "64")
    for words in (
        "EDAFormer_T (edaformer), 13 classes",
        "weights: edaformer_t.scenes, the default, trained on scenes",
        "from: this package, edaformer_t.scenes.safetensors",
        "published mIoU in percent: 89.04 (base), 89.05 (decoder), 89.03 (optimal), 89.01 (fast)",
        "licence: apache-2.0, commercial use allowed",
        "all weights of edaformer_t: ade20k, cityscapes, coco_stuff, scenes",
        "there are for 512x512 with 150 classes, 1024x2048 with 19 classes",
    ):
        assert words in text


def test_the_row_that_was_asked_for(info):
    text = info("segformer_b0.smp_ade20k_512", "--size", "64", "64")
    for words in (
        "weights: segformer_b0.smp_ade20k_512, trained on ade20k",
        "from: https://huggingface.co/smp-hub/segformer-b0-512x512-ade-160k at main, model.safetensors",
        "published accuracy: none known for these weights",
        "licence: nvidia-source-code-license (https://github.com/NVlabs/SegFormer/blob/master/LICENSE)",
        "commercial use not allowed",
    ):
        assert words in text
    assert "default" not in text


@pytest.mark.slow
def test_figures_with_protocol_reduction_and_doubt(info):
    text = info("segformerpp_b5_fast", "--size", "64", "64")
    assert "trained on cityscapes" in text
    assert "published mIoU in percent: 82.39 (base), 82.31 (hq), 82.04 (fast), 81.96 (n2d)\n" in text
    assert "protocol not stated; arXiv 2405.14467, Table II; confirmed by README of github.com/KieDani" in text
    assert "trained with the reduction; arXiv 2405.14467, Table III" in text
    text = info("edaformer_b.ade20k", "--size", "64", "64")
    assert "single scale, whole image; arXiv 2407.17261, Tables 1 and 4; could not be confirmed" in text
    assert (
        "from: the authors' folder https://drive.google.com/drive/folders/1hiAFQcfH9qd37WOc1_HMB0vKzbY-IWrO\n" in text
    )
    assert "how to get them: pip install 'segzoo[drive]', then pretrained=True finds the file there by its name" in text
    assert "not published in a loadable form" in info("edaformer_mit_b0.ade20k", "--size", "64", "64")


def test_costs_that_the_paper_counts_otherwise_say_how(info):
    text = info("rtformer_base.ade20k", "--size", "512", "2048")
    assert "published: 67.4 GMACs, 16.8 M parameters; the paper leaves out" in text


def test_a_saved_model(info, tmp_path, capsys):
    model = segzoo.create_model("test_edaformer", num_classes=5)
    overlay = {"dataset": "roofs", "license": "cc-by-4.0", "published": [{"value": 71.2, "source": "our report"}]}
    segzoo.save_pretrained(model, tmp_path / "saved", pretrained_cfg_overlay=overlay)
    text = info(f"local-dir:{tmp_path / 'saved'}", "--size", "64", "64")
    for words in (
        "(edaformer), 5 classes",
        "trained on roofs",
        f"from: local-dir:{tmp_path / 'saved'}",
        "published mIoU in percent: 71.2 (base)",
        "protocol not stated; our report; could not be confirmed",
        "licence: cc-by-4.0",
    ):
        assert words in text
    assert main(["info", f"local-dir:{tmp_path / 'none'}"]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_saved_plan_is_in_force(info, tmp_path):
    model = segzoo.create_model("test_edaformer")
    model.set_inference_reduction("fast")
    segzoo.save_pretrained(model, tmp_path / "saved")
    said = json.loads(info(f"local-dir:{tmp_path / 'saved'}", "--size", "64", "64", "--json"))
    assert said["reduction"]["encoder.0"] == 2


def test_on_a_terminal_lines_are_broken_between_words(info, monkeypatch):
    plain = info("edaformer_b", "--size", "64", "64")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    broken = info("edaformer_b", "--size", "64", "64")
    assert broken.split() == plain.split()
    assert max(map(len, plain.splitlines())) > 80
    assert all(len(line) <= 80 or "https://" in line for line in broken.splitlines())
    assert (
        "  how to get them: pip install 'segzoo[drive]', then pretrained=True finds the\n      file there by" in broken
    )


def test_options_of_the_config(info, capsys):
    said = json.loads(info("edaformer_t", "--option", "decoder_mixer=conv", "encoder=pvt_v2_b0", "--json"))
    model = segzoo.create_model("edaformer_t.scenes", decoder_mixer="conv", encoder="pvt_v2_b0")
    assert said["params"] == sum(parameter.numel() for parameter in model.parameters())
    said = json.loads(info("test_segvit", "--size", "64", "64", "--option", "stages=[1,3]", "--json"))
    assert said["macs"] == segzoo.cost(segzoo.create_model("test_segvit", stages=(1, 3)), (64, 64)).macs
    assert main(["info", "test_segvit", "--option", "stage=3"]) == 2
    assert "no option 'stage'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["info", "test_segvit", "--option", "stages"])
    assert "stages is not NAME=VALUE" in capsys.readouterr().err
