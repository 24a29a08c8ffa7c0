"""Weights into their final places: each is allocated once and filled from the checkpoint, slice by slice."""

from __future__ import annotations

import math
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from nbengine.errors import CheckpointError

if TYPE_CHECKING:
    from nbengine.models.checkpoint import Checkpoint
    from nbengine.models.spec import WeightSpec

Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in total; what it raises ends the load
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DUMMY_STD = 0.02


def load_weights(
    weights: Iterable[WeightSpec],
    checkpoint: Checkpoint,
    device: torch.device | str,
    dtype: torch.dtype,
    progress: Progress | None = None,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, torch.Tensor]:
    """Every weight of the spec by name, on `device` in `dtype`; with world_size > 1 this rank's share along each shard axis.

    Tensors of the checkpoint that no spec names are left alone. An exception from `progress` (an interrupt, say) ends
    the load and leaves nothing allocated, not even by the traceback.
    """
    weights = list(weights)
    shapes = [_local_shape(weight, world_size) for weight in weights]
    total = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
    done = 0
    loaded: dict[str, torch.Tensor] = {}
    try:
        if progress is not None:
            progress("loading weights", 0, total)
        sources = [source for weight in weights for source in weight.sources]
        with checkpoint.reading_ahead(sources) if _reads_ahead(device) else nullcontext():
            for weight, shape in zip(weights, shapes, strict=True):
                loaded[weight.name] = torch.empty(shape, dtype=dtype, device=device)
                for filled in _fill(weight, loaded[weight.name], checkpoint, rank, world_size):
                    done += filled
                    if progress is not None:
                        progress("loading weights", done, total)
    except BaseException as error:
        loaded.clear()
        traceback.clear_frames(error.__traceback__)  # a notebook keeps the last traceback, and its frames would keep the weights
        raise
    return loaded


def _reads_ahead(device: torch.device | str) -> bool:
    """Copies within main memory leave the disk no time to be idle in, and need the processor's cores."""
    return torch.device(device).type == "cuda"


def dummy_weights(weights: Iterable[WeightSpec], device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights of the right shapes, the same for the same seed and device: small normals; ones for norms, zeros for biases."""
    generator = torch.Generator(device).manual_seed(seed)
    made = {}
    for weight in weights:
        tensor = made[weight.name] = torch.empty(weight.shape, dtype=dtype, device=device)
        if tensor.dim() == 1:
            tensor.fill_(0 if weight.name.endswith("bias") else 1)
        else:
            tensor.normal_(0, DUMMY_STD, generator=generator)
    return made


def _local_shape(weight: WeightSpec, world_size: int) -> tuple[int, ...]:
    shape, axis = tuple(weight.shape), weight.shard_axis
    if axis is None or world_size == 1:
        return shape
    uneven = [size for size in (_parts(weight) if axis == 0 else (shape[axis],)) if size % world_size]
    if uneven:
        raise CheckpointError(f"{weight.name} has {uneven[0]} rows to share among {world_size} ranks: use a size that divides it")
    return (*shape[:axis], shape[axis] // world_size, *shape[axis + 1 :])


def _parts(weight: WeightSpec) -> tuple[int, ...]:
    return weight.parts or (weight.shape[0],)


def _fill(weight: WeightSpec, destination: torch.Tensor, checkpoint: Checkpoint, rank: int, world_size: int) -> Iterator[int]:
    names = [_present(source, checkpoint) for source in weight.sources]
    sizes = [checkpoint.shape(name) for name in names]
    if len(names) == 1 and (world_size == 1 or sizes[0] != weight.shape):  # a wrong shape is refused there
        return (yield from checkpoint.read_steps(names[0], destination))
    if len(names) > 1 and sum(size[0] for size in sizes if size) * math.prod(sizes[0][1:]) != math.prod(weight.shape):
        listed = ", ".join(f"{name} {list(size)}" for name, size in zip(names, sizes, strict=True))
        raise CheckpointError(
            f"{checkpoint.folder}: the sources of {weight.name} do not add up to {list(weight.shape)} ({listed}): the config.json beside "
            "them is of another model or was edited; use the one that came with the weights"
        )
    if world_size > 1 and weight.shard_axis not in {0, None}:
        axis = weight.shard_axis
        return (yield from checkpoint.read_steps(names[0], destination, axis=axis, start=rank * destination.shape[axis]))
    rows = destination.flatten(0, destination.dim() - len(sizes[0]))  # stacked experts [E, out, in] are filled as [E * out, in]
    for begin, end, row in _wanted(weight, rows.shape[0], rank, world_size):
        base = 0  # of this source among all rows
        for name, size in zip(names, sizes, strict=True):
            first, last = max(begin, base), min(end, base + size[0])
            if first < last:
                part = rows[row + first - begin : row + last - begin]
                yield from checkpoint.read_steps(name, part, **({} if part.shape[0] == size[0] else {"axis": 0, "start": first - base}))
            base += size[0]
    return None


def _wanted(weight: WeightSpec, rows: int, rank: int, world_size: int) -> Iterator[tuple[int, int, int]]:
    """The rank's rows: [begin, end) of the whole, and the row of the destination where they go."""
    if world_size == 1 or weight.shard_axis is None:
        yield 0, rows, 0
        return
    base = row = 0
    for size in _parts(weight):  # each part is cut by itself, whether the checkpoint stores them apart or merged
        share = size // world_size
        yield base + rank * share, base + (rank + 1) * share, row
        base, row = base + size, row + share


def _present(source: str, checkpoint: Checkpoint) -> str:
    """The source, or its twin where a checkpoint holds the embedding and the head as one tensor."""
    twin = {HEAD: EMBEDDING, EMBEDDING: HEAD}.get(source)
    if source in checkpoint or twin is None or twin not in checkpoint:
        return checkpoint.resolve(source)
    if source == HEAD:
        warnings.warn(
            f"{checkpoint.folder} holds no {HEAD}, though its config.json does not tie it to the embedding; the embedding is used",
            stacklevel=5,
        )
    return checkpoint.resolve(twin)
