"""Where weights come from: the file that a weights row or a saved model's name stands for, downloaded and checked.

No failure is swallowed: it ends in a WeightsError that names the file, its source and the way out, never in a model
without its weights. `cache` holds what every source shares, `hub`, `url` and `drive` fetch; their libraries are loaded
on use.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._errors import WeightsError
from ..checkpoint import WeightsFile
from ..config import CONFIG_NAME, read_config

if TYPE_CHECKING:
    from ...models.rows import PretrainedCfg

HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # tried in this order where a row names no file

_log = logging.getLogger("segzoo")
_said: set[str] = set()  # licence pages whose terms have been said in this process


def row_file(name: str, row: PretrainedCfg, cfg: Any, *, force: bool = False) -> WeightsFile:
    """The weights of a row, downloaded if need be.

    Args:
        name: "variant.tag", for messages and the repository of published weights.
        cfg: config that the weights of this row belong to; a published folder with another one is refused.
        force: download them even if they are in the cache.
    """
    namespace = os.environ.get("SEGZOO_HUB_NAMESPACE", "")
    if row.state == "unpublished" and not namespace:
        raise WeightsError(
            f"the weights of {name} are not published in a loadable form yet: {row.how_to_get}. "
            f"Or convert them once with `segzoo convert FILE {name} -o DIR`, publish the folder with "
            f"`segzoo publish DIR ORGANISATION/{name}`, and set SEGZOO_HUB_NAMESPACE=ORGANISATION (the project's own "
            f"place for them, still empty, is segzoo/{name})"
        )
    say_terms(name, row)
    if row.state == "bundled":
        return WeightsFile(_bundled(_place(name, row, "file")))
    if row.state == "drive" and row.file and os.path.isfile(path := os.path.expanduser(row.file)):
        return WeightsFile(path)
    fetch = _fetcher(namespace, name, row, cfg)
    file = fetch(force=force)
    # Where no hash is known, a file that cannot be read may have been damaged on its way.
    again = functools.partial(_again, name, fetch) if row.state == "url" and row.sha256 is None else None
    origin = row.url or row.hf_hub_id or ("Google Drive" if row.state == "drive" else "the Hub")
    return WeightsFile(file, keep_mapped=True, origin=origin, again=again)


def is_here(name: str, row: PretrainedCfg, cfg: Any) -> bool:
    """Whether `row_file` gives the weights of a row without asking for anything over the network."""
    from .cache import fetching_nothing

    namespace = os.environ.get("SEGZOO_HUB_NAMESPACE", "")
    if row.state == "bundled":
        return True
    if row.state == "unpublished" and not namespace:
        return False
    try:
        with fetching_nothing():
            _fetcher(namespace, name, row, cfg)(force=False)
    except WeightsError:
        return False
    return True


def _fetcher(namespace: str, name: str, row: PretrainedCfg, cfg: Any) -> Callable[..., Path]:
    """What gives the file of a row that does not come with the package; `force=True` downloads a cached one, too."""
    if row.state == "unpublished" or (row.state == "drive" and namespace):
        return functools.partial(_published_file, namespace, name, row, cfg)
    if row.state == "url":
        from .url import url_file

        return functools.partial(url_file, name, _place(name, row, "url"), row)
    if row.state == "drive":
        from .drive import drive_file

        return functools.partial(drive_file, name, row, cfg)
    from .hub import hub_file

    files = (row.hf_hub_filename,) if row.hf_hub_filename else HUB_FILES
    return functools.partial(hub_file, name, _place(name, row, "hf_hub_id"), files, row.hf_revision, row)


def _again(name: str, fetch: Callable[..., Path], path: Path, error: Exception) -> Path | None:
    """A file of the cache that cannot be read is set aside and fetched anew; None where it may not be moved."""
    from .cache import set_aside

    aside = set_aside(path)
    if aside is not None:
        _log.warning("%s: %s. It was moved to %s and is downloaded again", name, error, aside)
        return fetch()
    return None


def _place(name: str, row: PretrainedCfg, field: str) -> str:
    """The field that says where the file of a row in this state is."""
    place = getattr(row, field)
    if not place:
        raise WeightsError(
            f"the weights row of {name} is {row.state!r} and has no {field}; give it with "
            f"pretrained_cfg_overlay={{{field!r}: ...}}"
        )
    return place


def _published_file(namespace: str, name: str, row: PretrainedCfg, cfg: Any, *, force: bool = False) -> Path:
    """Weights that someone converted and put on the Hub in a namespace of his own."""
    config, weights = saved_files(f"hf-hub:{namespace}/{name}", row, force=force)
    saved = read_config(config)
    if saved.variant != name.partition(".")[0] or saved.cfg != cfg:
        raise WeightsError(
            f"{namespace}/{name} on the Hub holds another model, {saved.name}: {saved.cfg}, not {cfg}; "
            f"publish the right one there, or build this one with create_model('hf-hub:{namespace}/{name}')"
        )
    return Path(weights.path)


@functools.cache
def _bundled(file: str) -> Path:
    """A file of segzoo/weights; from a zipped package it is unpacked until the process ends."""
    unpacked = contextlib.ExitStack()
    atexit.register(unpacked.close)
    return unpacked.enter_context(resources.as_file(resources.files("segzoo.weights") / file))


def saved_files(name: str, row: PretrainedCfg | None = None, *, force: bool = False) -> tuple[Path, WeightsFile]:
    """config.json and the weights of "local-dir:/path" or "hf-hub:org/name@revision"; `force`: of the Hub anew."""
    config = saved_config_file(name, row, force=force)
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        folder = config.parent
        weights = next((folder / file for file in HUB_FILES if (folder / file).exists()), folder / HUB_FILES[0])
        return config, WeightsFile(weights)
    from .hub import hub_file

    # The weights of the same commit, even if the branch moves on in between.
    weights = hub_file(name, place.partition("@")[0], HUB_FILES, config.parent.name, row, force=force)
    return config, WeightsFile(weights, keep_mapped=True)


def saved_config_file(name: str, row: PretrainedCfg | None = None, *, force: bool = False) -> Path:
    """config.json alone of "local-dir:/path" or "hf-hub:org/name@revision"."""
    kind, _, place = name.partition(":")
    if kind == "local-dir":
        try:
            folder = Path(place).expanduser()
        except RuntimeError as error:
            raise WeightsError(
                f"{place} is no folder ({error}); save a model there with segzoo.save_pretrained"
            ) from error
        if not folder.is_dir():
            raise WeightsError(f"{folder} is no folder; save a model there with segzoo.save_pretrained")
        return folder / CONFIG_NAME
    from .hub import hub_file

    repo_id, _, revision = place.partition("@")
    unchecked = dataclasses.replace(row, sha256=None, size=None) if row else None  # those are the weights'
    return hub_file(name, repo_id, (CONFIG_NAME,), revision or None, unchecked, force=force)


def say_terms(name: str, row: PretrainedCfg) -> None:
    """Say once in a process, through logging, that weights under this licence are not for commercial use."""
    page = row.license_url or row.origin
    if row.commercial_use is False and page not in _said:
        _said.add(page)
        _log.warning("the weights of %s must not be used commercially; their licence: %s", name, page)
