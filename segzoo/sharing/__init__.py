"""Sharing models: a folder that `create_model` restores, official checkpoints turned into one, and the only upload.

A folder holds `model.safetensors`, `config.json` (see `models/_config.py`) and `README.md`, a model card of the
Hugging Face Hub. It is written beside its place and moved there whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCardData
from safetensors.torch import save_file

from .._errors import SegzooError, WeightsError
from .._version import __version__
from ..models.base import Model, SegmentationModel
from ..models.keys import Concat, Prefixed, StateDict
from ..models.rows import PretrainedCfg, label_names
from ..zoo.checkpoint import find_layout, load_weights, read_tensors
from ..zoo.config import (
    CONFIG_NAME,
    SOURCE_FIELDS,
    WEIGHTS_NAME,
    SavedConfig,
    config_to_dict,
    read_config,
)
from ..zoo.recipe import create_model

CARD_NAME = "README.md"
PLACEHOLDER = "OWNER/NAME"  # in the card's code, until `publish` knows the repository
PARTIAL_PREFIX = ".segzoo-"  # folder inside the target that files are written to first

# Identifiers that the Hub knows; any other licence is "other" there, with its name and link.
HUB_LICENSES = frozenset(
    ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "isc")
    + ("cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "openrail", "unlicense", "unknown")
)


# --- saving ---------------------------------------------------------------------------------------------------------


def save_pretrained(
    model: Model, directory: str | Path, *, pretrained_cfg_overlay: Mapping[str, Any] | None = None
) -> Path:
    """Write a model as a folder from which `create_model("local-dir:...")` restores it: weights, dtype, options,
    classes, reduction plan and preprocessing.

    The weights row says what is known about the weights, and goes into the model card. A row's published mIoU is
    left out, since it belongs to the published weights and segzoo cannot know whether these are still the same; so
    is its data set if the number of classes has changed; and without a tag in the model's name, data set, licence
    and origin. Say what holds with `pretrained_cfg_overlay`.

    >>> import segzoo
    >>> folder = segzoo.save_pretrained(segzoo.create_model("test_eft"), "my_eft")
    >>> sorted(path.name for path in folder.iterdir())
    ['README.md', 'config.json', 'model.safetensors']
    >>> segzoo.create_model("local-dir:my_eft").name
    'test_eft'

    Args:
        model: from `create_model`, on any device and of one dtype; not folded, compiled or wrapped.
        directory: new, empty, or a segzoo folder, whose three files are replaced as a whole; others stay.
        pretrained_cfg_overlay: fields of the weights row to replace, for example {"dataset": "roofs",
            "label_names": ("ground", "roof"), "license": "cc-by-4.0", "miou": 71.2}.

    Returns:
        The directory.

    Raises:
        SegzooError: a model that could not be restored, a directory that holds something else, or no room to write.
    """
    if not isinstance(model, Model):
        raise SegzooError(
            f"save_pretrained takes a model from create_model, not a {type(model).__name__}; of a compiled or wrapped "
            "model give the original, of a features_only one its .encoder"
        )
    return _save(model, Path(directory), _with_overlay(_row_of(model), pretrained_cfg_overlay))


def _save(model: Model, directory: Path, row: PretrainedCfg) -> Path:
    state = model.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise SegzooError(f"{model.name or 'this model'} is on the meta device and has no weights to save")
    names = row.label_names
    if names is not None and len(names) != model.num_classes:
        raise SegzooError(f"label_names must be {model.num_classes} different names, one a class, not {names}")
    config = config_to_dict(model, row)
    _check_shapes({name: tuple(tensor.shape) for name, tensor in state.items()}, read_config(config), "this model")
    card = model_card(model, row)

    def write(folder: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CARD_NAME).write_text(card, encoding="utf-8")
        (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    _write_folder(directory, write)
    return directory


def _row_of(model: Model) -> PretrainedCfg:
    """What still holds of the model's weights row; see `save_pretrained`."""
    row = model.pretrained_cfg or PretrainedCfg(num_classes=model.num_classes)
    unknown = {field.name: field.default for field in dataclasses.fields(row)}
    lost = ["miou"]
    if model.num_classes != row.num_classes:
        lost += ["dataset", "label_set", "label_names"]
    if "." not in model.name:
        lost += ["dataset", "license", "license_url", "commercial_use", "origin"]
    return dataclasses.replace(row, **{name: unknown[name] for name in lost})


def _with_overlay(row: PretrainedCfg, overlay: Mapping[str, Any] | None) -> PretrainedCfg:
    valid = [field.name for field in dataclasses.fields(row) if field.name not in SOURCE_FIELDS]
    for name in overlay or {}:
        if name not in valid:
            raise SegzooError(f"pretrained_cfg_overlay has no field {name!r} to save; fields: {', '.join(valid)}")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in (overlay or {}).items()}
    return dataclasses.replace(row, **values)


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], saved: SavedConfig, what: str) -> None:
    """Refuse parameters that a model built from the config does not have."""
    options = {field.name: getattr(saved.cfg, field.name) for field in dataclasses.fields(saved.cfg)}
    with torch.device("meta"):
        fresh = create_model(saved.variant, **options).state_dict()
    wrong = [name for name, tensor in fresh.items() if shapes.get(name) != tuple(tensor.shape)]
    wrong += [name for name in shapes if name not in fresh]
    if wrong:
        raise WeightsError(
            f"{what} does not have the parameters of {saved.name} with its config: {len(wrong)} are missing, left over "
            f"or of another shape, such as {wrong[0]}; a folded or altered model cannot be restored from its name, so "
            "save the model that it was made from"
        )


def _write_folder(directory: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder inside `directory`, then move the files to their place.

    The old config goes first and the new one comes last, so that no moment has the config of one model beside the
    weights of another: a crash between leaves a folder without config, which is refused.
    """
    made: list[Path] = []
    try:
        _check_target(directory)
        made = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL_PREFIX, dir=directory))
        try:
            write(partial)
            (directory / CONFIG_NAME).unlink(missing_ok=True)
            for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):
                (partial / name).replace(directory / name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, safetensors.SafetensorError, RuntimeError) as error:
        for path in made:
            with contextlib.suppress(OSError):  # not empty: somebody else's by now
                path.rmdir()
        raise SegzooError(f"{directory} cannot be written ({error}); choose another place") from error


def _check_target(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise SegzooError(f"{directory} is a file; name a directory")
    present = [path for path in directory.iterdir() if not path.name.startswith(PARTIAL_PREFIX)]
    if present and not _is_segzoo_folder(directory):
        raise SegzooError(
            f"{directory} is not empty and no segzoo folder (it holds {present[0].name}); choose an empty directory"
        )


def _is_segzoo_folder(directory: Path) -> bool:
    try:
        config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "segzoo" in config


# --- the model card -------------------------------------------------------------------------------------------------


def model_card(model: Model, row: PretrainedCfg) -> str:
    """The text of a model card: a YAML header that the Hub reads, and what a person has to know."""
    labels = label_names(row, model.num_classes)
    sections = [
        f"# {model.name}",
        _what_it_is(model, row),
        f"## Usage\n\n```sh\npip install segzoo\n```\n\n```python\n{_usage(model)}\n```",
        f"## Preprocessing\n\n{_preprocessing(model, row)}",
        f"## Inference reduction\n\n{_reduction(model, row)}",
        f"## Licence\n\n{_terms(row)}",
    ]
    if row.miou is not None:
        protocol = f", {row.miou_protocol}" if row.miou_protocol else ""
        sections.insert(4, f"## Accuracy\n\n{row.miou} mIoU in percent{protocol}: as published, not measured anew.")
    if labels:
        names = ", ".join(f"{index} {name}" for index, name in enumerate(labels["names"]))
        palette = f"Label set and palette `{labels['palette']}` of segzoo: " if labels["palette"] else ""
        sections.insert(4, f"## Labels\n\n{palette}{names}.")
    return f"---\n{_card_data(model, row).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _card_data(model: Model, row: PretrainedCfg) -> ModelCardData:
    task, tags = _task(model)
    known = row.license in HUB_LICENSES
    variant = model.name.partition(".")[0]
    fields: dict[str, Any] = {"license": row.license if known else "other"}
    if not known:
        fields["license_name"] = row.license
    if row.license_url:
        fields["license_link"] = row.license_url
    if row.dataset:
        fields["datasets"] = [row.dataset]
    if row.miou is not None:
        fields["metrics"] = ["mean_iou"]
    if row.miou is not None and row.dataset:
        fields["model_name"] = model.name
        fields["eval_results"] = [
            EvalResult(
                task_type=task,
                dataset_type=row.dataset,
                dataset_name=row.dataset,
                metric_type="mean_iou",
                metric_name=f"mIoU in percent ({row.miou_protocol or 'as published'})",
                metric_value=row.miou,
            )
        ]
    return ModelCardData(pipeline_tag=task, library_name="segzoo", tags=["segzoo", variant, *tags], **fields)


def _task(model: Model) -> tuple[str, list[str]]:
    """The Hub's name of what the model does, and tags that say it more closely."""
    if _finds_keypoints(model):
        return "keypoint-detection", []
    if isinstance(model, SegmentationModel):
        return "image-segmentation", ["semantic-segmentation"]
    return "image-classification" if model.num_classes else "image-feature-extraction", []


def _finds_keypoints(model: Model) -> bool:
    return isinstance(model, SegmentationModel) and model.score_kind == "heatmap"


def _what_it_is(model: Model, row: PretrainedCfg) -> str:
    variant = model.name.partition(".")[0]
    kind, outputs = "image encoder", "classes"
    if _finds_keypoints(model):
        kind, outputs = "keypoint model", "keypoints"
    elif isinstance(model, SegmentationModel):
        kind = "semantic segmentation model"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    data = f", trained on {row.dataset}" if row.dataset else ""
    origin = f" Origin of the weights: {row.origin}." if row.origin else ""
    return (
        f"`{variant}`, a {kind} of segzoo {__version__}{data}: {model.num_classes} {outputs}, {model.in_chans} "
        f"input channels, {parameters:,} parameters in {dtype}.{origin} `{CONFIG_NAME}` holds every option of the "
        "model."
    )


def _usage(model: Model) -> str:
    made = f'model = segzoo.create_model("hf-hub:{PLACEHOLDER}").eval()  # or "local-dir:PATH"\n'
    if _finds_keypoints(model) and model.in_chans == 3:
        found = 'xy, score = predict_keypoints(model, "image.jpg")  # (K, 2) in pixels, and (K,)'
        return f"import segzoo\nfrom segzoo.prediction import predict_keypoints\n\n{made}{found}"
    if isinstance(model, SegmentationModel) and model.in_chans == 3:
        return f'import segzoo\n\n{made}result = segzoo.predict(model, "image.jpg")\nresult.save("mask.png")'
    size = ", ".join(map(str, (1, model.in_chans, 224, 224)))
    out = "(1, K, 224, 224) scores" if isinstance(model, SegmentationModel) else "(1, K) logits, or pooled features"
    return f"import torch\nimport segzoo\n\n{made}scores = model(torch.zeros({size}))  # normalised images -> {out}"


def _preprocessing(model: Model, row: PretrainedCfg) -> str:
    """In words, exactly what `segzoo.predict` or `predict_keypoints` does."""
    H, W = row.test_size
    resize = {
        "keep_ratio": f"with its aspect ratio into short side {H}, long side {W}",
        "exact": f"to {H} x {W} (H x W)",
        "none": "not resized",
    }[row.resize]
    lines = [
        f"- Values in [0, 1], RGB where there are three channels; mean {_numbers(row.mean)}, "
        f"standard deviation {_numbers(row.std)}.",
        f"- Test image: {resize}, bilinear with antialias"
        + (f"; both sides at least {row.test_min_side}" if row.test_min_side > 1 else "")
        + (f"; both sides rounded up to a multiple of {row.size_divisor}" if row.size_divisor > 1 else "")
        + ".",
    ]
    if isinstance(model, SegmentationModel) and not _finds_keypoints(model):
        whole = "the whole image at once"
        slide = f"sliding window {_numbers(row.crop or ())}, stride {_numbers(row.stride or ())} (H, W)"
        lines.append(f"- Test mode: {slide if row.test_mode == 'slide' else whole}.")
    lines.append(f"- Training crop: {row.input_size[0]} x {row.input_size[1]} (H x W).")
    return "\n".join(lines)


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))


def _reduction(model: Model, row: PretrainedCfg) -> str:
    plan = read_config(config_to_dict(model)).reduction
    if plan is None:
        setting = "None is set: attention sees every token that it was trained with."
    else:
        setting = f"This setting is in force when the model is restored:\n\n```json\n{json.dumps(plan)}\n```"
    recommended = f" Recommended: `{row.recommended_reduction}`." if row.recommended_reduction else ""
    presets = (
        f" Presets: {', '.join(f'`{name}`' for name in model.reduction_presets)}." if model.reduction_presets else ""
    )
    return (
        f"{setting}\n\nChange it with `model.set_inference_reduction(...)`; `None` takes it off.{presets}{recommended}"
    )


def _terms(row: PretrainedCfg) -> str:
    if row.license == "unknown":
        stated = "No licence is stated for these weights: ask their authors before you use them or pass them on."
    else:
        link = f" ({row.license_url})" if row.license_url else ""
        stated = f"Weights: {row.license}{link}."
    commercial = {True: "allowed", False: "not allowed", None: "unknown"}[row.commercial_use]
    return f"{stated} Commercial use: {commercial}. The code of segzoo is Apache-2.0."


# --- converting official checkpoints --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What became of every key of an official checkpoint; `print` shows it key by key."""

    file: str
    name: str  # "variant.tag"
    directory: str
    layout: str  # of the file's names; "segzoo" for the model's own
    loaded: dict[str, tuple[str, ...]]  # the model's parameter -> the file's keys that it was made of
    dropped: dict[str, str]  # the file's key -> why the model has no use for it
    defaulted: tuple[str, ...]  # the model's buffers that the file lacks and that do not change its scores

    @property
    def renamed(self) -> dict[str, tuple[str, ...]]:
        return {name: keys for name, keys in self.loaded.items() if keys != (name,)}

    def to_dict(self) -> dict[str, Any]:
        counts = {"loaded": len(self.loaded), "renamed": len(self.renamed), "dropped": len(self.dropped)}
        return {**dataclasses.asdict(self), "counts": {**counts, "defaulted": len(self.defaulted)}}

    def __str__(self) -> str:
        lines = [f"{' + '.join(keys)} -> {name}" for name, keys in self.renamed.items()]
        lines += [f"{key} dropped: {why}" for key, why in self.dropped.items()]
        lines += [f"{name} not in the file: set to its initial value" for name in self.defaulted]
        return "\n".join(
            [
                *lines,
                f"{self.file} (layout: {self.layout}) -> {self.directory}: every key and shape of {self.name} checked; "
                f"{len(self.loaded)} loaded ({len(self.renamed)} of them renamed), {len(self.dropped)} dropped, "
                f"{len(self.defaulted)} not in the file",
            ]
        )


def convert(official_file: str | Path, name: str, directory: str | Path) -> ConversionReport:
    """Turn an official checkpoint into a segzoo folder, by the same strict rules as `load_weights`.

    Args:
        official_file: any file that `load_weights` reads.
        name: the weights row that the file is, "variant.tag".
        directory: as for `save_pretrained`. The row's published mIoU goes into the card.

    Raises:
        WeightsError: the file cannot be read or does not fit; nothing is written then.
    """
    if "." not in name:
        raise SegzooError(f"{name!r} names no weights; give variant.tag, see segzoo.list_pretrained({name + '*'!r})")
    model = create_model(name)
    load_weights(model, official_file)
    state = {key: torch.empty_like(tensor, device="meta") for key, tensor in read_tensors(official_file).items()}
    layout = find_layout(model, state)
    names, dropped = _trace(state, layout.rules if layout else ())
    own = model.state_dict()
    for surplus in [name for name in names if name not in own]:
        dropped.update(dict.fromkeys(names.pop(surplus), "the classifier, which this model does not have"))
    _save(model, Path(directory), model.pretrained_cfg)
    return ConversionReport(
        file=str(official_file),
        name=name,
        directory=str(directory),
        layout=layout.name if layout else "segzoo",
        loaded={name: names[name] for name in own if name in names},
        dropped=dropped,
        defaulted=tuple(name for name in own if name not in names),
    )


def _trace(
    state: StateDict, rules: Sequence[Callable[[StateDict], StateDict]]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Follow every key through the rules: ({new name: the keys that it is made of}, {dropped key: why})."""
    origins: dict[str, tuple[str, ...]] = {key: (key,) for key in state}
    dropped: dict[str, str] = {}
    for rule in rules:
        made, gone = _trace_one(state, rule)
        dropped.update({origin: why for key, why in gone.items() for origin in origins[key]})
        origins = {name: tuple(origin for key in keys for origin in origins[key]) for name, keys in made.items()}
        state = rule(state)
    return origins, dropped


def _trace_one(
    state: StateDict, rule: Callable[[StateDict], StateDict]
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    if isinstance(rule, Prefixed):
        inside = {key.removeprefix(rule.prefix): state[key] for key in state if key.startswith(rule.prefix)}
        names, gone = _trace(inside, rule.rules)
        made = {rule.new_prefix + name: tuple(rule.prefix + key for key in keys) for name, keys in names.items()}
        made.update({key: (key,) for key in state if not key.startswith(rule.prefix)})
        return made, {rule.prefix + key: why for key, why in gone.items()}
    if isinstance(rule, Concat):
        after = rule(state)
        made = {key: (key,) for key in after if key in state}
        for pattern in rule.patterns:
            for key in state.keys() - after.keys():
                if re.search(pattern, key):
                    name = re.sub(pattern, rule.replacement, key)
                    made[name] = (*made.get(name, ()), key)
        return made, {}
    made, gone = {}, {}
    for key, tensor in state.items():
        names = rule({key: tensor})
        if not names:
            gone[key] = rule.why  # of Drop and its like
        for name in names:
            if name in made:
                raise WeightsError(f"the keys {made[name][0]} and {key} both become {name}; one of them is too many")
            made[name] = (key,)
    return made, gone


# --- uploading ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Published:
    """Where an upload went."""

    repo_id: str
    commit: str  # full id; pin it with "hf-hub:OWNER/NAME@COMMIT"
    url: str


def push_to_hub(
    model: Model,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
) -> Published:
    """`save_pretrained` to a repository of the Hugging Face Hub; arguments as there and as for `publish`."""
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(model, folder, pretrained_cfg_overlay=pretrained_cfg_overlay)
        return publish(folder, repo_id, private=private, revision=revision, commit_message=commit_message, token=token)


def publish(
    directory: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> Published:
    """Upload a folder of `save_pretrained` or `convert` to the Hugging Face Hub, in one commit.

    Uploads `model.safetensors`, `config.json`, `README.md` (with the repository's name in its code; a card that is
    there already is replaced) and files whose name starts with LICENSE; nothing else in the folder.

    Args:
        repo_id: "owner/name"; made if it does not exist.
        private: True: upload only to a private repository; None: a new one is as its owner's settings say.
        revision: branch, made if it does not exist; None: the main one.
        token: other than the one that you are logged in with.

    Raises:
        SegzooError: a folder that is not whole, or an upload that failed; names the cause and the next step.
    """
    directory = Path(directory)
    saved = read_config(directory)
    _check_shapes(_file_shapes(directory / WEIGHTS_NAME), saved, str(directory / WEIGHTS_NAME))
    card = directory / CARD_NAME
    if not card.is_file():
        raise SegzooError(f"{card}: no such file; save the model again with segzoo.save_pretrained")
    files = [directory / CONFIG_NAME, directory / WEIGHTS_NAME]
    files += sorted(path for path in directory.glob("LICENSE*") if path.is_file())
    text = card.read_text(encoding="utf-8").replace(f"hf-hub:{PLACEHOLDER}", f"hf-hub:{repo_id}")
    api = HfApi(token=token, library_name="segzoo", library_version=__version__)
    with _upload_errors(repo_id):
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise SegzooError(f"{repo_id} exists and is public, so nothing was uploaded; name another repository")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo_id,
            [
                CommitOperationAdd(path_in_repo=CARD_NAME, path_or_fileobj=text.encode()),
                *(CommitOperationAdd(path_in_repo=path.name, path_or_fileobj=path) for path in files),
            ],
            commit_message=commit_message or f"{saved.name}, saved by segzoo {__version__}",
            revision=revision,
        )
    return Published(repo_id=repo_id, commit=commit.oid, url=str(commit.repo_url))


def _file_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes from the header of a .safetensors file."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f"{path} cannot be read ({error}); save the model again") from error


@contextlib.contextmanager
def _upload_errors(repo_id: str) -> Iterator[None]:
    """Say which repository, what the Hub's client said, and what to do about it."""
    try:
        yield
    except SegzooError:
        raise
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if not isinstance(error, (OSError, ValueError)) and not library.startswith(("huggingface_hub", "http")):
            raise  # neither the client's nor its transport's (httpx): a fault of this program
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            advice = "log in with `hf auth login`, or set HF_TOKEN to a token that may write to this repository"
        elif type(error).__name__ == "OfflineModeIsEnabled":
            advice = "unset HF_HUB_OFFLINE"
        elif type(error).__name__ == "HFValidationError":
            advice = 'a repository is named "owner/name"'
        else:
            advice = "check the connection, and try again: an upload is one commit, so nothing is there by halves"
        raise SegzooError(f"{repo_id} was not uploaded ({' '.join(str(error).split())}); {advice}") from error
