"""Each of SamplingParams does what it says, through the whole engine."""

import collections
import math

import pytest
import torch

from nbengine import SamplingParams

PROMPT = [10, 11, 12, 13, 14]
FREE = {"temperature": 1.0, "max_tokens": 30, "ignore_eos": True, "seed": 1}


def run(engine, prompt=PROMPT, **values):
    return engine.generate([{"prompt_token_ids": prompt}], SamplingParams(**{**FREE, **values}))[0]


def tokens(engine, prompt=PROMPT, **values):
    return run(engine, prompt, **values).outputs[0].token_ids


def test_a_seed_decides_and_without_one_outputs_differ(engine, make_engine):
    assert tokens(engine) == tokens(engine)
    assert tokens(engine, seed=2) != tokens(engine)
    assert tokens(engine, seed=None) != tokens(engine, seed=None)
    assert tokens(make_engine(seed=5), seed=None) == tokens(make_engine(seed=5), seed=None)  # the engine's own seed
    assert tokens(make_engine(seed=5), seed=None) != tokens(make_engine(seed=6), seed=None)
    assert tokens(make_engine(seed=99)) == tokens(engine)
    for seed in (0, 2**63, 2**64 - 1, -(2**63)):
        assert tokens(engine, seed=seed) == tokens(engine, seed=seed)


def test_the_outputs_of_one_request_differ_and_are_each_reproducible(engine):
    outputs = run(engine, n=4).outputs
    assert [o.index for o in outputs] == [0, 1, 2, 3]
    assert len({tuple(o.token_ids) for o in outputs}) == 4
    assert [o.token_ids for o in run(engine, n=4).outputs] == [o.token_ids for o in outputs]
    assert tokens(engine) == outputs[0].token_ids
    assert len({tuple(o.token_ids) for o in run(engine, n=3, temperature=0).outputs}) == 1


def test_many_outputs_with_few_rows_and_blocks(make_engine, engine):
    small = make_engine(max_num_seqs=3, num_gpu_blocks_override=12, max_model_len=128, max_num_batched_tokens=16)
    prompt = list(range(4, 64))
    expected = [o.token_ids for o in run(engine, prompt, n=9).outputs]
    assert [o.token_ids for o in run(small, prompt, n=9).outputs] == expected


def test_temperature(engine, tiny):
    assert tokens(engine, temperature=0) == tiny.greedy(PROMPT, 30)
    assert tokens(engine, temperature=1e-6) == tiny.greedy(PROMPT, 30)
    cold = len(set(tokens(engine, temperature=0.2, max_tokens=200)))
    assert cold < len(set(tokens(engine, temperature=3.0, max_tokens=200)))


def test_top_k_top_p_and_min_p_of_one_token_are_greedy(engine, tiny):
    greedy = tiny.greedy(PROMPT, 30)
    assert tokens(engine, top_k=1) == greedy
    assert tokens(engine, top_p=1e-9) == greedy
    assert tokens(engine, min_p=1.0) == greedy
    assert tokens(engine) != greedy


@pytest.mark.parametrize(("values", "count"), [({"top_k": 3}, 3), ({"top_p": 0.3}, None), ({"min_p": 0.5}, None)])
def test_what_is_cut_off_never_comes(engine, tiny, values, count):
    likely = tiny.logprobs(PROMPT)[-1]
    ranked = likely.argsort(descending=True).tolist()
    if count is None:
        mass = likely.exp()[ranked].cumsum(0)
        count = int((mass < 0.3).sum()) + 1 if "top_p" in values else int((likely >= likely.max() + math.log(0.5)).sum())
    outputs = run(engine, n=300, max_tokens=1, **values).outputs
    drawn = {o.token_ids[0] for o in outputs}
    assert drawn <= set(ranked[:count])
    assert len(drawn) > 1 or count == 1


def test_tokens_come_as_often_as_they_are_likely(engine, tiny):
    likely = tiny.logprobs(PROMPT)[-1].exp()
    drawn = collections.Counter(o.token_ids[0] for seed in range(4) for o in run(engine, n=500, max_tokens=1, seed=seed * 1000).outputs)
    for token in likely.argsort(descending=True)[:5].tolist():
        p = float(likely[token])
        assert abs(drawn[token] / 2000 - p) < 5 * math.sqrt(p * (1 - p) / 2000)


def test_penalties(engine):
    long = {"max_tokens": 120, "temperature": 0.0}
    most = collections.Counter(tokens(engine, **long)).most_common(1)[0][1]
    for penalty in ({"repetition_penalty": 1.5}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
        assert collections.Counter(tokens(engine, **long, **penalty)).most_common(1)[0][1] < most
    assert len(set(tokens(engine, **long, repetition_penalty=1e6))) == 120  # never twice, nor what the prompt has
    assert not set(tokens(engine, **long, repetition_penalty=1e6)) & set(PROMPT)


def test_biases_bans_and_allowances(engine):
    assert set(tokens(engine, logit_bias={77: 1000.0})) == {77}
    first = tokens(engine)[0]
    assert first not in tokens(engine, logit_bias={first: -1e30})
    assert set(tokens(engine, allowed_token_ids=[20, 21])) == {20, 21}
    word = engine.get_tokenizer().decode([first])
    if "\ufffd" not in word:
        assert word not in run(engine, bad_words=[word], max_tokens=1).outputs[0].text


def test_a_bad_word_of_several_tokens_never_comes(engine):
    letters = [engine.get_tokenizer().encode(c)[0] for c in "xyz"]
    free = run(engine, allowed_token_ids=letters, max_tokens=200).outputs[0].text
    assert "xy" in free
    held = run(engine, allowed_token_ids=letters, max_tokens=200, bad_words=["xy"]).outputs[0].text
    assert "xy" not in held
    assert "x" in held
    assert "y" in held


def test_the_models_end_and_min_tokens(engine):
    ending = {"logit_bias": {1: 8.0}, "ignore_eos": False, "max_tokens": 40}
    output = run(engine, **ending).outputs[0]
    assert (output.token_ids[-1], output.finish_reason, output.stop_reason) == (1, "stop", None)
    assert "</s>" not in output.text
    assert "</s>" in run(engine, **ending, skip_special_tokens=False, include_stop_str_in_output=True).outputs[0].text
    late = run(engine, **ending, min_tokens=25).outputs[0].token_ids
    assert len(late) > 25
    assert 1 not in late[:25]
    ignored = run(engine, **{**ending, "ignore_eos": True}).outputs[0]
    assert (len(ignored.token_ids), ignored.finish_reason) == (40, "length")
    assert 1 in ignored.token_ids


def test_stop_token_ids(engine):
    free = tokens(engine, max_tokens=60)
    stop = free[20]
    output = run(engine, max_tokens=60, stop_token_ids=[stop]).outputs[0]
    assert output.token_ids == free[: free.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_max_tokens_of_none_is_all_the_room(make_engine):
    engine = make_engine(max_model_len=50)
    assert len(tokens(engine, max_tokens=None)) == 45


def test_special_tokens_are_shown_when_asked_for(engine):
    shown = run(engine, allowed_token_ids=[2, 3, 50], skip_special_tokens=False).outputs[0]
    hidden = run(engine, allowed_token_ids=[2, 3, 50]).outputs[0]
    assert shown.token_ids == hidden.token_ids
    assert "<|im_start|>" in shown.text
    assert "<|im_start|>" not in hidden.text


def test_logprobs_are_the_models(engine, tiny):
    for values in (
        {"temperature": 0.0},
        {"temperature": 1.7, "top_k": 3, "logit_bias": {9: 2.0}},
    ):  # they are of the model, not of the sampler
        output = run(engine, logprobs=4, **values).outputs[0]
        wanted = tiny.logprobs(PROMPT + output.token_ids)[len(PROMPT) - 1 : -1]
        assert len(output.logprobs) == 30
        for token, entries, row in zip(output.token_ids, output.logprobs, wanted, strict=True):
            assert next(iter(entries)) == token
            assert set(entries) == {token, *row.topk(4).indices.tolist()}
            for one, entry in entries.items():
                assert abs(entry.logprob - row[one]) < 1e-4
                assert entry.rank == int((row > row[one]).sum()) + 1
                assert entry.decoded_token == engine.get_tokenizer().decode([one], skip_special_tokens=False)
        assert output.cumulative_logprob == pytest.approx(sum(e[t].logprob for t, e in zip(output.token_ids, output.logprobs, strict=True)))
    only = run(engine, logprobs=0).outputs[0]
    assert [list(e) for e in only.logprobs] == [[t] for t in only.token_ids]
    assert run(engine).outputs[0].logprobs is None
    assert run(engine).outputs[0].cumulative_logprob is None


def test_all_logprobs(make_engine):
    output = run(make_engine(max_logprobs=-1), logprobs=-1, prompt_logprobs=-1, max_tokens=2)
    assert [len(e) for e in output.outputs[0].logprobs] == [320, 320]
    assert [None if e is None else len(e) for e in output.prompt_logprobs] == [None, 320, 320, 320, 320]
    assert sum(math.exp(e.logprob) for e in output.outputs[0].logprobs[0].values()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 7}, {"num_gpu_blocks_override": 6, "max_model_len": 96}], ids=str)
def test_prompt_logprobs_are_the_models(make_engine, tiny, config):
    engine = make_engine(**config)
    prompt = list(range(20, 70))
    wanted = tiny.logprobs(prompt)
    engine.generate([prompt])  # its prefix is cached now, and yet every position is told
    for _ in range(2):
        outputs = engine.generate([prompt] * 3, SamplingParams(prompt_logprobs=2, max_tokens=20, n=2, ignore_eos=True, seed=0))
        for output in outputs:
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == 50
            for i in range(1, 50):
                entries = output.prompt_logprobs[i]
                assert next(iter(entries)) == prompt[i]
                assert set(entries) == {prompt[i], *wanted[i - 1].topk(2).indices.tolist()}
                assert all(abs(e.logprob - wanted[i - 1][t]) < 1e-4 for t, e in entries.items())
    single = engine.generate([[5]], SamplingParams(prompt_logprobs=1, max_tokens=1))[0]
    assert single.prompt_logprobs == [None]


def test_logits_processors_of_both_forms(engine):
    seen = []

    def short(output, logits):
        seen.append(list(output))
        logits[:50] = -torch.inf
        return logits

    def long(prompt, output, logits):
        assert prompt == PROMPT
        return torch.where(torch.arange(len(logits)) % 2 == 0, logits, -torch.inf)

    found = tokens(engine, logits_processors=[short, long], max_tokens=10)
    assert all(t >= 50 and t % 2 == 0 for t in found)
    assert seen == [found[:i] for i in range(10)]


def test_params_are_copied_when_they_are_submitted(engine):
    engine.pause()
    params = SamplingParams(**FREE, stop_token_ids=[])
    request = engine.submit(PROMPT, params)
    params.max_tokens = 1
    params.stop_token_ids.append(10)
    engine.resume()
    assert len(request.result(30).outputs[0].token_ids) == 30


def test_the_model_s_generation_config_is_obeyed(engine, tiny):
    """Its temperature, top_k, top_p and max_new_tokens, where a request brings no params."""
    assert engine.default_params() == SamplingParams(temperature=0.7, top_k=40, top_p=0.9, max_tokens=24)
    counts = {len(engine.submit(PROMPT).result(30).outputs[0].token_ids) for _ in range(5)}
    assert max(counts) <= 24
    ranked = tiny.logprobs(PROMPT)[-1].argsort(descending=True)[:40].tolist()
    firsts = {r.result(30).outputs[0].token_ids[0] for r in engine.submit_all([PROMPT] * 100)}
    assert len(firsts) > 1
    assert firsts <= set(ranked)
