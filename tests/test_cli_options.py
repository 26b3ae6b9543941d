"""Options of the command that are easily taken and never passed on, in process: each changes what comes out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import segzoo
from segzoo.cli import main
from segzoo.sharing.uploading import Published

SIZE = (40, 72)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return segzoo.create_model("test_edaformer").eval()


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """An image of noise, and the weights of `model`."""
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "noise.png")
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def predicted(files, folder, *options: object) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the overlay that `segzoo predict` writes."""
    arguments = ("predict", files / "noise.png", "-o", folder, "--model", "test_edaformer", "--no-legend")
    assert main([*map(str, (*arguments, "--checkpoint", files / "model.safetensors", *options))]) == 0
    with Image.open(folder / "noise.png") as mask, Image.open(folder / "noise_overlay.png") as overlay:
        return np.asarray(mask), np.asarray(overlay.convert("RGB"))


@pytest.mark.parametrize("alpha", [0, 1, 0.25])
def test_alpha(model, files, tmp_path, alpha):
    """By hand: the image itself, the classes' colours, and a quarter of these over three quarters of that."""
    mask, overlay = predicted(files, tmp_path, "--alpha", alpha)
    image = np.asarray(Image.open(files / "noise.png"))
    colours = np.array(segzoo.predict(model, files / "noise.png").label_set.palette)[mask]
    near = np.isclose(overlay, image * (1 - alpha) + colours * alpha, atol=1).all(axis=-1)
    assert near.all() if alpha in (0, 1) else near.mean() > 0.15  # between, there are lines around the classes


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--resize", 64, 32), {"resize": (64, 32)}),
        (("--resize", 64, 32, "--mode", "slide"), {"resize": (64, 32), "mode": "slide"}),
        (("--mode", "slide"), {"mode": "slide"}),
    ],
)
def test_what_the_model_sees(model, files, tmp_path, monkeypatch, arguments, options):
    """Both masks are the same pixel by pixel, and the options reach the protocol as they were given."""
    import segzoo.prediction

    given = {}
    protocol_of = segzoo.prediction.protocol_of

    def recorded(row, **kwargs):
        given.update(kwargs)
        return protocol_of(row, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(segzoo.prediction, "protocol_of", recorded)
        mask, _ = predicted(files, tmp_path, *arguments)
    assert np.array_equal(mask, segzoo.predict(model, files / "noise.png", **options).mask)
    for option, value in options.items():
        assert given[option] == value


@pytest.mark.parametrize(("arguments", "revision"), [(("--revision", "next"), "next"), ((), None)])
def test_publish_to_a_branch(tmp_path, monkeypatch, arguments, revision):
    segzoo.save_pretrained(segzoo.create_model("test_mit"), tmp_path)
    called = []

    def publish(*args, **kwargs) -> Published:
        called.append((args, kwargs))
        return Published(repo_id="org/name", commit="c" * 40, url="https://hub/org/name")

    monkeypatch.setattr("segzoo.sharing.publish", publish)
    assert main(["publish", str(tmp_path), "org/name", "--private", *arguments]) == 0
    assert called == [((tmp_path, "org/name"), {"private": True, "revision": revision})]
