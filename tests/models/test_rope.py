"""Inverse frequencies against transformers' own, over the parameters that real checkpoints set."""

import pytest
import torch

from nbengine.models.families import spec_from_config
from nbengine.models.rope import Rope, inverse_frequencies

KINDS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    "yarn, betas": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 20.0, "beta_slow": 2.0, "truncate": False},
    "yarn, mscale": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 128, "mscale": 0.7, "mscale_all_dim": 1.2},
    "yarn, attention factor": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5},
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 512, "short_factor": [1.25] * 32, "long_factor": [3.5] * 32},
    "longrope, factor": {"rope_type": "longrope", "factor": 16.0, "original_max_position_embeddings": 512, "short_factor": [1.0] * 32, "long_factor": [2.0] * 32},
}  # fmt: skip


@pytest.mark.parametrize("parameters", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies_and_scaling_equal_transformers(parameters, theta):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=256, num_attention_heads=4, max_position_embeddings=2048, rope_parameters={**parameters, "rope_theta": theta}
    )
    (rope,) = spec_from_config({**config.to_dict(), "architectures": ["LlamaForCausalLM"]}).ropes
    compute = ROPE_INIT_FUNCTIONS.get(rope.kind, LlamaRotaryEmbedding.compute_default_rope_parameters)
    for length in (1, 512, 513, 2048, 2049, 9000):
        expected, scaling = compute(config, seq_len=length)
        got = inverse_frequencies(rope, length)
        assert got.dtype is torch.float32
        assert ((got - expected) / expected).abs().max() < 1e-5
        assert rope.attention_factor == pytest.approx(scaling, rel=1e-9)
        on_demand = Rope(rope, 10**6, torch.device("cpu"))
        positions = torch.tensor([0, 1, 7])
        cos, sin = on_demand.cos_sin(positions, torch.full((3,), length))
        angles = positions[:, None, None] * expected
        assert (cos - scaling * torch.cat((angles, angles), -1).cos()).abs().max() < 1e-4
        assert (sin - scaling * torch.cat((-angles, angles), -1).sin()).abs().max() < 1e-4


def test_tokens_of_different_lengths_turn_differently_in_one_step():
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 100, "hidden_size": 64, "num_attention_heads": 1}
    (rope,) = spec_from_config({**config, "rope_scaling": {"type": "dynamic", "factor": 2.0}}).ropes
    cos, _ = Rope(rope, 1000, torch.device("cpu")).cos_sin(torch.tensor([50, 50, 50]), torch.tensor([51, 100, 300]))
    assert torch.equal(cos[0], cos[1])
    assert (cos[0] - cos[2]).abs().max() > 1e-2


def test_an_engine_that_cannot_outgrow_the_context_needs_no_lengths():
    config = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 100, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    (rope,) = spec_from_config(config).ropes
    assert not Rope(rope, 100, torch.device("cpu")).by_length
    assert Rope(rope, 101, torch.device("cpu")).by_length
