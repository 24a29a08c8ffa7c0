"""How many KV blocks fit: from the memory that is really free, or as told."""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from nbengine.config import EngineConfig

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Where an engine's memory goes, in bytes."""

    weights: int
    kv_cache: int
    num_blocks: int
    block_bytes: int
    free_before: int  # on the device, with the weights in place and the cache not yet

    def __repr__(self) -> str:
        return f"<MemoryPlan {self.told()}>"

    def told(self) -> str:
        """In words."""
        return (
            f"weights {size(self.weights)}, KV cache {size(self.kv_cache)} "
            f"({self.num_blocks:,} blocks of {size(self.block_bytes)}), free before it {size(self.free_before)}"
        )


def size(count: float) -> str:
    """`1.4 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def plan_memory(
    config: EngineConfig,
    device: torch.device,
    *,
    weights: int,
    block_bytes: int,
    max_model_len: int,
    max_num_seqs: int,
    free: int | None = None,
) -> MemoryPlan:
    """Size the pool: as told, or from what is free, and never more than the sequences allowed at once could fill.

    `free` is what will be free once the weights are in place, for a model that is not loaded; None: what is free now.
    """
    if free is None:
        free = free_memory(device)
    useful = max_num_seqs * -(-max_model_len // config.block_size)
    if config.num_gpu_blocks_override is not None:
        blocks = config.num_gpu_blocks_override
    elif config.kv_cache_memory_bytes is not None:
        blocks = config.kv_cache_memory_bytes // block_bytes
    else:
        blocks = min(useful, _budget(config, device, free) // block_bytes)
    if blocks < 1 and config.kv_cache_memory_bytes is not None:
        raise MemoryError(
            f"no KV block fits: kv_cache_memory_bytes={config.kv_cache_memory_bytes} is less than one takes, {block_bytes} bytes: raise it"
        )
    if blocks < 1:
        raise MemoryError(
            f"no KV block fits: one takes {size(block_bytes)}, and {size(free)} are free on {device} beside {size(weights)} of weights. "
            "Free memory (tensors of other cells, another engine's close()), or lower block_size or max_model_len"
        )
    if blocks * block_bytes > free:
        raise MemoryError(
            f"a KV cache of {blocks} blocks takes {size(blocks * block_bytes)}, and {size(free)} are free on {device}: "
            "ask for less with num_gpu_blocks_override or kv_cache_memory_bytes"
        )
    return MemoryPlan(weights, blocks * block_bytes, blocks, block_bytes, free)


def _budget(config: EngineConfig, device: torch.device, free: int) -> int:
    if device.type == "cuda":
        import torch

        total = torch.cuda.get_device_properties(device).total_memory
        return int(free - total * (1 - config.gpu_memory_utilization))  # the rest stays free for the user's own tensors
    return free // 4  # a notebook's kernel shares the machine's memory with everything else


def empty_device_cache() -> None:
    """Have torch give back what it keeps for later of a GPU, where it has begun to use one."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a GPU that is lost answers nothing
            torch.cuda.empty_cache()


def free_memory(device: torch.device) -> int:
    """Bytes that could be allocated now."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_ram()


def free_ram() -> int:
    """Bytes of main memory that could be taken now, within the container's limit where there is one."""
    available = _meminfo_available()
    limit, used = _cgroup("memory.max", "memory/memory.limit_in_bytes"), _cgroup("memory.current", "memory/memory.usage_in_bytes")
    if limit is not None and used is not None:
        reclaimable = _cgroup_inactive_file()
        available = min(available, max(0, limit - used + reclaimable))
    return available


def total_ram() -> int:
    """Bytes of main memory in all: the machine's, or the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup("memory.max", "memory/memory.limit_in_bytes")
    return total if limit is None else min(total, limit)


def _meminfo_available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 * GIB  # a system without /proc/meminfo: a careful guess


def _cgroup(v2: str, v1: str) -> int | None:
    for name in (v2, v1):
        try:
            text = (Path("/sys/fs/cgroup") / name).read_text().strip()
        except OSError:
            continue
        if text != "max":
            return int(text)
    return None


def _cgroup_inactive_file() -> int:
    """Page cache that the kernel gives back when somebody needs it."""
    for name in ("memory.stat", "memory/memory.stat"):
        try:
            lines = (Path("/sys/fs/cgroup") / name).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(" ")
            if key in {"inactive_file", "total_inactive_file"}:
                return int(value)
    return 0
