"""Steps of one token a row as CUDA graphs: hundreds of launches that the host makes once and then repeats with one call."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from nbengine.switch_interval import urgent

if TYPE_CHECKING:
    from nbengine.cuda_calls import CudaCalls

SIZES = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)


class DecodeGraphs:
    """A graph for each size of a step and each kind of body, captured when it is needed a second time; all share one pool of memory.

    The first time, the body simply runs: what it needs is compiled then. What a graph reads and writes must stay where it is.
    """

    def __init__(self, max_rows: int) -> None:
        self.sizes = [size for size in SIZES if size < max_rows] + [max_rows]
        self._graphs: dict[tuple[int, str], torch.cuda.CUDAGraph | None] = {}
        self._handles: dict[tuple[int, str], int] = {}
        self._pool: Any = None

    def size_for(self, rows: int) -> int:
        """The size of the step that so many rows are padded to."""
        return self.sizes[bisect_left(self.sizes, rows)]

    def run(self, size: int, kind: str, body: Callable[[int], None], calls: CudaCalls) -> None:
        """Run the body for this size, from its graph if there is one."""
        key = size, kind
        handle = self._handles.get(key)
        if handle is not None:
            calls.launch(handle)
            return
        with urgent():
            if key not in self._graphs:
                self._graphs[key] = None
                body(size)
            else:
                self._graphs[key] = graph = self._capture(size, body)
                self._handles[key] = graph.raw_cuda_graph_exec()
                graph.replay()

    def clear(self) -> None:
        """Forget all: something that they read or write has moved."""
        self._handles.clear()
        self._graphs.clear()
        self._pool = None

    def _capture(self, size: int, body: Callable[[int], None]) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads may use the card meanwhile
        try:
            body(size)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # what the body met is told, not that the capture is incomplete
                graph.capture_end()
            raise
        graph.capture_end()
        return graph
