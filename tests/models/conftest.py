"""Tiny models of every family, and a hand-made paged runner for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from transformers_greedy import greedily

from nbengine.models.decoder import Decoder
from nbengine.models.families import spec_from_config
from nbengine.ops import Ops
from nbengine.step_inputs import LayerCache, StepInputs

BASE: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LONG = {"short_factor": [1.0, 1.1, 1.3], "long_factor": [1.5, 3.0, 6.0]}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 2": ("Llama", {"num_key_value_heads": 6}),
    "llama 3": (
        "Llama",
        {
            "max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama with biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16}),
    "llama linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama dynamic": (
        "Llama",
        {"max_position_embeddings": 40, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama yarn": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 4.0,
            }
        },
    ),
    "mistral": ("Mistral", {"sliding_window": 13}),
    "mistral without window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 yarn": (
        "Qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 2.0, "original_max_position_embeddings": 32}},
    ),
    "qwen2 upper layers slide": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3 with window and biases": (
        "Qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 11, "max_window_layers": 2, "attention_bias": True},
    ),
    "gemma2": (
        "Gemma2",
        {"head_dim": 16, "sliding_window": 10, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "sliding_window": 7,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3", {"sliding_window": 21}),
    "phi3 partly rotary": (
        "Phi3",
        {"num_attention_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "phi3 longrope": (
        "Phi3",
        {
            "num_attention_heads": 4,
            "max_position_embeddings": 160,
            "original_max_position_embeddings": 40,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5, **LONG},
        },
    ),
}


def build(name: str, seed: int = 0) -> torch.nn.Module:
    family, own = FAMILIES[name]
    config_class = getattr(transformers, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    config = config_class(**{**BASE, **own})
    config.architectures = [f"{family}ForCausalLM"]
    torch.manual_seed(seed)
    implementation = "eager" if family == "Gemma2" else "sdpa"  # sdpa leaves the soft cap out
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # sizes at which every part matters; norms and biases are not ones and zeros
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))
    model.generation_config.eos_token_id = None
    return model


def weights_of(model: torch.nn.Module, spec: Any) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    return {weight.name: torch.cat([state[source] for source in weight.sources]).contiguous().clone() for weight in spec.weights()}


@dataclass
class Row:
    """A sequence in the paged cache."""

    blocks: list[int]
    tokens: list[int]
    prompt_len: int
    computed: int = 0
    anchor: int = 0


@dataclass
class PagedModel:
    """A Decoder with a poisoned cache whose blocks are handed out in a shuffled order."""

    decoder: Decoder
    block_size: int
    num_blocks: int = 0
    caches: list[LayerCache] = field(default_factory=list)
    free: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_blocks = 1200 // self.block_size + 9
        shapes = [(self.num_blocks, self.block_size, c.kv_heads, c.head_dim) for c in self.decoder.spec.cache_layers()]
        self.caches = [LayerCache(torch.full(shape, float("nan")), torch.full(shape, float("nan"))) for shape in shapes]
        self.free = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(self.block_size)).tolist()

    def row(self, prompt: list[int]) -> Row:
        spec = self.decoder.spec
        return Row([], list(prompt), len(prompt), anchor=spec.rope_anchor(len(prompt), len(prompt)))

    @torch.inference_mode()
    def step(self, work: list[tuple[Row, int]]) -> torch.Tensor:
        """Compute `count` more tokens of each row; log-probabilities [tokens, vocab]."""
        tokens, positions, slots, lengths, counts = [], [], [], [], []
        for row, count in work:
            while len(row.blocks) * self.block_size < row.computed + count:
                row.blocks.append(self.free.pop())
            span = range(row.computed, row.computed + count)
            tokens += [row.tokens[p] for p in span]
            positions += span
            slots += [row.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in span]
            lengths += [max(row.anchor, p + 1) for p in span]
            counts.append(count)
            row.computed += count
        width = max(len(row.blocks) for row, _ in work)
        inputs = StepInputs(
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            block_tables=torch.tensor([row.blocks + [0] * (width - len(row.blocks)) for row, _ in work], dtype=torch.int32),
            query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
            context_lens=torch.tensor([row.computed for row, _ in work], dtype=torch.int32),
            block_size=self.block_size,
            query_lens_host=counts,
            context_lens_host=[row.computed for row, _ in work],
            lengths=torch.tensor(lengths),
        )
        return self.decoder.logits(self.decoder.forward(inputs, self.caches)).log_softmax(-1)

    def prefill(self, row: Row, chunk: int | None = None) -> torch.Tensor:
        """Compute all of a row's tokens; the log-probabilities [vocab] after the last."""
        while row.computed < len(row.tokens):
            last = self.step([(row, min(chunk or len(row.tokens), len(row.tokens) - row.computed))])[-1]
        return last

    def generate(self, prompt: list[int], new_tokens: int, chunk: int | None = None) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the log-probabilities [new_tokens, vocab] that they were taken from."""
        row, found = self.row(prompt), []
        last = self.prefill(row, chunk)
        while True:
            found.append(last)
            row.tokens.append(int(last.argmax()))
            if len(found) == new_tokens:
                return row.tokens[len(prompt) :], torch.stack(found)
            boundary = self.decoder.spec.rope_boundary
            if boundary is not None and row.anchor <= boundary < len(row.tokens):  # outgrown: computed anew, as after a preemption
                row.computed, row.anchor = 0, self.decoder.spec.rope_anchor(len(prompt), len(row.tokens))
            last = self.prefill(row, chunk)


@dataclass
class Pair:
    """transformers' model and nbengine's decoder with the same weights."""

    model: torch.nn.Module
    decoder: Decoder

    def paged(self, block_size: int = 16) -> PagedModel:
        return PagedModel(self.decoder, block_size)

    def expected(self, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
        """What transformers' generate takes greedily, and its log-probabilities."""
        for module in self.model.modules():  # a fresh model's rotations: dynamic ones remember the longest sequence seen
            if hasattr(module, "max_seq_len_cached"):
                module.max_seq_len_cached = module.original_max_seq_len
                if hasattr(module, "original_inv_freq"):
                    module.register_buffer("inv_freq", module.original_inv_freq.clone(), persistent=False)
        return greedily(self.model, prompt, new_tokens)

    @torch.inference_mode()
    def expected_without_cache(self, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
        """The same from whole forward passes. Some versions' generate (5.17's) loses the prompt where Phi-3 changes its rotation."""
        tokens, found = list(prompt), []
        for _ in range(new_tokens):
            found.append(self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1))
            tokens.append(int(found[-1].argmax()))
        return tokens[len(prompt) :], torch.stack(found)


@pytest.fixture(scope="session")
def make_pair() -> Callable[..., Pair]:
    made: dict[str, Pair] = {}

    def make(name: str, **changed: Any) -> Pair:
        if name not in made or changed:
            model = made[name].model if name in made else build(name)
            spec = spec_from_config({**model.config.to_dict(), **changed})
            pair = Pair(model, Decoder(spec, weights_of(model, spec), Ops.default("cpu"), max_model_len=512))
            if changed:
                return pair
            made[name] = pair
        return made[name]

    return make


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`family` runs over every family."""
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(FAMILIES))
