"""One model on its way from the hub: resumed when the line drops, ended when the caller is interrupted, explained when it fails."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nbengine.errors import ModelNotFoundError

log = logging.getLogger("nbengine")
Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in total; what it raises ends the download

TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py")  # configuration, tokenizer and template in all their forms
DELAYS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt
TEMPORARY = (408, 429, 500, 502, 503, 504)


def _offline() -> bool:
    from huggingface_hub import constants

    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.lower() in {"1", "on", "yes", "true"} or constants.HF_HUB_OFFLINE


def wanted_files(names: Iterable[str], *, weights: bool) -> list[str]:
    """What to download of a repository's files: never pickles, never another framework's copy of the weights."""
    names = list(names)
    found = [
        name for name in names if name.startswith("additional_chat_templates/") or any(_at_top(name, pattern) for pattern in TEXT_FILES)
    ]
    if weights:
        named = [name for name in names if _at_top(name, "model*.safetensors")]
        found += named or [name for name in names if _at_top(name, "*.safetensors")]
    return found


def _at_top(name: str, pattern: str) -> bool:
    return "/" not in name and fnmatch(name, pattern)


@dataclass
class Download:
    """One model on its way: a thread fetches, the caller waits, shows progress and may be interrupted at any time."""

    model: str
    revision: str | None
    cache: Path
    token: str | bool | None
    weights: bool
    total: int = 0  # bytes that are not here yet
    bars: list[Any] = field(default_factory=list)
    aborted: threading.Event = field(default_factory=threading.Event)

    @property
    def endpoint(self) -> str:
        from huggingface_hub import constants

        return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")

    def folder(self, progress: Progress | None) -> Path:
        future: Future[Path] = Future()

        def work() -> None:
            try:
                future.set_result(self._fetch())
            except BaseException as error:  # noqa: BLE001 - it belongs to the caller
                future.set_exception(error)

        threading.Thread(target=work, name="nbengine-download", daemon=True).start()
        with ExitStack() as stack:
            stack.callback(self.aborted.set)
            show = progress or _bar(f"downloading {self.model}", stack)
            while True:
                try:
                    return future.result(timeout=0.1)
                except NotYet:
                    if future.done():  # the work itself raised a timeout
                        raise
                if self.total:
                    show("downloading", self.done, self.total)

    @property
    def done(self) -> int:
        return min(self.total, max((bar.n for bar in self.bars if bar.unit == "B"), default=0))

    def _fetch(self) -> Path:
        if _offline():
            return self._cached(None)
        for attempt in range(len(DELAYS) + 1):
            try:
                return self._attempt()
            except _Aborted:
                raise
            except Exception as error:
                if self.aborted.is_set():
                    raise
                last = attempt == (len(DELAYS) if self.total else 2)  # a hub that was never reached is given up sooner
                if not _temporary(error) or last:
                    if _temporary(error):
                        return self._cached(error)
                    raise self._explained(error) from error
                log.info("downloading %s: %s; trying again", self.model, error)
            self.aborted.wait(DELAYS[attempt])
        raise AssertionError

    def _attempt(self) -> Path:
        from huggingface_hub import snapshot_download

        names, self.total = self._listed()
        self._check_space()
        self.bars.clear()
        found = snapshot_download(
            self.model,
            revision=self.revision,
            cache_dir=self.cache,
            token=self.token,
            endpoint=self.endpoint,
            allow_patterns=names,
            tqdm_class=type("Bar", (_CountingBar,), {"download": self}),
        )
        return Path(found)

    def missing(self) -> int:
        """Bytes that a download would still fetch; asks the hub once, and explains what goes wrong as a download does."""
        if _offline():
            self._cached(None)
            return 0
        try:
            return self._listed()[1]
        except Exception as error:
            raise self._explained(error) from error

    def _listed(self) -> tuple[list[str], int]:
        """The files that the hub has and the engine wants, and the bytes of those that are not here."""
        from huggingface_hub import HfApi, try_to_load_from_cache

        api = HfApi(endpoint=self.endpoint, token=self.token)
        info = api.model_info(self.model, revision=self.revision, files_metadata=True, timeout=30)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        names = wanted_files(sizes, weights=self.weights)
        if self.weights and not any(name.endswith(".safetensors") for name in names):
            kinds = sorted({Path(name).suffix for name in sizes} & {".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"})
            raise ModelNotFoundError(
                f"{self.model} has no safetensors weights (it has {', '.join(kinds) or 'no weights at all'}): pick another version of the "
                "model, or convert it with transformers' save_pretrained and pass that folder"
            )
        if self.weights and "config.json" not in names:
            raise ModelNotFoundError(f"{self.model} has no config.json, so it is not a whole model (an adapter?): pass the base model's id")
        missing = [name for name in names if not isinstance(try_to_load_from_cache(self.model, name, self.cache, info.sha), str)]
        return names, sum(sizes[name] for name in missing)

    def _cached(self, error: Exception | None) -> Path:
        """What is already here, for a hub that may not, or cannot, be asked."""
        from huggingface_hub import snapshot_download

        patterns = [*TEXT_FILES, "*.safetensors"] if self.weights else list(TEXT_FILES)
        try:
            folder = Path(
                snapshot_download(
                    self.model,
                    revision=self.revision,
                    cache_dir=self.cache,
                    local_files_only=True,
                    allow_patterns=patterns,
                    ignore_patterns=["*/*", "consolidated*"],
                )
            )
            whole = not self.weights or ((folder / "config.json").is_file() and any(folder.glob("*.safetensors")))
        except OSError:  # huggingface_hub has no whole snapshot
            whole = False
        if whole:
            if error is not None:
                log.warning("%s cannot be reached (%s); using %s from the cache", self.endpoint, error, self.model)
            return folder
        if error is None:
            raise ModelNotFoundError(
                f"{self.model} is not complete in {self.cache}, and HF_HUB_OFFLINE forbids downloading it: unset HF_HUB_OFFLINE, "
                "or pass the path of a folder that holds the model"
            )
        raise self._explained(error) from error

    def _check_space(self) -> None:
        place = self.cache
        while not place.exists() and place != place.parent:
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < self.total:
            raise OSError(errno.ENOSPC, f"{self.total / 1e9:.1f} GB are to be downloaded and {free / 1e9:.1f} GB are free")

    def _explained(self, error: Exception) -> Exception:
        """The error in words for the person who asked for the model; what is not understood passes as it is."""
        from huggingface_hub import errors

        if isinstance(error, ModelNotFoundError):
            return error
        page = f"{self.endpoint}/{self.model}"
        status = getattr(getattr(error, "response", None), "status_code", None)
        advice = None
        if isinstance(error, errors.GatedRepoError):
            advice = f"is gated: accept its terms at {page}, then set HF_TOKEN (or pass hf_token=) to a token of that account"
        elif isinstance(error, errors.RevisionNotFoundError):
            advice = f"has no revision {self.revision!r}: see the branches and tags at {page}/tree/main"
        elif isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            advice = (
                f"is not on the hub ({self.endpoint}), or it is private: check the spelling of org/name; for a private model set HF_TOKEN "
                "(or pass hf_token=); for a local folder, pass its path"
            )
        elif status in {401, 403}:
            advice = f"was refused by {self.endpoint} ({status}): the token is invalid or lacks the right to read it; set HF_TOKEN to one that has it"
        elif isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT}:
            advice = f"does not fit on the disk of {self.cache} ({error}): free some space there, or pass download_dir= on another disk"
        elif isinstance(error, OSError) and error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            advice = f"cannot be written to {self.cache} ({error}): pass download_dir= (or set HF_HOME) to a folder that you may write to"
        elif _temporary(error):
            advice = (
                f"could not be downloaded from {self.endpoint} ({error}): check the connection and try again; files already whole are kept"
            )
        return error if advice is None else ModelNotFoundError(f"{self.model} {advice}")


class _Aborted(BaseException):
    """The caller is gone; unwinds huggingface_hub's threads."""


class _CountingBar:
    """What huggingface_hub takes for a tqdm bar: it counts, and ends the download when the caller is gone."""

    download: Download
    format_dict: dict[str, Any] = {}  # noqa: RUF012 - read, never written

    def __init__(
        self, iterable: Iterable[Any] | None = None, *, total: float | None = None, initial: float = 0, unit: str = "it", **_: Any
    ) -> None:
        self.iterable = iterable
        self.total, self.n, self.unit = total, int(initial), unit
        self.download.bars.append(self)

    def update(self, n: float | None = 1) -> None:
        if self.download.aborted.is_set():
            raise _Aborted
        self.n += int(n or 0)

    def __iter__(self) -> Any:
        for item in self.iterable or ():
            yield item
            self.update()

    def __enter__(self) -> _CountingBar:  # noqa: PYI034 - used through subclasses made on the spot
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None  # set_description, refresh, close, ...


def _bar(title: str, stack: ExitStack) -> Progress:
    from tqdm.auto import tqdm

    bar = stack.enter_context(tqdm(desc=title, unit="B", unit_scale=True, delay=0.2))

    def show(_phase: str, done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    return show


def _temporary(error: Exception) -> bool:
    """Whether trying again may help: dropped connections, timeouts, a busy hub."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return status in TEMPORARY
    transport = any(kind.__name__ == "TransportError" and kind.__module__.startswith("httpx") for kind in type(error).__mro__)
    inner = error.__cause__ or error.__context__
    return (
        transport
        or isinstance(error, (ConnectionError, TimeoutError))
        or "Consistency check failed" in str(error)
        or (type(error).__name__ in {"LocalEntryNotFoundError", "FileMetadataError"} and isinstance(inner, Exception) and _temporary(inner))
    )
