import warnings

import pytest
from kv_model import Simulation

from nbengine.policy import Policy, PriorityPolicy, ReserveMaximum, StaticBatching, StaticReserved, policies, policy_named


def test_a_policy_goes_by_name_class_or_instance():
    policy = PriorityPolicy()
    assert policy_named(policy) is policy
    assert isinstance(policy_named(StaticBatching), StaticBatching)
    assert {type(policy_named(name)) for name in policies} == set(policies.values())


@pytest.mark.parametrize("wrong", ["fifo", 3, dict, object()])
def test_anything_else_is_refused_with_the_names_there_are(wrong):
    with pytest.raises(ValueError, match="fcfs"):
        policy_named(wrong)


def test_a_misspelt_method_is_warned_of():
    class Misspelt(Policy):
        def chunks(self, sequence, budget):
            return 1

    class Whole(Policy):
        def chunk(self, sequence, budget):
            return min(budget, self.chunk_size())

        def chunk_size(self):
            return 1

    with pytest.warns(UserWarning, match=r"never calls .*Misspelt\.chunks\(\); did you mean chunk\(\)\?"):
        policy_named(Misspelt)
    with warnings.catch_warnings(action="error"):
        policy_named(Whole())


def test_first_come_first_served_admits_in_order_of_arrival():
    sim = Simulation(max_num_seqs=1)
    requests = [sim.add([0, 1], 2, priority=-i)[0] for i in range(3)]
    ended = []
    while sim.core.has_work():
        ended += [u.sequence for u in sim.step() if u.sequence.finish_reason]
    assert ended == requests


def test_priorities_admit_the_smallest_value_first_and_among_equals_the_first():
    sim = Simulation(max_num_seqs=1, policy=PriorityPolicy())
    late, urgent, also_urgent = [sim.add([0, 1], 2, priority=p)[0] for p in (5, -1, -1)]
    ended = []
    while sim.core.has_work():
        ended += [u.sequence for u in sim.step() if u.sequence.finish_reason]
    assert ended == [urgent, also_urgent, late]


def test_a_more_urgent_arrival_displaces_the_least_urgent_when_rows_run_out():
    sim = Simulation(max_num_seqs=2, policy=PriorityPolicy())
    middle, least = [sim.add([0, 1], 8, priority=p)[0] for p in (1, 2)]
    sim.step()
    (urgent,) = sim.add([1, 1], 8, priority=0)
    sim.step()
    assert (urgent.running, middle.running, least.running) == (True, True, False)
    assert least.preemptions == 1
    sim.drain()


def test_a_more_urgent_arrival_displaces_when_blocks_run_out():
    sim = Simulation(num_blocks=4, block_size=4, policy=PriorityPolicy(), budget=32, prefix_caching=False)
    (least,) = sim.add([0] * 12, 4, priority=1)
    sim.step()
    (urgent,) = sim.add([1] * 6, 4, priority=0)
    sim.step()
    assert urgent.running
    assert not least.running
    sim.drain()


def test_an_equal_arrival_displaces_nobody():
    sim = Simulation(max_num_seqs=1, policy=PriorityPolicy())
    (first,) = sim.add([0, 1], 8)
    sim.step()
    sim.add([1, 1], 8)
    sim.step()
    assert first.running
    assert not first.preemptions


def test_displacement_works_while_a_step_is_always_in_flight():
    sim = Simulation(max_num_seqs=1, policy=PriorityPolicy())
    (least,) = sim.add([0, 1], 20, priority=1)
    ahead = sim.launch()
    (urgent,) = sim.add([1, 1], 4, priority=0)
    for _ in range(3):
        ahead, done = sim.launch(), ahead
        sim.commit(done)
    assert urgent.running
    assert not least.running
    sim.commit(ahead)
    sim.drain()


def test_static_batching_forms_the_next_batch_only_when_the_last_sequence_has_ended():
    sim = Simulation(policy=StaticBatching(), max_num_seqs=2, budget=32)
    short, long, next_one = [sim.add([i], n)[0] for i, n in enumerate((2, 6, 2))]
    for _ in range(6):
        assert not next_one.running
        sim.step()
    assert short.finish_reason
    assert long.finish_reason
    sim.step()
    assert next_one.running
    sim.drain()


def test_continuous_batching_fills_a_row_as_soon_as_it_is_free():
    sim = Simulation(max_num_seqs=2, budget=32)
    *_, next_one = [sim.add([i], n)[0] for i, n in enumerate((2, 6, 2))]
    sim.step()
    sim.step()
    assert not next_one.running
    sim.step()
    assert next_one.running


@pytest.mark.parametrize("policy", [ReserveMaximum, StaticReserved])
def test_reserving_takes_all_blocks_at_once_and_never_preempts(policy):
    sim = Simulation(num_blocks=8, block_size=4, policy=policy(), budget=64)
    sequences = [sim.add([i], 11, n=1 + i % 2)[0] for i in range(6)]  # three blocks each
    sim.step()
    assert len(sequences[0].blocks) == 3
    assert sum(s.running for s in sequences) == 2
    sim.drain()
    assert sim.scheduler.preemptions == 0


def test_followers_come_in_later_when_their_reserve_has_no_room():
    sim = Simulation(num_blocks=7, block_size=4, policy=ReserveMaximum(), budget=64)
    sequences = sim.add([0, 1, 0], 9, n=4)  # three blocks each
    sim.step()
    assert sum(s.running for s in sequences) == 2
    sim.drain()
    assert sim.scheduler.preemptions == 0


def test_a_reserve_beyond_the_pool_is_cut_to_it():
    class Greedy(Policy):
        def reserve(self, sequence):
            return 10**9

    sim = Simulation(policy=Greedy())
    sim.add([0], 3)
    sim.add([1], 3)
    sim.step()
    assert sim.pool.num_free == 0
    sim.drain()


def test_a_users_policy_is_three_lines():
    class ShortestFirst(Policy):
        def key(self, sequence):
            return len(sequence.tokens)

    sim = Simulation(max_num_seqs=1, policy=ShortestFirst(), budget=64)
    long, short = sim.add([0] * 9, 2)[0], sim.add([1], 2)[0]
    sim.step()
    assert short.running
    assert not long.running
    sim.drain()


def test_a_users_order_that_changes_its_mind_still_finds_who_waits():
    """A key is asked for once, when a sequence starts to wait: it may be drawn by lot."""
    draws = iter([3, 1, 2, *range(10, 100)])

    class Lottery(Policy):
        def key(self, sequence):
            return next(draws)

        def victim(self, candidates):
            return candidates[-1]

    sim = Simulation(max_num_seqs=1, policy=Lottery())
    third, first, second = [sim.add([i], 2)[0] for i in range(3)]
    assert sim.scheduler.waiting == [first, second, third]
    sim.cancel(second)
    assert sim.scheduler.waiting == [first, third]
    sim.drain()


def test_a_users_chunks_are_kept_within_the_budget_and_never_empty():
    class Odd(Policy):
        def chunk(self, sequence, budget):
            return 100 if sequence.computed == 0 else 0

    sim = Simulation(policy=Odd(), budget=5)
    sim.add([0] * 10, 2)
    counts = []
    while sim.core.has_work():
        sim.step()
        counts.append(sim.batches[-1].num_tokens)
    assert counts == [5, 1, 1, 1, 1, 1, 1]


def test_exchanging_the_policy_orders_anew_who_waits():
    sim = Simulation(max_num_seqs=1)
    least, urgent = sim.add([0], 2, priority=1)[0], sim.add([1], 2, priority=0)[0]
    sim.scheduler.use(PriorityPolicy())
    assert sim.scheduler.waiting == [urgent, least]
    sim.drain()
