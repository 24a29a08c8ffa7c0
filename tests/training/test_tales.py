"""The shipped model keeps what its card promises."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import nbengine
from training.corpus import split_stories
from training.data import END_ID
from training.evaluate import bits_per_byte
from training.samples import render

TALES = Path(nbengine.__file__).parent / "tales"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TALES)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TALES, dtype=torch.float32).eval()


def test_the_weights_are_bf16_and_fit_in_32_megabytes():
    path = TALES / "model.safetensors"
    assert path.stat().st_size <= 32_000_000
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_shape_is_the_promised_one():
    config = json.loads((TALES / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["head_dim"] == 64
    assert config["max_position_embeddings"] >= 2048
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["tie_word_embeddings"]


def test_held_out_stories_of_the_sample_cost_less_than_the_baseline(model, tokenizer, sample):
    stories = split_stories((sample / "tales-valid.txt").read_text(encoding="utf-8"))
    tokens = [torch.tensor([END_ID, *tokenizer.encode(story), END_ID]) for story in stories]
    size = sum(len(story.encode()) for story in stories)
    assert bits_per_byte(model, tokens, size) < 1.4
    shuffled = [story[torch.randperm(len(story), generator=torch.Generator().manual_seed(0))] for story in tokens]
    assert bits_per_byte(model, shuffled, size) > 2


def test_it_answers_in_turn_and_stops(model, tokenizer):
    inputs = tokenizer(render(tokenizer, "Who are you?"), return_tensors="pt", return_token_type_ids=False)
    answer = model.generate(**inputs, max_new_tokens=80, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer[-1].item() in model.generation_config.eos_token_id
    assert "tales" in tokenizer.decode(answer)


def test_the_card_is_about_this_model():
    card = (TALES / "README.md").read_text(encoding="utf-8")
    assert card.count("### Seed ") == 10
    assert "5-gram" in card
