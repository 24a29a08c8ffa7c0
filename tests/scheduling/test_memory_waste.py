import pytest
from kv_waste import BLOCK_SIZE, MAX_MODEL_LEN, ReserveModelLength, measure

from nbengine.bench.workloads import workload
from nbengine.policy import Policy, ReserveMaximum


@pytest.fixture(scope="module")
def jobs():
    return workload("sharegpt", 600)


@pytest.fixture(scope="module")
def paged(jobs):
    return measure(Policy(), jobs)


def test_at_most_two_percent_of_the_allocated_slots_are_unused(paged):
    assert 0 < paged.mean_unused <= 0.02
    assert 0 < paged.unused_slots <= 0.02


def test_the_peak_is_the_arithmetic_minimum_for_blocks_of_sixteen(paged):
    assert BLOCK_SIZE == 16
    assert paged.peak_blocks == paged.minimum_at_peak


def test_reserving_the_maximum_wastes_many_times_as_much(jobs, paged):
    asked, model = measure(ReserveMaximum(), jobs[:300]), measure(ReserveModelLength(), jobs[:300])
    assert asked.mean_unused > 10 * paged.mean_unused
    assert model.mean_unused > 0.5
    assert model.peak_blocks == 256 * MAX_MODEL_LEN // BLOCK_SIZE


def test_the_workload_has_the_published_mean_lengths():
    jobs = workload("sharegpt", 20_000, vocab_size=11)
    assert sum(len(prompt) for prompt, _ in jobs) / len(jobs) == pytest.approx(161, rel=0.1)  # less what the cut at 1024 takes
    assert sum(output for _, output in jobs) / len(jobs) == pytest.approx(338, rel=0.1)


def test_equal_seeds_give_equal_workloads():
    assert workload("sharegpt", 5) == workload("sharegpt", 5)
    assert workload("sharegpt", 5) != workload("sharegpt", 5, seed=1)
