import pytest

from nbengine.bench.measure import asked
from nbengine.bench.shapes import SHAPES
from nbengine.bench.workloads import QUICK, WORKLOADS, lengths, workload
from nbengine.tokenizer import Tokenizer

NAMES = list(WORKLOADS)


def starts(jobs):
    """What a prefix cache would find again."""
    return {tuple(prompt[:4]) for prompt, _ in jobs}


@pytest.mark.parametrize("name", NAMES)
def test_each_repeat_has_fresh_prompts_of_the_same_lengths(name):
    first, second = workload(name, fresh=0), workload(name, fresh=1)
    assert [(len(prompt), new) for prompt, new in first] == [(len(prompt), new) for prompt, new in second] == lengths(name)
    assert not starts(first) & starts(second)


def test_no_prompt_of_one_workload_begins_as_one_of_another():
    single, fifty = workload("single"), workload("fifty")
    assert not starts(single) & starts(fifty)
    assert len(starts(fifty)) == 50


@pytest.mark.parametrize("name", NAMES)
def test_equal_seeds_give_equal_workloads(name):
    assert workload(name, 5) == workload(name, 5)
    assert workload(name, 5) != workload(name, 5, fresh=1)


def test_the_workloads_are_as_large_as_those_of_the_recorded_figures():
    totals = {name: (len(sizes := lengths(name)), sum(prompt for prompt, _ in sizes), sum(new for _, new in sizes)) for name in NAMES}
    assert totals["single"] == (1, 128, 256)
    assert totals["fifty"] == (50, 6_400, 12_800)
    assert totals["nano"][0] == 256
    assert totals["sharegpt"][0] == 1000
    assert round(totals["sharegpt"][1] / 1000) == 157
    assert round(totals["sharegpt"][2] / 1000) == 312


def test_tokens_are_of_the_model():
    assert max(token for prompt, _ in workload("nano", 50, vocab_size=300) for token in prompt) < 300


@pytest.mark.parametrize("name", NAMES)
def test_a_quick_workload_is_short(name):
    jobs = workload(name, quick=True)
    assert len(jobs) <= 100
    assert all(len(prompt) <= QUICK and new <= QUICK for prompt, new in jobs)


def test_requests_are_sampled_plainly_and_as_long_as_asked():
    prompts, params = asked([([1, 2, 3], 7)])
    assert prompts == [{"prompt_token_ids": [1, 2, 3]}]
    assert (params[0].temperature, params[0].top_p, params[0].max_tokens, params[0].ignore_eos) == (1.0, 1.0, 7, True)


def test_a_filled_up_tokenizer_has_a_text_for_every_token_of_the_model(tmp_path):
    from nbengine.bench.texts import folder_with_tokenizer

    tokenizer = Tokenizer.from_folder(folder_with_tokenizer("qwen3-0.6b", tmp_path))
    assert tokenizer.decode([4095, 4096, SHAPES["qwen3-0.6b"]["vocab_size"] - 1]) == " rule word4096 word151935"


def test_text_prompts_are_as_long_as_the_workload_says_and_fresh(tmp_path):
    from nbengine.bench.texts import folder_with_tokenizer, text_prompts

    folder = folder_with_tokenizer("tiny", tmp_path)
    tokenizer = Tokenizer.from_folder(folder)
    jobs = text_prompts("nano", folder, fresh=0)[:20]
    assert [(len(tokenizer.encode(text)), new) for text, new in jobs] == lengths("nano", 20)
    assert jobs != text_prompts("nano", folder, fresh=1)[:20]
