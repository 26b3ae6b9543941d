"""Published weights through the real Hub client, against a stand-in on loopback.

Weights are drawn by the golden rule under the official names and renamed here, by tables of this file, into the layout
and file format of the row, so that the package's key rules are proven against an independent description.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from golden_data import golden_arrays, golden_input, golden_json, golden_state_dict
from hub_client import Client, digest
from hub_stand_in import HubStandIn
from safetensors.torch import save

import segzoo
from segzoo.zoo import model_info

COMMIT = "c0ffee" + "0" * 34


# --- layouts --------------------------------------------------------------------------------------------------------

# Original NVIDIA names -> those in the nvidia/* repositories; groups may be followed by an offset to the index.
NVIDIA_TO_HUB = (
    (r"^backbone\.patch_embed(\d)\.proj\.", "segformer.encoder.patch_embeddings.{0}.proj."),
    (r"^backbone\.patch_embed(\d)\.norm\.", "segformer.encoder.patch_embeddings.{0}.layer_norm."),
    (r"^backbone\.norm(\d)\.", "segformer.encoder.layer_norm.{0}."),
    (r"^backbone\.block(\d)\.", "segformer.encoder.block.{0}."),
    (r"\.norm([12])\.(?=weight|bias)(?<=\d\.)", ".layer_norm_{1}."),
    (r"\.attn\.q\.", ".attention.self.query."),
    (r"\.attn\.sr\.", ".attention.self.sr."),
    (r"\.attn\.norm\.", ".attention.self.layer_norm."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc([12])\.", ".mlp.dense{1}."),
    (r"^decode_head\.linear_c(\d)\.", "decode_head.linear_c.{0}."),
    (r"^decode_head\.linear_fuse\.conv\.", "decode_head.linear_fuse."),
    (r"^decode_head\.linear_fuse\.bn\.", "decode_head.batch_norm."),
    (r"^decode_head\.linear_pred\.", "decode_head.classifier."),
)
NVIDIA_TO_SMP = (
    (r"^backbone\.", "encoder."),
    (r"^decode_head\.linear_c4\.proj\.", "decoder.mlp_stage.0.linear."),
    (r"^decode_head\.linear_c3\.proj\.", "decoder.mlp_stage.1.linear."),
    (r"^decode_head\.linear_c2\.proj\.", "decoder.mlp_stage.2.linear."),
    (r"^decode_head\.linear_c1\.proj\.", "decoder.mlp_stage.3.linear."),
    (r"^decode_head\.linear_fuse\.conv\.", "decoder.fuse_stage.0."),
    (r"^decode_head\.linear_fuse\.bn\.", "decoder.fuse_stage.1."),
    (r"^decode_head\.linear_pred\.", "segmentation_head.0."),
)


def renamed(state: dict[str, torch.Tensor], table: tuple) -> dict[str, torch.Tensor]:
    """{0} in a replacement is the matched index counted from 0 instead of 1, {1} the matched index itself."""
    result = {}
    for key, tensor in state.items():
        for pattern, replacement in table:
            key = re.sub(
                pattern,
                lambda match, text=replacement: text.format(int(match[1]) - 1, match[1]) if match.groups() else text,
                key,
            )
        result[key] = tensor
    return result


def to_hub_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    result = {}
    for key, tensor in renamed(state, NVIDIA_TO_HUB).items():
        if ".attn.kv." in key:
            for part, name in zip(tensor.chunk(2), ("key", "value"), strict=True):
                result[key.replace(".attn.kv.", f".attention.self.{name}.")] = part.contiguous()
        elif "conv_seg" not in key:
            result[key] = tensor
    return result


def to_smp_layout(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in renamed(state, NVIDIA_TO_SMP).items() if "conv_seg" not in key}


def to_pickle(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def to_pdparams(state: dict[str, torch.Tensor]) -> bytes:
    arrays = {key: tensor.numpy() for key, tensor in state.items()}
    return pickle.dumps({**arrays, "StructuredToParameterName@@": {key: key for key in arrays}}, protocol=2)


def drawn(manifest: list) -> dict[str, torch.Tensor]:
    return {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in golden_state_dict(manifest).items()
    }


def segformer_b0(variant: str) -> dict[str, torch.Tensor]:
    return drawn(golden_json("segformer_b0")["variants"][variant]["state_dict"])


def reference(name: str, state: dict[str, torch.Tensor], **options):
    """What `create_model` must give: the named model, on which `load_weights` of the official state was called."""
    model = segzoo.create_model(name, **options)
    segzoo.load_weights(model, state)
    return model


def row_of(name: str):
    return model_info(name).pretrained_cfg


# --- the stand-in and a client --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub():
    with HubStandIn() as server:
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def shared_client(hub, cache):
    with Client(hub.environment(cache)) as client:
        yield client


@pytest.fixture
def client(hub, shared_client):
    hub.reset()
    return shared_client


def serve(hub: HubStandIn, name: str, body: bytes, **changes: object) -> dict[str, object]:
    """Serve a body as the file of a row; the overlay says what drawn weights cannot share: size and hash."""
    row = row_of(name)
    file = row.hf_hub_filename or "model.safetensors"
    hub.add(row.hf_hub_id, {file: body}, commit=row.hf_revision)
    return {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), **changes}


# --- published rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "variant", "encode"),
    [
        ("segformer_b0.nvidia_ade20k_512", "ade", lambda state: save(to_hub_layout(state))),
        ("segformer_b0.nvidia_cityscapes_1024", "city", lambda state: to_pickle(to_hub_layout(state))),
        ("segformer_b0.smp_ade20k_512", "ade", lambda state: save(to_smp_layout(state))),
    ],
)
def test_segformer_rows(hub, client, name, variant, encode):
    state = segformer_b0(variant)
    overlay = serve(hub, name, encode(state))
    result = client.create(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert result.get("error") is None
    assert result["model"] == name
    assert result["digests"] == [digest(reference(name, state))]
    assert hub.count("GET", f"{row_of(name).hf_hub_id}/resolve/") == 1
    # Pinned and cached: no request at all.
    hub.reset()
    again = client.create(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert again["digests"] == result["digests"]
    assert hub.count("GET", "/resolve/") == 0
    if row_of(name).hf_revision is not None:
        assert hub.requests == []


def test_golden_scores_of_a_downloaded_model(hub, client, cache, monkeypatch):
    """The numbers of the official code, from the file that the client put into its cache."""
    name = "segformer_b0.nvidia_ade20k_512"
    overlay = serve(hub, name, save(to_hub_layout(segformer_b0("ade"))))
    assert "error" not in client.create(name, pretrained=True, pretrained_cfg_overlay=overlay)
    file = next(
        (cache / "hf" / "hub").glob("models--nvidia--segformer-b0-finetuned-ade-512-512/snapshots/*/*.safetensors")
    )
    model = segzoo.create_model(name, checkpoint_path=file).eval()
    arrays = golden_arrays("segformer_b0")
    compared = 0
    for setting in golden_json("segformer_b0")["settings"]:
        key = f"{setting['name']}.logits"
        if not setting["name"].startswith("ade") or key not in arrays:
            continue
        with torch.no_grad():
            logits = model.forward_head(model.forward_features(golden_input(setting["input_shape"]).float()))
        torch.testing.assert_close(logits[:, ::3], torch.from_numpy(arrays[key]), rtol=0, atol=2e-5)
        compared += 1
    assert compared


def test_original_layout_from_another_place(hub, client):
    """An overlay points a row elsewhere: then the recorded size and hash no longer hold, and original keys load."""
    state = segformer_b0("ade")
    hub.add("org/original", {"segformer.b0.pth": to_pickle({"state_dict": state, "meta": {"epoch": 1}})})
    overlay = {"hf_hub_id": "org/original", "hf_hub_filename": "segformer.b0.pth", "hf_revision": None}
    name = "segformer_b0.nvidia_ade20k_512"
    result = client.create(name, pretrained=True, pretrained_cfg_overlay=overlay)
    assert result.get("digests") == [digest(reference(name, state))], result


def test_mit_row(hub, client):
    manifest = golden_json("mit_b0_encoder")["state_dict"]
    state = drawn([*manifest, ["head.weight", [1000, 256]], ["head.bias", [1000]]])
    serve(hub, "mit_b0.imagenet", save(state))
    result = client.create("mit_b0", pretrained=True)
    assert result.get("digests") == [digest(reference("mit_b0", state))], result
    assert result["model"] == "mit_b0.imagenet"
    # The same file, read from the cache: other classes keep the encoder; in half as many channels the file is fitted.
    assert client.create("mit_b0", pretrained=True, num_classes=1000)["digests"] == result["digests"]
    grey = client.create("mit_b0", pretrained=True, in_chans=1)
    expected = segzoo.create_model("mit_b0", in_chans=1)
    expected.load_state_dict(
        {**reference("mit_b0", state).state_dict(), "stages.0.patch_embed.proj.weight": grey_weight(state)}
    )
    assert grey["digests"] == [digest(expected)]
    assert hub.count("GET") == 1


def grey_weight(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return state["patch_embed1.proj.weight"].sum(dim=1, keepdim=True)


@pytest.mark.parametrize("variant", ["slim", pytest.param("base", marks=pytest.mark.slow)])
def test_rtformer_url(hub, client, variant):
    name = f"rtformer_{variant}.{'cityscapes' if variant == 'slim' else 'ade20k'}"
    state = drawn(golden_json(f"rtformer_{variant}_{name.rpartition('.')[2]}")["state_dict"])
    url = hub.add_file(row_of(name).url.partition("://")[2], to_pdparams(state))
    result = client.create(name, pretrained=True, pretrained_cfg_overlay={"url": url})
    assert result.get("digests") == [digest(reference(name, state))], result
    assert hub.requests == [f"GET /files/{row_of(name).url.partition('://')[2]}"]
    hub.reset()
    assert client.create(name, pretrained=True, pretrained_cfg_overlay={"url": url})["digests"] == result["digests"]
    assert hub.requests == []


def test_zip_from_a_url(hub, client):
    name = "rtformer_slim_backbone.imagenet"
    model = segzoo.create_model(name)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        manifest = golden_json("rtformer_slim_cityscapes")["state_dict"]
        state = {key: value for key, value in drawn(manifest).items() if not key.startswith(("spp.", "seghead"))}
        file.writestr("rtformer_slim_backbone/model.pdparams", to_pdparams(state))
    url = hub.add_file("rtformer_slim_backbone_imagenet_pretrained.zip", archive.getvalue())
    segzoo.load_weights(model, state)
    result = client.create(name, pretrained=True, pretrained_cfg_overlay={"url": url})
    assert result.get("digests") == [digest(model)], result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "manifest"),
    [
        ("segvit_base.ade20k", "manifest_segvit_ade_51.3"),
        ("segvit_large.ade20k", "manifest_segvit_ade_54.6"),
        ("segvit_large_shrunk.ade20k", "manifest_segvit_ade_shrunk_53.9"),
    ],
)
def test_segvit_rows(hub, client, name, manifest):
    """An mmcv checkpoint with optimizer: only the weights are read."""
    state = drawn(golden_json(f"manifests/{manifest}")["state_dict"])
    body = to_pickle({"meta": {"iter": 160_000}, "state_dict": state, "optimizer": {"state": {0: torch.zeros(1000)}}})
    serve(hub, name, body)
    result = client.create(name, pretrained=True)
    assert result.get("digests") == [digest(reference(name, state))], result


# --- saved models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A saved model with a plan, its own classes, one channel and half precision."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(0)
    model = segzoo.create_model("test_edaformer", num_classes=5, in_chans=1).half()
    model.set_inference_reduction({"encoder": (2, 2, 1, 1), "decoder": 2})
    segzoo.save_pretrained(model, folder)
    return folder, model


def test_local_dir(saved):
    folder, model = saved
    restored = segzoo.create_model(f"local-dir:{folder}")
    assert digest(restored) == digest(model)
    assert restored.cfg == model.cfg
    assert repr(restored) == repr(model)  # shows every leaf's factor
    other = segzoo.create_model(f"local-dir:{folder}", num_classes=3, features_only=False)
    assert other.num_classes == 3
    with pytest.raises(segzoo.SegzooError, match="no_such_folder is no folder"):
        segzoo.create_model(f"local-dir:{folder}/no_such_folder")
    with pytest.raises(segzoo.SegzooError, match="checkpoint_path"):
        segzoo.create_model(f"local-dir:{folder}", checkpoint_path="x.pth")


def test_a_saved_file_may_be_overwritten_while_its_model_lives(saved, tmp_path):
    """A user's file is copied, not mapped: writing into it must not change or crash the model."""
    folder, model = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    restored = segzoo.create_model(f"local-dir:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert digest(restored) == digest(model)


def test_hub_name(hub, client, saved):
    folder, model = saved
    files = {file.name: file for file in folder.iterdir()}
    commit = hub.add("org/mine", files)
    hub.add("org/mine", {"config.json": b"{}"})
    result = client.create(f"hf-hub:org/mine@{commit}")
    assert result.get("digests") == [digest(model)], result
    hub.reset()
    assert client.create(f"hf-hub:org/mine@{commit}")["digests"] == result["digests"]
    assert hub.requests == []
    assert 'no "segzoo" block' in client.create("hf-hub:org/mine")["error"]
    assert "organisation/name" in client.create("hf-hub:a/b/c")["error"]


def test_unpublished_rows_touch_no_network(hub, client, tmp_path):
    result = client.create("edaformer_mit_b0.ade20k", pretrained=True)
    assert result["type"] == "WeightsError"
    assert re.search(
        r"not published.*train the model.*segzoo convert.*SEGZOO_HUB_NAMESPACE.*segzoo/edaformer_mit", result["error"]
    )
    assert hub.requests == []
    model = segzoo.create_model("edaformer_t.ade20k")
    segzoo.save_pretrained(model, tmp_path)
    hub.add("club/edaformer_t.ade20k", {file.name: file for file in tmp_path.iterdir()})
    club = {"SEGZOO_HUB_NAMESPACE": "club"}
    result = client.create("edaformer_t.ade20k", pretrained=True, environ=club)
    assert result.get("digests") == [digest(model)], result
    # Another model in that place is refused, not loaded.
    hub.add("club/edaformer_t.cityscapes", {file.name: file for file in tmp_path.iterdir()})
    result = client.create("edaformer_t.cityscapes", pretrained=True, environ=club)
    assert "club/edaformer_t.cityscapes on the Hub holds another model, edaformer_t.ade20k" in result["error"]
    result = client.create("edaformer_t.coco_stuff", pretrained=True, environ=club)
    assert "there is no repository club/edaformer_t.coco_stuff" in result["error"]


def test_terms_are_said_once(hub, tmp_path):
    name = "segformer_b0.nvidia_ade20k_512"
    overlay = serve(hub, name, save(to_hub_layout(segformer_b0("ade"))))
    with Client(hub.environment(tmp_path)) as client:
        logs = [client.create(name, pretrained=True, pretrained_cfg_overlay=overlay)["log"] for _ in range(2)]
    assert [("must not be used commercially" in " ".join(log)) for log in logs] == [True, False]


# --- faults of the Hub ----------------------------------------------------------------------------------------------

NAME = "segformer_b0.nvidia_ade20k_512"
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def body() -> bytes:
    return save(to_hub_layout(segformer_b0("ade")))


@pytest.fixture(scope="module")
def expected() -> str:
    return digest(reference(NAME, segformer_b0("ade")))


def hide(server, repo, body):
    """The repository that the row names is not there yet."""
    return {}


def gate(server, repo, body):
    server.add(repo, {FILE: body}, gated=True)
    return {}


def make_private(server, repo, body):
    server.add(repo, {FILE: body}, private=True)
    return {}


def other_revision(server, repo, body):
    server.add(repo, {FILE: body})
    return {"pretrained_cfg_overlay": {"hf_revision": COMMIT}}


def other_file(server, repo, body):
    server.add(repo, {"README.md": b"#"})
    return {}


def other_model(server, repo, body):
    server.add(repo, {FILE: save({"backbone.conv1.weight": torch.zeros(3)})})
    return {}


def no_file_limit(server, repo, body):
    server.add(repo, {FILE: body})
    return {"file_limit": 1_000_000}


def failing(pattern, **fault):
    def arrange(server, repo, body):
        server.add(repo, {FILE: body})
        server.fail(pattern, **{"times": None, **fault})
        return {}

    return arrange


def wrong_body(server, repo, body):
    server.add(repo, {FILE: body})
    server.fail("GET .*resolve", body=body[:-1] + bytes([body[-1] ^ 1]))
    return {}


ASK, GET = r"HEAD .*resolve", r"GET .*resolve"
REFUSED = {"X-Error-Message": "Your address is not allowed."}


FAULTS = [
    (failing(ASK, refuse=True), r"cannot be reached.*check the network, the proxy and HF_ENDPOINT"),
    (failing(GET, refuse=True), r"the download broke off.*run again"),
    (hide, r"there is no repository org/.*, or it is private.*HF_TOKEN"),
    (make_private, r"there is no repository org/.*, or it is private.*HF_TOKEN"),
    (gate, r"the repository is gated: .*restricted.*accept its terms at http.*HF_TOKEN"),
    (other_revision, r"the repository has no such revision.*hf_revision"),
    (other_file, r"the repository has no such file at this revision.*hf_hub_filename"),
    (failing(ASK, status=403, headers=REFUSED), r"refuses access \(403\): Your address is not allowed.*HF_TOKEN"),
    (failing(GET, status=403, headers=REFUSED), r"refuses access \(403\)"),
    (failing(ASK, status=500), r"the Hub answered 500.*try again later"),
    (failing(ASK, status=429), r"the Hub answered 429.*try again later"),
    (failing(GET, status=500), r"the Hub answered 500.*try again later"),
    (failing(GET, truncate=1000), r"the download broke off.*run again"),
    (wrong_body, r"the downloaded file has sha256 \w{64} instead of \w{64}, so it was removed"),
    (no_file_limit, r"the disk of .* is full.*make room, or set HF_HOME"),
    (other_model, r"does not fit SegFormer|left over: backbone.conv1.weight"),
]
CANNOT_BE_MENDED = (other_revision, other_file, other_model)  # in a pinned commit


@pytest.mark.parametrize(
    ("arrange", "message", "pinned"),
    [
        *[(*fault, False) for fault in FAULTS],
        *[pytest.param(*fault, True, marks=pytest.mark.slow) for fault in FAULTS if fault[0] not in CANNOT_BE_MENDED],
    ],
)
def test_faults_of_the_hub(request, hub, client, body, expected, arrange, message, pinned):
    repo = "org/" + re.sub(r"\W+", "-", request.node.callspec.id).strip("-")
    job = arrange(hub, repo, body)
    revision = hub.repositories[repo].refs["main"] if pinned and repo in hub.repositories else None
    overlay = {"hf_hub_id": repo, "hf_revision": revision, "sha256": hashlib.sha256(body).hexdigest()}
    if arrange is other_model:
        overlay["sha256"] = None
    broken = {**overlay, **job.pop("pretrained_cfg_overlay", {})}
    result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=broken, **job)
    assert result["type"] == "WeightsError", result
    assert re.search(message, result["error"]), result["error"]
    assert result["cause"] != "NoneType" or arrange is wrong_body
    assert repo in result["error"]
    assert NAME in result["error"]
    if arrange is not other_model:
        assert FILE in result["error"]
        assert "https://github.com/NVlabs/SegFormer/blob/master/LICENSE" in result["error"]
    # Mended: the cache is as good as new.
    hub.reset()
    if arrange in (hide, other_file, other_model):
        hub.add(repo, {FILE: body})
    environ = {"HF_TOKEN": hub.token} if arrange in (gate, make_private) else {}
    overlay["sha256"] = hashlib.sha256(body).hexdigest()
    result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay, environ=environ)
    assert result.get("digests") == [expected], result


def test_wrong_file_in_the_cache_is_replaced(hub, client, cache, body, expected):
    """Whoever damaged it: the file is found out, removed from use and downloaded again."""
    repo = "org/damaged"
    overlay = {"hf_hub_id": repo, "hf_revision": hub.add(repo, {FILE: body})}
    overlay["sha256"] = hashlib.sha256(body).hexdigest()
    assert client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)["digests"] == [expected]
    file = next((cache / "hf" / "hub").glob("models--org--damaged/snapshots/*/*.safetensors"))
    file.resolve().write_bytes(body[:-1] + bytes([body[-1] ^ 1]))
    hub.reset()
    result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert result.get("digests") == [expected], result
    assert "it was removed and is downloaded again" in " ".join(result["log"])
    assert hub.count("GET", "/resolve/") == 1


def test_without_recorded_hash_the_hub_s_own_is_checked(hub, client, body):
    repo = "org/unrecorded"
    commit = hub.add(repo, {FILE: body})
    hub.fail(GET, body=body[:-1] + bytes([body[-1] ^ 1]))
    overlay = {"hf_hub_id": repo, "hf_revision": commit}
    assert "so it was removed" in client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)["error"]


def test_branch_moves_on_and_is_cached(hub, client, body, expected):
    """A branch is asked every time; while the Hub does not answer, the cached copy serves, and that is said."""
    overlay = {"hf_hub_id": "org/branch", "hf_revision": None}
    other = {key: tensor + 1 if tensor.is_floating_point() else tensor for key, tensor in segformer_b0("ade").items()}
    hub.add("org/branch", {FILE: save(to_hub_layout(other))})
    first = client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert first["digests"] == [digest(reference(NAME, other))]
    hub.add("org/branch", {FILE: body})
    assert client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)["digests"] == [expected]
    for status in (503, 429):
        hub.reset()
        hub.fail("resolve", status=status, times=None)
        result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
        assert result["digests"] == [expected]
        assert "cached copy is used" in " ".join(result["log"])


@pytest.mark.slow
def test_offline_and_without_network(hub, tmp_path, body, expected):
    overlay = serve(hub, NAME, body)
    job = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    url = {"state": "url", "url": hub.add_file("offline/model.safetensors", body)}
    by_url = {"pretrained": True, "pretrained_cfg_overlay": url}
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nobody listens there
    for variables, message in (
        ({"HF_HUB_OFFLINE": "1"}, r"not in the cache, and offline mode is on \(HF_HUB_OFFLINE\).*unset HF_HUB_OFFLINE"),
        (nowhere, r"http://127.0.0.1:9 cannot be reached \(ConnectError.*check the network"),
    ):
        with Client(hub.environment(tmp_path, **variables)) as client:
            hub.reset()
            result = client.create(NAME, **job)
            assert re.search(message, result["error"]), result
            if "HF_HUB_OFFLINE" in variables:
                assert "HF_HUB_OFFLINE" in client.create(NAME, **by_url)["error"]
            assert hub.requests == []
    with Client(hub.environment(tmp_path)) as client:
        assert client.create(NAME, **job)["digests"] == [expected]
        assert client.create(NAME, **by_url)["digests"] == [expected]
    with Client(hub.environment(tmp_path, HF_HUB_OFFLINE="1")) as client:
        hub.reset()
        assert client.create(NAME, **job)["digests"] == [expected]
        assert client.create(NAME, **by_url)["digests"] == [expected]
        assert hub.requests == []


# --- faults of a URL ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "job", "message"),
    [
        ({"refuse": True}, {}, r"the server cannot be reached.*check the network"),
        ({"status": 404}, {}, r"the server answered 404.*pass the file as checkpoint_path="),
        ({"status": 503, "times": None}, {}, r"the server answered 503.*try again later"),
        ({"truncate": 500_000}, {}, r"the download broke off after 500,000 of [\d,]+ bytes.*it goes on from there"),
        ({"body": "wrong"}, {}, r"the downloaded file has sha256 \w{64} instead of \w{64}, so it was removed"),
        (None, {"file_limit": 1_000_000}, r"the disk of .* is full.*make room, or set SEGZOO_CACHE"),
    ],
)
def test_faults_of_a_url(request, hub, client, cache, body, expected, fault, job, message):
    url = hub.add_file(f"{re.sub('[^a-z0-9]+', '-', request.node.callspec.id)}/weights.safetensors", body)
    overlay = {"state": "url", "url": url, "sha256": hashlib.sha256(body).hexdigest(), "size": len(body)}
    if fault is not None:
        fault = {**fault, "body": body[:-1] + b"x"} if "body" in fault else fault
        hub.fail("GET /files/", **fault)
    result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay, **job)
    assert result["type"] == "WeightsError"
    assert re.search(message, result["error"]), result["error"]
    for part in (NAME, url, "https://github.com/NVlabs/SegFormer/blob/master/LICENSE"):
        assert part in result["error"]
    hub.reset()
    assert client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay).get("digests") == [expected]
    # An interrupted download goes on where it stopped.
    assert hub.ranges == (["bytes=500000-"] if fault and "truncate" in fault else [])
    assert not list((cache / "segzoo" / "files").glob("*.partial"))


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("kind", ["hub", "url"])
def test_a_busy_server_is_asked_again(hub, client, body, expected, kind, status):
    overlay = {"state": "url", "url": hub.add_file(f"busy/{status}/model.safetensors", body)}
    if kind == "hub":
        overlay = {"hf_hub_id": f"org/busy{status}", "hf_revision": hub.add(f"org/busy{status}", {FILE: body})}
    hub.fail(ASK if kind == "hub" else "GET /files/", status=status, times=2)
    result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert result.get("digests") == [expected], result
    said = [line for line in result["log"] if "trying again in" in line]
    assert len(said) == 2
    assert f"the server answered {status}" in said[0]


PAGE = b"\n<!DOCTYPE html><html><title>Log in</title></html>"


@pytest.mark.parametrize("name", ["model.safetensors", "model.pdparams", "weights.zip", "weights.pth", "weights"])
def test_a_page_instead_of_weights_is_never_kept(hub, client, cache, name):
    url = hub.add_file(f"login/login-{name}", PAGE)
    for _ in range(2):
        result = client.create(NAME, pretrained=True, pretrained_cfg_overlay={"state": "url", "url": url, "file": None})
        assert "the downloaded file is a web page" in result["error"]
    assert hub.count("GET") == 2
    assert not list((cache / "segzoo" / "files").glob(f"*-login-{name}"))


def test_a_file_that_cannot_be_read_is_set_aside_and_fetched_again(hub, client, cache, body, expected):
    """Of a URL without a known hash; by whatever way it was damaged."""
    url = hub.add_file("healed/weights.safetensors", body)
    overlay = {"state": "url", "url": url, "file": "healed.safetensors"}
    assert client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)["digests"] == [expected]
    (file,) = (cache / "segzoo" / "files").glob("*-healed.safetensors")
    file.write_bytes(bytes(5000))
    hub.reset()
    result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert result.get("digests") == [expected], result
    assert hub.count("GET") == 1
    assert f"It was moved to {file}.unreadable and is downloaded again" in " ".join(result["log"])
    assert Path(f"{file}.unreadable").read_bytes() == bytes(5000)
    # Damaged at its source: fetched again once, and refused with the name of the file and the way out.
    hub.add_file("healed/weights.safetensors", bytes(6000))
    file.write_bytes(bytes(5000))
    hub.reset()
    result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert re.search(
        rf"{re.escape(str(file))} is damaged.*It came from {url}; delete it, or pass force_download=True",
        result["error"],
    )
    assert hub.count("GET") == 1
    hub.add_file("healed/weights.safetensors", body)
    job = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    assert client.create(NAME, **job, force_download=True).get("digests") == [expected]


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_forced_download(hub, client, body, expected, kind):
    overlay = {"state": "url", "url": hub.add_file("forced/model.safetensors", body)}
    if kind == "hub":
        overlay = {"hf_hub_id": "org/forced", "hf_revision": hub.add("org/forced", {FILE: body})}
    for force, requests in ((False, 1), (False, 1), (True, 2)):
        job = {"pretrained": True, "pretrained_cfg_overlay": overlay, "force_download": force}
        assert client.create(NAME, **job).get("digests") == [expected]
        assert hub.count("GET", "/resolve/" if kind == "hub" else "/files/") == requests


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_a_cache_of_the_call(hub, client, cache, tmp_path, body, expected, kind):
    """There, and nowhere else: the common cache neither gets the file nor gives it."""
    overlay = {"state": "url", "url": hub.add_file("own/model.safetensors", body)}
    if kind == "hub":
        overlay = {"hf_hub_id": "org/own", "hf_revision": hub.add("org/own", {FILE: body})}
    before = set(cache.rglob("*"))
    for folder, requests in ((tmp_path / "a", 1), (tmp_path / "a", 1), (tmp_path / "b", 2)):
        job = {"pretrained": True, "pretrained_cfg_overlay": overlay, "cache_dir": str(folder)}
        assert client.create(NAME, **job).get("digests") == [expected]
        assert hub.count("GET", "/resolve/" if kind == "hub" else "/files/") == requests
        assert any(path.suffix == ".safetensors" for path in folder.rglob("*"))
    assert set(cache.rglob("*")) == before


def test_a_small_file_of_the_hub_that_was_damaged_is_replaced(hub, client, cache, saved):
    """config.json is no LFS file: the Hub names it by git's hash."""
    folder, model = saved
    commit = hub.add("org/zeroed", {file.name: file for file in folder.iterdir()})
    name = f"hf-hub:org/zeroed@{commit}"
    assert client.create(name).get("digests") == [digest(model)]
    config = next((cache / "hf" / "hub").glob("models--org--zeroed/snapshots/*/config.json"))
    config.resolve().write_bytes(bytes(config.stat().st_size))
    hub.reset()
    result = client.create(name)
    assert result.get("digests") == [digest(model)], result
    assert re.search(r"has git hash \w{40} instead of \w{40}; it was removed", " ".join(result["log"]))
    assert hub.count("GET") == 1


@pytest.mark.slow
def test_a_read_only_cache_serves_what_it_has(hub, tmp_path, body, expected, saved):
    folder, model = saved
    hub.add("org/mounted", {file.name: file for file in folder.iterdir()})  # a branch: the Hub is asked
    overlay = {"hf_hub_id": "org/mounted-weights", "hf_revision": hub.add("org/mounted-weights", {FILE: body})}
    url = {"state": "url", "url": hub.add_file("mounted/model.safetensors", body)}
    jobs = [(NAME, {"pretrained": True, "pretrained_cfg_overlay": row}) for row in (overlay, url)]
    jobs.append(("hf-hub:org/mounted", {}))
    with Client(hub.environment(tmp_path)) as client:
        for name, job in jobs:
            assert "error" not in client.create(name, **job)
    hub.reset()
    with Client(hub.environment(tmp_path)) as client:
        for name, job in jobs:
            result = client.create(name, **job, read_only=str(tmp_path))
            assert result.get("digests") == [expected if job else digest(model)], result
        file = next((tmp_path / "segzoo" / "files").glob("*-model.safetensors"))
        file.write_bytes(b"<html>")
        result = client.create(NAME, **jobs[1][1], read_only=str(tmp_path))
        assert re.search(rf"{re.escape(str(file))} is a web page.*it cannot be removed.*by hand", result["error"])


@pytest.mark.parametrize(
    ("name", "overlay", "headers", "message"),
    [
        (NAME, {"state": "url", "url": "http://[::1"}, {}, r"cannot be reached \(ValueError"),
        (NAME, {"state": "url", "url": "nonsense"}, {}, "cannot be reached"),
        (NAME, {"state": "url"}, {"Location": "http://[::1"}, "cannot be reached|the server answered 302"),
        ("local-dir:~nouser/x", {}, {}, "~nouser/x is no folder"),
        ("hf-hub:org/" + "x" * 300, {}, {}, "cannot get the weights"),
        ("hf-hub:org/a\0b", {}, {}, "cannot get the weights"),
        ("hf-hub:", {}, {}, "cannot get the weights"),
        ("hf-hub:org/name@../../x", {}, {}, "cannot get the weights"),
    ],
)
def test_odd_names_and_addresses(hub, client, name, overlay, headers, message):
    if headers:
        overlay = {**overlay, "url": hub.add_file("odd/weights.safetensors", b"")}
        hub.fail("GET /files/odd", status=302, headers=headers, times=None)
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay} if overlay else {}
    result = client.create(name, **options)
    assert result["type"] == "WeightsError", result
    assert re.search(message, result["error"]), result


def test_a_server_that_counts_wrongly(hub, client, body, expected):
    url = hub.add_file("counted/model.safetensors", body)
    hub.fail("GET /files/counted", length="abc")
    result = client.create(NAME, pretrained=True, pretrained_cfg_overlay={"state": "url", "url": url})
    assert result.get("digests") == [expected], result


@pytest.mark.slow
def test_a_cache_that_is_a_file(hub, tmp_path, body):
    (tmp_path / "file").touch()
    overlay = {"hf_hub_id": "org/nowhere", "hf_revision": hub.add("org/nowhere", {FILE: body})}
    url = {"state": "url", "url": hub.add_file("nowhere/model.safetensors", body)}
    for variable, row in (("HF_HOME", overlay), ("SEGZOO_CACHE", url)):
        with Client(hub.environment(tmp_path, **{variable: str(tmp_path / "file")})) as client:
            result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=row)
            assert re.search(rf"cannot be written .*set {variable} to a folder", result["error"]), result


def test_a_file_that_changed_is_not_resumed(hub, client, body, expected):
    url = hub.add_file("changed/weights.safetensors", save({"old": torch.zeros(300_000)}))
    hub.fail("GET /files/", truncate=700_000)
    overlay = {"state": "url", "url": url}
    assert "broke off" in client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)["error"]
    hub.reset()
    hub.add_file("changed/weights.safetensors", body)
    assert client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay).get("digests") == [expected]
    assert hub.ranges == ["bytes=700000-"]


# --- at once, and malice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["hub", "url"])
def test_twenty_threads_download_once(hub, client, body, expected, kind):
    commit = hub.add("org/threads", {FILE: body})
    overlay = {"hf_hub_id": "org/threads", "hf_revision": commit}
    if kind == "url":
        overlay = {"state": "url", "url": hub.add_file("threads/model.safetensors", body)}
    overlay["sha256"] = hashlib.sha256(body).hexdigest()
    result = client.create(NAME, threads=20, pretrained=True, pretrained_cfg_overlay=overlay)
    assert result.get("digests") == [expected] * 20, result
    assert hub.count("GET") == 1


@pytest.mark.slow
def test_four_processes_download_once(hub, tmp_path, body, expected):
    commit = hub.add("org/processes", {FILE: body})
    sha256 = hashlib.sha256(body).hexdigest()
    jobs = (
        {"hf_hub_id": "org/processes", "hf_revision": commit, "sha256": sha256},
        {"state": "url", "url": hub.add_file("processes/model.safetensors", body), "sha256": sha256},
    )
    clients = [Client(hub.environment(tmp_path)) for _ in range(4)]
    try:
        for client in clients:
            assert "error" in client.create("no_such_model")  # imports are done
        for overlay in jobs:
            hub.reset()
            for client in clients:
                client.start(NAME, threads=3, pretrained=True, pretrained_cfg_overlay=overlay)
            assert [client.answer().get("digests") for client in clients] == [[expected] * 3] * 4
            assert hub.count("GET") == 1
    finally:
        for client in clients:
            client.__exit__()


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def zipped(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model.pdparams", data)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["hub", "url"])
@pytest.mark.parametrize(
    ("file", "encode"),
    [
        ("model.safetensors", pickle.dumps),
        ("pytorch_model.bin", to_pickle),
        ("pytorch_model.bin", pickle.dumps),
        ("weights.pth", to_pickle),
        ("weights.pt", lambda value: pickle.dumps(value, protocol=0)),
        ("model.pdparams", pickle.dumps),
        ("model.zip", lambda value: zipped(pickle.dumps(value))),
        ("weights", to_pickle),
    ],
)
def test_malicious_files_are_not_run(request, hub, client, tmp_path, kind, file, encode):
    executed = tmp_path / "executed"
    body = encode({"state_dict": {"weight": Malicious(executed)}})
    place = re.sub(r"\W+", "-", request.node.callspec.id)
    if kind == "hub":
        hub.add(f"evil/{place}", {file: body})
        overlay = {"hf_hub_id": f"evil/{place}", "hf_hub_filename": file, "hf_revision": None}
    else:
        overlay = {"state": "url", "url": hub.add_file(f"{place}/{file}", body), "file": None}
    for _ in range(2):  # downloaded, and from the cache
        result = client.create(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
        assert result["type"] == "WeightsError", result
        assert file in result["error"]
    assert not executed.exists()
    if encode is to_pickle:  # the payload is live: this is what a plain torch.load does
        torch.load(io.BytesIO(body), weights_only=False)
        assert executed.exists()


# --- rows -----------------------------------------------------------------------------------------------------------


def test_every_row_is_complete():
    for name in segzoo.list_pretrained():
        row = row_of(name)
        where = {"bundled": row.file, "hub": row.hf_hub_id, "url": row.url}
        where |= {"drive": row.drive_folder and row.drive_files and row.how_to_get, "unpublished": row.how_to_get}
        assert where[row.state], name
        assert row.dataset, name
        assert row.origin, name
        assert all(score.source for score in row.published), name
        assert row.hf_revision is None or re.fullmatch("[0-9a-f]{40}", row.hf_revision), name
        assert row.sha256 is None or re.fullmatch("[0-9a-f]{64}", row.sha256), name
        if row.commercial_use is False:
            assert row.license != "apache-2.0", name


def test_filters_of_list_pretrained():
    assert segzoo.list_pretrained(source="bundled") == ["edaformer_t.scenes"]
    free = segzoo.list_pretrained(commercial=True)
    assert "rtformer_slim.cityscapes" in free
    assert not any(name.startswith("segformer") for name in free)
    assert set(segzoo.list_pretrained(commercial=False, dataset="ade20k", source="hub")) >= {NAME, "segvit_base.ade20k"}
    assert segzoo.list_pretrained("rtformer_*", license="apache-2.0", dataset="imagenet") == [
        "rtformer_base_backbone.imagenet",
        "rtformer_slim_backbone.imagenet",
    ]
    with pytest.raises(
        segzoo.SegzooError, match="no weights have source 'ftp'; there are: bundled, drive, hub, unpublished, url"
    ):
        segzoo.list_pretrained(source="ftp")


@pytest.mark.slow
@pytest.mark.parametrize("name", segzoo.list_models(["*", "test_*"], exclude_filters=["segformerpp_*", "*_keypoints"]))
def test_every_model_comes_back_from_its_file(name):
    """Built without values and assigned: nothing stays empty, no computed buffer is lost, no setting differs."""
    torch.manual_seed(0)
    model = segzoo.create_model(name).eval()
    with tempfile.TemporaryDirectory() as folder:  # up to 1.4 GB, which tmp_path would keep for days
        segzoo.save_pretrained(model, folder)
        restored = segzoo.create_model(f"local-dir:{folder}").eval()
    assert digest(restored) == digest(model)
    for (key, expected), (_, buffer) in zip(model.named_buffers(), restored.named_buffers(), strict=True):
        assert torch.equal(buffer, expected), key
    x = torch.randn(1, model.in_chans, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(restored(x), model(x))
