"""Architectures without a spec, run through transformers' own code: they agree with transformers' own generate."""

from __future__ import annotations

import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.masking_utils import AttentionMaskInterface
from transformers_greedy import greedily

from nbengine import LLM, SamplingParams
from nbengine.config import EngineConfig
from nbengine.errors import CheckpointError, UnsupportedModelError
from nbengine.models import transformers_check, transformers_model, transformers_weights
from nbengine.models.loading import LoadedModel, read_config
from nbengine.models.transformers_attention import PAGED, register
from nbengine.models.transformers_model import load_transformers_model
from nbengine.step_inputs import LayerCache, StepInputs

CPU = torch.device("cpu")
COMMON = {"vocab_size": 131, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASE = {
    **COMMON,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
GPT2 = {**COMMON, "n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 96}
OPT = {**COMMON, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "ffn_dim": 80, "max_position_embeddings": 96}
FALCON = {**COMMON, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 96}
MOE = {**BASE, "num_local_experts": 4, "num_experts_per_tok": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", {**GPT2, "scale_attn_by_inverse_layer_idx": True}),
    "opt": ("OPT", {**OPT, "word_embed_proj_dim": 48}),
    "opt with projections, norms after": ("OPT", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "falcon, one key head": ("Falcon", FALCON),
    "falcon, all heads, serial": ("Falcon", {**FALCON, "multi_query": False, "parallel_attn": False, "bias": True}),
    "falcon, new": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "olmo": ("Olmo", {**BASE, "clip_qkv": 2.0}),
    "olmo2": ("Olmo2", BASE),
    "llama": ("Llama", {**BASE, "tie_word_embeddings": True}),
    "gemma2, windows and soft caps": (
        "Gemma2",
        {
            **BASE,
            "head_dim": 16,
            "sliding_window": 10,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "cohere, scaled logits": ("Cohere", {**BASE, "logit_scale": 0.4}),
    "mixtral, merged experts": ("Mixtral", MOE),
}
MAIN = ["gpt2", "opt", "falcon, one key head", "falcon, new", "olmo", "olmo2", "llama"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These models are too small for more, which would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(family: str, seed: int = 0, **own: Any) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**own)
    implementation = {"attn_implementation": "eager"} if family == "Gemma2" else {}  # sdpa leaves the soft cap out
    model = transformers.AutoModelForCausalLM.from_config(config, **implementation).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # sizes at which every part matters
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))
    model.generation_config.eos_token_id = None
    return model


def load(folder: Path, device: torch.device = CPU, **config: Any) -> LoadedModel:
    config = EngineConfig.of(str(folder), **{"dtype": "float32", **config})
    return load_transformers_model(folder, read_config(folder), config, device, None)


@dataclass
class Saved:
    folder: Path
    model: Any
    loaded: LoadedModel | None = None

    def expected(self, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
        """What transformers' generate takes greedily, and its log-probabilities."""
        return greedily(self.model, prompt, new_tokens)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    made: dict[str, Saved] = {}

    def get(name: str) -> Saved:
        if name not in made:
            family, own = MODELS[name]
            model = build(family, **own)
            folder = save(model, tmp_path_factory.mktemp("model"))
            made[name] = Saved(folder, model, load(folder))
        return made[name]

    return get


@dataclass
class Row:
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


class Paged:
    """A loaded model with a poisoned cache whose blocks are handed out in a shuffled order."""

    def __init__(self, loaded: LoadedModel, block_size: int) -> None:
        self.model, self.block_size = loaded.model, block_size
        count = 600 // block_size + 9
        shapes = [(2, count, block_size, layer.kv_heads, layer.head_dim) for layer in loaded.cache_layers]
        self.caches = [LayerCache(*torch.full(shape, float("nan"))) for shape in shapes]
        self.free = torch.randperm(count, generator=torch.Generator().manual_seed(block_size)).tolist()

    @torch.inference_mode()
    def step(self, work: list[tuple[Row, int]]) -> torch.Tensor:
        """Compute `count` more tokens of each row; log-probabilities [tokens, vocab]."""
        tokens, positions, slots = [], [], []
        for row, count in work:
            while len(row.blocks) * self.block_size < row.computed + count:
                row.blocks.append(self.free.pop())
            span = range(row.computed, row.computed + count)
            tokens += [row.tokens[p] for p in span]
            positions += span
            slots += [row.blocks[p // self.block_size] * self.block_size + p % self.block_size for p in span]
            row.computed += count
        counts, contexts = [count for _, count in work], [row.computed for row, _ in work]
        width = max(len(row.blocks) for row, _ in work)
        inputs = StepInputs(
            tokens=torch.tensor(tokens),
            positions=torch.tensor(positions),
            slots=torch.tensor(slots),
            block_tables=torch.tensor([row.blocks + [0] * (width - len(row.blocks)) for row, _ in work], dtype=torch.int32),
            query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
            context_lens=torch.tensor(contexts, dtype=torch.int32),
            block_size=self.block_size,
            query_lens_host=counts,
            context_lens_host=contexts,
        )
        hidden = self.model.forward(inputs, self.caches)
        assert hidden.shape[0] == len(tokens)
        logits = self.model.logits(hidden)
        assert logits.dtype is torch.float32
        return logits.log_softmax(-1)

    def generate(self, prompt: list[int], new_tokens: int, chunk: int) -> tuple[list[int], torch.Tensor]:
        row, found = Row(list(prompt)), []
        while len(found) < new_tokens:
            last = self.step([(row, min(chunk, len(row.tokens) - row.computed))])[-1]
            if row.computed == len(row.tokens):
                found.append(last)
                row.tokens.append(int(last.argmax()))
        return row.tokens[len(prompt) :], torch.stack(found)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# ── beside transformers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_and_log_probabilities_are_those_of_generate(saved, name, block_size):
    model, prompt = saved(name), prompt_of(37)
    tokens, logprobs = model.expected(prompt, 9)
    for chunk in (37, 8):
        got, got_logprobs = Paged(model.loaded, block_size).generate(prompt, 9, chunk)
        assert got == tokens
        assert (got_logprobs - logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_mixed_step_do_not_touch_one_another(saved, name):
    model, paged = saved(name), Paged(saved(name).loaded, 4)
    prompts = [prompt_of(length, seed) for seed, length in enumerate((1, 30, 11, 19))]
    expected = [model.model(torch.tensor([prompt])).logits[0].float().log_softmax(-1) for prompt in prompts]
    rows = [Row(prompt) for prompt in prompts]
    paged.step([(rows[1], 29), (rows[2], 4)])
    got = paged.step([(rows[0], 1), (rows[1], 1), (rows[2], 7), (rows[3], 19)])
    wanted = torch.cat((expected[0], expected[1][29:], expected[2][4:], expected[3]))
    assert (got - wanted).abs().max() < 1e-4


def test_a_layers_cache_is_as_wide_as_its_keys_and_windows_are_found(saved):
    def layers(name: str) -> list[tuple[int, int, int | None]]:
        return [(layer.kv_heads, layer.head_dim, layer.window) for layer in saved(name).loaded.cache_layers]

    assert layers("gpt2") == [(6, 8, None)] * 3
    assert layers("falcon, one key head") == [(1, 8, None)] * 3
    assert layers("falcon, new") == [(2, 8, None)] * 3
    assert layers("gemma2, windows and soft caps") == [(2, 16, 10), (2, 16, None), (2, 16, 10)]


def test_what_a_loaded_model_says_of_itself(saved):
    loaded, model = saved("gpt2").loaded, saved("gpt2").model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert loaded.info == {"architecture": "GPT2LMHeadModel", "implementation": "transformers", "parameters": parameters}
    assert (loaded.vocab_size, loaded.max_position_embeddings, loaded.weight_bytes) == (131, 96, 4 * parameters)
    assert not loaded.rope_by_length


# ── the engine ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def engine(folder: Path, **config: Any) -> LLM:
    return LLM(
        str(folder), **{"skip_tokenizer_init": True, "dtype": "float32", "max_model_len": 96, "num_gpu_blocks_override": 64, **config}
    )


def greedy(max_tokens: int, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, **more)


def ids_of(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)]


@pytest.mark.parametrize("name", MAIN)
def test_the_engine_preempts_and_reuses_prefixes_without_a_difference(saved, name):
    model = saved(name)
    shared = prompt_of(20)
    prompts = [shared + prompt_of(1 + 3 * i, seed=i) for i in range(4)]
    expected = [model.expected(prompt, 24)[0] for prompt in prompts]
    llm = engine(model.folder, block_size=4, num_gpu_blocks_override=24, max_num_batched_tokens=16, model_impl="transformers")
    try:
        assert ids_of(llm, prompts, greedy(24)) == expected
        assert ids_of(llm, prompts, greedy(24)) == expected
        stats = llm.engine.stats()
    finally:
        llm.engine.close()
    assert stats["num_preemptions"] > 0
    assert stats["prefix_cache_hits"] > 0
    assert stats["blocks_used"] == 0


def test_the_engines_log_probabilities_are_transformers_own(saved):
    model, prompt = saved("gpt2"), prompt_of(21)
    tokens, logprobs = model.expected(prompt, 6)
    llm = engine(model.folder)
    try:
        (out,) = llm.generate({"prompt_token_ids": prompt}, greedy(6, logprobs=1, prompt_logprobs=0), use_tqdm=False)
    finally:
        llm.engine.close()
    got = torch.tensor([entry[token].logprob for entry, token in zip(out.outputs[0].logprobs, tokens, strict=True)])
    assert (got - logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0]).abs().max() < 1e-4
    whole = model.model(torch.tensor([prompt])).logits[0].detach().float().log_softmax(-1)
    for position in range(1, len(prompt)):
        assert abs(out.prompt_logprobs[position][prompt[position]].logprob - float(whole[position - 1, prompt[position]])) < 1e-4


def test_forks_of_one_prompt_are_each_what_they_would_be_alone(saved):
    llm = engine(saved("falcon, new").folder, block_size=4)
    prompt = {"prompt_token_ids": prompt_of(18)}
    try:
        together = llm.generate(prompt, SamplingParams(n=4, seed=5, max_tokens=7, ignore_eos=True, detokenize=False), use_tqdm=False)[0]
        again = llm.generate(prompt, SamplingParams(n=4, seed=5, max_tokens=7, ignore_eos=True, detokenize=False), use_tqdm=False)[0]
        same = ids_of(llm, [prompt["prompt_token_ids"]], greedy(7))[0]
        greedy_forks = llm.generate(prompt, greedy(7), use_tqdm=False)[0].outputs
    finally:
        llm.engine.close()
    found = [out.token_ids for out in together.outputs]
    assert len({tuple(tokens) for tokens in found}) > 1
    assert [out.token_ids for out in again.outputs] == found
    assert [out.token_ids for out in greedy_forks] == [same]
    assert same == saved("falcon, new").expected(prompt["prompt_token_ids"], 7)[0]


def test_two_engines_at_once_agree_with_one_each(saved):
    models = [saved("gpt2"), saved("gpt2"), saved("olmo2")]
    prompts = [prompt_of(5 + 7 * i, seed=i) for i in range(4)]
    expected = [[model.expected(prompt, 16)[0] for prompt in prompts] for model in models]
    engines = [engine(model.folder, block_size=size, max_num_batched_tokens=13) for model, size in zip(models, (4, 16, 8), strict=True)]
    found: list[Any] = [None] * len(engines)

    def run(index: int) -> None:
        found[index] = [ids_of(engines[index], prompts, greedy(16)) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(engines))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for llm in engines:
        llm.engine.close()
    assert found == [[one] * 3 for one in expected]


def test_an_engine_sleeps_wakes_and_changes_its_weights(saved):
    model, prompt = saved("olmo"), prompt_of(15)
    llm = engine(model.folder)
    try:
        before = ids_of(llm, [prompt], greedy(8))
        llm.sleep(2)
        llm.wake_up()
        assert ids_of(llm, [prompt], greedy(8)) == before == [model.expected(prompt, 8)[0]]
        other = build("Olmo", seed=9, **MODELS["olmo"][1])
        llm.engine.update_weights(other.state_dict())
        assert ids_of(llm, [prompt], greedy(8)) == [Saved(model.folder, other).expected(prompt, 8)[0]]
    finally:
        llm.engine.close()


def test_a_closed_engine_leaves_no_weights(saved):
    loaded = load(saved("falcon, new").folder)
    watched = [weakref.ref(weight) for weight in loaded.model.weights.values()]
    assert watched
    loaded.drop()
    gc.collect()
    assert not any(ref() is not None for ref in watched)
    assert loaded.reload().weights.keys() == saved("falcon, new").loaded.model.weights.keys()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt2", "opt", "falcon, new", "olmo2", "mixtral, merged experts"])
def test_on_a_gpu_an_engine_says_what_transformers_says_on_a_cpu(tmp_path, name):
    family, own = MODELS[name]
    wide = {key: 4 * size if key in {"n_embd", "hidden_size", "word_embed_proj_dim"} else size for key, size in own.items()}  # 32 a head
    model = build(family, **wide)
    for parameter in model.parameters():
        parameter.data *= 0.5
    model = Saved(save(model, tmp_path), model)
    prompts = [prompt_of(length, seed=length) for length in (1, 17, 40)]
    llm = engine(model.folder, device="cuda")
    try:
        assert ids_of(llm, prompts, greedy(12)) == [model.expected(prompt, 12)[0] for prompt in prompts]
    finally:
        llm.engine.close()


# ── weights ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def copy_of(saved: Saved, folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **config: Any) -> Path:
    """The saved model with its tensors or its config changed."""
    read = json.loads((saved.folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**read, **config}))
    tensors = change(load_file(saved.folder / "model.safetensors"))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_our_loader_and_transformers_own_bring_the_same(saved, monkeypatch, name):
    if name != "mixtral, merged experts":  # its checkpoint holds every expert by itself
        with monkeypatch.context() as patch:
            patch.delattr(transformers_weights, "_from_pretrained")
            ours = load(saved(name).folder, dtype="bfloat16").model
    else:
        ours = load(saved(name).folder, dtype="bfloat16").model
    reference = transformers.AutoModelForCausalLM.from_pretrained(saved(name).folder, dtype=torch.bfloat16)
    assert ours.weights.keys() == dict(reference.named_parameters(remove_duplicate=False)).keys()
    for key, weight in ours.weights.items():
        expected = reference.get_parameter(key)
        assert weight.dtype == expected.dtype
        assert torch.equal(weight, expected)
    buffers = dict(reference.get_decoder().named_buffers())
    assert dict(ours.body.named_buffers()).keys() == buffers.keys()
    for key, buffer in ours.body.named_buffers():
        assert buffer.dtype == buffers[key].dtype
        assert torch.equal(buffer, buffers[key])


def test_a_checkpoint_without_the_prefix_of_its_names_is_read(saved, tmp_path):
    def as_first_released(tensors):
        return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()} | {"h.0.attn.bias": torch.ones(1, 1, 96, 96)}

    folder = copy_of(saved("gpt2"), tmp_path, as_first_released)
    assert Paged(load(folder), 4).generate(prompt_of(9), 5, 9)[0] == saved("gpt2").expected(prompt_of(9), 5)[0]


def test_a_head_of_its_own_is_believed_whatever_the_config_says(saved, tmp_path):
    head = torch.randn(131, 48, generator=torch.Generator().manual_seed(3))
    folder = copy_of(saved("llama"), tmp_path, lambda tensors: {**tensors, "lm_head.weight": head})
    reference = Saved(folder, transformers.AutoModelForCausalLM.from_pretrained(folder))
    assert torch.equal(reference.model.lm_head.weight, head)
    got, logprobs = Paged(load(folder), 4).generate(prompt_of(9), 5, 9)
    tokens, expected = reference.expected(prompt_of(9), 5)
    assert got == tokens
    assert (logprobs - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("name", "lost"), [("gpt2", "transformer.h.1.mlp.c_fc.weight"), ("mixtral, merged experts", "model.layers.1.self_attn.q_proj.weight")]
)
def test_a_missing_tensor_is_named(saved, tmp_path, name, lost):
    folder = copy_of(saved(name), tmp_path, lambda tensors: {key: tensor for key, tensor in tensors.items() if key != lost})
    with pytest.raises(CheckpointError, match=lost):
        load(folder)


def test_a_tensor_of_another_shape_is_refused(saved, tmp_path):
    folder = copy_of(saved("olmo"), tmp_path, lambda tensors: tensors, intermediate_size=96)
    with pytest.raises(CheckpointError, match="has shape"):
        load(folder)


def test_progress_is_reported_and_may_end_the_load(saved):
    folder, seen = saved("opt").folder, []
    config = EngineConfig.of(str(folder), dtype="float32")
    load_transformers_model(folder, read_config(folder), config, CPU, lambda *report: seen.append(report))
    total = saved("opt").loaded.weight_bytes
    assert seen[0] == ("loading weights", 0, total)
    assert seen[-1] == ("loading weights", total, total)

    def interrupt(phase: str, done: int, of: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        load_transformers_model(folder, read_config(folder), config, CPU, interrupt)


@pytest.mark.parametrize("name", ["gpt2", "falcon, new", "olmo2", "mixtral, merged experts"])
def test_random_weights_need_no_file_and_hang_on_the_seed(saved, tmp_path, name):
    (tmp_path / "config.json").write_text((saved(name).folder / "config.json").read_text())
    state = torch.random.get_rng_state()
    one, same, other = (load(tmp_path, load_format="dummy", seed=seed).model.weights for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(weight, same[key]) for key, weight in one.items())
    assert not all(torch.equal(weight, other[key]) for key, weight in one.items())


def test_half_precision_weights_give_nearly_the_same(saved):
    model = saved("olmo2")
    loaded = load(model.folder, dtype="bfloat16")
    assert {weight.dtype for weight in loaded.model.weights.values()} == {torch.bfloat16}
    _, got = Paged(loaded, 16).generate(prompt_of(20), 1, 20)
    _, expected = model.expected(prompt_of(20), 1)
    assert (got - expected).square().mean().sqrt() < 0.03 * expected.std()


def test_weights_are_updated_by_the_checkpoints_names_or_not_at_all(saved):
    model = load(saved("gpt2").folder).model
    new = torch.randn(131, 48)
    model.update_weights({"wte.weight": new})
    assert torch.equal(model.weights["transformer.wte.weight"], new)
    assert torch.equal(model.head.lm_head.weight, new)
    with pytest.raises(CheckpointError, match=r"transformer\.wpe\.weight"):
        model.update_weights({"wte.weight": torch.zeros(131, 48), "transformer.wpx.weight": torch.zeros(96, 48)})
    with pytest.raises(CheckpointError, match=r"\[96, 48\]"):
        model.update_weights({"wte.weight": torch.zeros(131, 48), "wpe.weight": torch.zeros(95, 48)})
    assert torch.equal(model.weights["transformer.wte.weight"], new)


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────────

MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 6}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "bloom": ("Bloom", {**COMMON, "hidden_size": 48, "n_layer": 2, "n_head": 6}, "does not go through transformers' attention interface"),
    "mpt": ("Mpt", {**COMMON, "d_model": 48, "n_layers": 2, "n_heads": 6}, "does not go through transformers' attention interface"),
    "falcon with alibi": ("Falcon", {**FALCON, "alibi": True}, "ALiBi"),
    "mamba": ("Mamba", {**COMMON, "hidden_size": 32, "num_hidden_layers": 2}, "does not go through transformers' attention interface"),
    "a hybrid": (
        "RecurrentGemma",
        {**BASE, "lru_width": 48, "attention_window_size": 8, "block_types": ["recurrent", "attention"]},
        "of RecurrentGemmaForCausalLM's 3 layers 1 attend",
    ),
    "attention sinks": ("GptOss", {**MOE, "head_dim": 8, "layer_types": ["full_attention"] * 3}, "s_aux"),
    "latent attention": ("DeepseekV3", {**BASE, **MLA, "first_k_dense_replace": 3}, "keys and values of different sizes"),
    "chunked attention": (
        "Llama4Text",
        {**MOE, "head_dim": 8, "attention_chunk_size": 20, "intermediate_size_mlp": 48},
        "a rule of its own",
    ),
    "both directions": ("Bert", {**BASE, "is_decoder": False}, "a rule of its own"),
    "two attentions a layer": ("DiffLlama", BASE, "more than once"),
    "encoder and decoder": ("T5", {**COMMON, "d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32}, "encoder-decoder"),
    "positions counted in the step": (
        "Llama4Text",
        {**MOE, "head_dim": 8, "intermediate_size_mlp": 48, "floor_scale": 16, "attn_scale": 4.0, "no_rope_layers": [1, 0, 1]},
        "does not give the same",
    ),
    "longrope": (
        "Phi3",
        {
            **BASE,
            "original_max_position_embeddings": 32,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
        },
        "max_model_len=32",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_paged_attention_cannot_do_is_refused_before_it_runs(tmp_path, name):
    family, own, message = REFUSED[name]
    getattr(transformers, f"{family}Config")(**own).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        load(tmp_path, load_format="dummy")


def test_longrope_runs_within_its_original_length(tmp_path):
    family, own, _ = REFUSED["longrope"]
    getattr(transformers, f"{family}Config")(**own).save_pretrained(tmp_path)
    assert load(tmp_path, load_format="dummy", max_model_len=32).info["architecture"] == "Phi3ForCausalLM"


def test_a_quantised_checkpoint_is_refused(saved, tmp_path):
    folder = copy_of(saved("olmo"), tmp_path, lambda tensors: tensors, quantization_config={"quant_method": "gptq"})
    with pytest.raises(UnsupportedModelError, match=r"quantised \(gptq\)"):
        load(folder)


def test_a_model_that_transformers_does_not_know_is_refused(saved, tmp_path):
    folder = copy_of(saved("olmo"), tmp_path, lambda tensors: tensors, model_type="nobodys", architectures=["NobodysForCausalLM"])
    with pytest.raises(UnsupportedModelError, match="nobodys"):
        load(folder)


def test_a_models_own_code_is_not_run_unasked(saved, tmp_path):
    code = "raise SystemExit('the code was run')"
    (tmp_path / "configuration_own.py").write_text(code)
    folder = copy_of(
        saved("olmo"), tmp_path, lambda tensors: tensors, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"}
    )
    with pytest.raises(UnsupportedModelError, match="trust_remote_code"):
        load(folder)


@pytest.mark.parametrize("mutation", ["positions", "window", "order"])
def test_the_trial_at_load_catches_a_model_that_would_run_wrong(saved, monkeypatch, mutation):
    folder = saved("gemma2, windows and soft caps").folder if mutation == "window" else saved("olmo").folder
    if mutation == "positions":  # a model that numbers its tokens by itself
        stock = transformers_model.TransformersModel.forward

        def forward(self, inputs, caches):
            inputs.positions = torch.arange(len(inputs.tokens))
            return stock(self, inputs, caches)

        monkeypatch.setattr(transformers_model.TransformersModel, "forward", forward)
    elif mutation == "window":
        monkeypatch.setattr("nbengine.models.transformers_attention._window_of_probe_mask", lambda *_: 3)
    else:  # a permuted page table
        stock_step = transformers_check._step

        def step(*args):
            inputs = stock_step(*args)
            inputs.block_tables = inputs.block_tables.flip(1)
            return inputs

        monkeypatch.setattr(transformers_check, "_step", step)
    with pytest.raises(UnsupportedModelError, match="does not give the same"):
        load(folder)


def test_no_mask_is_built_for_the_paged_implementation():
    register()
    assert PAGED not in AttentionMaskInterface()


def test_the_paged_implementation_says_that_it_belongs_to_an_engine():
    register()
    config = transformers.LlamaConfig(**BASE)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=PAGED)
    with pytest.raises(RuntimeError, match="inside an nbengine engine only"):
        model(torch.tensor([[3, 4, 5]]))
