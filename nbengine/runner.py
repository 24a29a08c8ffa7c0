"""Batches one after the other, on a CPU, or through transformers' own code on any device: turns a Batch into sampled tokens."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbengine.device_errors import at_rest, told_apart
from nbengine.residence import Residence
from nbengine.sampler import Sampler
from nbengine.step_inputs import StepInputs
from nbengine.step_threads import StepThreads
from nbengine.switch_interval import urgent

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from nbengine.batch import Batch, Sampled
    from nbengine.models.loading import LoadedModel


class LocalRunner:
    """Each step is waited for. Used by the engine's thread alone."""

    overlaps = False
    ready = False

    def __init__(self, loaded: LoadedModel, *, num_blocks: int, block_size: int, max_rows: int, max_model_len: int) -> None:
        self.loaded = loaded
        self.device = loaded.device
        self.residence = Residence(loaded, num_blocks, block_size)
        self.block_size = block_size
        self.sampler = Sampler(loaded.vocab_size, max_rows, self.device, op=loaded.ops.sample)
        self._tables = np.zeros((max_rows, -(-max_model_len // block_size)), np.int32)  # [rows, blocks] by state row
        self._anchors = np.zeros(max_rows, np.int64)
        self._prompts: dict[int, list[int]] = {}  # of state rows whose prompt's log-probabilities are wanted
        self._launched: tuple[Batch, torch.Tensor] | None = None  # a batch and its hidden states [tokens, hidden]
        self._threads = StepThreads() if self.device.type == "cpu" else None

    def wait(self, place: int) -> None:
        """There is nothing in flight to wait for: `sample` draws what `launch` computed."""

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Bring the tables up to date and start the forward pass."""
        assert self._launched is None
        for row in batch.admitted:
            self.sampler.admit(row)
            self._anchors[row.row] = row.anchor
            if row.params.prompt_logprobs is not None:
                self._prompts[row.row] = list(row.prompt)
        if len(batch.table_writes):
            _, rows, columns, blocks = batch.table_writes.T
            self._tables[rows, columns] = blocks
        if len(batch.copies):
            self.loaded.ops.copy_blocks(self.residence.caches, torch.from_numpy(batch.copies).to(self.device))
        try:
            with urgent(), self._threads.timed(batch.num_tokens) if self._threads else nullcontext():
                self._launched = batch, self.residence.model.forward(self._inputs(batch), self.residence.caches)
        except RuntimeError as error:
            raise told_apart(error, self.device) from None

    @torch.inference_mode()
    def sample(self, mask: Any = None) -> Sampled:
        """Draw the launched batch's tokens."""
        try:
            with urgent():
                return self._sample(mask)
        except RuntimeError as error:
            raise told_apart(error, self.device) from None

    def _sample(self, mask: Any) -> Sampled:
        assert mask is None, "no structured output yet"
        assert self._launched is not None
        (batch, hidden), self._launched = self._launched, None
        ends = np.cumsum(batch.counts)
        last = hidden[self._on_device(ends[batch.sample_index].astype(np.int64) - 1)]  # [samples, hidden]
        sampled = self.sampler.sample(self.residence.model.logits(last).float(), batch.sample_rows)
        for row, top in batch.prompt_logprobs.items():
            start, end = int(batch.starts[row]), int(batch.starts[row] + batch.counts[row])
            targets = self._prompts[int(batch.rows[row])][start + 1 : end + 1]
            first = int(ends[row] - batch.counts[row])
            logits = self.residence.model.logits(hidden[first : first + len(targets)]).float()
            sampled.prompt_logprobs[row] = self.sampler.prompt_logprobs(logits, targets, top)
        return sampled

    def run(self, batch: Batch) -> Sampled:
        self.launch(batch)
        return self.sample()

    def _inputs(self, batch: Batch) -> StepInputs:
        counts, starts = batch.counts.astype(np.int64), batch.starts.astype(np.int64)
        ends = np.cumsum(counts)
        context = starts + counts
        of_row = np.repeat(np.arange(len(counts)), counts)  # [tokens]
        positions = np.arange(batch.num_tokens) + np.repeat(starts - (ends - counts), counts)
        width = -(-int(context.max()) // self.block_size)
        tables = self._tables[batch.rows, :width]  # [rows, width]
        slots = tables[of_row, positions // self.block_size].astype(np.int64) * self.block_size + positions % self.block_size
        lengths = None
        if self.loaded.rope_by_length:
            lengths = self._on_device(np.maximum(self._anchors[batch.rows][of_row], positions + 1))
        return StepInputs(
            tokens=self._on_device(batch.tokens.astype(np.int64)),
            positions=self._on_device(positions),
            slots=self._on_device(slots),
            block_tables=self._on_device(tables),
            query_starts=self._on_device(np.concatenate(([0], ends)).astype(np.int32)),
            context_lens=self._on_device(context.astype(np.int32)),
            block_size=self.block_size,
            query_lens_host=batch.counts.tolist(),
            context_lens_host=context.tolist(),
            lengths=lengths,
        )

    def _on_device(self, array: NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    # ── control, between steps ──────────────────────────────────────────────────────────────────────────────────────

    def use(self, ops: dict[str, str | Callable[..., Any]]) -> None:
        """Exchange ops; each new one is checked against its reference first, and all are refused if one fails."""
        with at_rest(self.device):
            self.loaded.ops.use_all(ops)
            if self.loaded.spec is not None and self.residence.model is not None:
                self.residence.model.lay_out()
            self.sampler.op = self.loaded.ops.sample

    def free(self) -> None:
        """Give back what can be made again, for a step that found no memory."""
        self.residence.empty_device_cache()

    def warm_up(self) -> None:
        """There is nothing to compile."""

    def resize(self, num_blocks: int) -> None:
        with at_rest(self.device):
            self.residence.resize(num_blocks)

    def sleep(self, level: int) -> None:
        with at_rest(self.device):
            self.residence.sleep(level)

    def wake_up(self) -> None:
        with at_rest(self.device):
            self.residence.wake_up()

    def update_weights(self, weights: Any) -> None:
        with at_rest(self.device):
            self.residence.update_weights(weights)

    def close(self) -> None:
        """Give every tensor back. Nothing can be run after this. DeviceLostError where the GPU takes nothing back any more."""
        with at_rest(self.device):
            self._launched = None
            self.sampler = None  # type: ignore[assignment]
            self.residence.close()
