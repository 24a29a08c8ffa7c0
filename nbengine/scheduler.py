"""Which sequences run next, on how many tokens, in which blocks. The mechanism; the decisions are a Policy's."""

from __future__ import annotations

from bisect import bisect_right
from operator import attrgetter, itemgetter
from typing import TYPE_CHECKING

from nbengine.batch import Batch, NewRow, Sampled, TokenLogprobs
from nbengine.blocks import BlockPool
from nbengine.plan import Plan, Update
from nbengine.policy import checked
from nbengine.prefix import PrefixCache, Rotation

if TYPE_CHECKING:
    from nbengine.policy import Policy
    from nbengine.sequence import FinishReason, Sequence

GROUP = 0  # the one cache group there is so far; tables and writes already carry its number
PLACE = attrgetter("place")


class Scheduler:
    """Turns waiting and running sequences into batches. Called from one thread; several plans may be in flight.

    plan()    admits, grows, preempts, and advances `computed` of everything it plans
    commit()  appends sampled tokens and ends what is finished
    """

    def __init__(
        self,
        pool: BlockPool,
        policy: Policy,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        chunked_prefill: bool = True,
        long_prefill_token_threshold: int = 0,
        prefix_caching: bool = True,
        rotation: Rotation | None = None,
    ) -> None:
        self.pool = pool
        self.policy = policy
        self.rejected: list[Update] = []  # ended by what their policy did, since this was last taken
        self._asked = checked(policy, self._blame)
        self._blamed: dict[Sequence, str] = {}  # to be rejected once the plan is made
        self.rotation = rotation
        self.prefixes = PrefixCache(pool, enabled=prefix_caching, rotation=rotation)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.chunked_prefill = chunked_prefill
        self.long_prefill_token_threshold = long_prefill_token_threshold
        self.waiting: list[Sequence] = []  # by place
        self.running: dict[int, Sequence] = {}  # by uid, in order of admission
        self.in_flight: dict[int, Plan] = {}  # by step
        self.steps = 0
        self.prefix_queries = 0  # prompt tokens looked up in the prefix cache, and those found there
        self.prefix_hits = 0
        self.preemptions = 0
        self.preempted: list[int] = []  # uids, since they were last recorded
        self.prompt_tokens = 0  # of all sequences that have been admitted, each counted once
        self.generation_tokens = 0
        self.most = max_num_batched_tokens, max_num_seqs  # what the runner was made for
        self._free_rows = list(range(max_num_seqs - 1, -1, -1))

    # ── coming and going ────────────────────────────────────────────────────────────────────────────────────────────

    def add(self, sequences: list[Sequence]) -> None:
        """Let a request's sequences wait. The first leads: the others share its prompt's blocks once that is computed."""
        leader, *followers = sequences
        assert self.pool.blocks_for(leader.limit) <= self.pool.num_blocks, "a sequence alone must fit into the pool"
        leader.followers = followers
        self._wait(leader)

    def cancel(self, sequence: Sequence, reason: FinishReason = "abort") -> Update | None:
        """End a sequence between two steps. None when it had ended already."""
        if sequence.finish_reason is not None:
            return None
        self._finish(sequence, reason)
        return Update(sequence, [])

    def use(self, policy: Policy) -> None:
        """Exchange the policy; who waits is ordered anew."""
        ordered = [(policy.key(sequence), sequence) for sequence in self.waiting]
        try:  # before anything changes
            ordered.sort(key=itemgetter(0))
            wrong = "None has no place in a queue" if any(place is None for place, _ in ordered) else ""
        except TypeError as error:
            wrong = str(error)
        if wrong:
            raise TypeError(f"the policy {type(policy).__qualname__} answers key() with what cannot be ordered: {wrong}")
        self.policy, self._asked = policy, checked(policy, self._blame)
        for place, sequence in ordered:
            sequence.place = place
        self.waiting = [sequence for _, sequence in ordered]

    def limit(self, max_num_batched_tokens: int | None, max_num_seqs: int | None) -> None:
        """Change how much a step takes, within what there are buffers and rows for; who runs beyond it runs to its end."""
        given = {"max_num_batched_tokens": max_num_batched_tokens, "max_num_seqs": max_num_seqs}
        for (name, value), most in zip(given.items(), self.most, strict=True):
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be between 1 and {most}, which this engine was made for, not {value}: make another for more")
        self.max_num_batched_tokens = max_num_batched_tokens or self.max_num_batched_tokens
        self.max_num_seqs = max_num_seqs or self.max_num_seqs

    @property
    def _row_left(self) -> bool:
        """Whether one more may run."""
        return bool(self._free_rows) and len(self.running) < self.max_num_seqs

    def suspend(self) -> None:
        """Preempt everybody and empty the prefix cache; nothing may be in flight."""
        for sequence in list(self.running.values()):
            self._preempt(sequence)
        self.pool.forget()

    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def take_rejected(self) -> list[Update]:
        """Who was ended by what their policy did since this was last called."""
        rejected, self.rejected = self.rejected, []
        return rejected

    def _blame(self, sequence: Sequence | None, why: str) -> None:
        """Have one end, or all there are, when the plan is made; until then the scheduler goes on as if nothing had happened."""
        for doomed in [*self.running.values(), *self.waiting] if sequence is None else [sequence]:
            self._blamed.setdefault(doomed, why)

    def _reject_blamed(self) -> None:
        blamed, self._blamed = self._blamed, {}
        for sequence, why in blamed.items():
            self._reject(sequence, why)

    def _reject(self, sequence: Sequence, why: str) -> None:
        """End it, and those that follow it, with an error."""
        followers, sequence.followers = sequence.followers, []
        for one in [sequence, *followers]:
            if one.finish_reason is None:
                one.error = f"{why}. Exchange it with engine.use(policy=...)"
                self._finish(one, "error")
                self.rejected.append(Update(one, []))

    # ── planning ────────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self) -> Batch | None:
        """The next step, or None when nothing can run until a step in flight is committed (or anything arrives)."""
        plan = self._fill(Plan(), self.max_num_batched_tokens)
        batch = None
        if plan.sequences:
            batch = plan.to_batch(self.steps)
            self.in_flight[self.steps] = plan
            self.steps += 1
        else:
            assert not plan.copies
        self._reject_blamed()
        return batch

    def _fill(self, plan: Plan, budget: int) -> Plan:
        """Let whoever can run take part, who runs already first."""
        opens = self._asked.opens(list(self.running.values()))
        self._displace(plan)
        decoding = any(sequence.remaining == 1 for sequence in self.running.values())
        plan.long_room = self.long_prefill_token_threshold if decoding and self.chunked_prefill else budget
        for sequence in self._asked.order(list(self.running.values())):
            if budget == 0:
                break
            if sequence.row < 0 or sequence.finish_reason is not None or sequence.length >= sequence.limit or sequence.uid in plan.held:
                continue  # preempted just now; cancelled in flight; its last token is on its way; or to be preempted next
            if self.rotation is not None and self.prefixes.outgrown(sequence):
                if not sequence.in_flight:
                    self._restart(sequence)
                continue
            decodes = self._writes_on(sequence)
            count = 1 if decodes else self._chunk(plan, sequence, budget)
            if decodes or (count > 0 and self._provide(plan, sequence, sequence.computed + count)):
                self._plan(plan, sequence, count)
                budget -= count
        if opens and not plan.squeezed:
            self._admit(plan, budget)
        return plan

    def _writes_on(self, sequence: Sequence) -> bool:
        """Whether it decodes and its next token's place is in a block of its own, as for most rows of most steps: there is no more to see to."""
        blocks, size = sequence.blocks, self.pool.block_size
        column = sequence.computed // size
        return (
            sequence.remaining == 1
            and column < len(blocks)
            and sequence.reserved <= len(blocks) * size
            and not self.pool.must_copy(blocks[column])
        )

    def _chunk(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """How many tokens it computes now; 0 where there is no room for it, as a whole or as a long one."""
        remaining = sequence.remaining
        if remaining == 1:
            return 1
        if self._is_long(remaining):
            if plan.long_room <= 0:
                return 0
            budget = min(budget, plan.long_room)
        if not self.chunked_prefill and remaining <= self.max_num_batched_tokens:  # a longer one cannot but come in pieces
            return remaining if remaining <= budget else 0
        return max(1, min(self._asked.chunk(sequence, budget), remaining, budget))

    def _is_long(self, tokens: int) -> bool:
        """Whether so many tokens to compute take part in steps by pieces while others decode, whom a long step would make wait."""
        return 0 < self.long_prefill_token_threshold < tokens

    def _admit(self, plan: Plan, budget: int) -> None:
        filling = self._filling() if self.waiting and budget > 0 and self._row_left else []
        while self.waiting and budget > 0 and self._row_left:
            sequence = self.waiting[0]
            hits = self._find(plan, sequence)
            known = len(sequence.tokens)
            start = min(len(hits) * self.pool.block_size, known - 1)  # there is always one token to compute: logits come of it
            reserved = self._reserve(sequence)  # asked once: a user's policy may answer otherwise the next time
            if not self._has_room(sequence, hits, start, reserved, filling):
                break
            if not self.chunked_prefill and budget < known - start <= self.max_num_batched_tokens:
                break
            if self._is_long(known - start) and plan.long_room <= 0:
                break
            self.waiting.pop(0)
            self._enter(plan, sequence, hits, start, reserved)
            if not sequence.preemptions:
                sequence.cached = start
                self.prompt_tokens += sequence.prompt_len
                self.prefix_queries += known
                self.prefix_hits += start
            count = self._chunk(plan, sequence, budget)
            provided = self._provide(plan, sequence, start + count)
            assert provided, "a sequence was admitted without room"
            leads = bool(sequence.followers)
            self._plan(plan, sequence, count)
            budget -= count
            if leads:  # who followed it may run now
                filling = self._filling()
            elif sequence.reserved or sequence.remaining > 1:
                filling.append(sequence)

    def _find(self, plan: Plan, sequence: Sequence) -> list[int]:
        """The cached blocks that a waiting sequence would enter with."""
        hits = self.prefixes.find(sequence)
        if hits and hits[-1] in plan.filled and len(hits) * self.pool.block_size == len(sequence.tokens):
            hits.pop()  # it would have to be copied, and copies are made before this step fills it
        return hits

    def _enter(self, plan: Plan, sequence: Sequence, hits: list[int], start: int, reserved: int) -> None:
        """Give a sequence a row and the blocks it shares, and let it run."""
        for block in hits:
            self.pool.share(block, sequence.uid)
        sequence.row = self._free_rows.pop()
        sequence.blocks = list(hits)
        sequence.sealed = start // self.pool.block_size
        sequence.computed = start
        sequence.reserved = reserved
        self.running[sequence.uid] = sequence
        plan.entered.append(sequence)
        plan.table_writes.extend((GROUP, sequence.row, column, block) for column, block in enumerate(hits))
        prompt, output = sequence.tokens[: sequence.prompt_len], sequence.tokens[sequence.prompt_len :]
        plan.admitted.append(NewRow(sequence.row, prompt, output, sequence.params, sequence.seed, sequence.anchor))

    def _plan(self, plan: Plan, sequence: Sequence, count: int) -> None:
        """Put the next `count` tokens of a sequence, for which it has blocks, into the batch."""
        start, known, size = sequence.computed, len(sequence.tokens), self.pool.block_size
        end, length = start + count, known + sequence.pending
        if self._is_long(length - start):
            plan.long_room -= count
        if end > known:
            assert count == 1
            plan.tokens.append(-1)
        else:
            plan.tokens.extend(sequence.tokens[start:end])
        row = len(plan.sequences)
        plan.sequences.append(sequence)
        plan.starts.append(start)
        plan.counts.append(count)
        sequence.computed = end
        sequence.in_flight += 1
        sequence.step = self.steps
        full = min(end, known) // size
        if full > sequence.sealed:  # within a step, what one row stores the next may already read
            plan.filled.update(self.prefixes.offer(sequence, full))
        if sequence.params.prompt_logprobs is not None and start < sequence.prompt_len - 1 and sequence.scored < end:
            plan.prompt_logprobs[row] = sequence.params.prompt_logprobs
        if end == length:
            sequence.pending += 1
            plan.sample_index.append(row)
            plan.samples.append(sequence)
            if sequence.followers:
                self._fork(plan, sequence, row)

    def _fork(self, plan: Plan, leader: Sequence, row: int) -> None:
        """The prompt is done: its followers share its blocks and take their first token from the same logits."""
        followers, leader.followers = [f for f in leader.followers if f.finish_reason is None], []
        blocks = leader.blocks[: self.pool.blocks_for(leader.computed)]
        for i, follower in enumerate(followers):
            follower.scored = follower.prompt_len  # the leader's are the request's
            reserved = self._reserve(follower)
            if not self._row_left or (reserved and not self._has_room(follower, blocks, leader.computed, reserved)):
                for later in followers[i:]:  # they come in later and find the prompt's full blocks in the prefix cache
                    later.scored = later.prompt_len
                    self._wait(later)
                return
            follower.anchor, follower.regime = leader.anchor, leader.regime
            self._enter(plan, follower, blocks, leader.computed, reserved)
            follower.hashes = list(leader.hashes)
            follower.sealed = leader.sealed
            follower.cached = leader.computed
            follower.in_flight += 1
            follower.step = self.steps
            follower.pending += 1
            plan.forks = True
            plan.sample_index.append(row)
            plan.samples.append(follower)

    # ── room ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _filling(self) -> list[Sequence]:
        """Who runs and may take blocks for more than its next token."""
        return [sequence for sequence in self.running.values() if sequence.reserved or sequence.remaining > 1]

    def _has_room(self, sequence: Sequence, hits: list[int], start: int, reserved: int, filling: list[Sequence] | None = None) -> bool:
        """Whether its known tokens, the next one and what others are still to fill fit into the free blocks."""
        if not self.running:
            return True  # a sequence alone fits
        pool = self.pool
        total = pool.blocks_for(max(len(sequence.tokens) + 1, reserved))
        revived = sum(1 for block in hits if pool.references[block] == 0)
        copied = start < len(hits) * pool.block_size
        promised = sum(max(0, self._needs(s, s.length)) for s in (self._filling() if filling is None else filling))
        return total - len(hits) + revived + copied + promised <= pool.num_free

    def _needs(self, sequence: Sequence, tokens: int) -> int:
        """Blocks to take so that the tokens from `computed` up to `tokens`, and those reserved, can be written."""
        pool, blocks = self.pool, sequence.blocks
        column, fresh = sequence.computed // pool.block_size, -(-max(tokens, sequence.reserved) // pool.block_size) - len(blocks)
        if column < len(blocks) and pool.must_copy(blocks[column]):
            return fresh + 1 if pool.references[blocks[column]] > 1 else max(fresh, 1)  # the last holder's is free once it is copied
        return fresh

    def _reserve(self, sequence: Sequence) -> int:
        return min(self._asked.reserve(sequence), self.pool.num_blocks * self.pool.block_size)

    def _provide(self, plan: Plan, sequence: Sequence, tokens: int) -> bool:
        """See that it may write the tokens from `computed` up to `tokens`; False if there is no room."""
        needed = self._needs(sequence, tokens)
        if needed == 0:
            return True
        if needed > self.pool.num_free and not self._make_room(plan, sequence, tokens):
            return False
        self._own(plan, sequence, sequence.computed // self.pool.block_size)
        self._grow(plan, sequence, max(tokens, sequence.reserved))
        return True

    def _own(self, plan: Plan, sequence: Sequence, column: int) -> None:
        """Let it write to this block of its table, if it has one there: in a copy where others may read what is in it."""
        blocks = sequence.blocks
        if column < len(blocks) and self.pool.must_copy(blocks[column]):
            shared, blocks[column] = blocks[column], self.pool.copy_on_write(blocks[column], sequence.uid)
            plan.copies.append((shared, blocks[column]))
            plan.table_writes.append((GROUP, sequence.row, column, blocks[column]))

    def _grow(self, plan: Plan, sequence: Sequence, tokens: int) -> None:
        """Take blocks until `tokens` positions have one."""
        blocks = sequence.blocks
        while len(blocks) * self.pool.block_size < tokens:
            plan.table_writes.append((GROUP, sequence.row, len(blocks), block := self.pool.take(sequence.uid)))
            blocks.append(block)

    def _make_room(self, plan: Plan, sequence: Sequence, tokens: int) -> bool:
        """Free blocks until `sequence` can grow to `tokens`, by preempting others or, at the last, itself."""
        while self._needs(sequence, tokens) > self.pool.num_free:
            plan.squeezed = True
            victim = self._asked.victim([s for s in self.running.values() if s.step != self.steps and s.finish_reason is None])
            if not self._vacate(plan, victim) or victim is sequence:
                return False
        return True

    def _displace(self, plan: Plan) -> None:
        """Let the next in line take the place of who runs, where the policy says so and there is no room otherwise."""
        while self.waiting:
            urgent = self.waiting[0]
            candidates = [s for s in self.running.values() if s.finish_reason is None and self._asked.displaces(urgent, s)]
            if not candidates:
                return
            hits = self._find(plan, urgent)
            start = min(len(hits) * self.pool.block_size, len(urgent.tokens) - 1)
            if self._row_left and self._has_room(urgent, hits, start, self._reserve(urgent)):
                return
            if not self._vacate(plan, self._asked.victim(candidates)):
                return

    def _vacate(self, plan: Plan, victim: Sequence) -> bool:
        """Preempt it; False if a step in flight still needs its blocks, so that it can only be held out of this one until then."""
        if victim.in_flight:
            plan.held.add(victim.uid)
            return False
        self._preempt(victim)
        return True

    def _preempt(self, victim: Sequence) -> None:
        victim.preemptions += 1
        self.preemptions += 1
        self.preempted.append(victim.uid)
        self._restart(victim)

    def _restart(self, sequence: Sequence) -> None:
        """Give back its blocks; it waits, and is computed again from its first token."""
        assert not sequence.in_flight
        self._release(sequence)
        sequence.computed = sequence.sealed = 0
        self._wait(sequence)

    def _release(self, sequence: Sequence) -> None:
        """Give back its blocks, last first, and its row."""
        del self.running[sequence.uid]
        for block in reversed(sequence.blocks):
            self.pool.free(block, sequence.uid)
        sequence.blocks = []
        self._free_rows.append(sequence.row)
        sequence.row = -1

    def _wait(self, sequence: Sequence) -> None:
        """Put it into the queue, behind its equals; where its policy has no place for it, it ends."""
        sequence.place = None
        place = self._asked.key(sequence)
        why = self._blamed.pop(sequence, None)
        at = 0
        if why is None:
            try:
                at = bisect_right(self.waiting, place, key=PLACE)
            except Exception as error:  # noqa: BLE001 - keys are any objects
                why = f"the policy {type(self.policy).__qualname__} answered key() with what cannot be ordered: {error}"
        if why is not None:
            self._reject(sequence, why)
            return
        sequence.place = place
        self.waiting.insert(at, sequence)

    # ── results ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, batch: Batch, sampled: Sampled) -> list[Update]:
        """Append what a step sampled; end what is finished and give its blocks back."""
        plan = self.in_flight.pop(batch.step)
        everyone = plan.everyone
        for sequence in everyone:
            sequence.in_flight -= 1
        scores = self._scores(plan, sampled)
        updates = []
        tokens, counts, failed, logprobs = sampled.tokens.tolist(), sampled.counts.tolist(), sampled.failed, sampled.logprobs
        for j, sequence in enumerate(plan.samples):
            sequence.pending -= 1
            if sequence.finish_reason is not None:
                continue
            new: list[int] = []
            if j in failed:
                sequence.error = failed[j]
                self._finish(sequence, "error")
            else:
                new = self._append(sequence, tokens[j][: counts[j]])
            updates.append(Update(sequence, new, logprobs.get(j), scores.pop(sequence, None) if scores else None))
        updates.extend(Update(sequence, [], prompt_logprobs=entries) for sequence, entries in scores.items())
        for sequence in everyone:
            if sequence.finish_reason is not None and sequence.row >= 0 and not sequence.in_flight:
                self._release(sequence)  # it ended while the step was in flight
        return updates

    def abandon(self, batch: Batch, error: str) -> list[Update]:
        """A step failed: those in it end with the error, and no block it was to fill is found by anyone again.

        Steps planned after it are built on it, so those in them end too; they are still to be committed or abandoned.
        """
        plan = self.in_flight.pop(batch.step)
        self.pool.forget()
        for sequence in plan.everyone:
            sequence.in_flight -= 1
        for sequence in plan.samples:
            sequence.pending -= 1
        updates = []
        for doomed in [plan, *(later for step, later in self.in_flight.items() if step > batch.step)]:
            for sequence in doomed.everyone:
                if sequence.finish_reason is None:
                    sequence.error = error
                    self._finish(sequence, "error")
                    updates.append(Update(sequence, []))
                elif sequence.row >= 0 and not sequence.in_flight:
                    self._release(sequence)
        return updates

    def postpone(self, batch: Batch) -> None:
        """A step could not be computed: whoever was in it gives back its blocks and waits. No other may be in flight."""
        plan = self.in_flight.pop(batch.step)
        assert not self.in_flight
        self.pool.forget()
        for sequence in plan.samples:
            sequence.pending -= 1
        for sequence in plan.everyone:
            sequence.in_flight -= 1
            if sequence.finish_reason is None:
                self._preempt(sequence)
            elif sequence.row >= 0:
                self._release(sequence)

    def _scores(self, plan: Plan, sampled: Sampled) -> dict[Sequence, list[TokenLogprobs]]:
        """The log-probabilities of prompt positions that had not been given out before a preemption."""
        scores = {}
        for row, entries in sampled.prompt_logprobs.items():
            sequence, start = plan.sequences[row], plan.starts[row]
            if sequence.finish_reason is None:
                scores[sequence] = entries[max(0, sequence.scored - start) :]
                sequence.scored = max(sequence.scored, start + len(entries))
        return scores

    def _append(self, sequence: Sequence, new: list[int]) -> list[int]:
        """Append tokens until one ends the sequence; those that were kept."""
        assert len(new) == 1 or not sequence.in_flight, "a step planned on one token cannot go on from more or fewer"
        for kept, token in enumerate(new, 1):
            sequence.tokens.append(token)
            self.generation_tokens += 1
            if token in sequence.stops:
                sequence.stop_reason = token if token in (sequence.params.stop_token_ids or ()) else None
                self._finish(sequence, "stop")
                return new[:kept]
            if len(sequence.tokens) >= sequence.limit:
                self._finish(sequence, "length")
                return new[:kept]
        if not new:
            sequence.computed -= 1  # the last token is computed once more, for the next one to be drawn
        return new

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        sequence.finish_reason = reason
        heirs, sequence.followers = [f for f in sequence.followers if f.finish_reason is None], []
        if heirs:  # a leader that ends before its prompt is done leaves the lead to the next
            heir, *heir.followers = heirs
            heir.scored = sequence.scored
            self._wait(heir)
        if sequence.row < 0:
            self._leave_queue(sequence)
        elif not sequence.in_flight:
            self._release(sequence)

    def _leave_queue(self, sequence: Sequence) -> None:
        if sequence.place is None:
            return  # a follower that never waited; its leader skips what has ended when it forks
        del self.waiting[self._find_place(sequence)]

    def _find_place(self, sequence: Sequence) -> int:
        """Its index in the queue: just before where an equal would go, unless many are equal or the keys are a user's and odd."""
        try:
            at = bisect_right(self.waiting, sequence.place, key=PLACE) - 1
        except Exception:  # noqa: BLE001 - keys are any objects
            at = -1
        return at if self.waiting[at] is sequence else self.waiting.index(sequence)
