"""How many threads a step gets: the quicker choice for one token, all of them for more, and nobody else's changed."""

from __future__ import annotations

from nbengine.step_threads import TRIES, TRY_AGAIN, StepThreads


class Machine:
    """A clock that a step moves by what its thread count costs."""

    def __init__(self, monkeypatch, costs: dict[int, float]) -> None:
        monkeypatch.setattr("torch.get_num_threads", lambda: 2)
        self.costs, self.now, self.count = costs, 0.0, 0
        self.used: list[int] = []
        self.threads = StepThreads(lambda: self.now, self.choose)

    def choose(self, count: int) -> None:
        self.count = count

    def step(self, tokens: int = 1, times: int = 1) -> list[int]:
        self.used = []
        for _ in range(times):
            with self.threads.timed(tokens):
                self.now += self.costs[self.count]
            self.used.append(self.count)
        return self.used


def test_both_choices_are_tried_and_the_quicker_is_kept(monkeypatch):
    for quicker, costs in ((1, {1: 1.0, 2: 1.5}), (2, {1: 1.5, 2: 1.0})):
        machine = Machine(monkeypatch, costs)
        assert machine.step(times=2 * TRIES) == [2] * TRIES + [1] * TRIES
        assert machine.step(times=TRY_AGAIN) == [quicker] * TRY_AGAIN


def test_a_choice_is_changed_when_the_machine_has_changed(monkeypatch):
    machine = Machine(monkeypatch, {1: 1.0, 2: 1.5})
    machine.step(times=2 * TRIES + 10)
    machine.costs = {1: 3.0, 2: 1.5}
    assert set(machine.step(times=TRY_AGAIN - 10)) == {1}
    assert machine.step(times=TRIES) == [2] * TRIES
    assert set(machine.step(times=TRY_AGAIN)) == {2}


def test_one_slow_step_decides_nothing(monkeypatch):
    machine = Machine(monkeypatch, {1: 1.0, 2: 1.5})
    machine.step(times=TRIES)
    machine.costs[1] = 50.0
    machine.step()
    machine.costs[1] = 1.0
    machine.step(times=TRIES - 1)
    assert machine.step() == [1]


def test_steps_with_more_tokens_use_every_thread_and_are_not_timed(monkeypatch):
    machine = Machine(monkeypatch, {1: 1.0, 2: 1.5})
    machine.step(times=2 * TRIES)
    assert machine.step(tokens=2, times=3) == [2, 2, 2]
    assert machine.step() == [1]


def test_the_users_own_threads_keep_their_count(script):
    code, out, err = script(
        """
import threading, torch
from nbengine import Engine, SamplingParams
torch.set_num_threads(2)
with Engine("tales", num_gpu_blocks_override=64) as engine:
    for _ in range(3):
        engine.generate("Once", SamplingParams(max_tokens=9, ignore_eos=True))
        counts = [torch.get_num_threads()]
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        print(counts)
"""
    ).end()
    assert code == 0, err
    assert out.split("\n")[:3] == ["[2, 2]"] * 3
