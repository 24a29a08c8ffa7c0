"""Batches on a GPU: launched without waiting for the ones before, their tokens fetched when somebody asks for them."""

from __future__ import annotations

import logging
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from time import perf_counter, sleep
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbengine.batch import Batch
from nbengine.cuda_streams import stream_for
from nbengine.device_errors import at_rest, told_apart
from nbengine.device_sampler import DeviceSampler, Drawing
from nbengine.errors import DeviceMemoryError
from nbengine.kernels._triton import multiprocessors
from nbengine.kernels.paged_attention import PLANNED_ROWS
from nbengine.kernels.prepare_step import HEADER, SampleInputs, packed_size
from nbengine.kernels.update_tables import ROW
from nbengine.residence import Residence
from nbengine.sampler import logprob_entries, logprob_tensors
from nbengine.staging import Slot, Staging, to_device, to_host
from nbengine.state_tables import StateTables, packed_rows
from nbengine.step_graphs import StepGraphs, paying_tokens
from nbengine.step_inputs import StepInputs
from nbengine.switch_interval import put_others_off, urgent

if TYPE_CHECKING:
    from nbengine.batch import Sampled
    from nbengine.models.loading import LoadedModel
    from nbengine.sampler import LogprobTensors

log = logging.getLogger("nbengine")
_SCORED = 256  # prompt positions whose logits are held together


_WARM_TOKENS = 16
_EVERY, _TURN = 1e-2, 1e-4  # seconds after which other threads get a turn although the device is not waited for, and how long it is
_UPDATES = 2  # writes to the tables for each token of a step that a graph has programs for


@dataclass(slots=True)
class _Flight:
    """A launched step."""

    batch: Batch
    slot: Slot
    drawing: Drawing
    prompt_logprobs: dict[int, list[LogprobTensors]] = field(default_factory=dict)  # by batch row


class DeviceRunner:
    """Several steps may be in flight. Used by the engine's thread alone, whose current stream it takes for all it does.

    Live sequences have rows in tables on the device. A step sends what is new in one copy; the device makes its inputs from that
    and from the tables, and draws tokens that the next step reads there, before the host has seen them.
    """

    overlaps = True

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        num_blocks: int,
        block_size: int,
        max_rows: int,
        max_tokens: int,
        max_model_len: int,
        cuda_graphs: bool = True,
    ) -> None:
        device = self.device = loaded.device
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # which brought the weights
            torch.cuda.set_device(device)
            stream, self._give_stream_back = stream_for(self, device)
            torch.cuda.set_stream(stream)
        self.loaded = loaded
        self.ops = loaded.ops
        self.residence = Residence(loaded, num_blocks, block_size)
        self.block_size = block_size
        room = max(max_tokens, max_rows)  # a step of one token a row may be padded to more rows than it may have tokens
        self._ends = memoryview(array("i", range(room + 1)))  # of queries, where each row has one
        self._most = max_rows, room, -(-max_model_len // block_size)
        self._prepare()
        self.graphs: StepGraphs | None = None
        if cuda_graphs and self._staging.calls is not None:
            weights = loaded.weight_bytes // loaded.dtype.itemsize
            paying = paying_tokens(len(loaded.cache_layers), weights, multiprocessors(device))
            self.graphs = StepGraphs(max_rows, min(max_tokens, paying), self._staging.calls)
        self._prompts: dict[int, list[int]] = {}  # of state rows whose prompt's log-probabilities are wanted
        self._flights: deque[_Flight] = deque()
        self._let_go = 0.0  # when other threads last had a turn

    def _prepare(self) -> None:
        """Make the tables, and room for what a step takes and gives."""
        rows, tokens, columns = self._most
        device, loaded = self.device, self.loaded
        self.tables = StateTables(rows, columns, device)
        self.sampler = DeviceSampler(loaded.vocab_size, rows, device, loaded.ops, self.tables)
        self._staging = Staging(packed_size(rows, tokens, rows), rows, device)
        self._inputs = self._make_inputs(rows, tokens)
        self._samples = SampleInputs.empty(rows, device)
        self._hidden = torch.zeros((rows, loaded.hidden_size), dtype=loaded.dtype, device=device)
        self._drawn = torch.zeros(rows, dtype=torch.int64, device=device)

    def _let_go_of_all(self) -> None:
        """Of what `_prepare` made, and of the graphs that read it."""
        self._forget_graphs()
        for name in ("sampler", "tables", "_staging", "_inputs", "_samples", "_hidden", "_drawn"):
            self.__dict__.pop(name, None)

    # ── a step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def launch(self, batch: Batch) -> None:
        """Have the device bring its tables up to date, compute the batch and draw its tokens; wait for none of it."""
        put_others_off()
        slot = self._staging.take()
        try:
            slot.began.set()
            updates = self._update(batch, slot)
            flight = _Flight(batch, slot, Drawing())
            samples = len(batch.sample_rows)
            shape = self._shape(batch, updates)
            if shape is not None:
                drawn = self._graphed(batch, flight, updates, *shape)
            else:
                with urgent():
                    drawn = self._compute(batch, flight, updates)
            if samples:
                self._staging.fetch(slot, drawn, samples)
            slot.ended.set()
        except BaseException as error:  # noqa: BLE001 - raised again, or by a better name
            self._staging.give_back(slot)
            raise told_apart(error, self.device) from None
        self._flights.append(flight)

    @torch.inference_mode()
    def sample(self, mask: Any = None) -> Sampled:
        """The tokens of the batch launched first whose tokens were not asked for; waits for them."""
        assert mask is None, "no structured output yet"
        flight = self._flights.popleft()
        slot, batch = flight.slot, flight.batch
        try:
            put_others_off()
            slot.ended.wait()
            tokens = slot.drawn_numbers[: len(batch.sample_rows)].tolist()
            sampled = self.sampler.collect(tokens, batch.sample_rows, flight.drawing)
            sampled.device_s = slot.ended.seconds_since(slot.began)
            for row, pieces in flight.prompt_logprobs.items():
                sampled.prompt_logprobs[row] = [entry for piece in pieces for entry in logprob_entries(*piece)]
        except RuntimeError as error:
            raise told_apart(error, self.device) from None
        finally:
            self._staging.give_back(slot)
        return sampled

    def wait(self, place: int) -> None:
        """Wait for a step in flight, the oldest being at place 0; a cell that keeps Python busy gets a turn then, or else now and then."""
        ended = self._flights[place].slot.ended
        try:
            waits = not ended.passed
            if waits:
                ended.wait()
        except RuntimeError as error:  # the first to hear of what went wrong in a step
            raise told_apart(error, self.device) from None
        if waits:
            self._let_go = perf_counter()
        elif perf_counter() > self._let_go + _EVERY:
            with urgent():
                sleep(_TURN)
            self._let_go = perf_counter()

    @property
    def ready(self) -> bool:
        """Whether `sample` would not wait."""
        try:
            return bool(self._flights) and self._flights[0].slot.ended.passed
        except RuntimeError as error:
            raise told_apart(error, self.device) from None

    def _update(self, batch: Batch, slot: Slot) -> torch.Tensor | None:
        """Send new rows and blocks for the tables; where they lie, if there are any."""
        with urgent() if any(map(self.sampler.keeps_tensors, batch.admitted)) else nullcontext():
            for new in batch.admitted:
                self.sampler.admit(new)
        for new in batch.admitted:
            if new.params.prompt_logprobs is not None:
                self._prompts[new.row] = list(new.prompt)
        admitted, writes = len(batch.admitted), len(batch.table_writes)
        if admitted or writes:
            count = admitted * ROW + writes * 3
            words = slot.room_for_updates(count)
            if admitted:
                words[: admitted * ROW] = packed_rows(batch.admitted)
            for column in range(3):
                words[admitted * ROW + column :: 3] = batch.table_writes.reshape(-1).data[column + 1 :: 4]
            return self._staging.send_updates(slot, count)
        return None

    def _apply(self, batch: Batch, updates: torch.Tensor | None) -> None:
        """Have the updates done that were sent, and what is to be copied on write."""
        if updates is not None:
            most = max(len(batch.admitted), len(batch.table_writes))
            self.ops.update_tables(self._staging.step, updates, self.tables, most)
        if len(batch.copies):
            self.ops.copy_blocks(self.residence.caches, to_device(batch.copies, self.device))

    def _shape(self, batch: Batch, updates: torch.Tensor | None) -> tuple[int, int] | None:
        """The rows and tokens of the graph that a step can be run by, if there is one."""
        graphs, rows, samples = self._usable_graphs(), len(batch.rows), len(batch.sample_rows)
        if graphs is None or batch.prompt_logprobs:
            return None
        if updates is not None and updates is not self._staging.updates:
            return None  # they lie where no graph looks
        if rows == samples == batch.num_tokens:
            return (size := graphs.size_for(rows)), size
        return graphs.shape_for(max(rows, samples), batch.num_tokens)

    def _graphed(self, batch: Batch, flight: _Flight, updates: torch.Tensor | None, rows: int, tokens: int) -> torch.Tensor:
        """A step padded to a shape, which is all that its graph needs to know."""
        assert self.graphs is not None
        self._send(batch, flight.slot, rows, tokens, rows)
        plain = self.sampler.plain(batch.sample_rows)
        if len(batch.copies) or max(len(batch.admitted), len(batch.table_writes)) > _UPDATES * tokens:
            self._apply(batch, updates)
        body = self._run_and_draw if plain else self._run_only
        self.graphs.run((rows, tokens, plain), partial(body, rows, tokens))
        if plain:
            return self._drawn
        count = len(batch.sample_rows)
        with urgent():
            drawn, flight.drawing = self.sampler.draw(self._logits(self._hidden[:count]), batch, self._samples.first(count))
        return drawn

    def _run_only(self, rows: int, tokens: int) -> None:
        hidden, _ = self._run(rows, tokens)
        self._hidden[:rows].copy_(hidden)

    def _run_and_draw(self, rows: int, tokens: int) -> None:
        hidden, samples = self._run(rows, tokens)
        self._drawn[:rows].copy_(self.sampler.draw_plainly(self._logits(hidden), samples))

    def _run(self, rows: int, tokens: int) -> tuple[torch.Tensor, SampleInputs]:
        """The hidden states that a step of this shape draws from, a row's each; nothing in it looks at anything on the host."""
        self.ops.update_tables(self._staging.step, self._staging.updates, self.tables, _UPDATES * tokens)
        hidden, samples = self._forward(rows, tokens, rows, [1] * rows, [1] * rows)
        return (hidden if rows == tokens else hidden.index_select(0, samples.last)), samples

    def _forward(self, rows: int, tokens: int, samples: int, counts: list[int], contexts: list[int]) -> tuple[torch.Tensor, SampleInputs]:
        """The hidden states of the step that was sent. Only ops that no graph may hold look at the contexts."""
        inputs, sample_inputs = self._views(rows, tokens, samples)
        inputs.query_lens_host, inputs.context_lens_host = counts, contexts
        self.ops.prepare_step(self._staging.step, self.tables, inputs, sample_inputs)
        return self.residence.model.forward(inputs, self.residence.caches), sample_inputs

    def _usable_graphs(self) -> StepGraphs | None:
        """The graphs, while every op in use can be held by one: a reference or a function of a user's may ask the host."""
        return self.graphs if self.ops.capturable else None

    def _compute(self, batch: Batch, flight: _Flight, updates: torch.Tensor | None) -> torch.Tensor:
        """A step as it is, launch by launch."""
        rows, tokens, count = len(batch.rows), batch.num_tokens, len(batch.sample_rows)
        self._send(batch, flight.slot, rows, tokens, count)
        self._apply(batch, updates)
        hidden, samples = self._forward(rows, tokens, count, batch.counts.tolist(), (batch.starts + batch.counts).tolist())
        drawn = self._drawn
        if count:
            logits = self._logits(hidden.index_select(0, samples.last))
            if self.sampler.plain(batch.sample_rows):
                drawn = self.sampler.draw_plainly(logits, samples)
            else:
                drawn, flight.drawing = self.sampler.draw(logits, batch, samples)
        for row, top in batch.prompt_logprobs.items():
            flight.prompt_logprobs[row] = self._score(batch, row, hidden, top)
        return drawn

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.residence.model.logits(hidden)
        return logits

    def _score(self, batch: Batch, row: int, hidden: torch.Tensor, top: int) -> list[LogprobTensors]:
        """What a row's hidden states say of the tokens of its prompt that follow them."""
        start, count = int(batch.starts[row]), int(batch.counts[row])
        targets = self._prompts[int(batch.rows[row])][start + 1 : start + count + 1]
        first = int(batch.counts[:row].sum())
        ids = to_device(np.array(targets, np.int64), self.device)
        scored = []
        for at in range(0, len(targets), _SCORED):
            part = ids[at : at + _SCORED]
            logits = self._logits(hidden[first + at : first + at + len(part)])
            wanted = self.loaded.vocab_size if top == -1 else top
            scored += [tuple(map(to_host, piece)) for piece in logprob_tensors(logits, part, wanted)]
        return scored  # type: ignore[return-value] # three tensors each

    def _send(self, batch: Batch, slot: Slot, rows: int, tokens: int, samples: int) -> None:
        """Pack a step into parts of these sizes, as kernels/prepare_step.py reads them."""
        count, size = len(batch.rows), packed_size(rows, tokens, samples)
        words = slot.step_words
        words[:5] = array("i", (count, batch.num_tokens, len(batch.sample_rows), len(batch.admitted), len(batch.table_writes)))
        at = HEADER
        for part, room in ((batch.rows, rows), (batch.starts, rows)):
            words[at : at + count] = part.data
            at += room
        if count == batch.num_tokens:
            words[at : at + count + 1] = self._ends[: count + 1]
        else:
            words[at : at + count + 1] = array("i", accumulate(batch.counts.tolist(), initial=0))
        words[at + count + 1 : at + rows + 1] = array("i", (batch.num_tokens,)) * (rows - count)  # rows that pad the step have none
        at += rows + 1
        for part, room in ((batch.sample_index, samples), (batch.sample_rows, samples), (batch.tokens, tokens)):
            words[at : at + len(part)] = part.data
            at += room
        self._staging.send(slot, size)

    def _make_inputs(self, rows: int, tokens: int) -> StepInputs:
        def made(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        return StepInputs(
            tokens=made(tokens),
            positions=made(tokens),
            slots=made(tokens),
            block_tables=made(rows, self.tables.blocks.shape[1], dtype=torch.int32),
            query_starts=made(rows + 1, dtype=torch.int32),
            context_lens=made(rows, dtype=torch.int32),
            block_size=self.block_size,
            query_lens_host=[],
            context_lens_host=[],
            lengths=made(tokens) if self.loaded.rope_by_length else None,
        )

    def _views(self, rows: int, tokens: int, samples: int) -> tuple[StepInputs, SampleInputs]:
        """The first of all inputs, with a scratch of their own."""
        whole = self._inputs
        inputs = StepInputs(
            tokens=whole.tokens[:tokens],
            positions=whole.positions[:tokens],
            slots=whole.slots[:tokens],
            block_tables=whole.block_tables[:rows],
            query_starts=whole.query_starts[: rows + 1],
            context_lens=whole.context_lens[:rows],
            block_size=self.block_size,
            query_lens_host=[],
            context_lens_host=[],
            lengths=None if whole.lengths is None else whole.lengths[:tokens],
        )
        return inputs, self._samples.first(samples)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Have what a prompt's step and a token's need compiled and loaded, and the graphs of decoding captured, on steps of nobody's rows.

        The graphs take less than a second together. Later each would hold up a step, and while one is captured CUDA lets no thread
        wait for the whole device: whoever loads a model waits for that anyway.
        """
        if self.device.type != "cuda" or not self.ops.capturable:
            return  # a reference reads what nobody's rows do not have
        nobody = np.zeros(0, np.int32)
        batch = Batch(0, nobody, nobody, nobody, nobody, nobody.reshape(0, 4), nobody.reshape(0, 2), nobody, nobody)
        slot = self._staging.take()
        graphs = self._usable_graphs()
        most_rows, most_tokens, _ = self._most
        for shape in (1, min(_WARM_TOKENS, most_tokens)), (1, 1):
            self._warm(batch, slot, graphs, *shape)
        try:
            for rows in sorted({min(rows, most_rows) for rows in PLANNED_ROWS[1:]}):  # all that is compiled for how many there are
                self._warm(batch, slot, None, rows, min(rows + _WARM_TOKENS, most_tokens))
            for size in reversed(graphs.sizes[1:]) if graphs is not None else ():  # in the memory of the largest the others find room
                self._warm(batch, slot, graphs, size, size)
        except RuntimeError as error:
            found = told_apart(error, self.device)
            if not isinstance(found, DeviceMemoryError):
                raise found from None
            self.free()
            log.info("there is no memory to compile and capture all steps ahead: they do so when they are needed (%s)", found)
        slot.ended.set()
        slot.ended.wait()
        self._staging.give_back(slot)

    def _warm(self, batch: Batch, slot: Slot, graphs: StepGraphs | None, rows: int, tokens: int) -> None:
        self._send(batch, slot, rows, tokens, rows)
        self._run_and_draw(rows, tokens)
        if graphs is not None:
            graphs.capture((rows, tokens, True), partial(self._run_and_draw, rows, tokens))

    def free(self) -> None:
        """Give back what can be made again, for a step that found no memory."""
        self._forget_graphs()
        self.residence.empty_device_cache()

    # ── control, between steps, with none in flight ─────────────────────────────────────────────────────────────────

    def use(self, ops: dict[str, str | Callable[..., Any]]) -> None:
        """Exchange ops; each new one is checked against its reference first, and all are refused if one fails."""
        with at_rest(self.device):
            self.ops.use_all(ops)
            if self.residence.model is not None:
                self.residence.model.lay_out()
            self._forget_graphs()

    def resize(self, num_blocks: int) -> None:
        with at_rest(self.device):
            self._forget_graphs()
            self.residence.resize(num_blocks)

    def sleep(self, level: int) -> None:
        with at_rest(self.device):
            self._let_go_of_all()  # a small tensor that stays keeps all the memory from torch that it lies in, a whole layer's cache perhaps
            try:
                self.residence.sleep(level)
            except (RuntimeError, MemoryError):  # it is awake as before
                self._prepare()
                raise

    def wake_up(self) -> None:
        with at_rest(self.device):
            self.residence.wake_up()
            if not hasattr(self, "_drawn"):  # what is made last
                self._prepare()

    def update_weights(self, weights: Any) -> None:
        with at_rest(self.device):
            self.residence.update_weights(weights)

    def close(self) -> None:
        """Give every tensor back. Nothing can be run after this. DeviceLostError where the GPU takes nothing back any more."""
        with at_rest(self.device):
            self._flights.clear()
            self._let_go_of_all()
            if self.device.type == "cuda":
                torch._C._cuda_clearCublasWorkspaces()  # noqa: SLF001 - there is no public call that gives them back
                torch._C._host_emptyCache()  # noqa: SLF001 - likewise, of pinned main memory
            self.residence.close()
            if self.device.type == "cuda":
                self._give_stream_back()

    def _forget_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.clear()
