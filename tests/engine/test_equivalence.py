"""Every model family through the whole engine gives what transformers' generate gives, whatever is switched on or off."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nbengine import Engine, SamplingParams
from nbengine.errors import RequestError

_spec = importlib.util.spec_from_file_location("models_conftest", Path(__file__).parents[1] / "models" / "conftest.py")
models = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = models
_spec.loader.exec_module(models)

NEW = 16
LENGTHS = (1, 15, 16, 26, 31, 40)  # with 16 more: past windows, and past the original context of longrope and dynamic
SWITCHES: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "chunked": {"max_num_batched_tokens": 7},
    "not chunked": {"enable_chunked_prefill": False},
    "no prefix cache": {"enable_prefix_caching": False},
    "preempting": {"num_gpu_blocks_override": 20, "block_size": 4},  # one sequence takes up to 14 of the 20 blocks
    "preempting, no prefix cache": {"num_gpu_blocks_override": 20, "block_size": 4, "enable_prefix_caching": False},
    "chunked and preempting": {"num_gpu_blocks_override": 20, "block_size": 4, "max_num_batched_tokens": 5},
    "blocks of 1": {"block_size": 1, "num_gpu_blocks_override": 600},
    "blocks of 256": {"block_size": 256, "num_gpu_blocks_override": 48},
    "few at once": {"max_num_seqs": 3},
    "static batching": {"scheduling_policy": "static-reserve"},
    "no trace": {"trace_steps": 0},
}


@dataclasses.dataclass
class Case:
    """A family's folder, prompts that share beginnings, and what transformers generates after each."""

    folder: Path
    expected: dict[tuple[int, ...], tuple[list[int], torch.Tensor]]

    @property
    def prompts(self) -> list[list[int]]:
        return [list(p) for p in self.expected]

    def check(self, prompts: list[list[int]], **config: Any) -> dict[str, Any]:
        with Engine(
            self.folder, skip_tokenizer_init=True, dtype="float32", max_model_len=56, **{"num_gpu_blocks_override": 256, **config}
        ) as engine:
            params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=5)
            outputs = [o.outputs[0] for o in engine.generate([{"prompt_token_ids": p} for p in prompts], params)]
            stats = engine.stats()
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens, logprobs = self.expected[tuple(prompt)]
            assert output.token_ids == tokens
            for found, wanted in zip(output.logprobs, logprobs, strict=True):
                for token, entry in found.items():
                    assert abs(entry.logprob - wanted[token]) < 1e-4
        return stats


@pytest.fixture(scope="session")
def make_case(tmp_path_factory):
    made: dict[str, Case] = {}

    def make(family: str) -> Case:
        if family not in made:
            model = models.build(family)
            folder = tmp_path_factory.mktemp("family")
            model.save_pretrained(folder)
            generator = torch.Generator().manual_seed(7)
            start = torch.randint(2, 131, (60,), generator=generator).tolist()
            expected = {}
            for length in LENGTHS:
                own = torch.randint(2, 131, (60,), generator=generator).tolist()
                prompt = (start[: length // 2] + own)[:length]  # half of it is everybody's
                pair = models.Pair(model, None)
                # transformers 5.17's generate feeds a cache that it has just thrown away when LongRoPE changes its factors
                expect = pair.expected_without_cache if "longrope" in family else pair.expected
                expected[tuple(prompt)] = expect(prompt, NEW)
            made[family] = Case(folder, expected)
        return made[family]

    return make


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_family_equals_transformers(make_case, family):
    case = make_case(family)
    stats = case.check(case.prompts * 2, max_num_batched_tokens=9, num_gpu_blocks_override=26, block_size=4)
    assert stats["num_preemptions"] > 0
    case.check([case.prompts[-1]])


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_leaves_the_tokens_alone(make_case, switch):
    case = make_case("mistral")
    stats = case.check((case.prompts * 7)[:40], **SWITCHES[switch])
    assert ("preempting" in switch) <= (stats["num_preemptions"] > 0)
    assert (stats["prefix_cache_hits"] > 0) == (SWITCHES[switch].get("enable_prefix_caching", True) and switch != "blocks of 256")
    for prompt in (case.prompts[0], case.prompts[-1]):
        case.check([prompt], **SWITCHES[switch])


@pytest.mark.slow
@pytest.mark.parametrize("family", models.FAMILIES)
@pytest.mark.parametrize("switch", SWITCHES)
def test_every_family_with_every_switch(make_case, family, switch):
    case = make_case(family)
    case.check((case.prompts * 7)[:40], **SWITCHES[switch])
    for prompt in case.prompts:
        case.check([prompt], **SWITCHES[switch])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunked", "cached", "tight", "block_size"), list(itertools.product([True, False], [True, False], [True, False], [1, 16, 256]))
)
def test_all_combinations_of_switches(make_case, chunked, cached, tight, block_size):
    case = make_case("gemma3")
    config = {"enable_chunked_prefill": chunked, "enable_prefix_caching": cached, "block_size": block_size}
    config["num_gpu_blocks_override"] = -(-90 // block_size) if tight else 48 + 600 // block_size
    if chunked:
        config["max_num_batched_tokens"] = 11
    case.check(case.prompts * 5, **config)
    case.check([case.prompts[3]], **config)


def test_a_sequence_that_outgrows_the_original_context_while_it_decodes(make_case):
    """LongRoPE turns every key anew there; with others around, in small steps, with cached prefixes of either kind."""
    case = make_case("phi3 longrope")
    crossing = [p for p in case.prompts if len(p) <= 40 < len(p) + NEW]
    assert len(crossing) >= 2
    for config in ({}, {"max_num_batched_tokens": 6}, {"block_size": 1, "num_gpu_blocks_override": 600}, {"enable_prefix_caching": False}):
        case.check(crossing * 3, **config)
        case.check([p for p in crossing for _ in range(2)] + case.prompts, **config)


# ── planted faults ──────────────────────────────────────────────────────────────────────────────────────────────────────


def edited(case: Case, folder: Path, change: Any) -> Case:
    for file in case.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return Case(folder, case.expected)


def test_a_wrong_rotary_base_is_caught(make_case, tmp_path):
    case = edited(make_case("qwen2"), tmp_path, lambda c: c["rope_parameters"].update(rope_theta=c["rope_parameters"]["rope_theta"] * 1.02))
    with pytest.raises(AssertionError):
        case.check(case.prompts)


def test_an_ignored_window_is_caught(make_case, tmp_path):
    case = edited(make_case("mistral"), tmp_path, lambda c: c.update(sliding_window=None))
    with pytest.raises(AssertionError):
        case.check(case.prompts)


def test_a_window_that_is_off_by_one_is_caught(make_case, tmp_path):
    case = edited(make_case("mistral"), tmp_path, lambda c: c.update(sliding_window=c["sliding_window"] + 1))
    with pytest.raises(AssertionError):
        case.check(case.prompts)


def test_a_swapped_page_is_caught(make_case, monkeypatch):
    from nbengine.runner import LocalRunner

    inputs = LocalRunner._inputs

    def swapped(self, batch):
        made = inputs(self, batch)
        if made.block_tables.shape[1] > 2:
            made.block_tables[:, [0, 1]] = made.block_tables[:, [1, 0]]
        return made

    case = make_case("llama 2")
    case.check(case.prompts, block_size=4)
    monkeypatch.setattr(LocalRunner, "_inputs", swapped)
    with pytest.raises((AssertionError, RequestError)):  # what a page that nobody wrote holds may be NaN
        case.check(case.prompts, block_size=4)


def test_keys_that_were_turned_for_a_shorter_context_are_caught(make_case, monkeypatch):
    from nbengine.prefix import PrefixCache

    case = make_case("phi3 longrope")
    monkeypatch.setattr(PrefixCache, "outgrown", lambda *_: False)
    with pytest.raises(AssertionError):
        case.check(case.prompts)
