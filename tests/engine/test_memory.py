"""How large the pool is made."""

import pytest
import torch

from nbengine import Engine
from nbengine.config import EngineConfig
from nbengine.memory import free_memory, plan_memory, size

CPU = torch.device("cpu")


def plan(monkeypatch, free, *, sequences=256, length=4096, block_bytes=1 << 20, **config):
    monkeypatch.setattr("nbengine.memory.free_memory", lambda _: free)
    return plan_memory(
        EngineConfig.of("m", **config), CPU, weights=1 << 20, block_bytes=block_bytes, max_model_len=length, max_num_seqs=sequences
    )


def test_a_share_of_what_is_free_is_taken(monkeypatch):
    found = plan(monkeypatch, 8 << 30)
    assert found.num_blocks == 2048  # a quarter: the rest is the user's
    assert found.kv_cache == 2 << 30
    assert found.free_before == 8 << 30


def test_no_more_than_can_be_of_use_is_taken(monkeypatch):
    assert plan(monkeypatch, 800 << 30, sequences=3, length=100).num_blocks == 3 * 7


def test_what_is_told_is_done(monkeypatch):
    assert plan(monkeypatch, 8 << 30, num_gpu_blocks_override=5).num_blocks == 5
    assert plan(monkeypatch, 8 << 30, kv_cache_memory_bytes=(7 << 20) + 5).num_blocks == 7
    assert plan(monkeypatch, 8 << 30, num_gpu_blocks_override=8000).num_blocks == 8000


def test_what_cannot_be_is_refused_with_advice(monkeypatch):
    with pytest.raises(MemoryError, match=r"8\.0 GiB are free on cpu: ask for less with num_gpu_blocks_override"):
        plan(monkeypatch, 8 << 30, num_gpu_blocks_override=9000)
    with pytest.raises(MemoryError, match=r"no KV block fits: one takes 1\.0 MiB, and 2\.0 MiB are free"):
        plan(monkeypatch, 2 << 20)
    with pytest.raises(MemoryError, match="no KV block fits: kv_cache_memory_bytes=100 is less than one takes, 1048576 bytes: raise it"):
        plan(monkeypatch, 8 << 30, kv_cache_memory_bytes=100)


def test_what_the_users_own_tensors_take_is_not_free():
    def taken():
        before = free_memory(CPU)
        tensor = torch.ones(1 << 30, dtype=torch.uint8)
        return before - free_memory(CPU), tensor

    assert any(taken()[0] > 256 << 20 for _ in range(12))  # others on the machine allocate and free at the same time
    assert free_memory(CPU) > 0


def test_a_container_has_only_what_its_limit_leaves(monkeypatch):
    monkeypatch.setattr("nbengine.memory._meminfo_available", lambda: 64 << 30)
    values = {"memory.max": 4 << 30, "memory.current": 3 << 30}
    monkeypatch.setattr("nbengine.memory._cgroup", lambda v2, v1: values[v2])
    monkeypatch.setattr("nbengine.memory._cgroup_inactive_file", lambda: 1 << 29)
    assert free_memory(CPU) == (1 << 30) + (1 << 29)
    values["memory.max"] = None
    assert free_memory(CPU) == 64 << 30
    values["memory.max"], values["memory.current"] = 1 << 30, 2 << 30
    assert free_memory(CPU) == 0


def test_the_pool_is_what_was_planned(tiny, make_engine):
    engine = make_engine(num_gpu_blocks_override=None, kv_cache_memory_bytes=1 << 20, max_model_len=None)
    memory = engine.info.memory
    assert memory.block_bytes == 2 * 16 * 2 * 8 * 4 * 2  # keys and values, tokens, heads, width, bytes, layers
    assert memory.num_blocks == (1 << 20) // memory.block_bytes == engine.stats()["blocks_total"]
    assert memory.weights == 4 * engine.info.parameters
    assert "KV cache 1.0 MiB" in repr(memory)


def test_a_model_longer_than_the_pool_is_cut_to_it(tiny, caplog):
    with Engine(tiny.folder, num_gpu_blocks_override=4) as engine:
        assert engine.info.max_model_len == 64
    assert "max_model_len is 64, what the KV cache holds, and not the model's 2048" in caplog.text


def test_sizes_are_readable():
    assert [size(n) for n in (5, 5 << 10, 5 << 20, (5 << 30) + (1 << 29))] == ["5 B", "5.0 KiB", "5.0 MiB", "5.5 GiB"]
