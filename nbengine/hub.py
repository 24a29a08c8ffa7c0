"""From a model's name to its folder: a local folder, the bundled model, or one downloaded from the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from nbengine.download import Download, Progress
from nbengine.errors import ModelNotFoundError, nearest

BUNDLED = "tales"
TOKENIZER_FILES = ("tokenizer*", "*.model", "vocab.*", "tekken.json", "*.tiktoken")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def resolve_model(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    download_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    progress: Progress | None = None,
    weights: bool = True,
) -> Path:
    """The folder of a model: a path, a hub id such as `Qwen/Qwen3-0.6B`, or `tales` for the bundled one.

    With weights=False only what configuration and tokenizer need is downloaded. HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and
    HF_HOME are read at each call. Raises ModelNotFoundError, which says what to do.

    >>> resolve_model("tales").name
    'tales'
    """
    name = os.fspath(model)
    if name == BUNDLED and not isinstance(model, Path):
        _refuse_revision(revision, "the bundled model")
        return _checked(Path(__file__).parent / BUNDLED, weights=weights)
    folder = Path(name).expanduser()
    if name and folder.is_dir():
        _refuse_revision(revision, f"the folder {name}")
        return _checked(folder, weights=weights)
    if folder.is_file():
        raise ModelNotFoundError(f"{name} is a file, and a model is a folder with config.json and *.safetensors: pass {folder.parent}")
    if isinstance(model, Path) or name.startswith(("/", "./", "../", "~")) or name in {".", ".."} or name.endswith("/"):
        raise ModelNotFoundError(
            f"there is no folder {name} (looked at {folder.absolute()}): check the path, or pass a hub id such as org/name"
        )
    if not HUB_ID.fullmatch(name):
        raise ModelNotFoundError(f"{name!r} is neither a folder here nor a hub id such as Qwen/Qwen3-0.6B: check the spelling")
    try:
        return Download(name, revision, _cache_folder(download_dir), token, weights).folder(progress)
    except ModelNotFoundError as error:
        if hint := nearest(name.lower(), [BUNDLED]):
            raise ModelNotFoundError(f"{error}{hint} That is the bundled model") from error
        raise


def _refuse_revision(revision: str | None, model: str) -> None:
    if revision is not None:
        raise ValueError(f"revision={revision!r} means a version of a model on the hub, and {model} has only the one: leave revision out")


def _checked(folder: Path, *, weights: bool) -> Path:
    if (folder / "config.json").is_file() or (not weights and any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES)):
        return folder
    raise ModelNotFoundError(
        f"the folder {folder} has no config.json, so it holds no model as transformers saves it: pass the folder that does, "
        "or, for a hub model of the same name, run from another directory"
    )


def _cache_folder(download_dir: str | os.PathLike[str] | None) -> Path:
    """Where downloads go; the environment counts as it is now, not as it was when huggingface_hub was imported."""
    if download_dir is not None:
        return Path(download_dir).expanduser()
    if cache := os.environ.get("HF_HUB_CACHE"):
        return Path(cache).expanduser()
    if home := os.environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
