"""Which models are on this machine: the bundled one, and those in the Hugging Face cache. Asks nobody, and needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from nbengine.checks import read_json
from nbengine.errors import CheckpointError
from nbengine.hub import BUNDLED, _cache_folder, resolve_model
from nbengine.memory import size
from nbengine.models.weight_files import weight_files

if TYPE_CHECKING:
    from huggingface_hub import CachedFileInfo, CachedRepoInfo, CachedRevisionInfo


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model that can be loaded from here, or that lacks some of its weights (`complete` is False)."""

    name: str  # as `Engine(name)` takes it
    folder: str
    source: str  # "bundled" or "cache"
    revision: str  # "main", another branch or tag, or a commit; "" for the bundled one
    architecture: str
    nbytes: int  # on disk
    complete: bool
    last_used: float  # seconds since 1970: when its weights were last read, as exactly as the file system keeps that

    def __repr__(self) -> str:
        day = datetime.fromtimestamp(self.last_used).astimezone().strftime("%Y-%m-%d")
        lacking = "" if self.complete else ", incomplete"
        return f"<LocalModel {self.name}: {self.architecture}, {size(self.nbytes)}{lacking}, last used {day}>"


class LocalModels(list[LocalModel]):
    """The models found, and in `skipped` a line for whatever could not be read."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped: list[str] = []


def local_models(download_dir: str | os.PathLike[str] | None = None) -> LocalModels:
    """The models on this machine: `tales`, then those in the cache (or in `download_dir`) by name. Only safetensors count.

    >>> local_models()[0].name
    'tales'
    """
    found = LocalModels()
    found.append(_bundled())
    for repo in sorted(_cached_repos(_cache_folder(download_dir), found.skipped), key=lambda repo: repo.repo_id):
        try:
            found.extend(_best(repo))
        except (OSError, CheckpointError) as error:
            found.skipped.append(f"{repo.repo_id}: {error}")
    return found


def _bundled() -> LocalModel:
    folder = resolve_model(BUNDLED)
    stats = [file.stat() for file in folder.iterdir() if file.is_file()]
    used = (folder / "model.safetensors").stat().st_atime
    return LocalModel(BUNDLED, str(folder), "bundled", "", _architecture(folder), sum(stat.st_size for stat in stats), True, used)


def _cached_repos(cache: Path, skipped: list[str]) -> list[CachedRepoInfo]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        info = scan_cache_dir(cache)
    except CacheNotFound:  # nothing was ever downloaded
        return []
    except (OSError, ValueError) as error:
        skipped.append(
            f"the cache {cache} cannot be read ({error}): set HF_HOME or HF_HUB_CACHE, or pass download_dir, to the right folder"
        )
        return []
    skipped.extend(f"{warning}; delete that folder and download the model again" for warning in info.warnings)
    return [repo for repo in info.repos if repo.repo_type == "model"]


def _best(repo: CachedRepoInfo) -> Iterator[LocalModel]:
    """One entry a model: of several revisions the one that a load without `revision` takes, or else the newest."""
    usable = [revision for revision in repo.revisions if _usable(revision)]
    if usable:
        revision = max(usable, key=lambda one: ("main" in one.refs, one.last_modified))
        folder = revision.snapshot_path
        yield LocalModel(
            name=repo.repo_id,
            folder=str(folder),
            source="cache",
            revision="main" if "main" in revision.refs else min(revision.refs, default=revision.commit_hash),
            architecture=_architecture(folder),
            nbytes=revision.size_on_disk,
            complete=_complete(folder),
            last_used=max(file.blob_last_accessed for file in _weights(revision)),
        )


def _usable(revision: CachedRevisionInfo) -> bool:
    return (revision.snapshot_path / "config.json").is_file() and bool(_weights(revision))


def _weights(revision: CachedRevisionInfo) -> list[CachedFileInfo]:
    return [file for file in revision.files if file.file_path.parent == revision.snapshot_path and file.file_name.endswith(".safetensors")]


def _architecture(folder: Path) -> str:
    config = read_json(folder / "config.json")
    named = config.get("architectures")
    return str(named[0] if isinstance(named, list) and named else config.get("model_type") or "?")


def _complete(folder: Path) -> bool:
    """Whether every file of weights is there; their content is checked when they are loaded, and reading it now would count as a use."""
    try:
        return bool(weight_files(folder))
    except CheckpointError:
        return False
