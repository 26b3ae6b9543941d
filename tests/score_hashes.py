"""Hashes of what every model computes, to prove that a change of structure changes no number.

    python tests/score_hashes.py before.json                           in the tree before the change
    python tests/score_hashes.py after.json --compare before.json      in the tree after it, on the same machine

One sha256 a tensor: every tiny variant (whole image, odd size, training, folded, every preset and some plans, masks of
`predict`), and our side of every golden comparison, through `load_weights`. Only public functions are used, and the
weights come from the golden rule, so that one script runs in both trees. Bits depend on the machine and on torch's
build: compare files of one machine only. It takes some minutes; `--only 'golden/*'` takes a part.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from golden_data import golden_input, golden_json, golden_state_dict, golden_tensor
from torch import Tensor, nn

import segzoo
from segzoo.models import SegmentationModel

DTYPES = {"float64": torch.float64, "float32": torch.float32}
SIZES = ((2, 3, 64, 96), (1, 3, 53, 75))
PLANS = {
    "none": None,
    "2": 2,
    "max": segzoo.Pool(2, "max"),
    "overlap": segzoo.OverlapPool(2),
    "bipartite": {"encoder": segzoo.Bipartite(0.5, 2)},
    "neighbour": {"encoder": segzoo.Neighbour2d(2)},
    "queries": {"encoder.q": segzoo.Bipartite(0.5, 2)},
}
# golden file -> model and its options
GOLDENS: dict[str, tuple[str, dict[str, Any]]] = {
    "eft_t_encoder": ("eft_t", {"features_only": True}),
    "eft_b_encoder": ("eft_b", {"features_only": True}),
    "eft_t_cls_assumed": ("eft_t", {}),
    "edaformer_t_ade": ("edaformer_t", {}),
    "edaformer_b_ade": ("edaformer_b", {}),
    "mit_b0_encoder": ("mit_b0", {"features_only": True}),
    "mit_b2_encoder": ("mit_b2", {"features_only": True}),
    "segformer_b0": ("segformer_b0", {}),
    "segformer_b2": ("segformer_b2", {}),
    "segformerpp_b0_official": ("segformer_b0", {"decoder": "segformerpp", "num_classes": 19}),
    "segformerpp_b0_nvlabs_weights": ("segformer_b0", {"num_classes": 19}),
    "rtformer_slim_cityscapes": ("rtformer_slim.cityscapes", {}),
    "rtformer_base_ade20k": ("rtformer_base.ade20k", {}),
    "segvit_b_ade_s128": ("segvit_base", {"img_size": (128, 128)}),
    "segvit_l_lite6_s96": ("segvit_large", {"img_size": (96, 96), "depth": 6, "stages": (1, 3, 5)}),
    "segvit_shrunk_l_lite6_s96": (
        "segvit_large_shrunk",
        {"img_size": (96, 96), "depth": 6, "stages": (1, 5), "downsample_block": 2},
    ),
}


def digest(value: Any) -> str:
    """sha256 of the tensors in a value: their order, shapes, types and bytes."""
    sha = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, (Tensor, np.ndarray)):
            array = np.ascontiguousarray(value.detach().numpy() if isinstance(value, Tensor) else value)
            sha.update(f"{array.dtype}{array.shape}".encode())
            sha.update(array.tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value):
                sha.update(key.encode())
                add(value[key])
        elif isinstance(value, (str, int, float, type(None))):
            pass
        elif isinstance(value, Iterable):  # lists, tuples, and a pyramid of maps
            for item in value:
                add(item)
        else:
            raise TypeError(f"no rule to hash {type(value).__name__}")

    add(value)
    return sha.hexdigest()


def drawn(name: str, dtype: torch.dtype, **options: Any) -> nn.Module:
    """A model in eval mode with weights by the golden rule, under segzoo's own names."""
    torch.manual_seed(0)
    model = segzoo.create_model(name, **options).to(dtype).eval()
    model.load_state_dict({key: golden_tensor(key, list(value.shape)) for key, value in model.state_dict().items()})
    return model


def outputs(model: nn.Module, x_BCHW: Tensor) -> Any:
    """Everything that one pass gives: scores, or the maps of a pyramid."""
    with torch.no_grad():
        return model(x_BCHW)


def plans_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The presets, and those of PLANS that the model takes."""
    yield from ((f"preset:{name}", name) for name in model.reduction_presets)
    for name, plan in PLANS.items():
        try:
            model.set_inference_reduction(plan)
        except segzoo.SegzooError:
            continue
        yield name, plan
    model.set_inference_reduction(None)


def variant_hashes(name: str) -> Iterator[tuple[str, str]]:
    for dtype_name, dtype in DTYPES.items():
        model = drawn(name, dtype)
        where = f"{name}/{dtype_name}"
        for plan_name, plan in plans_of(model):
            model.set_inference_reduction(plan)
            for shape in SIZES:
                yield (
                    f"{where}/{plan_name}/{shape[2]}x{shape[3]}",
                    digest(outputs(model, golden_input(shape).to(dtype))),
                )
        model.set_inference_reduction(None)
        x_BCHW = golden_input(SIZES[0]).to(dtype)
        yield f"{where}/folded", digest(outputs(segzoo.fold(model), x_BCHW))
        model.train()
        torch.manual_seed(1)  # dropout and drop path
        trained = model.forward_train(x_BCHW)
        yield f"{where}/train", digest(trained["scores"])
        trained["scores"].square().mean().backward()
        yield f"{where}/gradients", digest({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
        yield f"{where}/running statistics", digest(dict(model.named_buffers()))


def mask_hashes(name: str) -> Iterator[tuple[str, str]]:
    """`predict`: whole, in windows, and with several views; masks and full-size scores."""
    model = drawn(name, torch.float32)
    image_HWC = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (83, 121, 3), dtype=np.uint8)
    for what, options in (
        ("whole", {"resize": (64, 96)}),
        ("windows", {"resize": (64, 96), "mode": "slide", "crop": (48, 48), "stride": (32, 40)}),
        ("views", {"resize": (64, 96), "scales": (0.75, 1.0, 1.5), "flip": True}),
    ):
        result = segzoo.predict(model, image_HWC, **options)
        yield f"{name}/predict/{what}/mask", digest(result.mask)
        yield f"{name}/predict/{what}/scores", digest(result.scores())


def golden_hashes(golden: str) -> Iterator[tuple[str, str]]:
    """Our outputs for each setting of a golden file, before they are cut to what the file stores."""
    name, options = GOLDENS[golden]
    record = golden_json(golden)
    settings = record["settings"] if isinstance(record["settings"], list) else [{"name": "default"}]
    for dtype_name, dtype in DTYPES.items():
        model, loaded = None, None
        for setting in settings:
            variant = setting["name"].partition("_")[0] if "variants" in record else None
            if model is None or variant != loaded:
                source = record["variants"][variant] if variant else record
                classes = {"num_classes": {"city": 19, "ade": 150}[variant]} if variant else {}
                torch.manual_seed(0)
                model, loaded = segzoo.create_model(name, **options, **classes).to(dtype).eval(), variant
                segzoo.load_weights(model, golden_state_dict(source["state_dict"]))
            model.set_inference_reduction(plan_of(setting))
            shapes = setting.get("input_shape") or record["input_shape"]
            for shape_name, shape in (shapes if isinstance(shapes, dict) else {"": shapes}).items():
                where = f"golden/{golden}/{dtype_name}/{setting['name']}{shape_name}"
                x_BCHW = golden_input(shape).to(dtype)
                yield where, digest(outputs(model, x_BCHW))
                if isinstance(model, SegmentationModel):
                    with torch.no_grad():
                        yield f"{where}/head", digest(model.forward_head(model.forward_features(x_BCHW)))
                        for key, value in model.forward_train(x_BCHW).items():
                            yield f"{where}/train/{key}", digest(value)


def plan_of(setting: Mapping[str, Any]) -> Any:
    """The plan that a golden setting speaks of, in segzoo's order: decoder levels from coarse to fine."""
    if "preset" in setting:
        preset = setting["preset"].partition("_")[0]
        return None if preset == "none" else preset
    encoder = setting.get("backbone_reduction_ratios", setting.get("reduction_ratios"))
    if encoder is None:
        return None
    plan = {"encoder": tuple(encoder)}
    if "decoder_reduction_ratios" in setting:
        plan["decoder"] = tuple(reversed(setting["decoder_reduction_ratios"]))
    return plan


def all_hashes(only: str) -> dict[str, str]:
    jobs = dict.fromkeys([*segzoo.list_models("test_*"), "segvit_swin_tiny"], variant_hashes)
    jobs |= {f"golden/{name}": golden_hashes for name in GOLDENS}
    found: dict[str, str] = {}
    for name, job in jobs.items():
        if fnmatch.fnmatch(name, only):
            found.update(job(name.removeprefix("golden/")))
            print(f"{name}: {len(found)} hashes", file=sys.stderr, flush=True)
    for name in segzoo.list_models("test_*"):
        model = segzoo.create_model(name)
        is_segmenter = isinstance(model, SegmentationModel) and model.score_kind != "heatmap"
        if is_segmenter and fnmatch.fnmatch(name, only):
            found.update(mask_hashes(name))
    return found


def differences(before: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """What was there before and is not the same now; what is new is no difference."""
    return [f"{key}: {'differs' if key in after else 'is gone'}" for key in before if after.get(key) != before[key]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--compare", type=Path, help="JSON file of the tree before")
    parser.add_argument("--only", default="*", help="pattern of names, such as 'golden/*' or 'test_eft'")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = all_hashes(arguments.only)
    arguments.output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{len(found)} hashes in {arguments.output}")
    if arguments.compare is None:
        return 0
    before = {
        key: value
        for key, value in json.loads(arguments.compare.read_text()).items()
        if arguments.only == "*" or key in found
    }
    different = differences(before, found)
    print("\n".join(different) or f"identical: all {len(before)} of {arguments.compare}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
