"""Heatmaps, positions, PCK and their loss against definitions; keypoint models; and that one learns."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import segzoo
from segzoo.data.car_corners import KEYPOINTS, car_crops
from segzoo.interop.transformers import to_transformers_state_dict
from segzoo.keypoints import decode_heatmaps, gaussian_heatmaps, pck
from segzoo.models.segmenter import SegmentationModel
from segzoo.prediction import predict_keypoints
from segzoo.training.losses import HeatmapLoss

SIZES = {"image_size": (64, 96), "map_size": (16, 24)}


def keypoints(*points: tuple[float, float]) -> torch.Tensor:
    return torch.tensor(points)[None]


# --- targets --------------------------------------------------------------------------------------------------------


def test_heatmaps_are_gaussians_around_the_exact_position():
    heatmaps, weights = gaussian_heatmaps(keypoints((41.0, 22.0)), torch.ones(1, 1), **SIZES, sigma=1.5)
    assert heatmaps.shape == (1, 1, 16, 24)
    assert weights.tolist() == [[1]]
    for i, j in ((0, 0), (5, 10), (6, 9), (15, 23)):
        squared = (j + 0.5 - 41 / 4) ** 2 + (i + 0.5 - 22 / 4) ** 2
        assert heatmaps[0, 0, i, j].item() == pytest.approx(math.exp(-squared / (2 * 1.5**2)), rel=1e-5, abs=1e-12)


def test_a_keypoint_at_a_cell_centre_has_height_one():
    heatmaps, _ = gaussian_heatmaps(keypoints((42.0, 22.0)), torch.ones(1, 1), **SIZES)
    assert heatmaps.max() == 1
    assert heatmaps[0, 0, 5, 10] == 1


def test_only_known_keypoints_count():
    points = keypoints((10, 10), (10, 10), (-23, 10), (-25, 10), (10, 89), (math.nan, 10))
    heatmaps, weights = gaussian_heatmaps(points, torch.tensor([[2, 0, 1, 1, 1, 1]]), **SIZES, sigma=2.0)
    assert weights.tolist() == [[1, 0, 1, 0, 0, 0]]  # 3 sigma are 24 pixels
    assert (heatmaps.amax(dim=(2, 3)) > 0).tolist() == [[True, False, True, False, False, False]]


def test_targets_refuse_what_does_not_fit():
    with pytest.raises(segzoo.SegzooError, match=r"\(B, K, 2\)"):
        gaussian_heatmaps(torch.zeros(1, 4, 3), torch.ones(1, 4), **SIZES)
    with pytest.raises(segzoo.SegzooError, match=r"\(B, K\)"):
        gaussian_heatmaps(torch.zeros(1, 4, 2), torch.ones(1, 3), **SIZES)
    with pytest.raises(segzoo.SegzooError, match="sigma"):
        gaussian_heatmaps(torch.zeros(1, 4, 2), torch.ones(1, 4), **SIZES, sigma=0)


# --- the way back ---------------------------------------------------------------------------------------------------


@given(x=st.floats(4.1, 91.9), y=st.floats(4.1, 59.9), sigma=st.sampled_from((1.0, 1.5, 2.0, 3.0)))
def test_a_gaussian_is_found_within_a_quarter_of_a_cell(x, y, sigma):
    """Also off the cells' centres; the cells at the border, which are not refined, are left out."""
    truth = keypoints((x, y)).double()
    heatmaps, _ = gaussian_heatmaps(truth, torch.ones(1, 1), **SIZES, sigma=sigma)
    found = decode_heatmaps(heatmaps, SIZES["image_size"])
    assert (found.xy - truth).abs().max() <= 0.25 * 4 + 1e-6
    assert 0.7 < found.score.item() <= 1


def test_the_quarter_goes_to_the_higher_neighbour():
    heatmap = torch.zeros(1, 3, 5, 7)
    heatmap[:, :, 2, 3] = 1
    heatmap[0, 0, 2, 2], heatmap[0, 0, 3, 3] = 0.5, 0.5  # to the left and down
    heatmap[0, 1, 2, 4], heatmap[0, 1, 1, 3] = 0.5, 0.5  # to the right and up
    found = decode_heatmaps(heatmap, (5, 7))
    assert found.xy.tolist() == [[[3.25, 2.75], [3.75, 2.25], [3.5, 2.5]]]
    assert found.score.tolist() == [[1, 1, 1]]


def test_border_peaks_are_refined_only_along_the_border():
    heatmap = torch.zeros(1, 1, 5, 7)
    heatmap[0, 0, 0, 3], heatmap[0, 0, 1, 3], heatmap[0, 0, 0, 4] = 1.0, 0.5, 0.5
    assert decode_heatmaps(heatmap, (5, 7)).xy.tolist() == [[[3.75, 0.5]]]


def test_positions_are_in_pixels_of_the_whole_image():
    heatmap = torch.zeros(1, 1, 4, 5)
    heatmap[0, 0, 1, 2] = 1
    assert decode_heatmaps(heatmap, (40, 100)).xy.tolist() == [[[50.0, 15.0]]]
    assert decode_heatmaps(heatmap, (40, 100), origin=(7, 3)).xy.tolist() == [[[57.0, 18.0]]]


def test_pck_counts_visible_keypoints_within_the_length():
    truth = torch.zeros(2, 2, 2)
    found = torch.tensor([[[3.0, 4.0], [5.1, 0.0]], [[0.0, 9.9], [100.0, 0.0]]])
    visible = torch.tensor([[1, 1], [1, 0]])
    length = torch.tensor([50.0, 100.0])
    assert pck(found, truth, visible, length, t=0.1) == pytest.approx(2 / 3)
    assert pck(found, truth, visible, length, t=0.01) == 0
    assert math.isnan(pck(found, truth, torch.zeros(2, 2), length, t=0.1))


# --- loss -----------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_squared_error_of_the_keypoints_that_count():
    generator = torch.Generator().manual_seed(0)
    heatmaps = torch.rand(2, 3, 16, 24, generator=generator, requires_grad=True)
    xy = 60 * torch.rand(2, 3, 2, generator=generator)
    visible = torch.tensor([[1, 0, 1], [0, 0, 1]])
    outputs = {"scores": torch.zeros(2, 3, 64, 96), "heatmaps": heatmaps}
    loss = HeatmapLoss(sigma=1.5)(outputs, xy, visible)
    targets, _ = gaussian_heatmaps(xy, visible, **SIZES, sigma=1.5)
    counted = [((heatmaps - targets)[b, k] ** 2).mean() for b, k in ((0, 0), (0, 2), (1, 2))]
    torch.testing.assert_close(loss, sum(counted) / 3)
    loss.backward()
    assert (heatmaps.grad.abs().amax(dim=(2, 3)) > 0).tolist() == visible.bool().tolist()


def test_loss_without_any_keypoint_is_zero_and_connected():
    heatmaps = torch.rand(1, 2, 4, 4, requires_grad=True)
    outputs = {"scores": torch.zeros(1, 2, 16, 16), "heatmaps": heatmaps}
    loss = HeatmapLoss()(outputs, torch.zeros(1, 2, 2), torch.zeros(1, 2))
    loss.backward()
    assert loss == 0
    assert not heatmaps.grad.any()


def test_loss_of_perfect_heatmaps_is_zero_and_another_number_of_keypoints_is_refused():
    xy, visible = keypoints((30.0, 20.0)), torch.ones(1, 1)
    targets, _ = gaussian_heatmaps(xy, visible, **SIZES)
    outputs = {"scores": torch.zeros(1, 1, 64, 96), "heatmaps": targets}
    assert HeatmapLoss()(outputs, xy, visible) == 0
    with pytest.raises(segzoo.SegzooError, match=r"\(1, 1, 2\).*\(1, 2, 2\)"):
        HeatmapLoss()(outputs, torch.zeros(1, 2, 2), torch.ones(1, 2))


# --- models -----------------------------------------------------------------------------------------------------------


def tiny(**options) -> nn.Module:
    torch.manual_seed(0)
    return segzoo.create_model("test_segformer_keypoints", **options)


def test_every_size_has_a_keypoint_variant_of_cocos_17():
    names = segzoo.list_models("segformer_*_keypoints")
    assert names == [f"segformer_b{i}_keypoints" for i in range(6)]
    with torch.device("meta"):
        for name in names:
            model, plain = segzoo.create_model(name), segzoo.create_model(name.removesuffix("_keypoints"))
            assert (model.score_kind, model.num_classes) == ("heatmap", 17)
            assert list(model.state_dict()) == list(plain.state_dict())


def test_heatmaps_at_both_resolutions():
    model = tiny().eval()
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        head = model.forward_head(model.forward_features(x))
        assert head.shape == (2, 17, 16, 24)
        assert model(x).shape == (2, 17, 64, 96)
        outputs = model.forward_train(x)
    assert torch.equal(outputs["heatmaps"], head)
    assert torch.equal(outputs["scores"], model(x))


def test_a_fresh_model_starts_near_zero():
    """Heatmaps are nearly all zero, and squared errors take long to come down from elsewhere."""
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = tiny(num_classes=5)
    for _ in range(2):
        assert 0 < model(x).abs().max() < 0.1
        model.reset_classifier(4)


def test_segmentation_weights_serve_the_encoder_and_decoder(tmp_path):
    plain = segzoo.create_model("test_segformer")
    torch.save(plain.state_dict(), tmp_path / "weights.pth")
    model = tiny(checkpoint_path=tmp_path / "weights.pth", num_classes=4)
    own, given_ = model.state_dict(), plain.state_dict()
    assert all(torch.equal(own[key], given_[key]) for key in own if key not in model.classifier_parameters())


def test_transformers_has_no_place_for_it():
    with pytest.raises(segzoo.SegzooError, match="keypoint"):
        to_transformers_state_dict(tiny())


def test_an_unknown_score_kind_is_refused():
    with pytest.raises(segzoo.SegzooError, match="score_kind.*logits.*heatmap"):
        segzoo.create_model("test_segformer", score_kind="pose")


# --- prediction -------------------------------------------------------------------------------------------------------


class BrightestPixel(SegmentationModel):
    """A stand-in for a model: the one heatmap, at a quarter of the resolution, is the image's brightness."""

    score_kind = "heatmap"

    def __init__(self):
        super().__init__(cfg=SimpleNamespace(in_chans=3, num_classes=1))
        self.encoder = SimpleNamespace(in_chans=3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward_features(self, x_BCHW):
        return [nn.functional.avg_pool2d(x_BCHW.mean(dim=1, keepdim=True), 4) * self.scale]

    def forward_head(self, features):
        return features[0]


def dot(x: int, y: int) -> np.ndarray:
    """A black image of 120 x 200 pixels with a bright square of 3 x 3 around pixel (x, y)."""
    image = np.zeros((120, 200, 3), np.uint8)
    image[y - 1 : y + 2, x - 1 : x + 2] = 255
    return image


@pytest.mark.parametrize("resize", [(120, 200), (240, 400), (240, 200)])
def test_keypoints_come_back_in_pixels_of_the_image(resize):
    found = predict_keypoints(BrightestPixel(), dot(121, 47), resize=resize)
    assert found.xy.shape == (1, 2)
    assert found.score.shape == (1,)
    torch.testing.assert_close(found.xy, torch.tensor([[121.5, 47.5]]), rtol=0, atol=2.1)


def test_a_box_is_looked_at_alone_and_positions_stay_those_of_the_image():
    image = dot(121, 47)
    image[100:110, 10:20] = 255  # brighter in the mean, but outside the box
    found = predict_keypoints(BrightestPixel(), image, box=(99.6, 20.2, 160, 79.5), resize=(240, 244))
    torch.testing.assert_close(found.xy, torch.tensor([[121.5, 47.5]]), rtol=0, atol=0.6)
    clipped = predict_keypoints(BrightestPixel(), image, box=(100, -50, 900, 80), resize=(240, 300))
    torch.testing.assert_close(clipped.xy, torch.tensor([[121.5, 47.5]]), rtol=0, atol=1.0)


@pytest.mark.parametrize("box", [(300, 0, 400, 50), (50, 50, 50, 80), (90, 20, 30, 60)])
def test_a_box_without_pixels_is_refused(box):
    with pytest.raises(segzoo.SegzooError, match="200 x 120"):
        predict_keypoints(BrightestPixel(), dot(5, 5), box=box)


@pytest.mark.parametrize("box", [(0, 0, 10), (0, 0, 10, float("nan")), 7])
def test_a_box_that_is_none_is_refused(box):
    with pytest.raises(segzoo.SegzooError, match="box must be"):
        predict_keypoints(BrightestPixel(), dot(5, 5), box=box)


def test_prediction_keeps_the_mode_and_refuses_the_other_kind():
    model = tiny()
    found = predict_keypoints(model, dot(50, 50), resize=(64, 64))
    assert model.training
    assert found.xy.shape == (17, 2)
    with pytest.raises(segzoo.SegzooError, match="predict_keypoints"):
        segzoo.predict(model, dot(50, 50))
    with pytest.raises(segzoo.SegzooError, match="no keypoint model"):
        predict_keypoints(segzoo.create_model("test_segformer"), dot(50, 50))


# --- the synthetic task -----------------------------------------------------------------------------------------------


def test_crops_hold_the_corners_of_a_car():
    crops = list(car_crops(12, first_seed=50, side=64))
    for crop in crops:
        assert crop.image.shape == (64, 64, 3)
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = crop.xy.tolist()
        assert (x0, y1, x2, y3) == (x3, y0, x1, y2)
        assert crop.length == pytest.approx(max(x1 - x0, y3 - y0), rel=1e-4)
        assert crop.visible.tolist() == [0 <= x <= 64 and 0 <= y <= 64 for x, y in crop.xy.tolist()]
    assert 0.6 < np.mean([crop.visible.mean() for crop in crops]) < 1
    again = next(car_crops(1, first_seed=50, side=64))
    assert np.array_equal(again.image, crops[0].image)
    assert np.array_equal(again.xy, crops[0].xy)


@pytest.mark.slow
def test_a_tiny_model_learns_where_the_corners_are():
    """300 steps from scratch, judged on crops of other scenes."""
    side, t = 64, 0.2

    def load(count: int, first_seed: int):
        crops = list(car_crops(count, first_seed=first_seed, side=side))
        images = torch.from_numpy(np.stack([crop.image for crop in crops])).permute(0, 3, 1, 2) / 127.5 - 1
        return images, *(torch.tensor(np.stack([getattr(c, name) for c in crops])) for name in ("xy", "visible"))

    def found(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return decode_heatmaps(model.eval().forward_head(model.forward_features(images)), (side, side)).xy

    images, xy, visible = load(400, 0)
    held_out, truth, known = load(100, 1_000_000)
    length = (truth.amax(dim=1) - truth.amin(dim=1)).amax(dim=1)
    model = tiny(num_classes=len(KEYPOINTS), drop_path_rate=0.0, dropout=0.0)
    mean = (xy * visible[..., None]).sum(dim=0) / visible.sum(dim=0)[:, None]
    baseline = pck(mean.expand_as(truth), truth, known, length, t=t)
    untrained = pck(found(model, held_out), truth, known, length, t=t)

    loss_of = HeatmapLoss(sigma=1.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=300)
    model.train()
    for _ in range(300):
        chosen = torch.randint(len(images), (16,))
        optimizer.zero_grad()
        loss_of(model.forward_train(images[chosen]), xy[chosen], visible[chosen]).backward()
        optimizer.step()
        schedule.step()
    assert max(baseline, untrained) < 0.3
    assert pck(found(model, held_out), truth, known, length, t=t) > 0.5
