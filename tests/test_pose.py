"""Keypoints as results: names and lines of the skeletons, positions from heatmaps made by hand, pictures, files, and
`segzoo predict` on a keypoint model."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import segzoo
from segzoo.cli import main
from segzoo.keypoints import COCO, JUMP_BROADCAST, SKELETONS, Skeleton, skeleton_of
from segzoo.models.rows import PretrainedCfg
from segzoo.models.segmenter import SegmentationModel
from segzoo.results import SavedPose, Segmentation

# --- skeletons --------------------------------------------------------------------------------------------------------


def test_coco_has_the_lines_of_its_annotations():
    """The "skeleton" of person_keypoints_val2017.json, which counts from 1."""
    recorded = [
        *([16, 14], [14, 12], [17, 15], [15, 13], [12, 13], [6, 12], [7, 13], [6, 7], [6, 8], [7, 9]),
        *([8, 10], [9, 11], [2, 3], [1, 2], [1, 3], [2, 4], [3, 5], [4, 6], [5, 7]),
    ]
    assert len(COCO.keypoints) == 17
    assert {frozenset(pair) for pair in COCO.pairs()} == {frozenset((a - 1, b - 1)) for a, b in recorded}
    assert len(COCO.edges) == len(recorded)


def test_the_jump_broadcast_lines_run_along_both_sides():
    """By the indices of its own numbering: head 0, neck 1, right arm 2-5, left arm 6-9, right leg 10-14, left 15-19."""
    chains = [[0, 1, 2, 3, 4, 5], [1, 6, 7, 8, 9], [2, 10, 11, 12, 13, 14], [6, 15, 16, 17, 18, 19]]
    pairs = {frozenset(pair) for chain in chains for pair in zip(chain, chain[1:], strict=False)}
    assert len(JUMP_BROADCAST.keypoints) == 20
    assert {frozenset(pair) for pair in JUMP_BROADCAST.pairs()} == pairs
    assert len(JUMP_BROADCAST.edges) == len(pairs) == 19


@pytest.mark.parametrize("skeleton", SKELETONS.values(), ids=SKELETONS)
def test_sides_mirror_each_other(skeleton):
    other = {"left": "right", "right": "left"}

    def mirrored(name: str) -> str:
        side, _, part = name.partition("_")
        return f"{other[side]}_{part}" if side in other else name

    assert {mirrored(name) for name in skeleton.keypoints} == set(skeleton.keypoints)
    edges = {frozenset(edge) for edge in skeleton.edges}
    assert {frozenset(map(mirrored, edge)) for edge in edges} == edges


def test_which_skeleton():
    assert skeleton_of(17) is COCO
    assert skeleton_of(20) is JUMP_BROADCAST
    assert skeleton_of(17, COCO.keypoints) is COCO
    assert skeleton_of(3) == Skeleton("", ("keypoint 0", "keypoint 1", "keypoint 2"))
    other = tuple(f"marker {i}" for i in range(17))
    assert skeleton_of(17, other) == Skeleton("", other)
    with pytest.raises(segzoo.SegzooError, match="must join its keypoints, not tail"):
        Skeleton("dog", ("nose", "ear"), (("nose", "tail"),))


# --- by hand ----------------------------------------------------------------------------------------------------------

ARM = Skeleton("arm", ("left_elbow", "left_wrist", "right_wrist", "nose"), (("left_elbow", "left_wrist"),))
BLUE, RED, YELLOW = (0, 114, 178), (213, 60, 0), (240, 228, 66)


class ByHand(SegmentationModel):
    """A stand-in for a model: of any image, four heatmaps of 4 rows and 5 columns, written here."""

    score_kind = "heatmap"

    def __init__(self):
        super().__init__(cfg=SimpleNamespace(in_chans=3, num_classes=4))
        self.encoder = SimpleNamespace(in_chans=3)
        self.scale = nn.Parameter(torch.ones(()))
        heatmaps_KHW = torch.zeros(4, 4, 5)
        heatmaps_KHW[0, 1, 1] = 1.0
        heatmaps_KHW[0, 1, 2], heatmaps_KHW[0, 2, 1] = 0.5, 0.5  # a quarter of a cell to the right, and down
        heatmaps_KHW[1, 2, 3] = 0.75
        heatmaps_KHW[2, 0, 4] = 0.5  # in the corner
        heatmaps_KHW[3, 3, 0] = 0.25  # too low to be drawn
        self.heatmaps_KHW = heatmaps_KHW
        self.pretrained_cfg = PretrainedCfg(num_classes=4, label_names=ARM.keypoints)
        self.weights_state = "pretrained"
        self.name = "by_hand"

    def forward_features(self, x_BCHW):
        return [x_BCHW]

    def forward_head(self, features):
        return self.heatmaps_KHW.expand(len(features[0]), 4, 4, 5) * self.scale


# In an image of 80 rows and 100 columns a cell is 20 x 20 pixels.
EXPECTED = [
    {"name": "left_elbow", "x": 35.0, "y": 35.0, "score": 1.0},
    {"name": "left_wrist", "x": 70.0, "y": 50.0, "score": 0.75},
    {"name": "right_wrist", "x": 90.0, "y": 10.0, "score": 0.5},
    {"name": "nose", "x": 10.0, "y": 70.0, "score": 0.25},
]


def grey(H: int = 80, W: int = 100) -> np.ndarray:
    return np.full((H, W, 3), 128, np.uint8)


def test_a_pose_is_what_the_heatmaps_say():
    pose = segzoo.predict_keypoints(ByHand(), grey(), skeleton=ARM)
    assert pose.xy.tolist() == [[point["x"], point["y"]] for point in EXPECTED]
    assert pose.score.tolist() == [point["score"] for point in EXPECTED]
    assert pose.to_dict() == {
        "image": "<ndarray>",
        "size": [80, 100],
        "model": "by_hand",
        "weights_state": "pretrained",
        "reduction": {},
        "box": [0, 0, 100, 80],
        "keypoints": EXPECTED,
        "edges": [["left_elbow", "left_wrist"]],
    }
    assert repr(pose) == "<Pose in <ndarray> (80x100) by by_hand: 3 of 4 keypoints with a score of at least 0.3>"


def test_of_a_box_positions_are_those_of_the_image():
    pose = segzoo.predict_keypoints(ByHand(), grey(200, 300), box=(150.0, 100.0, 250.0, 180.0))
    assert pose.box == (150, 100, 250, 180)
    assert pose.xy.tolist() == [[point["x"] + 150, point["y"] + 100] for point in EXPECTED]


def test_names_are_the_rows_if_there_are_so_many():
    model = ByHand()
    assert segzoo.predict_keypoints(model, grey()).skeleton == Skeleton("", ARM.keypoints)
    model.pretrained_cfg = PretrainedCfg(num_classes=2, label_names=("a", "b"))
    assert segzoo.predict_keypoints(model, grey()).skeleton.keypoints[3] == "keypoint 3"
    with pytest.raises(segzoo.SegzooError, match="by_hand has 4 keypoints, the skeleton 17"):
        segzoo.predict_keypoints(model, grey(), skeleton=COCO)


def test_the_picture_has_the_sides_in_their_colours():
    pose = segzoo.predict_keypoints(ByHand(), grey(), skeleton=ARM)
    picture = pose.overlay()
    pixel = picture.getpixel
    assert picture.size == (100, 80)
    assert pixel((35, 35)) == pixel((70, 50)) == BLUE
    assert pixel((52, 42)) == BLUE  # half way between them
    assert pixel((90, 10)) == RED
    assert pixel((10, 70)) == pixel((50, 10)) == (128, 128, 128)  # a score of 0.25, and nothing
    assert (np.asarray(picture) == 0).all(axis=2).any()  # the rim
    assert pose.overlay(min_score=0.2).getpixel((10, 70)) == YELLOW
    assert np.array_equal(np.asarray(pose.overlay(min_score=2)), pose.image)
    assert (pose.image == 128).all()
    with Image.open(io.BytesIO(pose._repr_png_())) as shown:
        assert np.array_equal(np.asarray(shown), np.asarray(picture))


def test_lines_need_both_ends_and_join_the_sides_in_yellow():
    across = Skeleton("across", ARM.keypoints, (("left_wrist", "right_wrist"), ("right_wrist", "nose")))
    picture = segzoo.predict_keypoints(ByHand(), grey(), skeleton=across).overlay()
    assert picture.getpixel((80, 30)) == YELLOW  # half way from the left to the right wrist
    assert picture.getpixel((50, 40)) == (128, 128, 128)  # half way to the nose, which is not drawn


def test_lists_and_batches(tmp_path):
    model = segzoo.create_model("test_segformer_keypoints", pretrained_cfg_overlay={"resize": "none"}).eval()
    model.weights_state = "pretrained"
    noise = np.random.default_rng(0).integers(0, 255, (3, 70, 90, 3), dtype=np.uint8)
    images = [noise[0], noise[1, :40], noise[2]]
    single = [segzoo.predict_keypoints(model, image) for image in images]
    for size in (1, 3):
        for pose, expected in zip(segzoo.predict_keypoints(model, images, batch_size=size), single, strict=True):
            torch.testing.assert_close(pose.score, expected.score)
            torch.testing.assert_close(pose.xy, expected.xy)
            assert np.array_equal(pose.image, expected.image)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(segzoo.SegzooError, match="bad.png is no image") as failure:
        segzoo.predict_keypoints(model, [images[0], bad], batch_size=2)
    first, second = failure.value.results
    torch.testing.assert_close(first.xy, single[0].xy)
    assert second is None
    with pytest.raises(segzoo.SegzooError, match="bad.png is no image"):
        segzoo.predict_keypoints(model, bad)
    with pytest.raises(segzoo.SegzooError, match="a box belongs to one image"):
        segzoo.predict_keypoints(model, images, box=(0, 0, 9, 9))
    with pytest.raises(segzoo.SegzooError, match="batch_size must be"):
        segzoo.predict_keypoints(model, images, batch_size=0)


def test_files(tmp_path):
    source = tmp_path / "photo.png"
    Image.fromarray(grey()).save(source)
    pose = segzoo.predict_keypoints(ByHand(), source)
    files = pose.save(tmp_path / "out" / "photo.png")
    assert files == SavedPose(tmp_path / "out/photo.png", tmp_path / "out/photo_keypoints.json")
    assert json.loads(files.keypoints.read_text()) == pose.to_dict()
    assert pose.to_dict()["keypoints"] == EXPECTED
    with Image.open(files.picture) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(pose.overlay()))
    with pytest.raises(segzoo.SegzooError, match="exists"):
        pose.save(tmp_path / "out" / "photo.png")
    pose.save(tmp_path / "out" / "photo.png", min_score=0.2, overwrite=True)
    with Image.open(files.picture) as picture:
        assert picture.getpixel((10, 70)) == YELLOW
    with pytest.raises(segzoo.SegzooError, match="photo.png is the image itself"):
        pose.save(source, overwrite=True)
    with pytest.raises(segzoo.SegzooError, match="saved as .png"):
        pose.save(tmp_path / "photo.jpg")
    with Image.open(source) as untouched:
        assert (np.asarray(untouched) == 128).all()


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["hq", "fast", "n2d"])
def test_segformerpp_names_are_the_keypoint_models_with_a_preset(preset):
    names = segzoo.list_models(f"segformerpp_b?_keypoints_{preset}")
    assert names == [f"segformerpp_b{i}_keypoints_{preset}" for i in range(6)]
    with torch.device("meta"):
        model = segzoo.create_model(names[0])
        plain = segzoo.create_model("segformer_b0_keypoints")
    assert (model.score_kind, model.num_classes) == ("heatmap", 17)
    assert segzoo.model_info(names[0]).params == sum(p.numel() for p in plain.parameters())
    plain.set_inference_reduction(preset)
    assert segzoo.plans.current_plan(model).to_json() == segzoo.plans.current_plan(plain).to_json() != "{}"


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = segzoo.create_model("test_segformer_keypoints", pretrained_cfg_overlay={"resize": "none"})
    nn.init.normal_(model.get_classifier().weight, std=0.5)
    model.weights_state = "pretrained"
    segzoo.save_pretrained(model, folder)
    return f"local-dir:{folder}"


@pytest.fixture
def predict(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(1).integers(0, 255, (2, 64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise[0]).save("a.png")
    Image.fromarray(noise[1, :, :80]).save("b.png")

    def run(*args: object, code: int = 0) -> tuple[str, str]:
        assert main(["predict", *map(str, args)]) == code
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


def test_the_command_writes_what_the_function_finds(predict, saved):
    model = segzoo.create_model(saved)
    out, _ = predict("a.png", "b.png", "--model", saved, "-o", "out", "--reduction", "n2d", "--batch-size", 2)
    model.set_inference_reduction("n2d")
    for name, line in zip(("a", "b"), out.splitlines(), strict=True):
        expected = segzoo.predict_keypoints(model, f"{name}.png")
        assert json.loads(Path(f"out/{name}_keypoints.json").read_text()) == expected.to_dict()
        assert expected.to_dict()["reduction"] != {}
        with Image.open(f"out/{name}.png") as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(expected.overlay()))
        assert line == f"{name}.png -> out/{name}_keypoints.json: {expected.summary()}"
    assert sorted(path.name for path in Path("out").iterdir()) == [
        *("a.png", "a_keypoints.json", "b.png", "b_keypoints.json")
    ]


def test_json_skips_and_overwrites(predict, saved):
    Path("bad.png").write_bytes(b"no image")
    out, err = predict("a.png", "bad.png", "--model", saved, "--json", "--min-score", "-9", code=2)
    found, failed = map(json.loads, out.splitlines())
    assert [point["name"] for point in found["keypoints"]] == list(COCO.keypoints)
    assert found["files"] == {"picture": "segzoo_masks/a.png", "keypoints": "segzoo_masks/a_keypoints.json"}
    assert failed["image"] == "bad.png"
    assert "bad.png is no image" in err
    with Image.open("segzoo_masks/a.png") as picture:
        every = segzoo.predict_keypoints(segzoo.create_model(saved), "a.png").overlay(min_score=-9)
        assert np.array_equal(np.asarray(picture), np.asarray(every))
    Path("segzoo_masks/a.png").unlink()  # the other result still stands
    out, _ = predict("a.png", "--model", saved, "--json")
    assert json.loads(out) == {"image": "a.png", "skipped": "segzoo_masks/a.png"}
    predict("a.png", "--model", saved, "--overwrite")
    assert Path("segzoo_masks/a.png").exists()


@pytest.mark.parametrize("option", [["--flip"], ["--mode", "slide"], ["--scales", "2"], ["--alpha", "1"]])
def test_options_of_masks_are_refused(predict, saved, option):
    _, err = predict("a.png", "--model", saved, *option, code=2)
    assert f"{option[0]} is of masks, and {saved} finds keypoints; leave it out" in err
    assert not Path("segzoo_masks").exists()


def test_an_option_of_keypoints_is_refused(predict):
    _, err = predict("a.png", "--model", "edaformer_t.scenes", "--min-score", 0.5, code=2)
    assert "--min-score is of keypoints, and edaformer_t.scenes makes masks" in err


def test_a_keypoint_model_without_weights_asks_for_a_checkpoint(predict, tmp_path):
    _, err = predict("a.png", "--model", "segformerpp_b0_keypoints_hq", code=2)
    assert "segformerpp_b0_keypoints_hq has no weights; give your own as --checkpoint FILE" in err
    model = segzoo.create_model("test_segformer_keypoints", num_classes=20)
    torch.save(model.state_dict(), "trained.pth")
    options = ("--model", "test_segformer_keypoints", "--checkpoint", "trained.pth", "--num-classes", 20)
    predict("a.png", *options)
    names = [point["name"] for point in json.loads(Path("segzoo_masks/a_keypoints.json").read_text())["keypoints"]]
    assert names == list(JUMP_BROADCAST.keypoints)


def test_the_other_function_is_named(saved):
    with pytest.raises(segzoo.SegzooError, match=r"call segzoo.predict_keypoints\(model, image\)"):
        segzoo.predict(segzoo.create_model(saved), grey())
    with pytest.raises(segzoo.SegzooError, match="no keypoint model"):
        segzoo.predict_keypoints(segzoo.create_model("test_segformer"), grey())
    assert not issubclass(segzoo.Pose, Segmentation)
