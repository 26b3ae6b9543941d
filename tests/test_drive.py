"""Weights of a Google Drive folder, through the real gdown, against a stand-in in this process; the network never."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import io
import json
import logging
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
import torch
from drive_stand_in import FOLDER, LOGIN, QUOTA, DriveStandIn, answer
from golden_data import golden_arrays, golden_input, golden_json, golden_state_dict
from hub_client import digest
from huggingface_hub import constants

import segzoo
from segzoo.models.rows import PretrainedCfg
from segzoo.zoo import model_info

TINY = PretrainedCfg(
    state="drive", drive_folder=FOLDER, drive_files=r"(?=.*tiny).*\.pth$", num_classes=13, origin="the authors"
)
CHUNK = 2**19  # bytes that gdown writes at a time
BY_HAND = r"in a browser and pass it as checkpoint_path=$"


@pytest.fixture
def drive(monkeypatch) -> DriveStandIn:
    stand_in = DriveStandIn()
    monkeypatch.setattr(requests.Session, "get_adapter", lambda self, url: stand_in)
    return stand_in


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SEGZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("segzoo.zoo.download.cache.WAITS", (0.0, 0.0, 0.0))
    return tmp_path / "cache"


def pickled(state: object) -> bytes:
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue()


def tiny(seed: int = 0, **options: object) -> torch.nn.Module:
    torch.manual_seed(seed)
    return segzoo.create_model("test_edaformer", **options)


def body_of(model: torch.nn.Module, *, more: int = 0) -> bytes:
    """A checkpoint, with `more` bytes of other things in it."""
    optimizer = torch.zeros(more, dtype=torch.uint8)
    return pickled({"meta": {"epoch": 3}, "state_dict": model.state_dict(), "optimizer": optimizer})


def create(**options: object) -> torch.nn.Module:
    return segzoo.create_model("test_edaformer", True, **{"pretrained_cfg": TINY, **options})


def kept(cache: Path) -> list[str]:
    """Names of what is in the cache, but for locks and notes."""
    found = [path for path in cache.rglob("*") if path.is_file() and path.suffix not in (".lock", ".json")]
    return sorted(path.name for path in found)


# --- the official layout ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official() -> tuple[dict[str, torch.Tensor], bytes]:
    """EDAFormer-T as its authors' training writes it."""
    manifest = golden_json("edaformer_t_ade")["state_dict"]
    state = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in golden_state_dict(manifest).items()
    }
    return state, pickled({"meta": {"CLASSES": ["wall"]}, "state_dict": state, "optimizer": {"state": {}}})


def scores_are_golden(model: torch.nn.Module) -> None:
    """Those of the official code with these weights, without reduction."""
    arrays, setting = golden_arrays("edaformer_t_ade"), golden_json("edaformer_t_ade")["settings"][0]
    assert setting["name"] == "1111_111"
    with torch.no_grad():
        logits = model.forward_head(model.forward_features(golden_input(setting["input_shape"]).float()))
    expected = torch.from_numpy(arrays[f"{setting['name']}.logits"]).float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


def test_the_authors_checkpoint_becomes_the_model(drive, cache, official, caplog, monkeypatch):
    state, body = official
    drive.add("README.txt", b"weights")
    drive.add("tiny/edaformer.tiny.512x512.ade.160k.pth", body)
    drive.add("tiny/edaformer.tiny.1024x1024.city.160k.pth", b"not asked for")
    drive.add("base/edaformer.base.512x512.ade.160k.pth", b"not asked for")
    with caplog.at_level(logging.WARNING, "segzoo"):
        model = segzoo.create_model("edaformer_t.ade20k", pretrained=True)
    assert drive.downloads() == ["edaformer.tiny.512x512.ade.160k.pth"]
    assert (model.name, model.weights_state, model.num_classes) == ("edaformer_t.ade20k", "pretrained", 150)
    by_hand = segzoo.create_model("edaformer_t.ade20k")
    segzoo.load_weights(by_hand, state)
    assert digest(model) == digest(by_hand)
    scores_are_golden(model.eval())
    assert "tiny/edaformer.tiny.512x512.ade.160k.pth of https://drive.google.com/drive/folders/1hi" in caplog.text
    assert "the model loads it strictly, which is all that is known of it" in caplog.text
    assert kept(cache) == [f"{hashlib.sha256(body).hexdigest()}-edaformer.tiny.512x512.ade.160k.pth"]
    # The second call asks nobody, not even gdown.
    drive.requests.clear()
    monkeypatch.setitem(sys.modules, "gdown", None)
    assert digest(segzoo.create_model("edaformer_t.ade20k", pretrained=True)) == digest(by_hand)
    assert drive.requests == []


@pytest.mark.slow
def test_the_encoder_comes_with_its_classifier(drive):
    manifest = [*golden_json("eft_t_encoder")["state_dict"], ["head.weight", [1000, 256]], ["head.bias", [1000]]]
    state = {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in golden_state_dict(manifest).items()
    }
    drive.add("EFT_B.pth", b"not asked for")
    drive.add("EFT_T.pth", pickled({"model": state}))
    encoder = segzoo.create_model("eft_t", pretrained=True, features_only=True)
    assert drive.downloads() == ["EFT_T.pth"]
    by_hand = segzoo.create_model("eft_t")
    segzoo.load_weights(by_hand, state)
    by_hand.reset_classifier(0)
    assert digest(encoder.encoder) == digest(by_hand)


NAMES = {
    "edaformer.tiny.512x512.ade.160k.pth": ["edaformer_t.ade20k"],
    "edaformer.base.1024x1024.city.160k.pth": ["edaformer_b.cityscapes"],
    "edaformer.base.512x512.coco_stuff164k.80k.pth": ["edaformer_b.coco_stuff"],
    "EDAFormer-T/ADE20K/iter_160000.pth": ["edaformer_t.ade20k"],
    "ADE20K/EDAFormer_B.pth": ["edaformer_b.ade20k"],
    "EDAFormerT_Cityscapes.pth.tar": ["edaformer_t.cityscapes"],
    "COCO-Stuff/edaformer_tiny.pt": ["edaformer_t.coco_stuff"],
    "EDAFormer (Base) Cityscapes.pth": ["edaformer_b.cityscapes"],
    "EFT_T.pth": ["eft_t.imagenet"],
    "ImageNet/EFT-Base.pth": ["eft_b.imagenet"],
    "eftb.pth": ["eft_b.imagenet"],
    "EDAFormer_T_ADE20K.log": [],
    "edaformer.tiny.512x512.ade.160k.py": [],
    "best_cityscapes.pth": [],
    "edaformer_s_ade.pth": [],
}


@pytest.mark.parametrize("path", NAMES)
def test_what_a_file_may_be_called(path):
    rows = {name: model_info(name).pretrained_cfg for name in segzoo.list_pretrained(source="drive")}
    assert len(rows) == 8
    fitting = [name for name, row in rows.items() if re.match(row.drive_files, path, re.IGNORECASE)]
    assert fitting == NAMES[path]


# --- which file -------------------------------------------------------------------------------------------------------


def test_the_first_that_loads_is_taken_and_each_is_downloaded_once(drive, cache, caplog):
    """Shortest name first: one of other classes under a wrong name, the right one, and a special form of it."""
    right, other = tiny(), tiny(num_classes=5)
    drive.add("tiny.pth", body_of(other))
    drive.add("tiny_b.pth", body_of(right))
    drive.add("tiny_tuned.pth", body_of(tiny(1)))
    with caplog.at_level(logging.WARNING, "segzoo"):
        assert digest(create()) == digest(right)
    assert drive.downloads() == ["tiny.pth", "tiny_b.pth"]
    assert "tiny_b.pth of" in caplog.text
    assert "tiny.pth, tiny_tuned.pth would fit by name, too (choose one with" in caplog.text
    # What did not fit this row is another's, and is there already.
    of_five = dataclasses.replace(TINY, num_classes=5, drive_files=r"tiny\.pth$")
    assert digest(create(pretrained_cfg=of_five)) == digest(other)
    assert drive.downloads() == ["tiny.pth", "tiny_b.pth"]


def test_nothing_fits(drive, cache):
    drive.add("tiny.pth", body_of(tiny(num_classes=5)))
    drive.add("more/large.pth", b"")
    with pytest.raises(
        segzoo.SegzooError,
        match=r"no file that fits by its name could be loaded \(tiny.pth: .*decoder.classifier.bias is \(5,\), needs "
        r"\(13,\).*; the folder has tiny.pth, more/large.pth\. .*choose one with "
        rf"pretrained_cfg_overlay=\{{'file': NAME\}}, .*{BY_HAND}",
    ):
        create()
    with pytest.raises(segzoo.SegzooError, match=r"no file of the folder fits by its name; it has tiny.pth, more/larg"):
        create(pretrained_cfg_overlay={"drive_files": "nothing"})


def test_a_file_is_chosen_by_its_name_or_path(drive):
    models = {"a/weights.pth": tiny(1), "b/weights.pth": tiny(2), "other.bin": tiny(3)}
    for path, model in models.items():
        drive.add(path, body_of(model))
    assert digest(create(pretrained_cfg_overlay={"file": "b/weights.pth"})) == digest(models["b/weights.pth"])
    assert digest(create(pretrained_cfg_overlay={"file": "other.bin"})) == digest(models["other.bin"])
    assert digest(create(pretrained_cfg_overlay={"file": "weights.pth"})) == digest(models["a/weights.pth"])


def test_a_file_that_was_downloaded_by_hand(drive, tmp_path):
    model = tiny(4)
    path = tmp_path / "by hand.pth"
    with pytest.raises(segzoo.SegzooError, match="by hand.pth is no file on this machine"):
        create(pretrained_cfg_overlay={"file": str(path)})
    path.write_bytes(body_of(model))
    assert digest(create(pretrained_cfg_overlay={"file": str(path)})) == digest(model)
    assert drive.requests == []


def test_a_recorded_hash_decides(drive):
    model, other = body_of(tiny(1)), body_of(tiny(2))
    drive.add("tiny.pth", other)
    drive.add("tiny_b.pth", model)
    recorded = {"sha256": hashlib.sha256(model).hexdigest()}
    assert digest(create(pretrained_cfg_overlay=recorded)) == digest(tiny(1))
    with pytest.raises(segzoo.SegzooError, match="tiny.pth: has sha256 .* instead of 0000"):
        create(pretrained_cfg_overlay={"sha256": "0" * 64})


def test_a_wrong_hash_does_not_cost_the_file_that_was_taken(drive, cache):
    drive.add("tiny.pth", body_of(tiny()))
    create()
    before = kept(cache)
    with pytest.raises(segzoo.SegzooError, match="tiny.pth: has sha256 .* instead of 0000"):
        create(pretrained_cfg_overlay={"sha256": "0" * 64})
    assert kept(cache) == before
    assert digest(create()) == digest(tiny()) and drive.downloads() == ["tiny.pth"]


@pytest.mark.parametrize("place", ["{}", "https://drive.google.com/drive/u/0/folders/{}"])
def test_another_folder(drive, monkeypatch, place):
    mine = "my_own_folder_of_weights_1234"
    drive.folders[mine] = []
    drive.add("tiny.pth", body_of(tiny(1)))
    drive.add("tiny.pth", body_of(tiny(2)), folder=mine)
    assert digest(create()) == digest(tiny(1))
    assert digest(create(pretrained_cfg_overlay={"drive_folder": place.format(mine)})) == digest(tiny(2))
    monkeypatch.setenv("SEGZOO_EDAFORMER_DRIVE_FOLDER", place.format(mine))
    assert digest(create()) == digest(tiny(2))
    drive.folders["a_third_folder_of_weights_123"] = []
    with pytest.raises(segzoo.SegzooError, match="shows no file"):  # what the call says is not the authors' folder
        create(pretrained_cfg_overlay={"drive_folder": "a_third_folder_of_weights_123"})


def test_a_row_without_a_folder_or_a_pattern_that_is_none(drive):
    with pytest.raises(segzoo.SegzooError, match="has no folder, or nothing that says which file"):
        create(pretrained_cfg_overlay={"drive_folder": None})
    with pytest.raises(
        segzoo.SegzooError, match=r"drive_files of a weights row must be a regular expression, not '\('"
    ):
        create(pretrained_cfg_overlay={"drive_files": "("})
    assert drive.requests == []


def test_converted_weights_on_the_hub_go_first(drive, monkeypatch):
    """Who has published them in a namespace of his own asks for those."""
    asked = []

    def saved_files(name: str, row: PretrainedCfg, *, force: bool) -> None:
        asked.append(name)
        raise segzoo.SegzooError("not here")

    monkeypatch.setenv("SEGZOO_HUB_NAMESPACE", "club")
    monkeypatch.setattr("segzoo.zoo.download.saved_files", saved_files)
    with pytest.raises(segzoo.SegzooError, match="not here"):
        segzoo.create_model("edaformer_b", pretrained=True)
    assert asked == ["hf-hub:club/edaformer_b.ade20k"]
    assert drive.requests == []


# --- what goes wrong --------------------------------------------------------------------------------------------------


def page(where: str, status: int, body: str, headers: dict[str, str] | None = None):
    """A fault: answer so wherever a part of the URL is this."""
    return lambda request: answer(request, status, body, headers) if where in request.url else None


def raising(where: str, error: type[Exception]):
    def fault(request: requests.PreparedRequest) -> None:
        if where in request.url:
            raise error("the line is dead")

    return fault


ATTACHED = {"Content-Type": "text/html", "Content-Disposition": 'attachment; filename="tiny.pth"'}


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (raising("folderview", requests.ConnectionError), r"cannot be reached \(ConnectionError: the line is dead\)"),
        (raising("download", requests.exceptions.SSLError), r"cannot be reached \(SSLError"),
        (raising("uc?", requests.ReadTimeout), "does not answer in time"),
        (page("folderview", 403, "no"), r"does not give it \(Failed to retrieve folder contents .*status code 403"),
        (page("folderview", 200, "<p>new"), r"does not give it \(Failed to parse folder contents"),
        (page("folderview", 200, LOGIN), "shows no file: it is empty or private, or its page has changed"),
        (page("uc?", 200, QUOTA), "does not give it .*Too many users have viewed or downloaded this file recently"),
        (page("uc?", 200, LOGIN), "does not give it .*Cannot retrieve the public link"),
        (page("uc?", 200, "", {}), r"pages are not as gdown knows them \(KeyError: 'content-type'\)"),
        (page("download", 404, "gone", ATTACHED), "answered 404"),
        (page("download", 503, "later", ATTACHED), "answered 503"),
        (page("download", 200, LOGIN, ATTACHED), "tiny.pth is a web page, .*, so it was removed"),
    ],
)
def test_refusals_are_a_sentence_with_the_way_out(drive, cache, fault, message):
    drive.add("tiny.pth", body_of(tiny()))
    drive.faults.append(fault)
    with pytest.raises(
        segzoo.SegzooError, match=rf"(?s)^cannot get the weights of test_edaformer: .*{message}"
    ) as info:
        create()
    assert re.search(BY_HAND, str(info.value))
    assert "\n" not in str(info.value)
    assert kept(cache) == []
    drive.faults.clear()
    assert digest(create()) == digest(tiny())


def test_a_busy_drive_is_asked_again(drive, caplog):
    drive.add("tiny.pth", body_of(tiny()))
    busy = iter([429, 503])

    def fault(request: requests.PreparedRequest) -> requests.Response | None:
        status = next(busy, None) if "/download" in request.url else None
        return None if status is None else answer(request, status, "later", ATTACHED)

    drive.faults.append(fault)
    with caplog.at_level(logging.WARNING, "segzoo"):
        assert digest(create()) == digest(tiny())
    assert caplog.text.count("trying again") == 2


@pytest.mark.parametrize("version", [None, "5.2.0", "6.4.9"])
def test_without_gdown(drive, monkeypatch, version):
    drive.add("tiny.pth", body_of(tiny()))
    if version is None:
        monkeypatch.setitem(sys.modules, "gdown", None)
    else:
        monkeypatch.setattr("gdown.__version__", version)
    problem = "gdown is not installed" if version is None else f"gdown {re.escape(version)} is too old"
    problem += ".*licence: unknown, see the authors"
    with pytest.raises(
        segzoo.SegzooError,
        match=rf"{problem}.*pip install 'segzoo\[drive\]', .*{BY_HAND}",
    ):
        create()
    assert drive.requests == []


def test_offline(drive, monkeypatch):
    drive.add("tiny.pth", body_of(tiny()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(segzoo.SegzooError, match=rf"offline mode is on \(HF_HUB_OFFLINE\).*{BY_HAND}"):
        create()
    assert drive.requests == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    create()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert digest(create()) == digest(tiny())  # from the cache


def test_a_download_that_broke_off_is_gone_on_with(drive, cache):
    body = body_of(tiny(), more=2**20)
    drive.add("tiny.pth", body)
    drive.truncate = CHUNK + 5
    with pytest.raises(segzoo.SegzooError, match=rf"Download is incomplete: received 524288 bytes.*{BY_HAND}"):
        create()
    (partial,) = cache.rglob("*.part")
    assert partial.read_bytes() == body[:CHUNK]
    asked = []
    drive.faults.append(lambda request: asked.append(request.headers.get("Range")))
    assert digest(create()) == digest(tiny())
    assert f"bytes={CHUNK}-" in asked
    assert kept(cache) == [f"{hashlib.sha256(body).hexdigest()}-tiny.pth"]


def test_a_lost_network_keeps_what_has_arrived(drive, cache):
    drive.add("tiny.pth", body_of(tiny(), more=2**20))
    drive.truncate = CHUNK + 5
    with pytest.raises(segzoo.SegzooError, match="incomplete"):
        create()
    drive.faults.append(raising("download", requests.ConnectionError))
    with pytest.raises(segzoo.SegzooError, match="cannot be reached"):
        create()
    (partial,) = cache.rglob("*.part")
    assert partial.stat().st_size == CHUNK


def test_what_cannot_be_gone_on_with_is_downloaded_anew(drive, cache, caplog):
    """Drive answers with the whole file where its rest was asked for."""
    body = body_of(tiny(), more=2**20)
    drive.add("tiny.pth", body)
    drive.truncate = CHUNK + 5
    with pytest.raises(segzoo.SegzooError, match="incomplete"):
        create()

    def whole(request: requests.PreparedRequest) -> None:
        request.headers.pop("Range", None)

    drive.faults.append(whole)
    with caplog.at_level(logging.WARNING, "segzoo"):
        assert digest(create()) == digest(tiny())
    assert "tiny.pth cannot be gone on with and is downloaded anew" in caplog.text
    assert len(kept(cache)) == 1


def test_a_damaged_archive_is_not_kept(drive, cache):
    """A byte of a tensor differs: torch would load it, the archive's own check sum tells."""
    body = bytearray(body_of(tiny()))
    body[len(body) // 2] ^= 1
    drive.add("tiny.pth", bytes(body))
    with pytest.raises(segzoo.SegzooError, match=rf"tiny.pth is damaged at .*, so it was removed.*{BY_HAND}"):
        create()
    assert kept(cache) == []


Usage = collections.namedtuple("Usage", "total used free")


def test_a_full_disk(drive, cache, monkeypatch):
    drive.add("tiny.pth", body_of(tiny()))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(10**9, 10**9, -(10**9)))
    with pytest.raises(segzoo.SegzooError, match=r"is full \(.*bytes are needed.*set SEGZOO_CACHE to a larger disk"):
        create()


def test_a_cache_that_is_a_file(drive, cache):
    drive.add("tiny.pth", body_of(tiny()))
    cache.write_text("a file")
    with pytest.raises(segzoo.SegzooError, match="cannot be written.*set SEGZOO_CACHE"):
        create()


# --- the cache --------------------------------------------------------------------------------------------------------


def test_forced_download(drive):
    drive.add("tiny.pth", body_of(tiny(1)))
    assert digest(create()) == digest(tiny(1))
    drive.add("tiny.pth", body_of(tiny(2)))
    assert digest(create()) == digest(tiny(1))
    assert digest(create(force_download=True)) == digest(tiny(2))
    assert digest(create()) == digest(tiny(2))


def test_a_changed_file_of_the_cache_is_replaced(drive, cache, caplog):
    drive.add("tiny.pth", body_of(tiny()))
    create()
    (path,) = (path for path in cache.rglob("*-tiny.pth"))
    path.write_bytes(body_of(tiny(5)))
    with caplog.at_level(logging.WARNING, "segzoo"):
        assert digest(create()) == digest(tiny())
    assert "it was removed and is downloaded again" in caplog.text


def test_notes_that_cannot_be_read_are_made_anew(drive, cache):
    drive.add("tiny.pth", body_of(tiny()))
    create()
    for note in (cache / "drive").glob("*.json"):
        assert json.loads(note.read_text())["file"].endswith("-tiny.pth")
        note.write_text("[]")
    assert digest(create()) == digest(tiny())
    assert drive.downloads() == ["tiny.pth", "tiny.pth"]


def test_threads_download_once(drive):
    drive.add("tiny.pth", body_of(tiny()))
    expected = digest(tiny())
    with ThreadPoolExecutor(4) as pool:
        assert {digest(model) for model in pool.map(lambda _: create(), range(4))} == {expected}
    assert drive.downloads() == ["tiny.pth"]


def test_a_cache_of_the_call(drive, cache, tmp_path):
    drive.add("tiny.pth", body_of(tiny()))
    mine = tmp_path / "mine"
    assert digest(create(cache_dir=mine)) == digest(tiny())
    assert len(kept(mine)) == 1
    assert not cache.exists()
    drive.requests.clear()
    create(cache_dir=str(mine))
    assert drive.requests == []
    mine.joinpath("file").write_text("")
    with pytest.raises(segzoo.SegzooError, match="cannot be written.*set cache_dir to a folder"):
        create(cache_dir=mine / "file")
    with pytest.raises(segzoo.SegzooError, match="cache_dir=5 is no folder"):
        create(cache_dir=5)
    create()
    assert len(kept(cache)) == 1
