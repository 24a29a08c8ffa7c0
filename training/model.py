"""Sizes, and a stock transformers model made from one of them."""

from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from training.tokenizer import SPECIAL

CONTEXT = 2048
HEAD = 64


@dataclass(frozen=True)
class Size:
    """The shape of a decoder; heads are always `HEAD` wide."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    family: str = "qwen3"


SIZES = {
    "tiny": Size(layers=2, width=64, heads=2, kv_heads=1, mlp=128, vocab=512),
    "base": Size(layers=9, width=384, heads=6, kv_heads=2, mlp=1024, vocab=4096),
    "llama": Size(layers=9, width=384, heads=6, kv_heads=2, mlp=1024, vocab=4096, family="llama"),
    "wide": Size(layers=5, width=512, heads=8, kv_heads=2, mlp=1376, vocab=4096),
    "deep": Size(layers=13, width=320, heads=5, kv_heads=1, mlp=896, vocab=4096),
    "vocab8k": Size(layers=8, width=384, heads=6, kv_heads=2, mlp=1024, vocab=8192),
    "vocab2k": Size(layers=9, width=384, heads=6, kv_heads=2, mlp=1088, vocab=2048),
    "teacher": Size(layers=12, width=768, heads=12, kv_heads=4, mlp=2048, vocab=4096),
}


def build(size: Size) -> PreTrainedModel:
    """Make a fresh model: tied embeddings, grouped-query attention, no biases."""
    config_class, model_class = (Qwen3Config, Qwen3ForCausalLM) if size.family == "qwen3" else (LlamaConfig, LlamaForCausalLM)
    config = config_class(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=HEAD,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=size.width**-0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-6,
        attention_bias=False,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|endoftext|>"),
        pad_token_id=SPECIAL.index("<|pad|>"),
        use_cache=False,
    )
    model = model_class(config)
    with torch.no_grad():
        for layer in model.model.layers:  # residual branches start silent
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.normal_(std=0.02)
    return model


def add_dropout(model: PreTrainedModel, rate: float) -> None:
    """Drop a share of the embeddings and of what each block adds, while training; the checkpoint is unchanged."""

    def drop(module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return F.dropout(output, rate, training=module.training)

    if rate:
        model.model.embed_tokens.register_forward_hook(drop)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_hook(drop)
            layer.mlp.down_proj.register_forward_hook(drop)


def describe(size: Size, model: PreTrainedModel) -> str:
    """Return one line about a model."""
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{count / 1e6:.2f}M parameters, {2 * count / 1e6:.1f} MB in bf16, {asdict(size)}"
