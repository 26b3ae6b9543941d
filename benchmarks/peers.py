"""SegFormer as transformers has it, with the same weights as segzoo's, and its export to engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import segzoo
from segzoo.zoo import model_info


def transformers_segformer(name: str) -> nn.Module:
    """Random weights in transformers' SegFormer of a name of segzoo, in eval mode."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    cfg = model_info(name).cfg
    config = transformers.SegformerConfig(
        hidden_sizes=list(cfg.encoder.embed_dims),
        depths=list(cfg.encoder.depths),
        num_attention_heads=list(cfg.encoder.num_heads),
        sr_ratios=list(cfg.encoder.kv_stride),
        decoder_hidden_size=cfg.decoder_dim,
        num_labels=cfg.num_classes,
    )
    return transformers.SegformerForSemanticSegmentation(config).eval()


def with_its_weights(name: str, peer: nn.Module, folder: Path) -> nn.Module:
    """segzoo's model of that name with the weights of transformers'."""
    peer.save_pretrained(folder)
    return segzoo.create_model(name, checkpoint_path=folder / "model.safetensors").eval()


class Logits(nn.Module):
    """transformers' model as a function of one tensor."""

    def __init__(self, peer: nn.Module):
        super().__init__()
        self.peer = peer

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.peer(pixel_values=x_BCHW).logits


class OpenVINOExport:
    """transformers' own model exported to OpenVINO for one shape of images.

    Args:
        precision: "f32", "bf16", or None: what OpenVINO chooses on this processor.
    """

    def __init__(self, peer: nn.Module, shape: tuple[int, ...], *, precision: str | None, threads: int):
        import openvino  # the only one here that needs it

        example = torch.zeros(shape)
        with torch.no_grad():
            model = openvino.convert_model(Logits(peer), example_input=example, input=[list(shape)])
        hints: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        if precision is not None:
            hints["INFERENCE_PRECISION_HINT"] = precision
        self.compiled = openvino.Core().compile_model(model, "CPU", hints)
        self.request = self.compiled.create_infer_request()

    def __call__(self, x_BCHW: Tensor) -> Tensor:
        self.request.infer({0: np.ascontiguousarray(x_BCHW.numpy())})
        return torch.from_numpy(self.request.get_output_tensor(0).data)
