"""What an engine can be told, and what it says to the rest."""

import math
import pathlib

import pytest
import torch

from nbengine import Engine
from nbengine.config import EngineConfig
from nbengine.policy import Policy, StaticBatching

BAD = {
    "misspelt": ({"max_modellen": 5}, TypeError, "unknown engine option 'max_modellen'; did you mean 'max_model_len'"),
    "unknown": ({"xyzzy": 5}, TypeError, "unknown engine option 'xyzzy'"),
    "misspelt vLLM name": ({"tensor_parallel": 1}, TypeError, "did you mean 'tensor_parallel_size'"),
    "unbuilt": ({"tensor_parallel_size": 2}, ValueError, "tensor_parallel_size=2 is not supported yet; leave it at 1"),
    "compiled": ({"compilation_config": 3}, ValueError, "leave it at None; cuda_graphs=False does without CUDA graphs"),
    "scheduled": ({"async_scheduling": False}, ValueError, "leave it at None; overlap=False plans"),
    "overridden": ({"hf_overrides": {"a": 1}}, ValueError, "leave it at None; change config.json in a copy of the model's folder"),
    "captured": ({"max_seq_len_to_capture": 4096}, ValueError, "leave it at None; cuda_graphs=False"),
    "named": ({"served_model_name": "x"}, ValueError, r"leave it at None; engine.serve\(served_model_name=...\) takes it"),
    "quantised": ({"quantization": "awq"}, ValueError, "quantization='awq' is not supported yet; leave it at None"),
    "dtype": ({"dtype": "int8"}, ValueError, "dtype must be one of 'auto', 'float32'"),
    "dtype's type": ({"dtype": 32}, ValueError, "dtype must be one of"),
    "load_format": ({"load_format": "pt"}, ValueError, "load_format must be one of"),
    "model_impl": ({"model_impl": "vllm"}, ValueError, "model_impl must be one of"),
    "generation_config": ({"generation_config": "/some/folder"}, ValueError, "generation_config must be one of 'auto', 'vllm'"),
    "device": ({"device": "gpu"}, ValueError, "device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not 'gpu'"),
    "no length": ({"max_model_len": 0}, ValueError, "max_model_len must be at least 1"),
    "length as text": ({"max_model_len": "8k"}, TypeError, "max_model_len must be a whole number, not '8k'"),
    "length as a fraction": ({"max_model_len": 10.5}, TypeError, "max_model_len must be a whole number"),
    "length is True": ({"max_model_len": True}, TypeError, "max_model_len must be a whole number"),
    "block_size": ({"block_size": -16}, ValueError, "block_size must be at least 1"),
    "no block_size": ({"block_size": None}, TypeError, "block_size must be a whole number"),
    "share of zero": ({"gpu_memory_utilization": 0}, ValueError, "above 0 and at most 1"),
    "share of NaN": ({"gpu_memory_utilization": math.nan}, ValueError, "above 0 and at most 1"),
    "share as percent": ({"gpu_memory_utilization": 90}, ValueError, "above 0 and at most 1"),
    "share as text": ({"gpu_memory_utilization": "0.9"}, TypeError, "gpu_memory_utilization must be a number"),
    "a flag": ({"enable_prefix_caching": "yes"}, TypeError, "enable_prefix_caching must be True or False"),
    "seed": ({"seed": "x"}, TypeError, "seed must be a whole number"),
    "trace": ({"trace_steps": -1}, ValueError, "trace_steps must be at least 0"),
    "policy": ({"scheduling_policy": "random"}, ValueError, "scheduling_policy must be one of"),
    "policy's type": ({"scheduling_policy": int}, ValueError, "scheduling_policy must be one of"),
    "ops": ({"ops": ["linear"]}, TypeError, "ops must be a dict"),
    "parallel is True": ({"tensor_parallel_size": True}, ValueError, "tensor_parallel_size=True is not supported yet; leave it at 1"),
    "lora is 0": ({"enable_lora": 0}, ValueError, "enable_lora=0 is not supported yet; leave it at False"),
    "tokenizer": ({"tokenizer": 5}, TypeError, "tokenizer must be a string"),
    "template": ({"chat_template": 5}, TypeError, "chat_template must be a string"),
    "revision": ({"revision": 1.0}, TypeError, "revision must be a string"),
    "bytes": ({"kv_cache_memory_bytes": "1G"}, TypeError, "kv_cache_memory_bytes must be a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused_before_anything_is_looked_for(case):
    options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        EngineConfig.of("/nowhere", **options)
    with pytest.raises(error, match=message):
        Engine("/nowhere", **options)


@pytest.mark.parametrize("model", [None, 5, ["tales"], b"tales"])
def test_a_model_is_a_name_or_a_folder(model):
    with pytest.raises(TypeError, match="model must be a folder, a hub id or 'tales'"):
        Engine(model)


def test_neutral_values_of_vllms_names_are_taken():
    config = EngineConfig.of(
        "m",
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        quantization=None,
        kv_cache_dtype="auto",
        swap_space=0,
        enable_lora=False,
        disable_log_stats=True,
        tokenizer_mode="auto",
        enable_sleep_mode=True,
        async_scheduling=True,
        compilation_config={},
        max_seq_len_to_capture=8192,
        hf_overrides=None,
        served_model_name=None,
        trust_remote_code=True,
        enforce_eager=True,
        max_num_seqs=4,
    )
    assert config.max_num_seqs == 4
    assert not hasattr(config, "tensor_parallel_size")


def test_values_come_in_their_usual_forms(tmp_path):
    assert EngineConfig.of("m", dtype=torch.bfloat16).dtype == "bfloat16"
    assert EngineConfig.of("m", dtype="half").dtype == "float16"
    assert EngineConfig.of("m", dtype="float").dtype == "float32"
    assert EngineConfig.of(tmp_path, tokenizer=pathlib.Path("t")).tokenizer == "t"
    assert EngineConfig.of("m", device=torch.device("cpu")).device == "cpu"
    assert EngineConfig.of("m", device="cuda:1").device == "cuda:1"
    assert EngineConfig.of("m", scheduling_policy=StaticBatching).scheduling_policy is StaticBatching
    assert isinstance(EngineConfig.of("m", scheduling_policy=Policy()).scheduling_policy, Policy)


def test_what_it_turned_out_to_be_is_told(make_engine, tiny):
    engine = make_engine(tiny.folder, max_num_seqs=7, max_num_batched_tokens=99, max_model_len=None)
    info = engine.info
    assert (info.architecture, info.implementation) == ("LlamaForCausalLM", "nbengine")
    assert (info.device, info.dtype, info.vocab_size) == ("cpu", "float32", 320)
    assert (info.max_model_len, info.max_num_seqs, info.max_num_batched_tokens) == (2048, 7, 99)
    assert info.eos_token_ids == (1,)
    assert info.parameters == sum(p.numel() for p in tiny.model.parameters())
    assert "EngineInfo(" in repr(info)
    assert "EngineConfig(" in repr(engine.config)


def test_a_dtype_is_obeyed(make_engine):
    engine = make_engine(dtype="bfloat16")
    assert engine.info.dtype == "bfloat16"
    assert engine.generate("x")[0].finished


def test_dummy_weights_need_no_files(tiny, make_engine, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tiny.folder / name).read_bytes())
    assert make_engine(tmp_path, load_format="dummy").generate("x")[0].finished


def test_a_tokenizer_of_its_own(tiny, make_engine, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny.folder / name).read_bytes())
    engine = make_engine(tmp_path, tokenizer=tiny.folder)
    assert engine.generate("hello")[0].prompt_token_ids == engine.get_tokenizer().encode("hello")
