"""A runner without a model: a KV cache whose slots hold the name of what was stored there, and a core driven over it.

Each position's content is named by the tokens up to it, so a slot read through a table shows at once whether the right
thing is there: wrong sharing, a missing copy, swapped blocks, early freeing and slots never written all read wrong.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Ids
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nbengine.batch import Batch, NewRow, Sampled, TokenLogprobs
from nbengine.blocks import BlockPool, block_hash
from nbengine.core import EngineCore, NewRequest
from nbengine.plan import Update
from nbengine.policy import Policy, policies
from nbengine.pool_state import PoolState
from nbengine.sampling_params import SamplingParams
from nbengine.scheduler import Scheduler
from nbengine.sequence import Sequence

ALPHABET = 2  # so few tokens that prefixes often meet by chance
STOP = 7  # sampled now and then; ends those who asked for it


def sampled_token(seed: int, position: int) -> int:
    draw = random.Random(seed * 1_000_003 + position).randrange(24)
    return STOP if draw == 0 else draw % ALPHABET


def alone(sequence: Sequence) -> tuple[list[int], str]:
    """What a sequence brings when nothing runs beside it and nobody ends it: its tokens, and why it ends."""
    output: list[int] = []
    while True:
        output.append(sampled_token(sequence.seed, sequence.prompt_len + len(output)))
        if output[-1] in sequence.stops:
            return output, "stop"
        if sequence.prompt_len + len(output) >= sequence.limit:
            return output, "length"


@dataclass
class Row:
    """What a runner keeps of a state row."""

    new: NewRow
    tokens: list[int]  # known to the device, sampled ones included
    table: dict[int, int] = field(default_factory=dict)


class ModelRunner:
    """Carries out batches as a runner does: tables, copies, stores, then reads; everything it reads is checked."""

    overlaps = ready = False

    def __init__(self, scheduler: Scheduler) -> None:
        self.pool = pool = scheduler.pool
        self.held_rows = lambda: {s.row for s in scheduler.running.values()}
        self.rows: dict[int, Row] = {}
        self.slots: list[int | None] = [None] * (pool.num_blocks * pool.block_size)
        self.names: dict[tuple[int, int], int] = {}
        self.digests: dict[int, bytes] = {}  # of the blocks whose last position has this name
        self.taken: list[int] = []
        self.findable: set[int] = set()  # since an earlier step
        self.results: list[Sampled] = []
        self.bursts: random.Random | None = None  # draws how many tokens a sample brings; None: always one
        self.fail_samples: set[int] = set()
        self.fail_launch = False
        take = pool.take

        def noting(owner: int) -> int:
            self.taken.append(block := take(owner))
            return block

        pool.take = noting  # type: ignore[method-assign]

    # ── the runner's protocol ───────────────────────────────────────────────────────────────────────────────────────

    def launch(self, batch: Batch) -> None:
        fails, self.fail_launch = self.fail_launch, False
        if fails:
            raise RuntimeError("the device is on fire")
        for new in batch.admitted:
            self.rows[new.row] = Row(new, [*new.prompt, *new.output])
        for group, row, column, block in batch.table_writes.tolist():
            assert group == 0
            assert 0 <= block < self.pool.num_blocks
            self.rows[row].table[column] = block
        self._copy(batch.copies.tolist())
        self._check_tokens(batch)
        self._store(batch)
        self._read(batch)
        self.results.append(self._draw(batch))

    def sample(self, mask: Any = None) -> Sampled:
        return self.results.pop(0)

    # ── the cache ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _block(self, block: int) -> slice:
        return slice(block * self.pool.block_size, (block + 1) * self.pool.block_size)

    def _copy(self, pairs: list[list[int]]) -> None:
        contents = [self.slots[self._block(source)] for source, _ in pairs]  # all sources are read before any target is written
        for block in self.taken:  # a fresh block holds nothing that may be read
            self.slots[self._block(block)] = [None] * self.pool.block_size
        self.findable.difference_update(self.taken)
        self.taken.clear()
        for (_, target), content in zip(pairs, contents, strict=True):
            self.slots[self._block(target)] = content

    def _check_tokens(self, batch: Batch) -> None:
        at = 0
        for row, start, count in zip(batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True):
            tokens, known = batch.tokens[at : at + count].tolist(), self.rows[row].tokens[start : start + count]
            assert len(known) == count, "a token is computed that nobody has sampled"
            assert all(token in (-1, real) for token, real in zip(tokens, known, strict=True)), "the wrong token is computed"
            assert -1 not in tokens[:-1]
            at += count
        assert at == batch.num_tokens

    def _slot(self, row: Row, position: int) -> int:
        column, offset = divmod(position, self.pool.block_size)
        return row.table[column] * self.pool.block_size + offset

    def _store(self, batch: Batch) -> None:
        written: set[int] = set()
        for i, start, count in zip(batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True):
            row = self.rows[i]
            names = self._names_of(row.tokens[: start + count])
            for position in range(start, start + count):
                slot = self._slot(row, position)
                assert slot not in written, "two tokens are stored in one slot"
                assert self.slots[slot] in (None, names[position]), "a slot is written again with something else"
                block = slot // self.pool.block_size
                assert self.slots[slot] is None or block not in self.findable, "a block that can be found is written again"
                self._check_sharers(block, i, position, names[position])
                self.slots[slot] = names[position]
                written.add(slot)

    def _check_sharers(self, block: int, i: int, position: int, name: int) -> None:
        """A block may be written while others hold it only if what is stored is theirs too: they found it in this very step."""
        if self.pool.references[block] > 1:
            for other, row in self.rows.items():
                if other != i and other in self.held_rows() and row.table.get(position // self.pool.block_size) == block:
                    assert self._names_of(row.tokens[: position + 1])[position:] == [name], "a shared block is written"

    def _read(self, batch: Batch) -> None:
        """What attention reads: every position of every row, through its table."""
        for i, start, count in zip(batch.rows.tolist(), batch.starts.tolist(), batch.counts.tolist(), strict=True):
            row = self.rows[i]
            for position, name in enumerate(self._names_of(row.tokens[: start + count])):
                assert self.slots[self._slot(row, position)] == name, f"position {position} of row {i} reads what is not its own"

    def _names_of(self, tokens: Ids[int]) -> list[int]:
        names, name = [], -1
        for token in tokens:
            name = self.names.setdefault((name, token), len(self.names))
            names.append(name)
        return names

    def check_sealed(self) -> None:
        """A block that can be found is full, and holds what it is found by."""
        self.findable = set(self.pool.index.values())
        parents = {name: parent for (parent, _), name in self.names.items()}
        for digest, block in self.pool.index.items():
            content = self.slots[self._block(block)]
            assert None not in content, "a block can be found that is not full"
            assert [parents[name] for name in content[1:]] == content[:-1], "a block can be found that holds a mixture"
            if content[-1] not in self.digests:
                self.digests[content[-1]] = self._digest(content[-1])
            assert self.digests[content[-1]] == digest, "a block is found by what it does not hold"

    def _digest(self, name: int) -> bytes:
        """The digest of the last of the blocks filled by the tokens that a name stands for."""
        known = {name: key for key, name in self.names.items()}
        tokens: list[int] = []
        while name >= 0:
            name, token = known[name]
            tokens.insert(0, token)
        size, digest = self.pool.block_size, bytes(8)
        assert len(tokens) % size == 0
        for start in range(0, len(tokens), size):
            digest = block_hash(digest, tokens[start : start + size])
        return digest

    # ── sampling ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _draw(self, batch: Batch) -> Sampled:
        drawn = []
        for i in batch.sample_rows.tolist():
            row, count = self.rows[i], 1 if self.bursts is None else self.bursts.randrange(4)
            new = [sampled_token(row.new.seed, len(row.tokens) + k) for k in range(count)]
            row.tokens += new
            drawn.append(new)
        width = max([1, *map(len, drawn)])
        tokens = np.array([new + [-1] * (width - len(new)) for new in drawn], np.int32).reshape(-1, width)
        failed = {j: "a processor raised" for j in self.fail_samples if j < len(drawn)}
        self.fail_samples = set()
        scores = {}
        for b in batch.prompt_logprobs:
            prompt = self.rows[int(batch.rows[b])].new.prompt
            start, end = int(batch.starts[b]), int(batch.starts[b] + batch.counts[b])
            scores[b] = [TokenLogprobs([token], [0.0], 1) for token in prompt[start + 1 : end + 1]]
        return Sampled(tokens, np.array([len(new) for new in drawn], np.int32), prompt_logprobs=scores, failed=failed)


class Simulation:
    """A core over the model runner, what it gave each sequence, and everything that must hold after each step."""

    def __init__(
        self,
        *,
        num_blocks: int = 12,
        block_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 10,
        policy: Policy | None = None,
        trace_steps: int = 64,
        **options: Any,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.scheduler = Scheduler(self.pool, policy or Policy(), max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, **options)
        self.runner = ModelRunner(self.scheduler)
        self.core = EngineCore(self.scheduler, self.runner, trace_steps=trace_steps)
        self.sequences: list[Sequence] = []
        self.batches: list[Batch] = []
        self.given: dict[int, list[int]] = {}
        self.scores: dict[str, list[int]] = {}
        self.ends: Counter[int] = Counter()
        self.steps = 0
        self.operations = 0
        self.sound = True  # nothing has failed: worth running to the end
        self.eldest: tuple[int, int] = (-1, 0)  # the longest there, and the step since which it is
        self._ids = 0
        plan = self.scheduler.plan

        def noting() -> Batch | None:
            batch = plan()
            if batch is not None:
                self.batches.append(batch)
                self._check_batch(batch)
            return batch

        self.scheduler.plan = noting  # type: ignore[method-assign]

    # ── what can be done ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def capacity(self) -> int:
        return self.pool.num_blocks * self.pool.block_size

    def add(self, prompt: Ids[int], max_tokens: int = 8, *, n: int = 1, seed: int = 0, priority: int = 0, **params: Any) -> list[Sequence]:
        """Queue a request; its sequences, the leader first."""
        params.setdefault("ignore_eos", True)
        resolved = SamplingParams(n=n, max_tokens=max_tokens, seed=seed, detokenize=False, **params).resolve((), None)
        self._ids += 1
        self.core.add(NewRequest(str(self._ids), list(prompt), resolved, len(prompt) + max_tokens, priority))
        new = self.core.requests[str(self._ids)]
        self.sequences += new
        return list(new)

    def step(self) -> list[Update]:
        self.sound = False
        updates = self.core.step()
        self._receive(updates)
        self.check()
        return updates

    def overlapped(self) -> None:
        """Two steps planned and launched before the first is committed."""
        bursts, self.runner.bursts = self.runner.bursts, None
        for batch in [self.launch(), self.launch()]:
            self.commit(batch)
        self.runner.bursts = bursts

    def always_ahead(self, steps: int, between: Callable[[int], None] = lambda _: None) -> None:
        """Steps of which one is always in flight, as on a device that is never idle."""
        ahead = self.launch()
        for i in range(steps):
            ahead, done = self.launch(), ahead
            between(i)
            self.commit(done)
        self.commit(ahead)

    def launch(self) -> Batch | None:
        self.sound = False
        batch = self.scheduler.plan()
        if batch is not None:
            self.runner.launch(batch)
        self.check()
        return batch

    def commit(self, batch: Batch | None) -> list[Update]:
        self.sound = False
        updates = [] if batch is None else self.scheduler.commit(batch, self.runner.sample())
        self.core._note(updates)
        self._receive(updates)
        self.check()
        return updates

    def abandoned(self) -> None:
        """Two steps planned, and the device fails at the first."""
        self.sound = False
        for batch in [self.scheduler.plan(), self.scheduler.plan()]:
            if batch is not None:
                updates = self.scheduler.abandon(batch, "the device is gone")
                self.core._note(updates)
                self._receive(updates)
        self.runner.taken.clear()
        self.check()

    def cancel(self, sequence: Sequence, *, whole: bool = True) -> None:
        self._receive(self.core.end(sequence.request_id, index=None if whole else sequence.index))
        self.check()

    def forget(self) -> None:
        self.pool.forget()
        self.check()

    def drain(self) -> None:
        """Run until everything has ended, in no more steps than it takes one after the other, each computed twice over."""
        bound = 50 + 4 * sum(s.limit for s in self.sequences if s.finish_reason is None)
        while self.core.has_work():
            bound -= 1
            assert bound > 0, "requests do not end"
            self.step()
        self.check_ended()

    @property
    def alive(self) -> list[Sequence]:
        return [s for s in self.sequences if s.finish_reason is None]

    # ── what must hold ──────────────────────────────────────────────────────────────────────────────────────────────

    def _receive(self, updates: list[Update]) -> None:
        assert len({u.sequence for u in updates}) == len(updates), "one sequence is told twice"
        for update in updates:
            sequence = update.sequence
            assert not self.ends[sequence.uid], "a sequence that ended is given more"
            self.given.setdefault(sequence.uid, []).extend(update.tokens)
            if update.prompt_logprobs is not None:
                self.scores.setdefault(sequence.request_id, []).extend(entry.ids[0] for entry in update.prompt_logprobs)
            self.ends[sequence.uid] += sequence.finish_reason is not None

    def _check_batch(self, batch: Batch) -> None:
        scheduler = self.scheduler
        assert batch.num_tokens == int(batch.counts.sum())
        assert 0 < batch.num_tokens <= scheduler.max_num_batched_tokens, "more tokens than the budget"
        assert (batch.counts > 0).all()
        assert len(scheduler.running) <= (scheduler.max_num_seqs if batch.admitted else scheduler.most[1]), "more sequences than allowed"
        assert len(set(batch.rows.tolist())) == len(batch.rows), "a row runs twice"
        assert len(set(batch.sample_rows.tolist())) == len(batch.sample_rows), "a row samples twice"

    def check(self) -> None:
        scheduler, pool, running = self.scheduler, self.pool, self.scheduler.running
        self.sound = False
        self._receive(self.core.rejected())
        self.operations += 1
        pool.check()
        held = Counter(block for s in running.values() for block in s.blocks)
        assert [held[b] for b in range(pool.num_blocks)] == pool.references, "the references are not the tables that hold the blocks"
        assert all(len(set(s.blocks)) == len(s.blocks) for s in running.values()), "a block stands twice in a table"
        rows = [s.row for s in running.values()]
        assert sorted(rows + scheduler._free_rows) == list(range(scheduler.most[1])), "a row is lost or given twice"
        waiting = scheduler.waiting
        assert [s.place for s in waiting] == sorted(s.place for s in waiting)
        assert all(s.row < 0 and not s.blocks and not s.in_flight and s.finish_reason is None for s in waiting)
        self._check_all_are_somewhere()
        in_flight = Counter(s for plan in scheduler.in_flight.values() for s in plan.everyone)
        for sequence in self.sequences:
            assert sequence.in_flight == in_flight[sequence]
            assert sequence.row >= 0 or not sequence.in_flight, "a launched step may touch blocks that were given back"
            if sequence.row >= 0:
                assert sequence.computed <= min(sequence.length, len(sequence.blocks) * pool.block_size)
        self.runner.check_sealed()
        self.core.flush()
        last = self.core.trace.last
        if last is not None:
            assert self.core.trace.at(last) == PoolState.of(pool, running), "the trace tells of another pool"
        self.sound = True

    def _check_all_are_somewhere(self) -> None:
        """Whoever has not ended runs, waits, or follows one who does."""
        here = [*self.scheduler.running.values(), *self.scheduler.waiting]
        here += [follower for s in here for follower in s.followers]
        assert len(set(here)) == len(here), "a sequence is in two places"
        lost = set(self.alive) - set(here)
        assert not lost, f"lost: {lost}"

    def check_patience(self) -> None:
        """First come, first served: whoever has been there longest ends before everybody else could have run to the end."""
        uid = min((s.uid for s in self.alive), default=-1)
        if uid < 0 or uid != self.eldest[0]:
            self.eldest = uid, self.steps
        bound = 4 * self.capacity * (self.scheduler.max_num_seqs + 1)
        assert self.steps - self.eldest[1] < bound, "the sequence that came first does not end"
        self.steps += 1

    def check_ended(self) -> None:
        assert not self.alive
        assert not self.scheduler.running
        assert not self.scheduler.waiting
        assert not self.core.requests
        assert self.pool.num_used == 0
        for sequence in self.sequences:
            self.check_outcome(sequence)

    def check_outcome(self, sequence: Sequence) -> None:
        """It ended once, was given what it holds, and that is what it brings when it runs alone."""
        assert self.ends[sequence.uid] == 1
        output, (expected, reason) = sequence.tokens[sequence.prompt_len :], alone(sequence)
        assert self.given.get(sequence.uid, []) == output
        assert output == expected[: len(output)]
        if sequence.finish_reason in {"stop", "length"}:
            assert (output, sequence.finish_reason) == (expected, reason)
            if sequence.params.prompt_logprobs is not None and all(
                s.finish_reason in {"stop", "length"} for s in self.sequences if s.request_id == sequence.request_id
            ):
                assert self.scores.get(sequence.request_id, []) == sequence.tokens[1 : sequence.prompt_len]


def storm(seed: int, operations: int = 60) -> Simulation:
    """A simulation in which much happens at once, all of it where things go wrong: equal prompts, full blocks, no room."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 4])
    sim = Simulation(
        block_size=size,
        num_blocks=rng.randrange(4, 12) * (4 // size),
        max_num_seqs=rng.randrange(1, 5),
        budget=rng.choice([2, 5, 9, 30]),
        policy=policies[rng.choice(["fcfs", "fcfs", *policies])](),
        chunked_prefill=rng.random() < 0.9,
        prefix_caching=rng.random() < 0.9,
        long_prefill_token_threshold=rng.choice([0, 0, 1, 4]),
    )
    prompts = [[rng.randrange(ALPHABET) for _ in range(24)] for _ in range(2)]

    def add() -> None:
        length = rng.choice([size * rng.randrange(1, 6), rng.randrange(1, 24)])
        prompt = rng.choice(prompts)[: min(length, sim.capacity - 1, 24)]
        params = {"stop_token_ids": [STOP] if rng.random() < 0.5 else None, "prompt_logprobs": 0 if rng.random() < 0.2 else None}
        count, priority, tokens = rng.choice([1, 1, 2, 4]), rng.randrange(3), rng.randrange(1, 14)
        sim.add(prompt, min(tokens, sim.capacity - len(prompt)), n=count, seed=rng.randrange(1 << 32), priority=priority, **params)

    for _ in range(operations):
        draw = rng.random()
        if draw < 0.3 and len(sim.alive) < 8:
            for _ in range(rng.choice([1, 1, 2])):
                add()
        elif draw < 0.65:
            sim.step()
        elif draw < 0.75:
            sim.runner.bursts = rng
            sim.step()
            sim.runner.bursts = None
        elif draw < 0.82:
            sim.overlapped()
        elif draw < 0.86:
            sim.always_ahead(rng.randrange(2, 7))
        elif draw < 0.95 and sim.alive:
            sim.cancel(rng.choice(sim.alive), whole=rng.random() < 0.4)
        elif draw < 0.97:
            sim.runner.fail_samples = {rng.randrange(3)}
            sim.step()
            sim.runner.fail_samples = set()
        elif draw < 0.98:
            sim.runner.fail_launch = True
            sim.step()
            sim.runner.fail_launch = False
        elif draw < 0.99:
            sim.abandoned()
        elif draw > 0.998:
            sim.core.suspend()
            sim.check()
        elif draw > 0.995:
            sim.forget()
    sim.drain()
    return sim
