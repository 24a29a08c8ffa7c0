"""The weights on disk: which tensor lies where, and reading one straight into its final place."""

from __future__ import annotations

import json
import math
import mmap
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nbengine.errors import CheckpointError, nearest
from nbengine.models.read_ahead import ReadAhead
from nbengine.models.weight_files import INDEX, weight_files

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# What different exports put before the same tensor's name; the empty one first.
PREFIXES = ("", "model.", "language_model.", "model.language_model.", "language_model.model.", "transformer.", "base_model.model.")
CHUNK = 32 << 20  # bytes per copy: progress moves and an interrupt gets in between two of them


@dataclass(frozen=True, slots=True)
class StoredTensor:
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int  # [begin, end): its bytes in the file
    end: int


class Checkpoint:
    """A folder of safetensors, one file or many. Opening reads only headers; nothing is ever unpickled.

    >>> checkpoint = Checkpoint("Qwen3-0.6B")                      # doctest: +SKIP
    >>> checkpoint.shape("model.embed_tokens.weight")              # doctest: +SKIP
    (151936, 1024)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._tensors: dict[str, StoredTensor] = {}
        for file, listed in weight_files(self.folder):
            stored = _read_header(file)
            for name in listed if listed is not None else stored:
                if name not in stored:
                    raise CheckpointError(
                        f"{self.folder / INDEX} says that {name} is in {file.name}, and it is not: download that file and the index again"
                    )
                self._tensors[name] = stored[name]
        self._maps: dict[Path, mmap.mmap] = {}
        self._ahead = ReadAhead(())

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(tensor.end - tensor.begin for tensor in self._tensors.values())

    def resolve(self, name: str) -> str:
        """The name under which the checkpoint holds this tensor, whichever prefix its export used."""
        found = self._find(name)
        if found is None:
            raise CheckpointError(
                f"{self.folder} holds no tensor {name}{nearest(name, self._tensors)}. The checkpoint is incomplete, or its "
                "config.json is of another model: download it again, or pass load_format='dummy' to run with random weights"
            )
        return found

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[self.resolve(name)].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[self.resolve(name)].dtype

    def file(self, name: str) -> Path:
        return self._tensors[self.resolve(name)].file

    @contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Meanwhile have the disk read on while a GPU is copied to, if these are read in about this order."""
        found = [self._tensors[name] for name in map(self._find, names) if name is not None]
        with ReadAhead((tensor.file, tensor.begin, tensor.end) for tensor in found) as self._ahead:
            yield

    def read_into(self, name: str, destination: torch.Tensor, *, axis: int | None = None, start: int = 0) -> None:
        """Fill `destination` (any device, any float dtype) with the tensor, or with its slice from `start` along `axis`.

        Raises CheckpointError when the shapes do not fit.
        """
        for _ in self.read_steps(name, destination, axis=axis, start=start):
            pass

    def read_steps(self, name: str, destination: torch.Tensor, *, axis: int | None = None, start: int = 0) -> Iterator[int]:
        """As read_into, a few megabytes at a time: yields the bytes of `destination` filled by each step."""
        stored = self._tensors[self.resolve(name)]
        wanted = tuple(destination.shape)
        source = self._view(stored)
        if axis is not None:
            rest = tuple(size for place, size in enumerate(wanted) if place != axis)
            stored_rest = tuple(size for place, size in enumerate(stored.shape) if place != axis)
            if len(wanted) != len(stored.shape) or rest != stored_rest or start + wanted[axis] > stored.shape[axis]:
                raise CheckpointError(
                    f"{name} in {stored.file} has shape {list(stored.shape)}, from which [{start}, {start + wanted[axis]}) along axis "
                    f"{axis} cannot fill {list(wanted)}: {WRONG_CONFIG}"
                )
            source = source.narrow(axis, start, wanted[axis])
        elif stored.shape != wanted:
            raise CheckpointError(
                f"{name} in {stored.file} has shape {list(stored.shape)}, and the model needs {list(wanted)}: {WRONG_CONFIG}"
            )
        for read, filled in _chunks(source, destination):
            filled.copy_(read)
            self._ahead.taken += read.nbytes
            yield filled.nbytes

    def ties_head(self, embedding: str = "model.embed_tokens.weight", head: str = "lm_head.weight") -> bool:
        """Whether one tensor serves as embedding and head: one of them is absent, or both hold the same values.

        A config that says `tie_word_embeddings` beside a head of its own is wrong: transformers believes the weights.
        """
        if embedding not in self or head not in self:
            return True
        one, other = (self._tensors[self.resolve(name)] for name in (embedding, head))
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        rows = zip(self._view(one).split(4096), self._view(other).split(4096), strict=True)
        return all(torch.equal(a, b) for a, b in rows)

    def _find(self, name: str) -> str | None:
        if name in self._tensors:
            return name
        bare = {name.removeprefix(prefix) for prefix in PREFIXES}
        candidates = (prefix + stem for prefix in PREFIXES for stem in sorted(bare, key=len))
        return next((candidate for candidate in candidates if candidate in self._tensors), None)

    def _view(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor where it lies in the mapped file; its pages are read when they are copied."""
        if stored.begin == stored.end:
            return torch.empty(stored.shape, dtype=stored.dtype)
        if stored.file not in self._maps:
            with stored.file.open("rb") as file:
                # a private mapping: torch insists on writable memory, and nothing here writes
                self._maps[stored.file] = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        data = torch.frombuffer(self._maps[stored.file], dtype=torch.uint8, count=stored.end - stored.begin, offset=stored.begin)
        if stored.begin % stored.dtype.itemsize:
            data = data.clone()  # a header of odd length: a typed view needs aligned bytes
        return data.view(stored.dtype).view(stored.shape)


WRONG_CONFIG = "the config.json beside it is of another model or was edited; use the one that came with the weights"


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The safetensors layout: 8 bytes of header length, a JSON header, then the tensors' bytes."""
    size = path.stat().st_size
    damaged = f"{path} is damaged"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > 100_000_000:
            raise CheckpointError(f"{damaged} (it does not begin with a safetensors header): download it again")
        if 8 + length > size:
            raise CheckpointError(f"{damaged} (it ends within its header, after {size} bytes): delete it and download it again")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            return {name: _stored(path, name, entry, 8 + length, size) for name, entry in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{damaged} (its header cannot be read: {error!r}): download it again") from error


def _stored(path: Path, name: str, entry: dict[str, Any], base: int, size: int) -> StoredTensor:
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(f"{name} in {path} has dtype {entry['dtype']}, which is not supported: use another version of the model")
    dtype, shape = DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
    begin, end = (base + int(offset) for offset in entry["data_offsets"])
    if end > size:
        raise CheckpointError(
            f"{path} is cut short: {name} needs bytes up to {end}, and the file has {size}. Delete it and download it again"
        )
    if not base <= begin <= end or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != end - begin:
        raise CheckpointError(f"{path} is damaged ({name}: shape {list(shape)} does not fit its {end - begin} bytes): download it again")
    return StoredTensor(path, dtype, shape, begin, end)


def _chunks(source: torch.Tensor, destination: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Both in parts of a few megabytes of the source."""
    if source.dim() == 0 or source.numel() == 0:
        yield source, destination
        return
    rows = max(1, CHUNK // max(1, source[0].numel() * source.element_size()))
    yield from zip(source.split(rows), destination.split(rows), strict=True)
