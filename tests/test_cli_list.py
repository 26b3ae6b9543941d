"""What `segzoo list` prints, at the widths of a narrow and of a wide terminal."""

from __future__ import annotations

import json
import logging

import pytest

import segzoo
from segzoo.cli import main


@pytest.fixture
def listed(capsys, monkeypatch):
    def listed(*arguments: str, width: int) -> str:
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["list", *arguments]) == 0
        return capsys.readouterr().out

    return listed


MODELS = """\
edaformer     parameters  weights for
edaformer_t    4,929,914  ade20k, cityscapes, coco_stuff, scenes

rtformer        parameters  weights for
rtformer_slim    5,403,398  cityscapes, ade20k, (camvid, coco_stuff10k)

segformer                      parameters  weights for
segformerpp_b5_{fast,hq,n2d}   84,708,694  cityscapes, ade20k

( ): not published; `segzoo info NAME.TAG` says how to get the weights
"""

WEIGHTS_80 = """\
edaformer               data set    mIoU   source   use
edaformer_t.ade20k      ade20k      42.3?  drive    ask
edaformer_t.cityscapes  cityscapes  78.7?  drive    ask
edaformer_t.coco_stuff  coco_stuff  40.3?  drive    ask
edaformer_t.scenes      scenes      89.04  bundled  any

segformer                                 data set    mIoU   source  use
segformer_b5.nvidia_ade20k_640            ade20k      51.0   hub     nc
segformer_b5.nvidia_cityscapes_1024       cityscapes  82.4   hub     nc
segformer_b5.segformerpp_ade20k_640       ade20k      49.72  url     nc
segformer_b5.segformerpp_cityscapes_1024  cityscapes  82.39  url     nc
segformer_b5.smp_ade20k_640               ade20k             hub     nc
segformer_b5.smp_cityscapes_1024          cityscapes         hub     nc
segformerpp_b5_{fast,hq,n2d}: segformer_b5's weights; mIoU 82.04, 82.31, 81.96

?: a published figure that could not be confirmed; `segzoo info NAME.TAG`
drive: Google Drive, by pip install 'segzoo[drive]'; see `segzoo info NAME.TAG`
use: any = commercial too, nc = not commercial, ask = terms not stated
"""

WEIGHTS_120 = """\
segformer                                      data set    mIoU   source  use  licence
segformerpp_b5_hq.nvidia_ade20k_640            ade20k             hub     nc   nvidia-source-code-license
segformerpp_b5_hq.nvidia_cityscapes_1024       cityscapes         hub     nc   nvidia-source-code-license
segformerpp_b5_hq.segformerpp_ade20k_640       ade20k             url     nc   unknown
segformerpp_b5_hq.segformerpp_cityscapes_1024  cityscapes  82.31  url     nc   unknown
segformerpp_b5_hq.smp_ade20k_640               ade20k             hub     nc   nvidia-source-code-license
segformerpp_b5_hq.smp_cityscapes_1024          cityscapes         hub     nc   nvidia-source-code-license

use: any = commercial too, nc = not commercial, ask = terms not stated
"""


def test_models(listed):
    for width in (80, 120):
        assert listed("edaformer_t", "rtformer_sli[m]", "segformerpp_b5_[fhn]*", width=width) == MODELS


def test_weights(listed):
    assert listed("--pretrained", "edaformer_t", "segformer_b5.*", "segformerpp_b5*", width=80) == WEIGHTS_80
    assert listed("--pretrained", "SegFormerPP_b5_hq", width=120) == WEIGHTS_120


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("arguments", [(), ("--pretrained",)])
def test_everything_fits_the_terminal(listed, arguments, width):
    lines = listed(*arguments, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert not any(line.startswith("test_") for line in lines)
    assert sum(line.startswith("segformerpp_") for line in lines) == (6 if "--pretrained" in arguments else 12)


def test_in_a_terminal_that_is_too_narrow_only_names_are_left(listed):
    assert "edaformer_t.scenes\n" in listed("--pretrained", "edaformer_t", width=20)


def test_tiny_variants_are_listed_on_request(listed):
    assert "test_edaformer" in listed("test", width=80)
    assert "test_edaformer" not in listed("edaformer", width=80)
    assert "test_eft" in segzoo.list_models("test_*")
    assert "test_eft" not in segzoo.list_models("*eft*")


def test_a_word_is_a_part_of_names_and_case_does_not_count(listed, capsys):
    assert [row["name"] for row in json.loads(listed("EFT", "--json", width=80))] == ["eft_b", "eft_t"]
    assert segzoo.list_models("EFT_*") == ["eft_b", "eft_t"]
    assert segzoo.list_pretrained("*.IMAGENET", exclude_filters="MiT*")[0] == "eft_b.imagenet"
    assert main(["list", "nothing"]) == 2
    assert "no name matches nothing" in capsys.readouterr().err


def test_a_filter_without_wildcards_that_finds_nothing_says_what_would(caplog):
    with caplog.at_level(logging.WARNING, "segzoo"):
        assert segzoo.list_models("segformerpp_b5") == []
    (message,) = caplog.messages
    assert message == (
        "nothing is called 'segformerpp_b5'; the filter '*segformerpp_b5*' finds segformerpp_b5_hq, "
        "segformerpp_b5_fast, segformerpp_b5_n2d and 3 more"
    )
    caplog.clear()
    assert segzoo.list_models("no_such_name") == segzoo.list_models("no_such*") == []
    assert segzoo.list_models("edaformer_t") == ["edaformer_t"]
    assert not caplog.messages


def test_at_most_three_suggestions():
    for name, words in {
        "edaformr_t": "did you mean edaformer_t, ",
        "segformer": "did you mean segformer_b0, segformer_b0_keypoints, segformer_b1?",
        "zzz": r"unknown model 'zzz'; segzoo.list_models\(\)",
    }.items():
        with pytest.raises(segzoo.SegzooError, match=words) as refusal:
            segzoo.create_model(name)
        assert str(refusal.value).count(",") < 3
        assert "test_" not in str(refusal.value)


def test_names_in_any_case_are_the_models():
    model = segzoo.create_model("Test_EDAFormer")
    assert model.name == "test_edaformer"
    assert segzoo.model_info("RTFormer_Slim.Cityscapes").tag == "cityscapes"
