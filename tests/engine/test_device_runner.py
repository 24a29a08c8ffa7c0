"""The runner for GPUs, on a CPU with the reference ops: tokens that only the device knows, steps launched ahead, requests with wishes."""

from __future__ import annotations

import itertools
from collections import deque
from unittest.mock import MagicMock

import pytest
import torch
from runner_cases import WISHES, tokens

from nbengine import Engine, SamplingParams, startup
from nbengine.device_runner import DeviceRunner
from nbengine.ops import OP_NAMES
from nbengine.residence import Residence
from nbengine.step_graphs import StepGraphs

PROMPTS = ["Once upon a time", "The fox", "The king had three sons, and", "In the middle of the forest there stood"]


@pytest.fixture(params=[True, False], ids=["overlapped", "step by step"])
def device_engine(request, monkeypatch):
    """Makes engines on tales that run as on a GPU."""
    monkeypatch.setattr(startup, "_overlaps", lambda loaded: True)
    engines = []

    def make(**options):
        engine = Engine("tales", device="cpu", dtype="float32", max_model_len=256, overlap=request.param, **options)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def plain_engine():
    with Engine("tales", device="cpu", dtype="float32", max_model_len=256) as engine:
        yield engine


def forbid_the_last(output, logits):
    return logits.index_fill(0, torch.tensor(output[-1:], dtype=torch.long), -5.0)


@pytest.mark.parametrize("params", [*WISHES.values(), {"seed": 1, "logits_processors": [forbid_the_last]}], ids=[*WISHES, "processor"])
def test_it_gives_the_tokens_of_the_runner_for_cpus(device_engine, plain_engine, params):
    engine = device_engine()
    wishes = SamplingParams(max_tokens=40, **params)
    assert tokens(engine.generate(PROMPTS, wishes)) == tokens(plain_engine.generate(PROMPTS, wishes))
    assert engine.stats()["blocks_used"] == 0


def test_requests_of_every_kind_share_its_batches(device_engine, plain_engine):
    wishes = [
        SamplingParams(temperature=0, max_tokens=30, ignore_eos=True),
        SamplingParams(seed=2, max_tokens=9, repetition_penalty=1.2),
        SamplingParams(seed=4, max_tokens=50, logprobs=3),
        SamplingParams(seed=4, max_tokens=20, n=2, prompt_logprobs=2),
    ]
    small = {"num_gpu_blocks_override": 24, "max_num_batched_tokens": 16, "max_num_seqs": 4}
    alone = [plain_engine.generate(prompt, wish)[0] for prompt, wish in zip(PROMPTS, wishes, strict=True)]
    together = device_engine(**small).generate(PROMPTS, wishes)
    assert tokens(together) == tokens(alone)
    for one, other in zip(together, alone, strict=True):
        for entries, expected in ((one.prompt_logprobs, other.prompt_logprobs), (one.outputs[0].logprobs, other.outputs[0].logprobs)):
            assert (entries is None) == (expected is None)
            for entry, wanted in zip(entries or [], expected or [], strict=True):
                if wanted is not None:
                    assert set(entry) == set(wanted)
                    assert [lp.logprob for lp in entry.values()] == pytest.approx([lp.logprob for lp in wanted.values()], abs=1e-4)


def test_steps_are_launched_ahead_while_nobody_can_end(monkeypatch):
    monkeypatch.setattr(startup, "_overlaps", lambda loaded: True)
    deepest = []
    original = DeviceRunner.sample

    def sample(self, mask=None):
        deepest.append(len(self._flights))
        sampled = original(self, mask)
        sampled.device_s = 0.004  # as a GPU would say
        return sampled

    monkeypatch.setattr(DeviceRunner, "sample", sample)
    monkeypatch.setattr(DeviceRunner, "ready", False)
    with Engine("tales", device="cpu", max_model_len=256, run_ahead_ms=20) as engine:
        engine.generate(PROMPTS[:2], SamplingParams(max_tokens=40, ignore_eos=True))
        assert max(deepest) == 6  # five ahead of the one that is waited for
        deepest.clear()
        engine.generate(PROMPTS[:2], SamplingParams(max_tokens=40, seed=1))
        assert max(deepest) == 2  # an end-of-sequence token may come: one
    with Engine("tales", device="cpu", max_model_len=256, run_ahead_ms=0) as engine:
        deepest.clear()
        engine.generate(PROMPTS[:2], SamplingParams(max_tokens=40, ignore_eos=True))
        assert max(deepest) == 2


def test_nothing_is_lost_when_two_steps_land_together(monkeypatch, plain_engine):
    monkeypatch.setattr(startup, "_overlaps", lambda loaded: True)
    original, turns = DeviceRunner.sample, itertools.count()

    def sample(self, mask=None):
        sampled = original(self, mask)
        sampled.device_s = 0.004
        return sampled

    monkeypatch.setattr(DeviceRunner, "sample", sample)
    monkeypatch.setattr(DeviceRunner, "ready", property(lambda self: bool(self._flights) and next(turns) % 3 == 0))
    wishes = [SamplingParams(max_tokens=10 + 5 * i, ignore_eos=True, temperature=0) for i in range(4)]
    with Engine("tales", device="cpu", dtype="float32", max_model_len=256) as engine:
        assert tokens(engine.generate(PROMPTS, wishes)) == tokens(plain_engine.generate(PROMPTS, wishes))
        stopped = SamplingParams(max_tokens=60, stop=["and"], n=2, seed=1)
        assert tokens(engine.generate(PROMPTS, stopped)) == tokens(plain_engine.generate(PROMPTS, stopped))


def test_pausing_stepping_and_sleeping_land_what_is_in_flight(device_engine):
    engine = device_engine()
    request = engine.submit(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True, temperature=0))
    next(iter(request))
    engine.pause()
    before = len(request.completions[0].token_ids)
    records = engine.step(3)
    assert [len(record.uids) for record in records] == [1, 1, 1]
    assert len(request.completions[0].token_ids) == before + 3
    engine.sleep()
    engine.wake_up()
    engine.resume()
    again = engine.generate(PROMPTS[0], SamplingParams(max_tokens=200, ignore_eos=True, temperature=0))[0]
    assert request.result().outputs[0].token_ids == again.outputs[0].token_ids


def _holds_a_tensor(thing, seen=None):
    """In its attributes or what it is made of, as deep as nbengine's own objects go."""
    seen = set() if seen is None else seen
    if isinstance(thing, torch.Tensor) or id(thing) in seen:
        return isinstance(thing, torch.Tensor)
    seen.add(id(thing))
    parts = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list | tuple | set | deque) else ()
    if type(thing).__module__.startswith("nbengine."):
        parts = [getattr(thing, name, None) for name in (*vars(type(thing)).get("__slots__", ()), *getattr(thing, "__dict__", ()))]
    return any(_holds_a_tensor(part, seen) for part in parts)


@pytest.mark.parametrize("level", [1, 2])
def test_a_sleeping_runner_keeps_no_tensor_but_the_weights_and_wakes_when_there_is_memory(device_engine, monkeypatch, level):
    engine, params = device_engine(), SamplingParams(max_tokens=40, temperature=0.8, seed=3, presence_penalty=0.5, ignore_eos=True)
    expected = tokens(engine.generate(PROMPTS, params))
    request = engine.submit(PROMPTS[0], params)
    next(iter(request))
    original, kept = DeviceRunner.sleep, []

    def sleep(self, level):
        original(self, level)
        kept.append({name for name, value in vars(self).items() if _holds_a_tensor(value)})

    monkeypatch.setattr(DeviceRunner, "sleep", sleep)
    engine.sleep(level)
    assert kept == [{"loaded", "residence"} if level == 1 else set()]
    with monkeypatch.context() as patch:
        patch.setattr("nbengine.device_runner.SampleInputs.empty", MagicMock(side_effect=MemoryError("none left")))
        with pytest.raises(MemoryError, match="none left"):
            engine.wake_up()
    engine.wake_up()
    assert request.result().outputs[0].token_ids == expected[0][0]
    assert tokens(engine.generate(PROMPTS, params)) == expected


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("no room")])
def test_a_runner_that_could_not_fall_asleep_goes_on(device_engine, monkeypatch, error):
    engine, params = device_engine(), SamplingParams(max_tokens=10, temperature=0)
    expected = tokens(engine.generate(PROMPTS, params))
    with monkeypatch.context() as patch:
        patch.setattr(Residence, "sleep", MagicMock(side_effect=error))
        with pytest.raises(MemoryError, match="no room"):
            engine.sleep()
    assert tokens(engine.generate(PROMPTS, params)) == expected


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's random numbers
def test_a_step_may_be_padded_to_more_rows_than_it_may_have_tokens(tiny, monkeypatch):
    """With Triton's kernels as their interpreter runs them, and steps of the shapes of graphs that are not captured."""
    used = set()

    class Uncaptured(StepGraphs):
        def run(self, shape, body):
            used.add(shape)
            body()

    made = DeviceRunner.__init__

    def make(self, loaded, **options):
        made(self, loaded, **options)
        self.graphs = Uncaptured(options["max_rows"], 0, None)

    monkeypatch.setattr(startup, "_overlaps", lambda loaded: True)
    monkeypatch.setattr(DeviceRunner, "__init__", make)
    options = {"skip_tokenizer_init": True, "num_gpu_blocks_override": 64, "max_model_len": 64, "max_num_seqs": 32}
    prompts = [{"prompt_token_ids": [5 + i]} for i in range(17)]
    wishes = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    with Engine(tiny.folder, device="cpu", max_num_batched_tokens=20, ops=dict.fromkeys(OP_NAMES, "triton"), **options) as engine:
        found = engine.generate(prompts, wishes)
    assert (24, 24, True) in used
    assert [len(one.outputs[0].token_ids) for one in found] == [3] * 17
