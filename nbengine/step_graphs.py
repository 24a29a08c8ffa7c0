"""Steps as CUDA graphs: hundreds of launches that the host makes once and then repeats with one call."""

from __future__ import annotations

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch

from nbengine.switch_interval import urgent

if TYPE_CHECKING:
    from nbengine.cuda_calls import CudaCalls

# rows of a step in which each computes one token
SIZES = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024)
# rows and tokens of any other, so few shapes that under load all are captured soon: each is slow the first two times
MIXED_ROWS = (1, 8, 32, 128, 256)
MIXED_TOKENS = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2304)
LAUNCH = 0.4e-3  # seconds that the launches of a layer take
RATE = 4.5e12  # operations a second of a Hopper GPU's multiprocessor, in large products


def paying_tokens(layers: int, weights: int, multiprocessors: int) -> int:
    """Tokens of the largest step that takes longer to launch than to compute: in a larger one a graph saves nothing, and its padding costs."""
    return int(layers * LAUNCH * multiprocessors * RATE / (2 * weights))


class StepGraphs:
    """A graph for each shape that steps are padded to, captured ahead or when it is needed a second time; all share one pool of memory.

    The first time, the step simply runs: what it needs is compiled and loaded then, which is not always possible during a capture.
    What a graph reads and writes must stay where it is.
    """

    def __init__(self, max_rows: int, mixed_tokens: int, calls: CudaCalls) -> None:
        self._calls = calls
        self.sizes = [size for size in SIZES if size < max_rows] + [max_rows]
        self.rows = [rows for rows in MIXED_ROWS if rows <= max_rows]
        self.tokens = [tokens for tokens in MIXED_TOKENS if tokens <= mixed_tokens]
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._failed: list[torch.cuda.CUDAGraph] = []  # kept: where the GPU is lost, to free one would end the process
        self._ran: set[Hashable] = set()  # shapes that were run and have no graph yet
        self._handles: dict[Hashable, int] = {}
        self._pool: Any = None

    def size_for(self, rows: int) -> int:
        """What a step of one token a row is padded to."""
        return self.sizes[bisect_left(self.sizes, rows)]

    def shape_for(self, rows: int, tokens: int) -> tuple[int, int] | None:
        """The rows and tokens that any other step is padded to; None where it is too large for a graph to pay."""
        if rows > self.rows[-1]:
            return None
        padded = self.rows[bisect_left(self.rows, rows)]
        at = bisect_left(self.tokens, max(tokens, padded + 1))  # as many tokens as rows mean one token a row
        return (padded, self.tokens[at]) if at < len(self.tokens) else None

    def run(self, shape: Hashable, body: Callable[[], None]) -> None:
        """Run the body of this shape, from its graph if there is one."""
        if shape not in self._handles:
            with urgent():
                if shape not in self._ran:
                    self._ran.add(shape)
                    body()
                    return
                self.capture(shape, body)
        self._calls.launch(self._handles[shape])

    def capture(self, shape: Hashable, body: Callable[[], None]) -> None:
        """Have a graph of this shape from now on; nothing runs."""
        graph = self._captured(body)
        self._handles[shape] = graph.raw_cuda_graph_exec()
        self._graphs[shape] = graph

    def clear(self) -> None:
        """Forget all: something that they read or write has moved."""
        self._handles.clear()
        self._graphs.clear()
        self._ran.clear()
        self._failed.clear()
        self._pool = None

    def _captured(self, body: Callable[[], None]) -> torch.cuda.CUDAGraph:
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads may use the card meanwhile
        try:
            body()
        except BaseException:
            self._failed.append(graph)
            self._pool = None  # a capture that ends badly may leave it unusable
            with contextlib.suppress(RuntimeError):  # what the body met is told, not that the capture is incomplete
                graph.capture_end()
            raise
        graph.capture_end()
        return graph
