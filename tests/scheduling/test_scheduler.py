"""The scheduler's rules one by one. `kv_model` checks after each step that every read finds what it should."""

import numpy as np
import pytest
from kv_model import STOP, Simulation, alone, storm

from nbengine.batch import Sampled
from nbengine.policy import Policy, PriorityPolicy
from nbengine.scheduler import Scheduler


def tokens_of(batch, sequence):
    """How many tokens of it a batch computes."""
    return dict(zip(batch.rows.tolist(), batch.counts.tolist(), strict=True)).get(sequence.row, 0)


# ── batches ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_step_has_more_tokens_or_sequences_than_allowed():
    sim = Simulation(num_blocks=40, max_num_seqs=3, budget=7)
    for i in range(6):
        sim.add([i % 2] * (4 * i + 1), 5, n=1 + i % 3, seed=i)
    sim.drain()
    assert max(b.num_tokens for b in sim.batches) == 7
    assert max(len(b.rows) for b in sim.batches) == 3


def test_limits_can_be_lowered_and_raised_again_up_to_what_there_are_rows_for():
    sim = Simulation(num_blocks=40, max_num_seqs=4, budget=16)
    for i in range(6):
        sim.add([i % 2] * 3, 9, seed=i)
    sim.step()
    assert len(sim.scheduler.running) == 4
    sim.scheduler.limit(5, 2)
    sim.step()
    assert len(sim.scheduler.running) == 4  # who runs is not sent away
    while len(sim.scheduler.running) == 4:
        sim.step()
    sim.step()
    assert len(sim.scheduler.running) <= 2
    assert max(b.num_tokens for b in sim.batches[1:]) <= 5
    sim.scheduler.limit(16, 4)
    sim.drain()


@pytest.mark.parametrize(
    ("budget", "sequences", "name"), [(0, None, "max_num_batched_tokens"), (17, None, "1 and 16"), (None, 5, "1 and 4")]
)
def test_a_limit_beyond_what_the_engine_was_made_for_is_refused(budget, sequences, name):
    sim = Simulation(num_blocks=40, max_num_seqs=4, budget=16)
    with pytest.raises(ValueError, match=name):
        sim.scheduler.limit(budget, sequences)
    assert (sim.scheduler.max_num_batched_tokens, sim.scheduler.max_num_seqs) == (16, 4)


def test_a_long_prompt_is_computed_in_chunks_beside_sequences_that_decode():
    sim = Simulation(num_blocks=40, budget=8)
    (decoding,) = sim.add([0, 1], 10)
    sim.step()
    (long,) = sim.add([1] * 20, 3)
    for expected in (7, 7, 6):
        sim.step()
        assert tokens_of(sim.batches[-1], decoding) == 1
        assert tokens_of(sim.batches[-1], long) == expected
    assert long.output_len == 1
    sim.drain()


def test_only_the_chunk_that_ends_the_prompt_samples():
    sim = Simulation(budget=4)
    sim.add([0] * 10, 2)
    sim.drain()
    assert [len(b.sample_index) for b in sim.batches] == [0, 0, 1, 1]


def test_without_chunked_prefill_a_prompt_waits_for_a_step_that_takes_it_whole():
    sim = Simulation(num_blocks=40, budget=8, chunked_prefill=False)
    first, second, third = [sim.add([i] * 5, 3, seed=i)[0] for i in range(3)]
    sim.step()
    assert first.running
    assert not second.running
    sim.step()
    assert tokens_of(sim.batches[-1], second) == 5
    assert not third.running  # three tokens are left, and it needs five
    sim.drain()


def test_without_chunked_prefill_a_prompt_beyond_the_budget_still_ends():
    sim = Simulation(budget=4, chunked_prefill=False)
    sim.add([0, 1] * 5, 3)
    sim.drain()


def test_while_others_decode_long_prompts_take_the_threshold_together_and_short_ones_what_is_left():
    sim = Simulation(num_blocks=60, budget=40, max_num_seqs=6, long_prefill_token_threshold=7)
    (decoding,) = sim.add([0, 1], 12)
    sim.step()
    (short,) = sim.add([1] * 7, 9)
    (long,) = sim.add([2] * 17, 3)
    (other,) = sim.add([3] * 9, 3)
    for counts in ((1, 7, 7, 0), (1, 1, 7, 0), (1, 1, 3, 7), (1, 1, 1, 2)):  # what is left of a long one is short in the end
        sim.step()
        assert tuple(tokens_of(sim.batches[-1], one) for one in (decoding, short, long, other)) == counts
    sim.drain()


def test_a_long_prompt_that_delays_nobody_takes_the_whole_step():
    sim = Simulation(num_blocks=60, budget=40, max_num_seqs=6, long_prefill_token_threshold=7)
    sim.add([2] * 30, 3)
    sim.step()
    assert sim.batches[-1].num_tokens == 30
    sim.drain()


def test_a_request_that_fits_no_pool_is_our_bug():
    with pytest.raises(AssertionError, match="alone"):
        Simulation(num_blocks=2, block_size=4).add([0] * 8, 1)


# ── the prefix cache ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_later_request_shares_the_blocks_of_an_equal_beginning():
    sim = Simulation(num_blocks=40, budget=32)
    (first,) = sim.add([0, 1] * 4 + [0], 3)
    sim.step()
    (second,) = sim.add([0, 1] * 4 + [1, 1], 3)
    sim.step()
    assert second.blocks[:2] == first.blocks[:2]
    assert second.cached == 8
    assert tokens_of(sim.batches[-1], second) == 2
    assert (sim.scheduler.prefix_hits, sim.scheduler.prefix_queries) == (8, 19)
    sim.drain()


def test_equal_beginnings_share_within_one_step():
    sim = Simulation(num_blocks=40, budget=32)
    first, second = [sim.add([0, 1] * 4 + [i], 3)[0] for i in range(2)]
    sim.step()
    assert second.blocks[:2] == first.blocks[:2]
    assert sim.batches[-1].counts.tolist() == [9, 1]
    sim.drain()


def test_equal_prompts_in_one_step_copy_nothing_that_the_step_has_yet_to_fill():
    sim = Simulation(num_blocks=40, budget=32)
    sim.add([0, 1] * 4, 3)
    (second,) = sim.add([0, 1] * 4, 3)
    sim.step()
    assert len(sim.batches[-1].copies) == 0
    assert sim.batches[-1].counts.tolist() == [8, 4]  # its second block again, in a block of its own
    assert second.cached == 4
    sim.drain()


def test_a_prompt_cached_to_the_end_computes_one_token_in_a_copied_block():
    sim = Simulation(num_blocks=40, budget=32)
    (first,) = sim.add([0, 1] * 4, 3)
    sim.step()
    (second,) = sim.add([0, 1] * 4, 3)
    sim.step()
    assert tokens_of(sim.batches[-1], second) == 1
    assert sim.batches[-1].copies.tolist() == [[first.blocks[1], second.blocks[1]]]
    assert second.blocks[0] == first.blocks[0]
    assert second.cached == 7
    sim.drain()


def test_what_ended_is_found_again_and_forgetting_it_is_not():
    sim = Simulation(budget=32)
    sim.add([0, 1] * 4 + [0], 2)
    sim.drain()
    (again,) = sim.add([0, 1] * 4 + [0], 2)
    sim.drain()
    sim.forget()
    (anew,) = sim.add([0, 1] * 4 + [0], 2)
    sim.drain()
    assert (again.cached, anew.cached) == (8, 0)


def test_sampled_tokens_are_found_too():
    sim = Simulation(budget=32)
    (first,) = sim.add([0, 1, 0], 8)
    sim.drain()
    (second,) = sim.add(first.tokens, 1)
    sim.drain()
    assert second.cached == 8


def test_other_salts_share_nothing():
    sim = Simulation(num_blocks=40, budget=32)
    first, second = [sim.add([0, 1] * 4 + [0], 3)[0] for _ in range(2)]
    second.hash_seed = b"another adapter"
    sim.core.scheduler.plan()
    assert not set(first.blocks) & set(second.blocks)


def test_without_prefix_caching_nothing_is_shared_or_kept():
    sim = Simulation(num_blocks=40, budget=32, prefix_caching=False)
    for _ in range(3):
        sim.add([0, 1] * 4, 3, n=2)
    sim.drain()
    assert sim.scheduler.prefix_hits == 0
    assert len(sim.pool.blank) == 40


# ── n > 1 ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_followers_share_the_prompt_and_copy_when_they_write():
    sim = Simulation(num_blocks=40, budget=32)
    sequences = sim.add([0, 1] * 3, 4, n=3)
    sim.step()
    assert sim.batches[0].num_tokens == 6  # the prompt is computed once
    assert sim.batches[0].sample_index.tolist() == [0, 0, 0]
    assert all(s.blocks == sequences[0].blocks and s.output_len == 1 for s in sequences)
    sim.step()
    assert len(sim.batches[1].copies) == 2  # the last to write needs none
    assert len({s.blocks[0] for s in sequences}) == 1
    assert len({s.blocks[1] for s in sequences}) == 3
    sim.drain()


def test_followers_of_a_prompt_that_ends_with_a_block_copy_nothing():
    sim = Simulation(num_blocks=40, budget=32)
    sim.add([0, 1] * 4, 4, n=3)
    sim.drain()
    assert sum(len(b.copies) for b in sim.batches) == 0


def test_the_outputs_of_one_request_differ():
    sim = Simulation(num_blocks=40, budget=32)
    sequences = sim.add([0, 1], 10, n=3)
    sim.drain()
    assert len({tuple(s.tokens) for s in sequences}) == 3


def test_followers_without_a_free_row_come_in_later_and_find_the_prompt():
    sim = Simulation(num_blocks=40, max_num_seqs=2, budget=32)
    sequences = sim.add([0, 1] * 4 + [0], 3, n=4)
    sim.step()
    assert [s.running for s in sequences] == [True, True, False, False]
    assert sim.scheduler.waiting == sequences[2:]
    sim.drain()
    assert [s.cached for s in sequences[2:]] == [8, 8]


def test_a_leader_that_is_cancelled_before_its_prompt_is_done_leaves_the_lead_to_the_next():
    sim = Simulation(num_blocks=40, budget=4)
    leader, *followers = sim.add([0, 1] * 4, 3, n=3)
    sim.step()
    sim.cancel(leader, whole=False)
    assert sim.scheduler.waiting == [followers[0]]
    sim.drain()
    assert [s.finish_reason for s in followers] == ["length"] * 2


def test_a_follower_cancelled_before_it_forks_never_runs():
    sim = Simulation(num_blocks=40, budget=4)
    leader, follower = sim.add([0, 1] * 4, 3, n=2)
    sim.step()
    sim.cancel(follower, whole=False)
    sim.drain()
    assert follower.output_len == 0
    assert leader.finish_reason == "length"


# ── preemption ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_when_blocks_run_out_the_youngest_goes_back_to_the_head_of_the_queue_and_resumes_with_its_output():
    sim = Simulation(num_blocks=5, block_size=4, budget=32, max_num_seqs=2, prefix_caching=False)
    old, young, waiting = [sim.add([i] * 6, 9, seed=i)[0] for i in range(3)]
    while not sim.scheduler.preemptions:
        sim.step()
    assert old.running
    assert sim.scheduler.waiting == [young, waiting]
    assert young.preemptions == 1
    had = list(young.tokens)
    assert len(had) > 6
    while not young.running:
        assert not waiting.running
        sim.step()
    assert sim.batches[-1].admitted[0].output == had[6:]
    sim.drain()
    assert young.tokens[: len(had)] == had
    assert young.cached == 0


def test_a_preempted_sequence_finds_what_is_left_of_its_blocks():
    sim = Simulation(num_blocks=5, block_size=4, budget=32)
    sim.add([0] * 6, 9)
    (young,) = sim.add([1] * 6, 9)
    sim.drain()
    assert young.preemptions
    assert any(b.admitted and b.admitted[0].output and b.starts[-1] > 0 for b in sim.batches)


def test_nobody_new_comes_in_while_blocks_run_out_for_who_runs():
    sim = Simulation(num_blocks=5, block_size=4, budget=32, prefix_caching=False)
    sim.add([0] * 6, 9)
    sim.add([1] * 6, 9)
    while not sim.scheduler.preemptions:
        sim.step()
        if not sim.scheduler.preemptions:
            continue
        (small,) = sim.add([0], 1)
        assert not small.running
    sim.drain()


def test_the_eldest_is_never_preempted_even_with_a_step_always_in_flight():
    sim = Simulation(num_blocks=6, block_size=4, budget=32, prefix_caching=False)
    eldest, *others = [sim.add([i % 2] * 3, 18, seed=i)[0] for i in range(3)]
    ahead = sim.launch()
    while eldest.finish_reason is None:
        ahead, done = sim.launch(), ahead
        sim.commit(done)
    assert eldest.preemptions == 0
    assert all(s.preemptions for s in others)
    sim.commit(ahead)
    sim.drain()


def test_first_come_first_served_lets_nobody_starve_under_steady_arrivals():
    sim = Simulation(num_blocks=6, block_size=4, max_num_seqs=3, budget=8)
    pending = []
    for i in range(150):
        if i % 2 == 0:
            pending.append((i, sim.add([i % 2, 1] * (1 + i % 5), 1 + i % 7, seed=i)[0]))
        sim.step()
        pending = [(since, s) for since, s in pending if s.finish_reason is None]
    order = [s.arrival for s in sorted(sim.sequences, key=lambda s: s.uid) if s.finish_reason]
    assert order[:30] == list(range(30))  # whoever came first has ended
    sim.drain()


def test_a_policy_that_is_unfair_is_seen_to_starve():
    """The test above can fail."""

    class LastComeFirstServed(PriorityPolicy):
        def key(self, sequence):
            return -sequence.arrival

    sim = Simulation(num_blocks=6, block_size=4, max_num_seqs=1, budget=8, policy=LastComeFirstServed())
    for i in range(60):
        sim.add([i % 2], 2, seed=i)
        sim.step()
    assert [s.arrival for s in sim.sequences if s.finish_reason][:30] != list(range(30))


def test_suspending_preempts_everybody_and_they_go_on_after():
    sim = Simulation(budget=32)
    sim.add([0] * 6, 9, n=2)
    sim.step()
    sim.core.suspend()
    assert sim.pool.num_used == 0
    assert not sim.pool.cached
    sim.check()
    sim.drain()


# ── ends ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sequence_ends_at_its_limit():
    sim = Simulation()
    (sequence,) = sim.add([0, 1], 5)
    sim.drain()
    assert (sequence.output_len, sequence.finish_reason, sequence.stop_reason) == (5, "length", None)


def seed_that_stops():
    return next(seed for seed in range(1000) if alone_stops(seed))


def alone_stops(seed):
    (sequence,) = Simulation().add([0, 1], 8, seed=seed, stop_token_ids=[STOP])
    output, reason = alone(sequence)
    return reason == "stop" and 2 < len(output) < 6


def test_a_stop_token_ends_a_sequence_and_is_its_reason():
    sim = Simulation()
    (sequence,) = sim.add([0, 1], 8, seed=seed_that_stops(), stop_token_ids=[STOP])
    sim.drain()
    assert (sequence.finish_reason, sequence.stop_reason, sequence.tokens[-1]) == ("stop", STOP, STOP)


def test_the_models_own_end_of_sequence_is_no_stop_reason():
    sim = Simulation()
    (sequence,) = sim.add([0, 1], 8, seed=seed_that_stops())
    sequence.stops = frozenset({STOP})
    sim.drain()
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", None)


@pytest.mark.parametrize(("counts", "given"), [([2], [2]), ([0, 3], [0, 3]), ([3, 0, 0, 4], [3, 0, 0, 3]), ([4, 4], [4, 2])])
def test_a_sample_may_bring_any_number_of_tokens_and_what_is_beyond_the_limit_is_dropped(counts, given):
    class Counts:
        def __init__(self):
            self.left = iter(counts)

        def randrange(self, _):
            return next(self.left, 1)

    sim = Simulation(budget=32)
    (sequence,) = sim.add([0, 1, 0, 1], 6)
    sim.runner.bursts = Counts()
    assert [len(sim.step()[0].tokens) for _ in counts] == given
    sim.drain()
    assert sequence.output_len == 6


def test_tokens_after_a_stop_in_one_sample_are_dropped():
    sim = Simulation(budget=32)
    (sequence,) = sim.add([0, 1], 8, seed=seed_that_stops(), stop_token_ids=[STOP])

    class All:
        def randrange(self, _):
            return 8

    sim.runner.bursts = All()
    sim.step()
    assert sequence.tokens[-1] == STOP
    assert sequence.finish_reason == "stop"


def test_a_failed_sample_ends_one_sequence_and_no_other():
    sim = Simulation(budget=32)
    first, second = sim.add([0], 4)[0], sim.add([1], 4)[0]
    sim.runner.fail_samples = {0}
    sim.step()
    assert (first.finish_reason, first.error) == ("error", "a processor raised")
    assert second.finish_reason is None
    sim.drain()
    assert second.finish_reason == "length"


def test_a_failed_step_ends_those_in_it_and_keeps_nobody_from_going_on():
    sim = Simulation(max_num_seqs=2, budget=32)
    *failed, waiting = [sim.add([0, 1] * 4 + [i], 4)[0] for i in range(3)]
    sim.runner.fail_launch = True
    sim.step()
    assert [s.finish_reason for s in failed] == ["error"] * 2
    assert "on fire" in failed[0].error
    assert not sim.pool.index  # what the step was to fill is found by nobody
    sim.drain()
    assert waiting.finish_reason == "length"


def test_a_failed_step_takes_those_planned_upon_it_along():
    sim = Simulation(num_blocks=40, budget=9)
    first, second = [sim.add([0, 1] * 4 + [i], 4)[0] for i in range(2)]
    one = sim.scheduler.plan()
    two = sim.scheduler.plan()
    assert second.blocks[0] == first.blocks[0]  # filled by the step that is about to fail
    assert {u.sequence for u in sim.scheduler.abandon(one, "gone")} == {first, second}
    assert second.row >= 0  # its step is in flight still
    assert sim.scheduler.abandon(two, "gone") == []
    assert sim.pool.num_used == 0


# ── cancelling ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_cancelling_frees_at_once_between_two_steps():
    sim = Simulation()
    (running,) = sim.add([0, 1], 8)
    sim.step()
    (waiting,) = sim.add([1], 8)
    sim.cancel(running)
    sim.cancel(waiting)
    assert sim.pool.num_used == 0
    assert not sim.core.has_work()
    assert [s.finish_reason for s in (running, waiting)] == ["abort", "abort"]


def test_cancelling_what_ended_changes_nothing():
    sim = Simulation()
    (sequence,) = sim.add([0, 1], 2)
    sim.drain()
    assert sim.scheduler.cancel(sequence) is None
    assert sim.core.end(sequence.request_id) == []
    assert sequence.finish_reason == "length"


def test_one_output_of_several_can_be_cancelled():
    sim = Simulation(budget=32)
    first, second, third = sim.add([0, 1], 6, n=3)
    sim.step()
    sim.cancel(second, whole=False)
    sim.drain()
    assert [s.finish_reason for s in (first, second, third)] == ["length", "abort", "length"]


def test_what_is_cancelled_in_flight_keeps_its_row_and_blocks_until_its_step_is_committed():
    sim = Simulation()
    (sequence,) = sim.add([0, 1], 8)
    batch = sim.launch()
    sim.cancel(sequence)
    assert sequence.row >= 0
    assert sim.pool.num_used == 1
    assert sim.commit(batch) == []
    assert sequence.output_len == 0
    assert sim.pool.num_used == 0


# ── steps in flight ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_step_planned_before_the_last_is_committed_leaves_the_unknown_token_to_the_device():
    sim = Simulation()
    (sequence,) = sim.add([0, 1], 8)
    first, second = sim.launch(), sim.launch()
    assert first.tokens.tolist() == [0, 1]
    assert (second.tokens.tolist(), second.starts.tolist()) == ([-1], [2])
    assert (sequence.length, sequence.in_flight) == (4, 2)
    sim.commit(first)
    sim.commit(second)
    assert sequence.output_len == 2
    sim.drain()


def test_no_step_is_planned_beyond_the_last_token():
    sim = Simulation()
    sim.add([0, 1], 1)
    first = sim.launch()
    assert sim.launch() is None
    sim.commit(first)
    assert not sim.core.has_work()


def test_a_stop_found_late_costs_one_token_and_its_blocks_wait_for_the_step_in_flight():
    sim = Simulation(block_size=1)
    (sequence,) = sim.add([0, 1], 8, seed=seed_that_stops(), stop_token_ids=[STOP])
    ahead = sim.launch()
    while sequence.finish_reason is None:
        ahead, done = sim.launch(), ahead
        sim.commit(done)
    assert sequence.row >= 0
    held = sim.pool.num_used
    assert held > 0
    assert sim.commit(ahead) == []
    assert sequence.tokens[-1] == STOP
    assert sim.pool.num_used == 0


def test_blocks_are_offered_only_when_their_tokens_are_known():
    sim = Simulation(block_size=2)
    sim.add([0], 8)
    first, second = sim.launch(), sim.launch()  # the second computes the last position of block 0, but which token stands there?
    assert not sim.pool.index
    sim.commit(first)
    third = sim.launch()
    assert len(sim.pool.index) == 1
    sim.commit(second)
    sim.commit(third)
    sim.drain()


def test_equal_runs_bring_equal_tokens_with_and_without_overlap():
    outcomes = []
    for overlap in (False, True):
        sim = Simulation(num_blocks=7, budget=6)
        for i in range(5):
            sim.add([0, 1, i % 2] * 2, 7, n=1 + i % 3, seed=100 * i, stop_token_ids=[STOP])
        while sim.core.has_work():
            if overlap:
                sim.overlapped()
            else:
                sim.step()
        sim.check_ended()
        outcomes.append([s.tokens for s in sim.sequences])
    assert outcomes[0] == outcomes[1]


def test_a_step_planned_on_one_token_cannot_go_on_from_two():
    sim = Simulation()
    sim.add([0, 1], 8)
    first = sim.launch()
    sim.launch()
    with pytest.raises(AssertionError, match="planned on one token"):
        sim.scheduler.commit(first, Sampled(np.zeros((1, 2), np.int32), np.array([2], np.int32)))


# ── log-probabilities of the prompt ─────────────────────────────────────────────────────────────────────────────────


def test_prompt_logprobs_come_once_for_each_position_over_chunks():
    sim = Simulation(budget=4)
    (sequence,) = sim.add([0, 1, 1, 0, 0, 1, 0, 1, 1], 3, prompt_logprobs=0)
    lengths = []
    while sim.core.has_work():
        lengths += [len(u.prompt_logprobs) for u in sim.step() if u.prompt_logprobs is not None]
    assert lengths == [4, 4]  # the position after the last one is a sampled token's
    assert sim.scores[sequence.request_id] == sequence.tokens[1:9]


def test_prompt_logprobs_and_the_first_token_come_in_one_update():
    sim = Simulation(budget=32)
    sim.add([0, 1, 1], 1, prompt_logprobs=0)
    (update,) = sim.step()
    assert len(update.tokens) == 1
    assert len(update.prompt_logprobs) == 2


def test_prompt_logprobs_are_not_given_again_after_a_preemption():
    sim = Simulation(num_blocks=5, block_size=4, budget=5)
    sim.add([0] * 4, 12)
    (young,) = sim.add([1] * 9, 4, prompt_logprobs=0)
    while not (young.running and 0 < young.scored < 8):
        sim.step()
    sim.scheduler._preempt(young)
    sim.drain()
    assert sim.scores[young.request_id] == [1] * 8


def test_prompt_logprobs_of_several_outputs_come_once_also_when_some_come_in_later():
    sim = Simulation(max_num_seqs=2, budget=32)
    sequences = sim.add([0, 1, 1, 0, 0], 3, n=4, prompt_logprobs=0)
    sim.drain()
    assert sim.scores[sequences[0].request_id] == [1, 1, 0, 0]


def test_a_new_leader_goes_on_with_the_prompt_logprobs_where_the_old_one_ended():
    sim = Simulation(budget=4)
    leader, _ = sim.add([0, 1, 1, 0, 0, 1, 0], 3, n=2, prompt_logprobs=0)
    sim.step()
    sim.cancel(leader, whole=False)
    sim.drain()
    assert sim.scores[leader.request_id] == [1, 1, 0, 0, 1, 0]


def test_a_prompt_whose_logprobs_are_wanted_is_computed_in_full_though_it_is_cached():
    sim = Simulation(budget=32)
    sim.add([0, 1] * 4 + [0], 2)
    sim.drain()
    (again,) = sim.add([0, 1] * 4 + [0], 2, prompt_logprobs=0)
    sim.drain()
    assert again.cached == 0
    assert sim.scores[again.request_id] == again.tokens[1:9]


# ── rotations that depend on the length ─────────────────────────────────────────────────────────────────────────────


class LongRotation:
    """As LongRoPE: sequences of more than six tokens turn otherwise."""

    rope_boundary = 6

    def rope_anchor(self, prompt_len, known_len):
        return known_len

    def rope_regime(self, anchor):
        return int(anchor > self.rope_boundary)


def test_a_sequence_that_outgrows_its_rotation_is_computed_again_and_shares_with_its_likes_alone():
    sim = Simulation(num_blocks=40, budget=32, rotation=LongRotation())
    sim.runner.check_sealed = lambda: None  # digests are seeded by the regime here
    (short,) = sim.add([0, 1, 0, 1, 0], 6)
    sim.step()
    (long,) = sim.add([0, 1, 0, 1, 0, 1, 0, 1], 2)
    sim.step()
    assert not set(short.blocks) & set(long.blocks)
    sim.drain()
    assert short.preemptions == 0
    assert next(b.starts[0] for b in sim.batches if b.admitted) == 0
    restarted = [b for b in sim.batches for new in b.admitted if new.output]
    assert len(restarted) == 1
    assert restarted[0].admitted[0].anchor == 7


# ── what is looked at once, or not at all ───────────────────────────────────────────────────────────────────────────────


def planned(seeds):
    batches = [batch for seed in seeds for batch in storm(seed).batches]
    return [[part.tolist() for part in (b.rows, b.starts, b.counts, b.tokens, b.table_writes, b.copies, b.sample_rows)] for b in batches]


def test_what_is_not_looked_at_changes_no_batch(monkeypatch):
    """Decoding rows that write on in their own block, and the promised blocks, counted once for all who are let in."""
    seeds = range(60)
    quick = planned(seeds)
    has_room = Scheduler._has_room
    monkeypatch.setattr(Scheduler, "_writes_on", lambda self, sequence: False)
    monkeypatch.setattr(Scheduler, "_has_room", lambda self, *about: has_room(self, *about[:4]))
    assert planned(seeds) == quick


def test_blocks_promised_to_one_who_was_let_in_are_not_given_to_the_next_in_the_same_step():
    class Slowly(Policy):
        def chunk(self, sequence, budget):
            return 1

    sim = Simulation(num_blocks=4, block_size=4, policy=Slowly())
    for seed in (0, 1):
        sim.add([seed] * 10, 1, seed=seed)
    sim.step()
    assert [len(batch.admitted) for batch in sim.batches] == [1]
    sim.drain()
    assert sim.scheduler.preemptions == 0
