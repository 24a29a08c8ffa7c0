"""What of a model is on its device, its weights and its KV cache: given back and taken again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from nbengine.errors import EnginePausedError
from nbengine.memory import size
from nbengine.step_inputs import CacheSpec, LayerCache

if TYPE_CHECKING:
    from nbengine.models.loading import LoadedModel


# Bytes. torch takes much of a GPU's memory at once in whole multiples: what a cache left of the last, a tensor would get that stays
# when the cache goes, and keep all of it.
_PIECE = 2 << 20


class Residence:
    """Used by the engine's thread alone, between two steps."""

    def __init__(self, loaded: LoadedModel, num_blocks: int, block_size: int) -> None:
        self.loaded = loaded
        self.model: Any = loaded.model  # None while its weights are elsewhere
        self.device = loaded.device
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caches: list[LayerCache] = []
        self._away: Any = None  # the model whose weights are in main memory
        self.allocate()

    def allocate(self) -> None:
        """Take memory for the cache."""

        def block(layer: CacheSpec) -> torch.Tensor:  # not cleared: a slot is written before it is read, and untouched pages cost nothing
            shape = self.num_blocks, self.block_size, layer.kv_heads, layer.head_dim
            piece = _PIECE // self.loaded.dtype.itemsize
            room = -(-math.prod(shape) // piece) * piece
            return torch.empty(room, dtype=self.loaded.dtype, device=self.device)[: math.prod(shape)].view(shape)

        self.caches = [LayerCache(block(layer), block(layer)) for layer in self.loaded.cache_layers]

    def resize(self, num_blocks: int) -> None:
        """Another cache in place of this one, whose content is lost; this one again if there is no memory for it."""
        before, self.num_blocks = self.num_blocks, num_blocks
        self.caches = []
        self.empty_device_cache()
        try:
            self.allocate()
        except (RuntimeError, MemoryError):  # a GPU's kinds, and a CPU's
            self.caches = []
            self.empty_device_cache()
            self.num_blocks = before
            self.allocate()
            raise MemoryError(f"a KV cache of {num_blocks} blocks does not fit; the engine keeps its {before}") from None

    def sleep(self, level: int) -> None:
        """Give the cache back. On a GPU the weights too: to main memory (level 1), or altogether (level 2, anywhere).

        MemoryError where main memory has no room for them: then all is as before.
        """
        if level == 2:
            self.model = self._away = None
            self.loaded.drop()
        elif self.device.type == "cuda" and self.model is not None:
            try:
                self.model.move(torch.device("cpu"))
            except (RuntimeError, MemoryError) as error:
                self.model.move(self.device)  # a part of it may have gone
                raise MemoryError(
                    f"main memory has no room for weights of {size(self.loaded.weight_bytes)} that come back fast ({error}); the engine is "
                    "awake as before. sleep(level=2) drops them"
                ) from None
            self._away, self.model = self.model, None
        self.caches = []
        self.empty_device_cache()

    def wake_up(self) -> None:
        """Take again what is missing."""
        if self._away is not None:
            self._away.move(self.device)
            self.model, self._away = self._away, None
        elif self.model is None:
            self.model = self.loaded.reload()
        if not self.caches:
            self.allocate()

    def update_weights(self, weights: Any) -> None:
        if self.model is None:
            raise EnginePausedError("the weights are not on the device while the engine sleeps: call engine.wake_up() first")
        self.loaded.update_weights(weights)

    def close(self) -> None:
        """Give every tensor back. Nothing can be run after this."""
        self.caches = []
        self.model = self._away = None
        self.loaded.drop()
        self.empty_device_cache()

    def empty_device_cache(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
