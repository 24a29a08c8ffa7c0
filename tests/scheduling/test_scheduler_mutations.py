"""Faults put into the scheduler and the pool on purpose: each must be caught by what `kv_model` checks after each step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from kv_model import storm

from nbengine.blocks import BlockPool
from nbengine.plan import Plan
from nbengine.prefix import PrefixCache
from nbengine.scheduler import GROUP, Scheduler

STORMS = 120  # most faults show in the first ten
faults: list[tuple[type, str, Callable]] = []


def fault(cls, name):
    """A replacement for a method, made from the method it replaces."""

    def note(make):
        faults.append((cls, name, make))
        return make

    return note


@fault(Scheduler, "_release")
def forgets_to_free_a_block(release):
    def mutant(self, sequence):
        sequence.blocks = sequence.blocks[:-1]
        release(self, sequence)

    return mutant


@fault(BlockPool, "free")
def frees_a_block_into_nowhere(free):
    def mutant(self, block, owner):
        free(self, block, owner)
        if self.references[block] == 0 and block == self.num_blocks - 1:
            (self.cached.pop(block) if block in self.cached else self.blank.remove(block))

    return mutant


@fault(Scheduler, "_finish")
def gives_back_what_a_launched_step_still_touches(finish):
    def mutant(self, sequence, reason):
        finish(self, sequence, reason)
        if sequence.row >= 0:
            self._release(sequence)

    return mutant


@fault(BlockPool, "must_copy")
def never_copies_on_write(_):
    return lambda self, block: False


@fault(BlockPool, "must_copy")
def copies_only_what_is_cached(_):
    return lambda self, block: self.hashes[block] is not None


@fault(BlockPool, "must_copy")
def copies_only_what_is_shared(_):
    return lambda self, block: self.references[block] > 1


@fault(Plan, "to_batch")
def loses_the_copies(to_batch):
    def mutant(self, step):
        self.copies = []
        return to_batch(self, step)

    return mutant


@fault(Scheduler, "_find")
def copies_what_the_same_step_fills(_):
    return lambda self, plan, sequence: self.prefixes.find(sequence)


@fault(Scheduler, "_plan")
def seals_before_the_tokens_are_known(plan_one):
    def mutant(self, plan, sequence, count):
        plan_one(self, plan, sequence, count)
        self.prefixes.offer(sequence, sequence.computed // self.pool.block_size)

    return mutant


@fault(PrefixCache, "offer")
def seals_blocks_that_are_not_full(offer):
    return lambda self, sequence, full: offer(self, sequence, len(sequence.blocks))


@fault(PrefixCache, "_hash")
def names_a_block_by_its_own_tokens_alone(hash_of):
    def mutant(self, sequence, i):
        size = self.pool.block_size
        own = type(sequence)(0, "", 0, sequence.params, sequence.tokens[i * size : (i + 1) * size], 0, 0, 0)
        return hash_of(self, own, 0)

    return mutant


@fault(BlockPool, "_drop_hash")
def an_evicted_block_can_still_be_found(_):
    def mutant(self, block):
        self.hashes[block] = None

    return mutant


@fault(BlockPool, "blocks_for")
def counts_a_block_too_few(_):
    return lambda self, tokens: max(1, tokens // self.block_size)


@fault(Scheduler, "_needs")
def needs_a_block_too_few(needs):
    return lambda self, sequence, tokens: needs(self, sequence, tokens) - 1


@fault(Scheduler, "_grow")
def grows_a_token_too_late(grow):
    return lambda self, plan, sequence, tokens: grow(self, plan, sequence, tokens - 1)


@fault(Scheduler, "_enter")
def a_preempted_sequence_keeps_what_it_had_computed(enter):
    def mutant(self, plan, sequence, hits, start):
        enter(self, plan, sequence, hits, max(start, len(sequence.tokens) - 1) if sequence.preemptions else start)

    return mutant


@fault(Scheduler, "_vacate")
def preempts_who_is_in_flight(_):
    def mutant(self, plan, victim):
        victim.in_flight = 0
        self._preempt(victim)
        return True

    return mutant


@fault(Scheduler, "_fork")
def loses_a_follower(fork):
    def mutant(self, plan, leader, row):
        leader.followers = leader.followers[:-1]
        fork(self, plan, leader, row)

    return mutant


@fault(Scheduler, "_finish")
def a_leader_that_ends_takes_its_followers_along(finish):
    def mutant(self, sequence, reason):
        sequence.followers = []
        finish(self, sequence, reason)

    return mutant


@fault(Scheduler, "_chunk")
def ignores_the_budget(_):
    return lambda self, sequence, budget: sequence.remaining


@fault(Scheduler, "_enter")
def writes_the_table_in_the_wrong_order(enter):
    def mutant(self, plan, sequence, hits, start):
        enter(self, plan, sequence, hits, start)
        if len(hits) > 1:
            plan.table_writes[-1], plan.table_writes[-2] = (
                (GROUP, sequence.row, len(hits) - 1, hits[-2]),
                (GROUP, sequence.row, len(hits) - 2, hits[-1]),
            )

    return mutant


@fault(BlockPool, "share")
def shares_without_a_word_to_the_trace(share):
    def mutant(self, block, owner):
        share(self, block, owner)
        self.events.pop()

    return mutant


@fault(Scheduler, "_append")
def misses_a_stop_token(append):
    def mutant(self, sequence, new):
        stops, sequence.stops = sequence.stops, frozenset()
        kept = append(self, sequence, new)
        sequence.stops = stops
        return kept

    return mutant


@fault(Scheduler, "_append")
def waits_for_ever_when_no_token_came(append):
    def mutant(self, sequence, new):
        return append(self, sequence, new) if new else new

    return mutant


@fault(Scheduler, "_restart")
def gives_prompt_logprobs_again_after_a_preemption(restart):
    def mutant(self, sequence):
        restart(self, sequence)
        sequence.scored = 0

    return mutant


def storms(count=STORMS):
    """How many operations went well."""
    return sum(storm(seed).operations for seed in range(count))


def test_without_a_fault_nothing_is_caught():
    assert storms() > 10_000


@pytest.mark.parametrize(("cls", "name", "make"), [pytest.param(*f, id=f[2].__name__) for f in faults])
def test_a_fault_is_caught(monkeypatch, cls, name, make):
    monkeypatch.setattr(cls, name, make(getattr(cls, name)))
    with pytest.raises(Exception):  # noqa: B017, PT011 - whichever check is the first to see it
        storms()


def test_the_order_in_which_blocks_are_freed_is_no_fault(monkeypatch):
    def mutant(self, sequence):
        sequence.blocks.reverse()
        release(self, sequence)

    release = Scheduler._release
    monkeypatch.setattr(Scheduler, "_release", mutant)
    monkeypatch.setattr("nbengine.trace.PoolState._free", free_anywhere)
    storms(40)


def free_anywhere(self, block, uid):
    """As PoolState does it, for blocks that are not freed last first."""
    table = self.tables[uid]
    table.remove(block)
    if not table:
        del self.tables[uid]
    self._let_go(block)
