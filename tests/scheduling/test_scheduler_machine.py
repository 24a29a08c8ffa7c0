"""The core under hypothesis: anything may happen in any order, and everything must hold after each of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from kv_model import ALPHABET, STOP, Simulation, storm

from nbengine.policy import Policy, policies

rarely = st.integers(0, 5).map(lambda draw: draw == 5)
any_policy = st.sampled_from([*policies, "fcfs", "fcfs"])


class Impatient(Policy):
    """A user's policy with odd answers: the newest first, prompts in threes, a reserve larger than any pool, the eldest gives way."""

    def key(self, sequence):
        return -sequence.arrival

    def chunk(self, sequence, budget):
        return 3

    def reserve(self, sequence):
        return 10**6 if sequence.arrival % 5 == 0 else 0

    def victim(self, candidates):
        return candidates[0]


class Unsound(Impatient):
    """Now and then one of its methods raises, or answers nonsense."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        for name in ("key", "order", "opens", "chunk", "reserve", "victim", "displaces"):
            setattr(self, name, self._spoiled(getattr(self, name)))

    def _spoiled(self, method):
        def spoiled(*about):
            draw = self.random.randrange(60)
            if draw == 0:
                raise ZeroDivisionError
            return self.random.choice([None, "x", [3]]) if draw == 1 else method(*about)

        return spoiled


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(4, 14),
        block_size=st.sampled_from([1, 2, 4]),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
        chunked_prefill=st.sampled_from([True, True, True, False]),
        long_prefill_token_threshold=st.sampled_from([0, 0, 1, 5]),
        prefix_caching=st.sampled_from([True, True, True, False]),
        policy=any_policy,
    )
    def start(self, policy, **options):
        self.sim = Simulation(policy=policies[policy](), **options)
        self.only_fcfs = policy == "fcfs"
        self.prompts = [[]]
        self.seed = 0

    @rule(
        prompt=st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=24),
        earlier=st.integers(0, 50),
        keep=st.integers(0, 24),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        max_tokens=st.integers(1, 20),
        priority=st.integers(0, 2),
        stops=st.booleans(),
        scores=st.sampled_from([None, None, None, 0]),
    )
    def add(self, prompt, earlier, keep, n, max_tokens, priority, stops, scores):
        prompt = self.prompts[earlier % len(self.prompts)][:keep] + prompt  # often the beginning of one that came before
        prompt = prompt[: max(1, min(40, self.sim.capacity - max_tokens))]
        max_tokens = min(max_tokens, self.sim.capacity - len(prompt))
        if len(self.sim.alive) < 12 and max_tokens > 0:
            self.seed += 10
            stop = [STOP] if stops else None
            self.sim.add(prompt, max_tokens, n=n, seed=self.seed, priority=priority, stop_token_ids=stop, prompt_logprobs=scores)
            self.prompts.append(prompt)

    @rule(earlier=st.integers(0, 50), max_tokens=st.integers(1, 6))
    def add_one_again(self, earlier, max_tokens):
        prompt = self.prompts[earlier % len(self.prompts)]
        if prompt and len(self.sim.alive) < 12 and len(prompt) + max_tokens <= self.sim.capacity:
            self.seed += 10
            self.sim.add(prompt, max_tokens, seed=self.seed)

    @rule(steps=st.integers(1, 4))
    def step(self, steps):
        for _ in range(steps):
            self.sim.step()
            self._patience()

    @rule(seed=st.integers(0, 1000))
    def step_with_any_number_of_tokens(self, seed):
        self.sim.runner.bursts = random.Random(seed)
        self.sim.step()
        self.sim.runner.bursts = None
        self._patience()

    @rule(steps=st.integers(1, 3))
    def overlap(self, steps):
        for _ in range(steps):
            self.sim.overlapped()
            self._patience()

    @rule(which=st.integers(0, 20), whole=st.booleans(), steps=st.integers(2, 6))
    def overlap_for_long_with_a_cancel(self, which, whole, steps):

        def between(i):
            if i == 1 and self.sim.alive:
                self.sim.cancel(self.sim.alive[which % len(self.sim.alive)], whole=whole)

        self.sim.always_ahead(steps, between)

    @precondition(lambda self: self.sim.alive)
    @rule(which=st.integers(0, 20), whole=st.booleans())
    def cancel(self, which, whole):
        self.sim.cancel(self.sim.alive[which % len(self.sim.alive)], whole=whole)

    @rule(often=rarely)
    def reset_the_prefix_cache(self, often):
        if often:
            self.sim.forget()

    @rule(often=rarely)
    def suspend(self, often):
        if often:
            self.sim.core.suspend()
            self.sim.check()

    @rule(budget=st.integers(1, 12), max_num_seqs=st.integers(1, 5))
    def set_limits(self, budget, max_num_seqs):
        scheduler = self.sim.scheduler
        scheduler.limit(min(budget, scheduler.most[0]), min(max_num_seqs, scheduler.most[1]))

    @rule(policy=any_policy)
    def use_another_policy(self, policy):
        self.only_fcfs = False
        self.sim.scheduler.use(policies[policy]())

    @rule()
    def use_a_users_policy(self):
        self.only_fcfs = False
        self.sim.scheduler.use(Impatient())

    @rule(seed=st.integers(0, 1000))
    def use_a_policy_that_fails(self, seed):
        self.only_fcfs = False
        try:
            self.sim.scheduler.use(Unsound(seed))
        except (TypeError, ZeroDivisionError):
            self.sim.check()  # nothing has changed

    @rule(budget=st.integers(1, 16))
    def change_the_budget(self, budget):
        self.sim.scheduler.max_num_batched_tokens = budget

    @rule(sample=st.integers(0, 12))
    def fail_a_sample(self, sample):
        self.sim.runner.fail_samples = {sample}
        self.sim.step()
        self.sim.runner.fail_samples = set()

    @rule(often=rarely)
    def fail_a_step(self, often):
        self.sim.runner.fail_launch = often
        self.sim.step()
        self.sim.runner.fail_launch = False

    @rule(often=rarely)
    def fail_a_step_on_which_another_was_built(self, often):
        if often:
            self.sim.abandoned()

    @invariant()
    def holds(self):
        if hasattr(self, "sim"):
            self.sim.check()

    def _patience(self):
        if self.only_fcfs:
            self.sim.check_patience()

    def teardown(self):
        if hasattr(self, "sim") and self.sim.sound:
            self.sim.drain()


phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
common = {"deadline": None, "suppress_health_check": list(HealthCheck), "phases": phases}

TestSample = pytest.mark.timeout(300)(SchedulerMachine.TestCase)
TestSample.settings = settings(max_examples=300, stateful_step_count=40, derandomize=True, **common)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_at_length_and_at_random():
    operations = 0

    class Counted(SchedulerMachine):
        @invariant()
        def counts(self):
            nonlocal operations
            operations += 1

    run_state_machine_as_test(Counted, settings=settings(max_examples=1000, stateful_step_count=60, derandomize=False, **common))
    assert operations >= 10_000


@pytest.mark.slow
def test_a_thousand_storms():
    assert sum(storm(seed).operations for seed in range(1000, 2000)) > 100_000
