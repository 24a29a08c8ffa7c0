"""Each parameter against transformers' processors or plain arithmetic, failures that stay one sample's, logprobs, reproducibility."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nbengine import sampler as sampler_module
from nbengine.batch import NewRow
from nbengine.kernels.sample import gumbel_noise
from nbengine.sampler import Sampler
from nbengine.sampling_params import SamplingParams

VOCAB = 60
EOS = (2, 59)


class Words:
    """A tokenizer of three-letter words: 'aab' is token 1, ' aab' is 31, 'zzz' is two tokens."""

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        return {"aab": [1], " aab": [31], "zzz": [7, 8], " zzz": [37, 8], "xyz": [5, 6], " xyz": [3, 5, 6], "": []}[text]


def new_row(row=0, prompt=(1, 2, 3), output=(), seed=0, **params):
    return NewRow(row, list(prompt), list(output), SamplingParams(**params).resolve(EOS, Words()), seed)


def only(prompt=(1, 2, 3), output=(), seed=0, vocab=VOCAB, **params):
    """A sampler whose row 0 has these parameters."""
    sampler = Sampler(vocab, 4)
    sampler.admit(new_row(0, prompt, output, seed, **params))
    return sampler


def step(sampler, logits, rows=(0,)):
    return sampler.sample(logits, np.array(rows, np.int32))


def tokens(sampler, steps, seed=0):
    """The tokens of row 0 over some steps, each on its own random logits."""
    generator = torch.Generator().manual_seed(seed)
    return [int(step(sampler, torch.randn(1, VOCAB, generator=generator)).tokens[0, 0]) for _ in range(steps)]


def random_logits(rows=1, seed=0, vocab=VOCAB):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def follow(process, steps=25, prompt=(1, 2, 3), spread=2.0, **params):
    """Run row 0 for some steps; at each, its token must be the best of process(history, logits) with the row's noise added."""
    sampler, history = only(prompt, seed=77, **params), list(prompt)
    unlike = 0
    for i in range(steps):
        logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(i)) * spread
        noise = gumbel_noise(torch.tensor([77]), torch.tensor([len(history)]), torch.arange(VOCAB, dtype=torch.int32))
        expected = int((process(torch.tensor([history]), logits.clone()) + noise).argmax())
        unlike += expected != int((logits + noise).argmax())
        assert step(sampler, logits).tokens.tolist() == [[expected]]
        history.append(expected)
    assert unlike > 0  # the parameter made a difference, so ignoring it fails


# -------------------------------------------------------------------------------------------------- parameters, one by one


def test_plain_sampling_adds_the_noise_of_seed_and_position():
    sampler, history = only(seed=2**64 - 5), 3
    for i in range(10):
        logits = random_logits(seed=i)
        noise = gumbel_noise(torch.tensor([-5]), torch.tensor([history + i]), torch.arange(VOCAB, dtype=torch.int32))
        assert step(sampler, logits).tokens.tolist() == [[int((logits + noise).argmax())]]


def test_greedy_takes_the_most_likely_and_ignores_the_cuts():
    logits = random_logits(8)
    for params in ({}, {"top_p": 0.01}, {"top_k": 5}, {"min_p": 0.9}, {"seed": 3}):
        sampler = Sampler(VOCAB, 8)
        for row in range(8):
            sampler.admit(new_row(row, temperature=0, **params))
        sampled = step(sampler, logits, range(8))
        assert sampled.tokens[:, 0].tolist() == logits.argmax(-1).tolist()
        assert sampled.tokens.dtype == np.int32
        assert sampled.counts.tolist() == [1] * 8


def test_temperature_scales_as_in_transformers():
    follow(TemperatureLogitsWarper(0.4), temperature=0.4)
    follow(TemperatureLogitsWarper(1.9), temperature=1.9)


def test_top_k_keeps_what_transformers_keeps():
    follow(TopKLogitsWarper(4), top_k=4)
    follow(lambda ids, x: x.masked_fill(x < x.max(), -torch.inf), top_k=1)


def test_top_p_keeps_what_transformers_keeps():
    follow(TopPLogitsWarper(0.6), top_p=0.6)


def test_min_p_keeps_what_transformers_keeps():
    follow(MinPLogitsWarper(0.2), min_p=0.2)


def test_top_k_of_zero_or_minus_one_is_off():
    assert tokens(only(top_k=-1), 20) == tokens(only(top_k=0), 20) == tokens(only(), 20)


def test_repetition_penalty_counts_prompt_and_output_as_in_transformers():
    follow(RepetitionPenaltyLogitsProcessor(1.8), prompt=range(30), repetition_penalty=1.8)
    follow(RepetitionPenaltyLogitsProcessor(0.5), prompt=(1, 1, 50, 50, 50), repetition_penalty=0.5)


def plain_penalties(ids, x, prompt_len, frequency=0.0, presence=0.0):
    counts = torch.bincount(ids[0, prompt_len:], minlength=VOCAB)
    return x - frequency * counts - presence * (counts > 0)


def test_frequency_and_presence_penalties_count_the_output_only():
    prompt = tuple(range(20)) * 3
    follow(functools.partial(plain_penalties, prompt_len=60, frequency=1.5), steps=60, prompt=prompt, frequency_penalty=1.5)
    follow(functools.partial(plain_penalties, prompt_len=60, presence=2.0), steps=60, prompt=prompt, presence_penalty=2.0)
    follow(functools.partial(plain_penalties, prompt_len=60, presence=-2.0), steps=60, prompt=prompt, presence_penalty=-2.0)


def test_the_three_penalties_together_apply_repetition_first():
    def process(ids, x):
        return plain_penalties(ids, RepetitionPenaltyLogitsProcessor(1.3)(ids, x), 3, 0.3, 0.4)

    follow(process, steps=400, repetition_penalty=1.3, frequency_penalty=0.3, presence_penalty=0.4, max_tokens=None)


def test_min_tokens_holds_back_the_end_as_in_transformers():
    def forced(ids, x):
        x[0, [2, 59]] += 6.0
        return x

    def process(ids, x):
        return MinNewTokensLengthLogitsProcessor(3, 9, list(EOS), device="cpu")(ids, forced(ids, x))

    follow(process, min_tokens=9, logit_bias={2: 6.0, 59: 6.0})


def test_min_tokens_alone_ends_after_that_many_tokens():
    sampler = only(min_tokens=3, temperature=0, stop_token_ids=[9])
    logits = torch.zeros(1, VOCAB)
    logits[0, [2, 9, 59]], logits[0, 30] = torch.tensor([7.0, 8.0, 9.0]), 1.0
    assert [int(step(sampler, logits).tokens[0, 0]) for _ in range(5)] == [30, 30, 30, 59, 59]


def test_min_tokens_counts_the_output_from_before_a_preemption():
    sampler = only(output=(5, 5), min_tokens=3, temperature=0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 2], logits[0, 30] = 7.0, 1.0
    assert [int(step(sampler, logits).tokens[0, 0]) for _ in range(2)] == [30, 2]


def test_min_tokens_with_ignore_eos_holds_back_stop_tokens_only():
    sampler = only(min_tokens=5, ignore_eos=True, temperature=0, stop_token_ids=[9])
    logits = torch.zeros(1, VOCAB)
    logits[0, 9], logits[0, 2] = 9.0, 8.0
    assert step(sampler, logits).tokens.tolist() == [[2]]


def test_logit_bias_is_added_as_in_transformers():
    bias = {3: 4.0, 10: -100.0, 40: 2.5}
    follow(SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()]), logit_bias=bias)


def test_allowed_token_ids_are_the_only_ones():
    def process(ids, x):
        return x.masked_fill(~torch.isin(torch.arange(VOCAB), torch.tensor([4, 8, 15])), -torch.inf)

    follow(process, allowed_token_ids=[4, 8, 15])


def test_bad_words_never_come_as_in_transformers():
    # more likely than not at every step, so that the two-token words would come
    liked = dict.fromkeys((1, 31, 7, 8, 37, 5, 6, 3), 3.0)

    def process(ids, x):
        x[0, list(liked)] += 3.0
        return NoBadWordsLogitsProcessor([[1], [31], [7, 8], [37, 8], [5, 6]], eos_token_id=None)(ids, x)

    follow(process, steps=60, prompt=(50, 51), bad_words=["aab", "zzz", "xyz"], logit_bias=liked)


def test_bad_words_look_at_the_output_not_at_the_prompt():
    sampler = only(prompt=(4, 7), bad_words=["zzz"], temperature=0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 8] = 5.0
    assert step(sampler, logits).tokens.tolist() == [[8]]


# ---------------------------------------------------------------------------------------------------- custom processors


def test_a_processor_of_two_arguments_gets_the_output_and_the_logits():
    calls = []

    def processor(output_ids, logits):
        calls.append((output_ids, logits.shape, logits.dtype))
        return torch.where(torch.arange(VOCAB) == 10 + len(output_ids), logits, -torch.inf)

    sampler = only(logits_processors=[processor])
    assert tokens(sampler, 3) == [10, 11, 12]
    assert calls == [([], (VOCAB,), torch.float32), ([10], (VOCAB,), torch.float32), ([10, 11], (VOCAB,), torch.float32)]


def test_a_processor_of_three_arguments_gets_the_prompt_too():
    calls = []

    def processor(prompt_ids, output_ids, logits):
        calls.append((prompt_ids, output_ids))
        logits[:30] = -torch.inf
        return logits

    assert min(tokens(only(prompt=(9, 8), logits_processors=[processor]), 20)) >= 30
    assert calls[1][0] == [9, 8]
    assert len(calls[19][1]) == 19


def test_processors_run_in_their_order_after_bias_and_before_penalties():
    seen = []

    def first(output_ids, logits):
        seen.append(float(logits[4]))
        return logits + 1

    def second(output_ids, logits):
        seen.append(float(logits[4]))
        return logits

    sampler = only(prompt=(4,), output=(4,), logits_processors=[first, second], logit_bias={4: 2.0}, repetition_penalty=2.0, temperature=0)
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = 0.7  # with the 1 of `first` 1.7: below 3, above 3 / 2
    assert step(sampler, logits).tokens.tolist() == [[5]]
    assert seen == [2.0, 3.0]


def test_what_a_processor_does_to_its_lists_stays_there():
    given = []

    def vandal(prompt_ids, output_ids, logits):
        given.append((list(prompt_ids), list(output_ids)))
        prompt_ids.clear()
        output_ids.append(99)
        return logits

    params = {"repetition_penalty": 1.5, "frequency_penalty": 1.0}
    output = tokens(only(logits_processors=[vandal], **params), 15)
    assert output == tokens(only(**params), 15)
    assert given == [([1, 2, 3], output[:i]) for i in range(15)]


def test_plus_infinity_from_a_processor_forces_its_token():
    def force(output_ids, logits):
        logits[33] = torch.inf
        return logits

    assert tokens(only(logits_processors=[force], repetition_penalty=1.5, top_p=0.9), 4) == [33] * 4


def test_a_processor_may_return_half_precision():
    assert tokens(only(logits_processors=[lambda o, x: x.half()], temperature=0), 1) == tokens(only(temperature=0), 1)


def raising(output_ids, logits):
    raise KeyError("no such state")


@pytest.mark.parametrize(
    ("processor", "message"),
    [
        (raising, "logits processor raising raised KeyError: 'no such state'"),
        (lambda o, x: None, "logits processor <lambda> returned NoneType; return the logits, a torch.Tensor"),
        (lambda o, x: x.tolist(), "returned list; return the logits"),
        (lambda o, x: x[:-1], r"returned torch.float32 of shape \(59,\); return floating-point logits of shape \(60,\)"),
        (lambda o, x: x[None], r"of shape \(1, 60\)"),
        (lambda o, x: x.long(), "returned torch.int64 of shape"),
        (lambda o, x: x * torch.nan, "returned NaN for 60 tokens; use -inf to forbid a token"),
        (lambda o, x: x.masked_fill(x > 0, torch.nan), "returned NaN for"),
        (lambda o, x: torch.full_like(x, -torch.inf), "no token is left to draw: .* leave at least one allowed"),
        (functools.partial(lambda o, x, by: x / by, by="two"), "logits processor partial raised TypeError"),
    ],
)
def test_a_processor_that_goes_wrong_fails_its_own_sample_only(processor, message):
    sampler, without = Sampler(VOCAB, 3), Sampler(VOCAB, 3)
    for row in range(3):
        sampler.admit(new_row(row, seed=row, logprobs=1, logits_processors=[processor] if row == 1 else None))
        without.admit(new_row(row, seed=row, logprobs=1))
    for i in range(3):
        sampled, expected = (step(s, random_logits(3, seed=i), range(3)) for s in (sampler, without))
        assert list(sampled.failed) == [1]
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(sampled.failed[1])
        assert sampled.counts.tolist() == [1, 0, 1]
        assert sampled.tokens[[0, 2]].tolist() == expected.tokens[[0, 2]].tolist()
        assert {j: sampled.logprobs[j] for j in (0, 2)} == {j: expected.logprobs[j] for j in (0, 2)}
        assert 1 not in sampled.logprobs


def test_a_failed_sample_may_be_drawn_again_as_if_nothing_had_been():
    given = []

    def processor(output_ids, logits):
        given.append(output_ids)
        if len(given) == 1:
            raise RuntimeError("not yet")
        return logits

    sampler = only(logits_processors=[processor], frequency_penalty=1.0)
    assert step(sampler, random_logits()).counts.tolist() == [0]
    assert tokens(sampler, 10) == tokens(only(frequency_penalty=1.0), 10)
    assert [len(output_ids) for output_ids in given] == [0, *range(10)]


@pytest.mark.parametrize(
    ("value", "message"),
    [(torch.nan, "the model's logits hold NaN for 60 of 60"), (-torch.inf, "largest logit is -inf"), (torch.inf, "largest logit is inf")],
)
@pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}, {"repetition_penalty": 1.2}])
def test_logits_that_are_broken_fail_their_own_sample_only(value, message, params):
    sampler = Sampler(VOCAB, 3)
    for row in range(3):
        sampler.admit(new_row(row, seed=row, logprobs=0, **params))
    logits = random_logits(3)
    logits[1] = value
    sampled = step(sampler, logits, range(3))
    assert list(sampled.failed) == [1]
    assert message in sampled.failed[1]
    assert "; try dtype='float32'" in sampled.failed[1]
    assert sampled.counts.tolist() == [1, 0, 1]
    assert list(sampled.logprobs) == [0, 2]


def test_one_nan_among_the_logits_is_enough_to_fail():
    logits = random_logits()
    logits[0, 17] = torch.nan
    assert "hold NaN for 1 of 60" in step(only(), logits).failed[0]


def test_parameters_that_leave_no_token_say_so():
    assert "no token is left to draw" in step(only(allowed_token_ids=[2], min_tokens=3), random_logits()).failed[0]


# -------------------------------------------------------------------------------------------------------- logprobs


def test_logprobs_are_of_the_raw_logits_whatever_is_done_to_them_later():
    logits = random_logits(4, seed=5)
    expected = torch.log_softmax(logits.double(), -1)
    sampler = Sampler(VOCAB, 4)
    extras = [{}, {"temperature": 0.3, "top_k": 5}, {"logit_bias": {9: 50.0}}, {"repetition_penalty": 2.0, "temperature": 0}]
    for row, params in enumerate(extras):
        sampler.admit(new_row(row, seed=row, logprobs=row, **params))
    sampled = step(sampler, logits, range(4))
    assert int(sampled.tokens[2, 0]) == 9
    for row in range(4):
        (entry,) = sampled.logprobs[row]
        assert entry.ids == [int(sampled.tokens[row, 0]), *logits[row].topk(row).indices.tolist()]
        torch.testing.assert_close(torch.tensor(entry.values).double(), expected[row, entry.ids], rtol=1e-5, atol=1e-5)
        assert entry.rank == 1 + int((logits[row] > logits[row, entry.ids[0]]).sum())


def test_logprobs_of_minus_one_are_the_whole_vocabulary_best_first():
    logits = random_logits()
    (entry,) = step(only(logprobs=-1), logits).logprobs[0]
    assert entry.ids[1:] == logits[0].argsort(descending=True).tolist()
    assert sum(np.exp(entry.values[1:])) == pytest.approx(1, abs=1e-5)


def test_logprobs_beyond_the_vocabulary_are_all_there_are():
    assert len(step(only(logprobs=500), random_logits()).logprobs[0][0].ids) == VOCAB + 1


def test_only_rows_that_asked_get_logprobs():
    sampler = Sampler(VOCAB, 5)
    for row, wanted in enumerate([None, 2, None, 0, 3]):
        sampler.admit(new_row(row, logprobs=wanted))
    sampled = step(sampler, random_logits(5), range(5))
    assert {j: len(entry[0].ids) for j, entry in sampled.logprobs.items()} == {1: 3, 3: 1, 4: 4}


def test_tokens_that_are_equally_likely_share_the_better_rank():
    assert step(only(logprobs=0, allowed_token_ids=[7]), torch.zeros(1, VOCAB)).logprobs[0][0].rank == 1


@pytest.mark.parametrize("top", [0, 3, -1, 400])
def test_prompt_logprobs_are_the_log_softmax_of_the_next_tokens(top, monkeypatch):
    logits, targets = random_logits(11), [5, 5, 0, 59, 1, 2, 3, 4, 30, 31, 32]
    sampler = Sampler(VOCAB, 1)
    entries = sampler.prompt_logprobs(logits, targets, top)
    expected = torch.log_softmax(logits.double(), -1)
    assert len(entries) == 11
    for i, entry in enumerate(entries):
        assert entry.ids == [targets[i], *logits[i].topk(top if 0 <= top <= VOCAB else VOCAB).indices.tolist()]
        torch.testing.assert_close(torch.tensor(entry.values).double(), expected[i, entry.ids], rtol=1e-5, atol=1e-5)
        assert entry.rank == 1 + int((logits[i] > logits[i, targets[i]]).sum())
    monkeypatch.setattr(sampler_module, "_CHUNK", 3 * VOCAB)
    assert sampler.prompt_logprobs(logits.bfloat16().float(), torch.tensor(targets), 2)[10].ids[0] == 32
    assert sampler.prompt_logprobs(logits, targets, top) == entries


def test_prompt_logprobs_of_nothing_are_nothing():
    assert Sampler(VOCAB, 1).prompt_logprobs(torch.empty(0, VOCAB), [], 2) == []


# ------------------------------------------------------------------------------------------------- rows, batches, seeds

any_params = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0, 0.5, 1.5]),
        "top_k": st.sampled_from([1, 4, 30]),
        "top_p": st.sampled_from([0.2, 0.9]),
        "min_p": st.just(0.1),
        "repetition_penalty": st.sampled_from([0.8, 1.4]),
        "frequency_penalty": st.just(0.7),
        "presence_penalty": st.just(-0.5),
        "min_tokens": st.integers(0, 5),
        "logit_bias": st.just({3: 2.0, 2: 3.0}),
        "bad_words": st.just(["aab", "zzz"]),
        "allowed_token_ids": st.just(list(range(0, VOCAB, 2))),
        "logits_processors": st.just([lambda o, x: x - 0.1 * len(o) * torch.arange(VOCAB)]),
        "logprobs": st.sampled_from([0, 2]),
    },
)


@given(st.lists(any_params, min_size=2, max_size=41), st.randoms(use_true_random=False))
def test_a_sequence_is_the_same_alone_among_others_in_any_row_and_after_a_preemption(many, random):
    count = len(many)
    together, elsewhere = Sampler(VOCAB, count), Sampler(VOCAB, count)
    prompts = [[i % VOCAB, 3, i // 2] for i in range(count)]
    places = random.sample(range(count), count)  # of the second run: other rows, other order
    for i, params in enumerate(many):
        together.admit(new_row(i, prompts[i], (), seed=i, **params))
        elsewhere.admit(new_row(places[i], prompts[i], (), seed=i, **params))
    histories = [[] for _ in many]
    preempted = random.randrange(count)
    for at in range(8):
        logits = random_logits(count, seed=at)
        sampled = step(together, logits, range(count))
        assert sampled.failed == {}
        order = random.sample(range(count), count)
        again = step(elsewhere, logits[order], [places[i] for i in order])
        for j, i in enumerate(order):
            assert again.tokens[j, 0] == sampled.tokens[i, 0]
            assert again.logprobs.get(j) == sampled.logprobs.get(i)
            histories[i].append(int(sampled.tokens[i, 0]))
        if at == 4:
            elsewhere.admit(new_row(places[preempted], prompts[preempted], histories[preempted], seed=preempted, **many[preempted]))
    alone = Sampler(VOCAB, 1)
    alone.admit(new_row(0, prompts[0], (), seed=0, **many[0]))
    assert [int(step(alone, random_logits(count, seed=at)[:1]).tokens[0, 0]) for at in range(8)] == histories[0]


def test_rows_that_sit_out_a_step_do_not_move():
    sampler = Sampler(VOCAB, 2)
    for row in range(2):
        sampler.admit(new_row(row, seed=3))
    for _ in range(4):
        step(sampler, random_logits(), [1])
    assert tokens(sampler, 6) == tokens(only(seed=3), 6)


def test_admitting_a_row_forgets_who_had_it_before():
    before = {"logits_processors": [raising], "logprobs": 3, "top_k": 1, "allowed_token_ids": [3], "min_tokens": 4, "temperature": 0.1}
    sampler = only(prompt=range(40), seed=9, **before)
    sampler.admit(new_row(0, seed=1))
    sampled = step(sampler, random_logits())
    assert sampled.logprobs == {} == sampled.failed
    fresh = only(seed=1)
    step(fresh, random_logits())
    assert tokens(sampler, 10) == tokens(fresh, 10)


def test_siblings_with_different_seeds_differ_and_equal_seeds_agree():
    sampler = Sampler(VOCAB, 12)
    for row in range(12):
        sampler.admit(new_row(row, seed=row if row < 10 else 4))
    runs = np.concatenate([step(sampler, random_logits().expand(12, -1), range(12)).tokens for _ in range(12)], axis=1)
    assert len({tuple(run) for run in runs[:10].tolist()}) == 10
    assert runs[10].tolist() == runs[11].tolist() == runs[4].tolist()


def test_the_logits_handed_in_stay_as_they_are():
    logits = random_logits()
    before = logits.clone()
    step(only(repetition_penalty=1.5, logit_bias={4: 2.0}, logits_processors=[lambda o, x: x.zero_()], allowed_token_ids=[3, 4]), logits)
    assert torch.equal(logits, before)


def test_a_step_without_samples_is_empty():
    sampled = step(only(), torch.empty(0, VOCAB), [])
    assert sampled.tokens.shape == (0, 1)
    assert sampled.counts.tolist() == []


def test_another_op_may_draw():
    sampler = Sampler(VOCAB, 2, op=lambda logits, *arguments: torch.full((len(logits),), 41))
    sampler.admit(new_row())
    assert step(sampler, random_logits()).tokens.tolist() == [[41]]


def test_end_tokens_outside_the_logits_are_nothing_to_hold_back():
    sampler = Sampler(10, 1)
    sampler.admit(new_row(0, min_tokens=3, temperature=0))  # 59 is an end-of-sequence token
    assert step(sampler, torch.eye(10)[2:3]).tokens[0, 0] != 2
