"""Published weights through the real Hub client, against a stand-in on loopback.

Weights are drawn by the golden rule under the official names and renamed here, by tables of this file, into the layout
and file format of the row, so that the package's key rules are proven against an independent description.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from golden_data import golden_arrays, golden_input, golden_json, golden_state_dict
from hub_client import Client, digest
from hub_stand_in import HubStandIn
from safetensors.torch import save

import segzoo
from segzoo.models import model_info

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
