"""The only upload: a model, or a folder of a saved one, to the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
from huggingface_hub import CommitOperationAdd, HfApi

from .._errors import SegzooError, WeightsError
from .._version import __version__
from ..models.base import Model
from ..zoo.config import CONFIG_NAME, WEIGHTS_NAME, read_config
from .card import CARD_NAME, PLACEHOLDER
from .saving import check_shapes, save_pretrained


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
    check_shapes(_file_shapes(directory / WEIGHTS_NAME), saved, str(directory / WEIGHTS_NAME))
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


@dataclasses.dataclass(frozen=True)
class Published:
    """Where an upload went."""

    repo_id: str
    commit: str  # full id; pin it with "hf-hub:OWNER/NAME@COMMIT"
    url: str


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
