"""The whole engine on a GPU, against transformers on the same card: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from nbengine import Engine, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")]

LLAMA = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, max_position_embeddings=512)).eval()
    model.save_pretrained(folder)
    return folder, model.cuda()


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(3, 512, (1 + 7 * i % 90,), generator=generator).tolist() for i in range(count)]


@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 1}, {"enable_prefix_caching": False}, {"num_gpu_blocks_override": 32, "max_num_batched_tokens": 48}],
    ids=["default", "block size 1", "no prefix cache", "preempted and chunked"],
)
def test_greedy_float32_equals_transformers(model, options):
    folder, reference = model
    with Engine(folder, skip_tokenizer_init=True, dtype="float32", max_model_len=256, **options) as engine:
        outputs = engine.generate(
            [{"prompt_token_ids": p} for p in prompts(24)], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
        )
    for prompt, output in zip(prompts(24), outputs, strict=True):
        tokens = torch.tensor([prompt], device="cuda")
        expected = reference.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert output.outputs[0].token_ids == expected[0, len(prompt) :].tolist()


def test_closing_gives_the_card_its_memory_back(model):
    folder, _ = model
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        with Engine(folder, skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 28, max_model_len=256) as engine:
            engine.generate([{"prompt_token_ids": p} for p in prompts(4)])
        assert torch.cuda.memory_allocated() <= before + (20 << 20)


def test_seeded_samples_are_those_of_the_cpu(model):
    folder, _ = model
    params = SamplingParams(seed=7, max_tokens=16, ignore_eos=True, top_p=0.9)
    found = []
    for device in ("cpu", "cuda"):
        with Engine(
            folder, skip_tokenizer_init=True, dtype="float32", device=device, max_model_len=256, kv_cache_memory_bytes=1 << 26
        ) as engine:
            found.append([output.outputs[0].token_ids for output in engine.generate([{"prompt_token_ids": p} for p in prompts(8)], params)])
    assert found[0] == found[1]


def test_sleeping_frees_the_cache_and_waking_goes_on(model):
    folder, _ = model
    with Engine(folder, skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 28, max_model_len=256) as engine:
        first = engine.generate([{"prompt_token_ids": prompts(4)[3]}], SamplingParams(temperature=0, ignore_eos=True))[0]
        full = torch.cuda.memory_allocated()
        for level in (1, 2):
            engine.sleep(level)
            assert torch.cuda.memory_allocated() < full - (1 << 27)
            engine.wake_up()
            again = engine.generate([{"prompt_token_ids": prompts(4)[3]}], SamplingParams(temperature=0, ignore_eos=True))[0]
            assert again.outputs[0].token_ids == first.outputs[0].token_ids
