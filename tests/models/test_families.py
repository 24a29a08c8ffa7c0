"""Every family's decoder against transformers' generate: the same greedy tokens, the same log-probabilities."""

import pytest
import torch

from nbengine.errors import CheckpointError, UnsupportedModelError
from nbengine.models.families import spec_from_config, supported_architectures

TOLERANCE = 1e-4


def prompt_of(length, seed=0):
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(1000 * seed + length)).tolist()


def difference(got, expected):
    """The largest between log-probabilities; infinite where a token differs or something is NaN."""
    if got[0] != expected[0]:
        return float("inf")
    return float((got[1] - expected[1]).abs().max().nan_to_num(nan=float("inf")))


@pytest.mark.parametrize("length", [1, 31, 75])  # 75: beyond every window and every original context
def test_greedy_tokens_equal_transformers_generate(family, length, make_pair):
    pair = make_pair(family)
    assert difference(pair.paged().generate(prompt_of(length), 5), pair.expected(prompt_of(length), 5)) < TOLERANCE


def test_chunks_and_block_sizes_change_nothing(family, make_pair):
    pair, prompt = make_pair(family), prompt_of(67)
    expected = pair.expected(prompt, 3)
    for block_size, chunk in ((1, 67), (16, 19), (256, 8)):
        assert difference(pair.paged(block_size).generate(prompt, 3, chunk), expected) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 40, 41, 64, 100])
def test_sweep_of_lengths_chunks_and_block_sizes(family, length, make_pair):
    pair, prompt = make_pair(family), prompt_of(length, 1)
    outgrows = family == "phi3 longrope" and length <= 40
    expected = pair.expected_without_cache(prompt, 8) if outgrows else pair.expected(prompt, 8)
    for block_size in (1, 16, 256):
        for chunk in (None, 1, 32):
            assert difference(pair.paged(block_size).generate(prompt, 8, chunk), expected) < TOLERANCE


def test_rows_of_every_kind_share_a_step_without_touching_each_other(family, make_pair):
    pair = make_pair(family)
    prompts = [prompt_of(length, 2) for length in (50, 3, 44, 20)]
    paged = pair.paged()
    rows = [paged.row(prompt) for prompt in prompts]
    paged.step([(rows[0], 49), (rows[1], 2)])
    together = paged.step([(rows[0], 1), (rows[2], 44), (rows[1], 1), (rows[3], 7)])  # two decodes, a prompt, a chunk
    for prompt, last in ((prompts[0], together[0]), (prompts[2], together[44]), (prompts[1], together[45])):
        alone = pair.paged().generate(prompt, 1)[1][0]
        assert (last - alone).abs().max() < 1e-5


# ── rotations that depend on the length ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("chunk", [None, 16])
def test_a_sequence_that_outgrows_the_original_context_still_equals_generate(chunk, make_pair):
    prompt = prompt_of(37)
    longrope, dynamic = make_pair("phi3 longrope"), make_pair("llama dynamic")
    assert difference(longrope.paged().generate(prompt, 8, chunk), longrope.expected_without_cache(prompt, 8)) < TOLERANCE
    assert difference(dynamic.paged().generate(prompt, 8, chunk), dynamic.expected(prompt, 8)) < TOLERANCE


@pytest.mark.parametrize(("name", "length"), [("phi3 longrope", 60), ("phi3 longrope", 20), ("llama dynamic", 60), ("llama dynamic", 37)])
def test_computing_a_preempted_sequence_again_gives_the_same(name, length, make_pair):
    pair, prompt = make_pair(name), prompt_of(length)
    tokens, logprobs = pair.expected(prompt, 8)
    paged, spec = pair.paged(), pair.decoder.spec
    row = paged.row(prompt)
    row.tokens += tokens[:7]
    row.anchor = spec.rope_anchor(length, len(row.tokens))
    assert (paged.prefill(row, 9) - logprobs[7]).abs().max() < TOLERANCE


def test_regimes_tell_apart_the_sequences_that_may_not_share_keys(make_pair):
    long = make_pair("phi3 longrope").decoder.spec
    assert long.rope_boundary == 40
    assert [long.rope_regime(long.rope_anchor(10, known)) for known in (1, 40, 41, 90)] == [0, 0, 1, 1]
    dynamic = make_pair("llama dynamic").decoder.spec
    assert dynamic.rope_boundary is None
    assert [dynamic.rope_regime(dynamic.rope_anchor(prompt, 99)) for prompt in (1, 40, 41, 90)] == [0, 0, 41, 90]
    plain = make_pair("qwen2").decoder.spec
    assert plain.rope_boundary is None
    assert plain.rope_regime(plain.rope_anchor(10, 90)) == 0


def test_without_lengths_a_rows_context_is_taken(make_pair):
    pair, prompt = make_pair("phi3 longrope"), prompt_of(60)
    paged = pair.paged()
    forward = pair.decoder.forward

    def without(inputs, caches):
        inputs.lengths = None
        return forward(inputs, caches)

    pair.decoder.forward = without
    try:
        assert difference(paged.generate(prompt, 3), pair.expected(prompt, 3)) < TOLERANCE
    finally:
        del pair.decoder.forward


# ── planted faults ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama 2", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
        ("llama 3", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("llama yarn", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 14}),
        ("qwen2 upper layers slide", {"layer_types": ["sliding_attention"] * 3}),
        ("gemma2", {"sliding_window": 11}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma3", {"layer_types": ["full_attention"] * 4}),
        ("phi3 longrope", {"original_max_position_embeddings": 100}),
        ("llama dynamic", {"max_position_embeddings": 200}),
        ("qwen3", {"rms_norm_eps": 1e-1}),
    ],
    ids=str,
)
def test_a_misread_config_would_be_seen(name, changed, make_pair):
    expected = make_pair(name).expected(prompt_of(75), 2)
    assert difference(make_pair(name).paged().generate(prompt_of(75), 2), expected) < TOLERANCE
    assert difference(make_pair(name, **changed).paged().generate(prompt_of(75), 2), expected) > 10 * TOLERANCE


def test_a_swapped_page_would_be_seen(make_pair):
    pair, prompt = make_pair("mistral"), prompt_of(75)
    expected = pair.expected(prompt, 1)[1][0]
    for swap in (False, True):
        paged = pair.paged()
        row = paged.row(prompt)
        paged.step([(row, 74)])
        if swap:
            row.blocks[3], row.blocks[4] = row.blocks[4], row.blocks[3]
        assert ((paged.step([(row, 1)])[0] - expected).abs().max() < TOLERANCE) is not swap


# ── configs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def class_of(architecture):
    import transformers

    name = architecture.removesuffix("ForCausalLM")
    return getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")


@pytest.mark.parametrize("architecture", supported_architectures())
def test_missing_keys_take_the_familys_defaults(architecture):
    complete = {**class_of(architecture)().to_dict(), "architectures": [architecture]}
    assert spec_from_config({"architectures": [architecture], "model_type": complete["model_type"]}) == spec_from_config(complete)


OLD_DIALECT = {
    "Llama-3.1-8B": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "vocab_size": 128256,
        "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "attention_bias": False, "tie_word_embeddings": False,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    },
    "a linear Llama 2": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}, "torch_dtype": "float16"},
    "a dynamic Llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4096},
    "Mistral-7B-v0.1": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "max_position_embeddings": 32768, "rope_theta": 10000.0, "sliding_window": 4096},
    "Mistral-7B-v0.3": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "vocab_size": 32768},
    "Qwen2.5-7B with YaRN": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
        "num_hidden_layers": 28, "max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False, "rope_theta": 1e6,
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen2 with windows": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 8, "max_window_layers": 5, "sliding_window": 100, "use_sliding_window": True,
    },
    "Qwen3-0.6B": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": 4096, "rope_theta": 10000.0, "cache_implementation": "hybrid", "torch_dtype": "float32",
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 1152, "num_attention_heads": 4, "num_key_value_heads": 1,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "the text part of gemma-3-4b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "rope_theta": 1e6,
        "rope_local_base_freq": 10000.0, "sliding_window": 1024, "sliding_window_pattern": 3,
    },
    "Phi-3-mini-4k": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "sliding_window": 2047, "rope_scaling": None, "rope_theta": 10000.0},
    "Phi-3-mini-128k": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.1] * 48, "type": "longrope"},
    },
    "Phi-4-mini": {
        "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "tie_word_embeddings": True, "vocab_size": 200064,
        "rope_scaling": {"long_factor": [1.5] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    },
}  # fmt: skip


@pytest.mark.parametrize("config", OLD_DIALECT.values(), ids=OLD_DIALECT.keys())
def test_the_old_dialect_means_what_transformers_makes_of_it(config):
    import copy

    rewritten = {**class_of(config["architectures"][0])(**copy.deepcopy(config)).to_dict(), "architectures": config["architectures"]}
    assert "rope_parameters" in rewritten
    old, new = spec_from_config(config), spec_from_config(rewritten)
    assert old == new
    assert old.dtype == config.get("torch_dtype")


@pytest.mark.parametrize("first_name", ["su", "yarn"])
def test_longropes_first_names_are_understood(first_name):
    config = OLD_DIALECT["Phi-3-mini-128k"]
    assert spec_from_config({**config, "rope_scaling": {**config["rope_scaling"], "type": first_name}}) == spec_from_config(config)


def test_weights_name_every_tensor_of_the_checkpoint_once(family, make_pair):
    pair = make_pair(family)
    state = pair.model.state_dict()
    named = [source for weight in pair.decoder.spec.weights() for source in weight.sources]
    tied = {"lm_head.weight"} if pair.decoder.spec.tied_head else set()
    assert len(named) == len(set(named))
    assert set(named) == set(state) - tied
    assert pair.decoder.spec.parameter_count() == sum(state[name].numel() for name in named)
    for weight in pair.decoder.spec.weights():
        assert weight.parts == () or sum(weight.parts) == weight.shape[0]


def test_a_sliding_layer_says_so_to_the_cache(make_pair):
    assert [layer.window for layer in make_pair("gemma3").decoder.spec.cache_layers()] == [7, 7, None, 7]
    assert [layer.window for layer in make_pair("qwen2 upper layers slide").decoder.spec.cache_layers()] == [None, 9, 9]


def test_new_weights_are_copied_in_by_the_checkpoints_names(make_pair):
    pair = make_pair("qwen2")
    weights, before = pair.decoder.weights["layers.1.qkv"], pair.decoder.weights["layers.1.qkv"].clone()
    name = "model.layers.1.self_attn.k_proj.weight"
    try:
        pair.decoder.update_weights({name: torch.full((16, 48), 7.0)})
        assert (weights[48:64] == 7).all()
        assert torch.equal(weights[:48], before[:48])
        assert torch.equal(weights[64:], before[64:])
    finally:
        weights.copy_(before)
    with pytest.raises(CheckpointError, match=r"no weight 'model.layers.1.self_attn.K_proj.weight'; did you mean"):
        pair.decoder.update_weights({name.replace("k_proj", "K_proj"): weights[:16]})
    with pytest.raises(CheckpointError, match=r"has the shape \[16, 48\]"):
        pair.decoder.update_weights({"model.norm.weight": torch.zeros(48), name: weights[:17]})
    assert pair.decoder.weights["norm"].abs().sum() > 0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised .awq.*load the unquantised checkpoint"),
        ({"architectures": ["MambaForCausalLM"]}, "no decoder spec for 'MambaForCausalLM'.*LlamaForCausalLM"),
        ({"hidden_act": "relu2"}, "no activation 'relu2'"),
        ({"rope_scaling": {"type": "spiral"}}, "no rotary scaling 'spiral'"),
        ({"use_bidirectional_attention": True}, "both directions"),
    ],
)
def test_what_cannot_run_is_refused_with_advice(changed, says):
    with pytest.raises(UnsupportedModelError, match=says):
        spec_from_config({"architectures": ["LlamaForCausalLM"], "model_type": "llama", **changed})


def test_a_config_without_architectures_is_known_by_its_model_type():
    assert spec_from_config({"model_type": "qwen3"}).architecture == "Qwen3ForCausalLM"
