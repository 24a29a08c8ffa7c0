"""What an error of a device is taken for, and what the engine does about it; the device is a stand-in here, a real one in tests/gpu."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from nbengine import Engine, SamplingParams, device_errors
from nbengine.device_errors import told_apart
from nbengine.device_runner import DeviceRunner
from nbengine.errors import DeviceLostError, DeviceMemoryError, EngineDeadError, RequestError
from nbengine.models.decoder import Decoder
from nbengine.residence import Residence
from nbengine.runner import LocalRunner

PARAMS = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
CUDA = torch.device("cuda")
PROMPT = "Once upon a time there was a fox and a crow who met in the forest. " * 3


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), DeviceMemoryError),
        (RuntimeError("CUDA error 2"), DeviceMemoryError),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), DeviceMemoryError),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), DeviceMemoryError),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), DeviceMemoryError),
        (RuntimeError("CUDA error 200"), RuntimeError),
        (RuntimeError(""), RuntimeError),
        (ValueError("out of memory"), ValueError),
    ],
)
@pytest.mark.parametrize("lost", [False, True])
def test_no_memory_is_told_from_what_is_lost_and_from_the_rest(monkeypatch, error, kind, lost):
    monkeypatch.setattr(device_errors, "_lost", lambda device: lost)
    lost = lost and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
    assert type(told_apart(error, CUDA)) is (DeviceLostError if lost else kind)


@pytest.mark.parametrize("asked", [lambda runner: runner.ready, lambda runner: runner.wait(0)])
def test_whoever_hears_first_that_the_gpu_is_lost_says_so(monkeypatch, asked):
    class Ended:
        @property
        def passed(self):
            raise RuntimeError("CUDA error 700")

    monkeypatch.setattr(device_errors, "_lost", lambda device: True)
    runner = DeviceRunner.__new__(DeviceRunner)
    runner.device, runner._flights = CUDA, deque([SimpleNamespace(slot=SimpleNamespace(ended=Ended()))])
    with pytest.raises(DeviceLostError, match="Restart the kernel"):
        asked(runner)


def test_an_engine_closes_on_a_gpu_that_is_lost_and_lets_nothing_go_there(monkeypatch, caplog):
    """To free a part of what lies there would end the process."""
    runners = []

    def lost(self):
        runners.append(weakref.ref(self))
        raise DeviceLostError("the GPU met an error. Restart the kernel")

    monkeypatch.setattr(LocalRunner, "close", lost)
    with Engine("tales", max_model_len=64, kv_cache_memory_bytes=1 << 22) as engine:
        engine.generate("Once", SamplingParams(max_tokens=1))
    assert engine.status == "closed"
    assert "Restart the kernel" in caplog.text
    del engine
    gc.collect()
    assert [runner() for runner in runners] != [None]


@pytest.mark.parametrize(
    ("place", "asked"),
    [
        ("nbengine.core.EngineCore.drain", lambda engine: engine.pause()),  # steps are in flight then
        ("nbengine.runner.LocalRunner.sleep", lambda engine: engine.sleep()),
        ("nbengine.runner.LocalRunner.resize", lambda engine: engine.resize_kv_cache(9)),
    ],
)
def test_whoever_asks_something_of_an_engine_whose_gpu_is_lost_is_told_and_not_left_waiting(monkeypatch, place, asked):
    with Engine("tales", max_model_len=64, kv_cache_memory_bytes=1 << 22) as engine:
        engine.generate("Once", PARAMS)
        monkeypatch.setattr(place, MagicMock(side_effect=DeviceLostError("the GPU met an error. Restart the kernel")))
        with pytest.raises(EngineDeadError, match="Restart the kernel"):
            asked(engine)
        with pytest.raises(EngineDeadError, match="Restart the kernel"):
            engine.generate("Twice", PARAMS)
        assert engine.status == "dead"


@pytest.mark.parametrize("kind", [DeviceRunner, LocalRunner])
@pytest.mark.parametrize("control", ["use", "resize", "sleep", "wake_up", "update_weights", "close"])
def test_what_changes_a_gpus_memory_tells_that_it_is_lost_before_it_lets_anything_go(monkeypatch, kind, control):
    monkeypatch.setattr(device_errors, "_lost", lambda device: True)
    stream = MagicMock()
    stream.synchronize.side_effect = RuntimeError("CUDA error: device-side assert triggered")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    runner = object.__new__(kind)
    runner.device = CUDA
    with pytest.raises(DeviceLostError, match="Restart the kernel"):
        getattr(runner, control)(*[] if control in {"wake_up", "close"} else [1])


@pytest.fixture
def failing(monkeypatch):
    """Have some calls of a runner's method find no memory; how often they did, and how often all that can be was given back."""
    seen = {"failed": 0, "freed": 0}

    def fail(method, times, least):
        original = getattr(LocalRunner, method)

        def found_none(self, *args):
            tokens = args[0].num_tokens if args else self._launched[0].num_tokens
            if tokens < least or seen["failed"] >= times:
                return original(self, *args)
            seen["failed"] += 1
            self._launched = None
            raise DeviceMemoryError("no memory for this")

        monkeypatch.setattr(LocalRunner, method, found_none)
        return seen

    free = LocalRunner.free
    monkeypatch.setattr(LocalRunner, "free", lambda self: seen.update(freed=seen["freed"] + 1) or free(self))
    return fail


@pytest.mark.parametrize("method", ["launch", "sample"])
@pytest.mark.parametrize("least", [1, 20], ids=["a small step", "a large step"])
def test_a_step_that_finds_no_memory_is_tried_again(failing, method, least):
    with Engine("tales", max_model_len=256, num_gpu_blocks_override=64, enable_prefix_caching=False) as engine:
        expected = engine.generate(PROMPT, PARAMS)[0].outputs[0].token_ids
        prompt = PROMPT if least > 1 else "Once"
        expected = expected if least > 1 else engine.generate("Once", PARAMS)[0].outputs[0].token_ids
        seen = failing(method, 1, least)
        assert engine.generate(prompt, PARAMS)[0].outputs[0].token_ids == expected
        assert seen == {"failed": 1, "freed": 1}
        assert engine.stats()["blocks_used"] == 0


def test_a_small_step_that_finds_none_once_more_ends_its_requests(failing):
    with Engine("tales", max_model_len=256, num_gpu_blocks_override=64) as engine:
        seen = failing("launch", 2, 1)
        with pytest.raises(RequestError, match="no memory for this"):
            engine.generate("Once", PARAMS)
        assert seen == {"failed": 2, "freed": 1}
        assert len(engine.generate("Once", PARAMS)[0].outputs[0].token_ids) == 12


def test_what_a_model_of_transformers_finds_is_told_apart_too(monkeypatch):
    with Engine("tales", max_model_len=256, num_gpu_blocks_override=64, model_impl="transformers") as engine:
        tried, inputs = [], LocalRunner._inputs

        def once(self, batch):
            tried.append(batch.num_tokens)
            if len(tried) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return inputs(self, batch)

        monkeypatch.setattr(LocalRunner, "_inputs", once)
        assert len(engine.generate(PROMPT, PARAMS)[0].outputs[0].token_ids) == 12
        assert tried[1] < tried[0]


def test_a_cache_that_does_not_fit_leaves_the_one_there_was():
    with Engine("tales", max_model_len=64, num_gpu_blocks_override=64) as engine:
        expected = engine.generate("Once", PARAMS)[0].outputs[0].token_ids
        with pytest.raises(MemoryError, match="does not fit; the engine keeps its 64"):
            engine.resize_kv_cache(10**9)
        assert engine.stats()["blocks_total"] == 64
        assert engine.generate("Once", PARAMS)[0].outputs[0].token_ids == expected


def test_an_engine_whose_weights_find_no_room_stays_awake(monkeypatch):
    """As on a GPU, whose weights would go to pinned main memory."""
    fall_asleep = Residence.sleep

    def sleep(self, level):
        real, self.device = self.device, SimpleNamespace(type="cuda")
        try:
            fall_asleep(self, level)
        finally:
            self.device = real

    def move(self, device):
        if device == torch.device("cpu"):
            raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Residence, "sleep", sleep)
    monkeypatch.setattr(Decoder, "move", move)
    with Engine("tales", max_model_len=64, num_gpu_blocks_override=64) as engine:
        with pytest.raises(MemoryError, match=r"no room for weights of .*sleep\(level=2\) drops them"):
            engine.sleep(1)
        assert engine.status == "idle"
        assert len(engine.generate("Once", PARAMS)[0].outputs[0].token_ids) == 12


def test_what_transformers_runs_cannot_be_asked_to_be_deterministic(monkeypatch):
    monkeypatch.setattr("nbengine.models.loading._invariant", lambda config, device: config.deterministic)
    with pytest.raises(ValueError, match="deterministic=True needs a model that nbengine's own code runs"):
        Engine("tales", model_impl="transformers", deterministic=True, num_gpu_blocks_override=64)


@pytest.mark.parametrize(
    ("error", "told"), [(torch.OutOfMemoryError("CUDA out of memory. Tried to"), False), (RuntimeError("a bug"), True)]
)
def test_a_load_goes_on_where_there_is_no_memory_to_capture_graphs(error, told, monkeypatch):
    """Captured from the largest on; what is there by then is given back."""
    captured, freed = [], []
    monkeypatch.setattr(device_errors, "_lost", lambda device: False)

    def capture(shape, body):
        if shape[0] == 4:
            raise error
        captured.append(shape)

    runner = object.__new__(DeviceRunner)
    runner.device = SimpleNamespace(type="cuda")
    runner.ops = SimpleNamespace(capturable=True)
    runner.graphs = SimpleNamespace(sizes=[1, 2, 4, 8], capture=capture)
    runner._staging, runner._most = MagicMock(), (8, 64, 4)
    runner._send = runner._run_and_draw = lambda *about: None
    runner.free = lambda: freed.append(list(captured))
    with pytest.raises(RuntimeError, match="a bug") if told else nullcontext():
        runner.warm_up()
    assert captured == [(1, 16, True), (1, 1, True), (8, 8, True)]
    assert freed == ([] if told else [captured])
    assert runner._staging.give_back.called is not told
