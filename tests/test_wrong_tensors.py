"""A wrong tensor is refused in one sentence, by every family, before anything is computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import segzoo

TINY = segzoo.list_models("test_*")
WRONG = {
    "uint8": (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"not \(1, 3, 64, 64\) in uint8: pixels must be divided"),
    "float64": (torch.zeros(1, 3, 64, 64).double(), r"in float32, not .* in float64: x.to\(torch.float32\)"),
    "rank 3": (torch.zeros(3, 64, 64), r"images \(B, 3, H, W\) in float32, not \(3, 64, 64\) .*: .* x\[None\]"),
    "rank 5": (torch.zeros(1, 1, 3, 64, 64), "four axes"),
    "channels": (torch.zeros(1, 4, 64, 64), r"not \(1, 4, 64, 64\) .*: create_model\(..., in_chans=4\)"),
    "channels last": (torch.zeros(1, 64, 65, 3), r"x.permute\(0, 3, 1, 2\)"),
    "no pixels": (torch.zeros(1, 3, 0, 64), r"\(1, 3, 0, 64\) .* no pixels"),
    "an array": (np.zeros((1, 3, 64, 64), np.float32), r"not ndarray; segzoo.predict takes files and arrays"),
}


@pytest.mark.parametrize("name", TINY)
def test_wrong_tensors(name):
    model = segzoo.create_model(name)
    segmenter = [model.forward_train, model.forward_features, model]
    for call in (*segmenter, segzoo.create_model(name, features_only=True)):
        for x, sentence in WRONG.values():
            with pytest.raises(segzoo.SegzooError, match=sentence) as refusal:
                call(x)
            assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["test_eft", "test_segvit", "test_rtformer"])
def test_what_is_right_passes(name):
    model = segzoo.create_model(name).eval()
    x = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float64):
            assert model.to(dtype)(x.to(dtype)).dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert model.float()(x.bfloat16()).isfinite().all()
            with pytest.raises(segzoo.SegzooError, match="in uint8"):
                model(x.byte())
        assert model(x[:0]).shape[0] == 0  # an empty batch is no mistake


def test_a_model_of_four_channels():
    model = segzoo.create_model("test_mit", in_chans=4)
    with pytest.raises(segzoo.SegzooError, match=r"images \(B, 4, H, W\) .*not \(1, 3, 64, 64\)"):
        model(torch.zeros(1, 3, 64, 64))


@pytest.mark.slow
def test_one_compilation_serves_all_sizes():
    """The refusal adds no guard on the sizes of an image."""
    model = segzoo.create_model("test_eft").eval()
    counter = CompileCounter()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for size in ((64, 96), (96, 128)):
            x = torch.zeros(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:FutureWarning")
@pytest.mark.parametrize("name", ["test_edaformer", "test_segvit", "test_rtformer", "test_swin"])
def test_a_trace_is_not_disturbed(name):
    model = segzoo.create_model(name).eval()
    x = torch.zeros(1, 3, 64, 96)
    with torch.no_grad():
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x), model(x))
