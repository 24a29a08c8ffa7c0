"""What a plan promises is what an engine then is."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from nbengine import Engine
from nbengine.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from nbengine.hub import resolve_model
from nbengine.model_plan import UNTRIED, plan_model
from nbengine.models.checkpoint import Checkpoint

GIB = 1 << 30
SMALL = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 96, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {name: value for name, value in SMALL.items() if name not in {"intermediate_size", "num_key_value_heads"}}
GEMMA2 = {**SMALL, "head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 24}

MODELS = {
    "llama with biases": ("Llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "llama yarn": (
        "Llama",
        {**SMALL, "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "qwen3, tied": ("Qwen3", {**SMALL, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen2, upper layers slide": ("Qwen2", {**SMALL, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "gemma2": ("Gemma2", GEMMA2),
    "mistral": ("Mistral", {**SMALL, "sliding_window": 13}),
    "phi3": ("Phi3", {**SMALL, "sliding_window": 21}),
    "olmo2, transformers' code": ("Olmo2", SMALL),
    "gpt2, transformers' code": ("GPT2", GPT2),
    "falcon, one key head": ("Falcon", FALCON),
    "falcon, new": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon, all heads": ("Falcon", {**FALCON, "multi_query": False, "parallel_attn": False}),
    "mixtral, merged experts": ("Mixtral", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
WINDOWS = {"qwen2, upper layers slide": ((9, 2),), "gemma2": ((10, 2),), "mistral": ((13, 3),), "phi3": ((21, 3),)}


def load_hub_tests():
    """The hub that is a server in another file of tests."""
    spec = importlib.util.spec_from_file_location("hub_for_plans", Path(__file__).parent / "test_hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub = load_hub_tests().hub


def write_config(folder, family, values):
    config = getattr(transformers, f"{family}Config")(**values)
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(folder)
    return folder


def agrees(plan, info):
    assert {name: getattr(plan, name) for name in ("architecture", "implementation", "parameters", "dtype", "device")} == {
        name: getattr(info, name) for name in ("architecture", "implementation", "parameters", "dtype", "device")
    }
    assert (plan.max_model_len, plan.max_num_seqs) == (info.max_model_len, info.max_num_seqs)
    memory = info.memory
    assert (plan.weights, plan.block_bytes) == (memory.weights, memory.block_bytes)
    assert (plan.num_blocks, plan.kv_cache) == (memory.num_blocks, memory.kv_cache)
    assert plan.kv_per_token * plan.block_size == plan.block_bytes
    return True


SIZES = {
    "bytes for the cache": {"kv_cache_memory_bytes": 3 << 20, "max_num_seqs": 5},
    "a number of blocks": {"num_gpu_blocks_override": 21, "block_size": 8},
    "fewer than the model's length": {"num_gpu_blocks_override": 2},
    "what can be of use": {"max_num_seqs": 3, "max_model_len": 50},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_is_what_its_plan_says(tmp_path, name, dtype):
    folder = write_config(tmp_path, *MODELS[name])
    config = {"dtype": dtype, "load_format": "dummy", "skip_tokenizer_init": True, "kv_cache_memory_bytes": 3 << 20, "max_num_seqs": 5}
    plan = plan_model(folder, **config)
    with Engine(folder, **config) as engine:
        assert agrees(plan, engine.info)
    assert plan.layers == 3
    assert plan.windows == WINDOWS.get(name, ())
    assert (UNTRIED in plan.notes) == (plan.implementation == "transformers")
    assert plan.fits
    assert plan.download == 0


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_tales_is_what_its_plan_says(sizes, dtype):
    plan = plan_model("tales", dtype=dtype, **sizes)
    with Engine("tales", dtype=dtype, **sizes) as engine:
        assert agrees(plan, engine.info)
        assert plan.num_blocks == engine.stats()["blocks_total"]


@pytest.mark.parametrize("family", ["Llama", "Olmo2"])
def test_weights_on_disk_are_believed_over_the_config(tmp_path, family):
    config = getattr(transformers, f"{family}Config")(**SMALL)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    own_head = plan_model(tmp_path, num_gpu_blocks_override=9)
    written = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**written, "tie_word_embeddings": True}))  # beside a head of its own
    plan = plan_model(tmp_path, num_gpu_blocks_override=9)
    assert plan.weights == own_head.weights == 4 * sum(parameter.numel() for parameter in model.parameters())
    with Engine(tmp_path, num_gpu_blocks_override=9, skip_tokenizer_init=True) as engine:
        assert agrees(plan, engine.info)


def test_the_cache_is_sized_from_what_the_weights_will_leave(monkeypatch):
    weights = plan_model("tales", dtype="float32").weights
    free = [GIB]
    monkeypatch.setattr("nbengine.memory.free_memory", lambda _: free[0])
    monkeypatch.setattr("nbengine.model_plan.free_memory", lambda _: free[0])
    plan = plan_model("tales", dtype="float32")
    assert plan.free == GIB
    assert plan.kv_cache == (GIB - weights) // 4 // plan.block_bytes * plan.block_bytes
    free[0] -= weights  # as an engine finds it, its weights in place
    with Engine("tales", dtype="float32") as engine:
        assert agrees(plan, engine.info)


def test_sequences_are_counted_in_whole_blocks():
    plan = plan_model("tales", num_gpu_blocks_override=188, max_model_len=1000, block_size=16)
    assert plan.sequences == ((512, 5), (1000, 2))  # 32 and 63 blocks each
    assert plan.kv_tokens == 3008
    assert "2 of max_num_seqs=256 sequences fit at once when each has 1000 tokens" in plan.notes[0]
    assert plan_model("tales", num_gpu_blocks_override=200, max_num_seqs=2, max_model_len=512).sequences == ((512, 2),)
    assert plan_model("tales", num_gpu_blocks_override=200, max_num_seqs=2, max_model_len=512).notes == ()


LARGE = {
    "Llama": {**SMALL, "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
    "Olmo2": {**SMALL, "vocab_size": 100352, "hidden_size": 5120, "intermediate_size": 27648, "num_attention_heads": 40},
}


@pytest.mark.parametrize("family", LARGE)
def test_nothing_is_allocated_for_a_plan(tmp_path, monkeypatch, family):
    folder = write_config(tmp_path, family, {**LARGE[family], "num_hidden_layers": 80, "num_key_value_heads": 8})
    monkeypatch.setattr("nbengine.model_plan.free_memory", lambda _: 4000 * GIB)
    plan = plan_model(folder, dtype="bfloat16", load_format="dummy")
    assert plan.weights > 60 * GIB  # what no machine of these tests has
    assert plan.kv_per_token == 2 * 80 * 8 * 128 * 2
    assert plan.fits


def test_no_weight_is_read_for_a_plan(monkeypatch):
    def read(*_, **__):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Checkpoint, "read_steps", read)
    assert plan_model("tales").fits


def test_a_plan_that_imports_torch_leaves_its_threads_as_an_engine_wants_them():
    script = """if True:
        import os, sys
        from nbengine.model_plan import plan_model
        assert "torch" not in sys.modules
        plan_model("tales")
        assert os.environ["GOMP_SPINCOUNT"] == "1000"
    """
    environment = {name: value for name, value in os.environ.items() if name not in {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)


def test_a_plan_of_tales_takes_less_than_a_second():
    def taken():
        began = time.perf_counter()
        plan_model("tales")
        return time.perf_counter() - began

    assert min(taken() for _ in range(3)) < 1


def test_what_does_not_fit_says_what_to_change(monkeypatch):
    monkeypatch.setattr("nbengine.model_plan.free_memory", lambda _: 40 << 20)
    plan = plan_model("tales", dtype="float32")
    assert not plan.fits
    assert plan.problems[0].startswith("the weights take 60.0 MiB and 40.0 MiB are free on cpu")
    assert plan.problems[0].endswith("or pass dtype='bfloat16' (30.0 MiB)")
    assert (plan.num_blocks, plan.sequences[-1]) == (0, (2048, 0))
    assert plan_model("tales", dtype="bfloat16").fits
    assert "dtype=" not in plan_model("tales", dtype="float16", block_size=1 << 20).problems[0]


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"num_gpu_blocks_override": 10**9}, MemoryError),
        ({"kv_cache_memory_bytes": 100}, MemoryError),
        ({"num_gpu_blocks_override": 3, "max_model_len": 100}, ValueError),
    ],
)
def test_a_plan_says_in_its_problems_what_loading_would_raise(config, error):
    with pytest.raises(error) as caught:
        Engine("tales", **config)
    (problem,) = plan_model("tales", **config).problems

    def same(message):
        return re.sub(r"[\d.]+ GiB are free", "", str(message))  # others on the machine allocate and free at the same time

    assert same(problem) == same(caught.value)


def quantised(folder):
    write_config(folder, "Llama", SMALL)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))


def without_config(folder):
    (folder / "tokenizer.json").write_text("{}")


def without_a_tensor(folder):
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))


ERRORS = {
    "no weights": (lambda folder: write_config(folder, "Llama", SMALL), {}, CheckpointError),
    "a tensor missing": (without_a_tensor, {}, CheckpointError),
    "quantised": (quantised, {"load_format": "dummy"}, UnsupportedModelError),
    "quantised, for transformers": (quantised, {"load_format": "dummy", "model_impl": "transformers"}, UnsupportedModelError),
    "no config": (without_config, {}, ModelNotFoundError),
    "no spec": (
        lambda folder: write_config(folder, "Olmo2", SMALL),
        {"load_format": "dummy", "model_impl": "nbengine"},
        UnsupportedModelError,
    ),
    "longer than the model": (
        lambda folder: write_config(folder, "Llama", SMALL),
        {"load_format": "dummy", "max_model_len": 97},
        ValueError,
    ),
    "an unknown option": (lambda folder: write_config(folder, "Llama", SMALL), {"max_len": 3}, TypeError),
}


@pytest.mark.parametrize("name", ERRORS)
def test_a_plan_fails_as_loading_does(tmp_path, name):
    make, config, error = ERRORS[name]
    make(tmp_path)
    with pytest.raises(error) as loading:
        Engine(tmp_path, skip_tokenizer_init=True, **config)
    with pytest.raises(error) as planning:
        plan_model(tmp_path, **config)
    assert str(planning.value) == str(loading.value)


def test_a_model_without_attention_is_refused(tmp_path):
    write_config(tmp_path, "Mamba", {"vocab_size": 131, "hidden_size": 48, "num_hidden_layers": 2})
    with pytest.raises(UnsupportedModelError, match="has no attention heads in its config"):
        plan_model(tmp_path, load_format="dummy")


def test_a_model_that_is_nowhere_is_not_found(tmp_path):
    with pytest.raises(ModelNotFoundError, match="there is no folder"):
        plan_model(tmp_path / "nothing")


def test_a_device_can_be_given_in_both_ways():
    assert plan_model("tales", devices="cpu").device == plan_model("tales", devices=[torch.device("cpu")]).device == "cpu"
    with pytest.raises(TypeError, match="not both"):
        plan_model("tales", devices="cpu", device="cpu")
    with pytest.raises(ValueError, match="devices names 2"):
        plan_model("tales", devices=["cpu", "cpu"])
    with pytest.raises(ValueError, match="torch sees no GPU"):
        plan_model("tales", devices="cuda:0")


def on_the_hub(hub):
    config = transformers.LlamaConfig(**SMALL)
    config.architectures = ["LlamaForCausalLM"]
    hub.files["config.json"] = config.to_json_string().encode()
    return hub


def test_of_a_hub_model_only_the_small_files_are_fetched(hub):
    on_the_hub(hub)
    plan = plan_model("org/model", num_gpu_blocks_override=9)
    assert plan.architecture == "LlamaForCausalLM"
    assert plan.download == len(hub.files["model.safetensors"])
    assert not any(hub.gets(name) for name in hub.files if name.endswith((".safetensors", ".bin", ".gguf")))
    assert "1000.0 KiB are not on this machine yet" in repr(plan)


def test_a_hub_model_without_safetensors_is_refused(hub):
    on_the_hub(hub)
    del hub.files["model.safetensors"], hub.files["consolidated.safetensors"]
    with pytest.raises(ModelNotFoundError, match=r"no safetensors weights \(it has \.bin, \.gguf\)"):
        plan_model("org/model")


def test_a_hub_model_that_is_here_and_damaged_is_not_called_a_download(hub):
    on_the_hub(hub)
    resolve_model("org/model")  # its weights are no safetensors
    with pytest.raises(CheckpointError, match="is damaged"):
        plan_model("org/model")


def test_offline_a_model_without_its_weights_here_is_refused(hub, monkeypatch):
    on_the_hub(hub)
    plan_model("org/model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotFoundError, match="is not complete in"):
        plan_model("org/model")


def test_an_unknown_model_is_explained(hub):
    with pytest.raises(ModelNotFoundError, match="is not on the hub"):
        plan_model("org/other")


def test_a_plan_shows_itself_as_aligned_lines():
    first, *lines = repr(plan_model("tales", dtype="bfloat16", num_gpu_blocks_override=64, max_model_len=512)).splitlines()
    assert first == "<ModelPlan tales>"
    starts = {len(line) - len(line[17:].lstrip()) for line in lines}
    assert starts == {17}
    assert lines[0].split(maxsplit=1)[1].startswith("Qwen3ForCausalLM through nbengine's own decoder, 15.7 M parameters, 9 layers")
    assert lines[2] == "  KV per token   4.5 KiB, 72.0 KiB a block of 16"
    assert lines[3] == "  KV cache       4.5 MiB: 64 blocks, 1,024 tokens"
    assert lines[5] == "  at once        2 sequences of 512"
    assert "1 sequence of 2,048" in repr(plan_model("tales", num_gpu_blocks_override=128))


def test_html_is_escaped_and_leaves_colours_to_the_theme(tmp_path):
    folder = write_config(tmp_path / "<b>&", "Llama", SMALL)
    shown = plan_model(folder, load_format="dummy")._repr_html_()
    assert "<b>" not in shown
    assert "&lt;b&gt;&amp;" in shown
    assert shown.startswith("<table")
    assert "#" not in shown.replace("&#x27;", "")


def test_a_plan_is_plain_values():
    plan = plan_model("tales", max_model_len=600, num_gpu_blocks_override=99)
    given = plan.to_dict()
    assert json.loads(json.dumps(given)) == given
    assert given["sequences"] == [[512, 3], [600, 2]]
    assert given["fits"] is True
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.weights = 3
