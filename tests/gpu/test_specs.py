"""Every family in 16 bits on a GPU: as near to float64 as transformers' own 16-bit pass is. `make test-gpu`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from nbengine import Engine, SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")]


def _families():
    place = Path(__file__).parents[1] / "models" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_families", place)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["tiny_families"] = module
    spec.loader.exec_module(module)
    return module


families = _families()


def rms(got, expected):
    return float((got.double() - expected).square().mean().sqrt())


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "no graphs"])
@pytest.mark.parametrize("family", list(families.FAMILIES))
def test_logits_are_within_bf16_rounding_of_float64(family, graphs, tmp_path):
    model = families.build(family).bfloat16()
    model.save_pretrained(tmp_path)
    length = 39 if family == "phi3 longrope" else 60  # a prompt that outgrows the original context while it grows is computed anew
    prompt = torch.randint(3, 131, (length,), generator=torch.Generator().manual_seed(7)).tolist()
    with Engine(
        tmp_path,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        cuda_graphs=graphs,
        max_num_batched_tokens=24,
        max_logprobs=-1,
        kv_cache_memory_bytes=1 << 24,
    ) as engine:
        greedy = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1, logprobs=-1, ignore_eos=True)
        output = engine.generate([{"prompt_token_ids": prompt}] * 2, greedy)[0]
        forced = [entry for entry in output.prompt_logprobs if entry is not None] + output.outputs[0].logprobs
    got = torch.tensor([[entry[token].logprob for token in range(131)] for entry in forced])
    ids = torch.tensor([prompt])
    with torch.no_grad():
        exact = families.build(family).bfloat16().double()(ids).logits[0].log_softmax(-1)
        theirs = model.cuda()(ids.cuda()).logits[0].float().log_softmax(-1).cpu()
    assert got.shape == exact.shape
    assert rms(got, exact) < 1.5 * rms(theirs, exact) + 1e-3
    assert rms(got.roll(1, 0), exact) > 10 * rms(got, exact)  # a position off would be seen
