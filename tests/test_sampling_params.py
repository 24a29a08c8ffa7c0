"""What is asked of the sampler: vLLM's names and defaults, every wrong value's message, what resolving adds."""

import inspect
import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbengine.sampling_params import RequestOutputKind, SamplingParams, takes_prompt

VLLM_DEFAULTS = {  # of vllm.SamplingParams
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": [],
    "stop_token_ids": [],
    "bad_words": [],
    "include_stop_str_in_output": False,
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "output_kind": RequestOutputKind.CUMULATIVE,
    "logit_bias": None,
    "allowed_token_ids": None,
    "logits_processors": None,
}


def two(output_ids, logits):
    return logits


def three(prompt_ids, output_ids, logits):
    return logits


class Tokenizer:
    """Words of whole letters: one token a letter; a space is its own token unless `merges`."""

    def __init__(self, merges=False):
        self.merges = merges

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        ids = [ord(c) for c in text if c != "\u200b"]
        return [ids[1] + 1000, *ids[2:]] if self.merges and ids[:1] == [32] and len(ids) > 1 else ids


def test_names_and_defaults_are_vllms():
    params = SamplingParams()
    assert {name: getattr(params, name) for name in inspect.signature(SamplingParams).parameters} == VLLM_DEFAULTS
    assert [(kind.name, kind.value) for kind in RequestOutputKind] == [("CUMULATIVE", 0), ("DELTA", 1), ("FINAL_ONLY", 2)]


def test_values_come_to_their_one_form():
    params = SamplingParams(
        n=np.int64(2),
        temperature=1,
        top_p=np.float32(0.5),
        top_k=-1,
        seed=-1,
        stop="end",
        stop_token_ids=(5, 5, np.int32(6)),
        bad_words=("a", "a"),
        logit_bias={"7": 1, 8: np.float32(0.5)},
        allowed_token_ids=range(3),
        logprobs=True,
        logits_processors=(two,),
    )
    assert (params.n, type(params.n)) == (2, int)
    assert (params.temperature, type(params.temperature)) == (1.0, float)
    assert (params.top_p, params.top_k, params.seed, params.stop) == (0.5, 0, None, ["end"])
    assert (params.stop_token_ids, params.bad_words, params.logit_bias) == ([5, 6], ["a"], {7: 1.0, 8: 0.5})
    assert (params.allowed_token_ids, params.logprobs, params.logits_processors) == ([0, 1, 2], 1, [two])
    assert [type(token) for token in params.stop_token_ids] == [int, int]


WRONG = [
    ({"n": 0}, ValueError, "n must be >= 1, got 0"),
    ({"n": 1.0}, TypeError, "n must be an integer, not 1.0"),
    ({"n": True}, TypeError, "n must be an integer, not True"),
    ({"n": None}, TypeError, "n must be an integer, not None"),
    ({"presence_penalty": 2.1}, ValueError, "presence_penalty must be finite and >= -2 and <= 2, got 2.1"),
    ({"frequency_penalty": -2.1}, ValueError, "frequency_penalty must be finite and >= -2"),
    ({"frequency_penalty": math.nan}, ValueError, "frequency_penalty must be finite"),
    ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be finite and > 0, got 0.0; use 1 for none"),
    ({"repetition_penalty": math.inf}, ValueError, "repetition_penalty must be finite"),
    ({"temperature": "0.7"}, TypeError, "temperature must be a number, not '0.7'; use 0 for greedy"),
    ({"temperature": True}, TypeError, "temperature must be a number, not True"),
    ({"temperature": None}, TypeError, "temperature must be a number, not None"),
    ({"temperature": -0.1}, ValueError, "temperature must be finite and >= 0, got -0.1; use 0 for greedy"),
    ({"temperature": math.nan}, ValueError, "temperature must be finite and >= 0, got nan"),
    ({"temperature": math.inf}, ValueError, "temperature must be finite"),
    ({"temperature": 1j}, TypeError, "temperature must be a number"),
    ({"top_p": 0}, ValueError, "top_p must be finite and > 0 and <= 1, got 0.0; use 1 for all tokens, temperature=0 for greedy"),
    ({"top_p": 1.01}, ValueError, "top_p must be finite and > 0 and <= 1"),
    ({"top_p": [0.9]}, TypeError, "top_p must be a number"),
    ({"top_k": -2}, ValueError, "top_k must be >= -1, got -2; use 0 for all tokens"),
    ({"top_k": 5.0}, TypeError, "top_k must be an integer"),
    ({"min_p": 1.5}, ValueError, "min_p must be finite and >= 0 and <= 1"),
    ({"min_p": -0.1}, ValueError, "min_p must be finite"),
    ({"seed": "7"}, TypeError, "seed must be an integer, not '7'"),
    ({"seed": 2**64}, ValueError, "seed must fit 64 bits"),
    ({"stop": 5}, TypeError, "stop must be a list of strings, not 5"),
    ({"stop": [5]}, TypeError, "stop must hold strings only, not 5"),
    ({"stop": ""}, ValueError, "stop holds an empty string"),
    ({"stop": ["a", ""]}, ValueError, "stop holds an empty string"),
    ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a list of token ids, not 5"),
    ({"stop_token_ids": ["5"]}, TypeError, "each of stop_token_ids must be an integer"),
    ({"stop_token_ids": [-1]}, ValueError, "each of stop_token_ids must be >= 0"),
    ({"stop_token_ids": "5"}, TypeError, "stop_token_ids must be a list"),
    ({"bad_words": "word"}, TypeError, "bad_words must be a list of strings"),
    ({"bad_words": [""]}, ValueError, "bad_words holds an empty string"),
    ({"include_stop_str_in_output": 1}, TypeError, "include_stop_str_in_output must be True or False, not 1"),
    ({"ignore_eos": "yes"}, TypeError, "ignore_eos must be True or False"),
    ({"detokenize": None}, TypeError, "detokenize must be True or False"),
    ({"skip_special_tokens": 0}, TypeError, "skip_special_tokens must be True or False"),
    ({"spaces_between_special_tokens": False}, ValueError, "spaces_between_special_tokens=False is not supported: leave it out"),
    ({"max_tokens": 0}, ValueError, "max_tokens must be >= 1"),
    ({"max_tokens": 16.0}, TypeError, "max_tokens must be an integer"),
    ({"min_tokens": -1}, ValueError, "min_tokens must be >= 0"),
    ({"min_tokens": 17}, ValueError, "min_tokens=17 is more than max_tokens=16: raise max_tokens or lower min_tokens"),
    ({"logprobs": -2}, ValueError, "logprobs must be >= -1, got -2; use None for none"),
    ({"logprobs": False}, TypeError, "logprobs must be an integer, not False; use None for none"),
    ({"prompt_logprobs": 1.5}, TypeError, "prompt_logprobs must be an integer"),
    ({"output_kind": 1}, TypeError, "output_kind must be a RequestOutputKind"),
    ({"logit_bias": [1]}, TypeError, "logit_bias must be a dict"),
    ({"logit_bias": {"a": 1}}, TypeError, "each key of logit_bias must be an integer, not 'a'"),
    ({"logit_bias": {-1: 1}}, ValueError, "each key of logit_bias must be >= 0"),
    ({"logit_bias": {1: "2"}}, TypeError, r"logit_bias\[1\] must be a number, not '2'"),
    ({"logit_bias": {1: math.nan}}, ValueError, r"logit_bias\[1\] must be finite"),
    ({"logit_bias": {1: math.inf}}, ValueError, "to force a token use allowed_token_ids"),
    ({"allowed_token_ids": []}, ValueError, "allowed_token_ids is empty"),
    ({"allowed_token_ids": [1.5]}, TypeError, "each of allowed_token_ids must be an integer"),
    ({"logits_processors": two}, TypeError, "logits_processors must be a list of callables, not function"),
    ({"logits_processors": ["two"]}, TypeError, "logits_processors must hold callables, not 'two'"),
    ({"logits_processors": [lambda logits: logits]}, TypeError, r"must take \(output_ids, logits\) or \(prompt_ids, output_ids, logits\)"),
    ({"stop": "x", "detokenize": False}, ValueError, "set detokenize=True, or stop at tokens with stop_token_ids"),
    ({"temprature": 1.0}, TypeError, "SamplingParams has no parameter 'temprature'; did you mean 'temperature'"),
    ({"max_new_tokens": 5}, TypeError, "no parameter 'max_new_tokens'; did you mean 'max_tokens'"),
    ({"qqq": 5}, TypeError, "no parameter 'qqq'$"),
]


@pytest.mark.parametrize(("values", "error", "message"), WRONG, ids=lambda value: str(value)[:40] if isinstance(value, dict) else "")
def test_a_wrong_value_is_refused_with_what_to_do(values, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**values)


UNBUILT = {
    "best_of": (None, 3),
    "use_beam_search": (False, True),
    "length_penalty": (1.0, 1.2),
    "early_stopping": (False, True),
    "structured_outputs": (None, {"regex": "a"}),
    "guided_decoding": (None, {"regex": "a"}),
    "truncate_prompt_tokens": (None, 5),
    "logprob_token_ids": (None, [1]),
    "prompt_logprob_token_ids": (None, [1]),
    "prompt_logprob_start": (None, 3),
    "flat_logprobs": (False, True),
    "stream_interval": (1, 5),
    "skip_clone": (False, True),
    "skip_reading_prefix_cache": (None, True),
    "thinking_token_budget": (-1, 100),
    "repetition_detection": (None, object()),
    "routed_experts_prompt_start": (0, 4),
    "trace_decode_token_ids": (None, [4]),
    "extra_args": ({}, {"a": 1}),
}


@pytest.mark.parametrize("name", UNBUILT)
def test_what_is_not_built_is_accepted_at_rest_and_refused_otherwise(name):
    neutral, other = UNBUILT[name]
    assert SamplingParams(**{name: neutral}) == SamplingParams(**{name: None}) == SamplingParams()
    with pytest.raises(ValueError, match=f"^{name}=.* is not supported: ...."):
        SamplingParams(**{name: other})


def test_best_of_as_many_as_n_is_at_rest():
    assert SamplingParams(n=3, best_of=3) == SamplingParams(n=3)
    with pytest.raises(ValueError, match="best_of=3 is not supported"):
        SamplingParams(n=2, best_of=3)


def test_several_greedy_outputs_and_no_limit_are_allowed():
    assert SamplingParams(n=3, temperature=0).greedy
    assert SamplingParams(temperature=9e-6).greedy
    assert not SamplingParams(temperature=1e-5).greedy
    assert SamplingParams(max_tokens=None, min_tokens=1000).max_tokens is None


def test_an_attribute_with_a_wrong_name_or_value_does_not_get_through():
    params = SamplingParams()
    with pytest.raises(AttributeError):
        params.temprature = 0.5
    params.temperature = "hot"
    with pytest.raises(TypeError, match="temperature must be a number"):
        params.resolve()


def test_an_attribute_that_is_changed_is_brought_to_its_form_when_resolved():
    params = SamplingParams()
    params.stop, params.stop_token_ids, params.bad_words = "end", None, None
    assert params.all_stop_token_ids == frozenset()
    assert params.resolve((2,)).stop == ["end"]
    assert params.resolve((2,)).all_stop_token_ids == {2}


any_valid = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 9),
        "presence_penalty": st.floats(-2, 2),
        "repetition_penalty": st.floats(0.01, 10),
        "temperature": st.floats(0, 100),
        "top_p": st.floats(0.001, 1),
        "top_k": st.integers(-1, 1000),
        "min_p": st.floats(0, 1),
        "seed": st.none() | st.integers(-(2**63), 2**64 - 1),
        "stop": st.none() | st.text(min_size=1) | st.lists(st.text(min_size=1)),
        "stop_token_ids": st.none() | st.lists(st.integers(0, 99)),
        "bad_words": st.lists(st.text(min_size=1)),
        "ignore_eos": st.booleans(),
        "max_tokens": st.none() | st.integers(10, 99),
        "min_tokens": st.integers(0, 10),
        "logprobs": st.none() | st.integers(-1, 20),
        "output_kind": st.sampled_from(RequestOutputKind),
        "logit_bias": st.none() | st.dictionaries(st.integers(0, 99) | st.integers(0, 99).map(str), st.floats(-100, 100)),
        "allowed_token_ids": st.none() | st.lists(st.integers(0, 99), min_size=1),
    },
)


@given(any_valid)
def test_valid_parameters_survive_copies_pickles_and_their_own_repr(values):
    params = SamplingParams(**values)
    assert params == SamplingParams(**values) == params.clone() == pickle.loads(pickle.dumps(params))
    assert eval(repr(params)) == params
    assert repr(SamplingParams()) == "SamplingParams()"


@given(any_valid, any_valid)
def test_parameters_are_equal_only_if_each_field_is(one, other):
    a, b = SamplingParams(**one), SamplingParams(**other)
    assert (a == b) == all(getattr(a, name) == getattr(b, name) for name in VLLM_DEFAULTS)


def test_a_clone_owns_its_lists_and_shares_its_processors():
    params = SamplingParams(stop=["a"], stop_token_ids=[1], logit_bias={1: 2.0}, logits_processors=[two])
    clone = params.clone()
    clone.stop.append("b")
    clone.stop_token_ids.append(2)
    clone.logit_bias[2] = 1.0
    assert params == SamplingParams(stop=["a"], stop_token_ids=[1], logit_bias={1: 2.0}, logits_processors=[two])
    assert clone.logits_processors == [two]
    assert clone.logits_processors is not params.logits_processors


def test_from_optional_reads_none_as_the_default():
    assert SamplingParams.from_optional(temperature=None, top_p=0.5, n=None, stop=None, max_tokens=None) == SamplingParams(top_p=0.5)
    with pytest.raises(TypeError, match="did you mean 'top_p'"):
        SamplingParams.from_optional(topp=0.5)


def test_a_models_generation_config_gives_its_defaults():
    config = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.01,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "do_sample": True,
        "eos_token_id": [1, 2],
        "transformers_version": "4.51.0",
    }
    expected = SamplingParams(temperature=0.6, top_p=0.95, top_k=20, min_p=0.01, repetition_penalty=1.05, max_tokens=2048)
    assert SamplingParams.from_generation_config(config) == expected
    assert SamplingParams.from_generation_config({"do_sample": False, "top_k": None}) == SamplingParams()
    with pytest.raises(ValueError, match=r"the model.s generation_config\.json cannot be used: top_p must be"):
        SamplingParams.from_generation_config({"top_p": 7})


def test_resolving_adds_the_models_end_unless_ignored():
    params = SamplingParams(stop_token_ids=[9])
    resolved = params.resolve((1, 2))
    assert (params.all_stop_token_ids, resolved.all_stop_token_ids) == ({9}, {1, 2, 9})
    assert (resolved._eos_token_ids, resolved.stop_token_ids) == ((1, 2), [9])
    assert resolved == params
    assert resolved is not params
    ignoring = SamplingParams(stop_token_ids=[9], ignore_eos=True).resolve([1, 2])
    assert (ignoring.all_stop_token_ids, ignoring._eos_token_ids) == ({9}, ())
    assert isinstance(resolved.all_stop_token_ids, frozenset)
    assert resolved.clone().all_stop_token_ids == {1, 2, 9}


def test_bad_words_are_banned_at_the_start_of_a_text_and_after_a_space():
    params = SamplingParams(bad_words=["ab", " c"])
    assert params.resolve((), Tokenizer(merges=True))._bad_words_ids == [[97, 98], [1097, 98], [99], [1099]]
    assert params.resolve((), Tokenizer())._bad_words_ids == [[97, 98], [99]]  # " ab" ends with what "ab" bans
    assert params._bad_words_ids == []


def test_bad_words_without_tokens_or_tokenizer_are_refused():
    with pytest.raises(ValueError, match="bad_words needs a tokenizer: load the engine without skip_tokenizer_init"):
        SamplingParams(bad_words=["a"]).resolve()
    with pytest.raises(ValueError, match="which the tokenizer turns into no token at all: take it out"):
        SamplingParams(bad_words=["\u200b"]).resolve((), Tokenizer())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stop_token_ids": [99, 100]}, r"stop_token_ids holds \[100\], outside this model's vocabulary of 100 tokens: use ids below 100"),
        ({"allowed_token_ids": [5, 1000]}, r"allowed_token_ids holds \[1000\]"),
        ({"logit_bias": {"200": 1.0}}, r"logit_bias holds \[200\]"),
        ({"bad_words": ["z"]}, r"bad_words holds \[122\]"),
        ({"logprobs": 21}, "logprobs=21 is more than this engine's max_logprobs=20: ask for fewer or raise max_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs=-1 is more than this engine's max_logprobs=20"),
    ],
)
def test_what_this_model_cannot_do_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**values).resolve((), Tokenizer()).validate_for(100, 20)


def test_what_this_model_can_do_is_allowed():
    SamplingParams(stop_token_ids=[99], allowed_token_ids=[0], logit_bias={99: 1.0}, logprobs=20).resolve((500,)).validate_for(100, 20)
    SamplingParams(logprobs=-1, prompt_logprobs=50).validate_for(100, 100)
    SamplingParams(logprobs=-1).validate_for(100, -1)


def test_a_processors_signature_says_whether_it_takes_the_prompt():
    class Object:
        def __call__(self, prompt_ids, output_ids, logits):
            return logits

    assert [takes_prompt(f) for f in (two, three, Object(), lambda o, x, scale=2.0: x, lambda *args: args[-1], max)] == [
        *(False, True, True, False, False, False)
    ]


def test_importing_parameters_and_outputs_brings_no_torch():
    code = (
        "import sys, nbengine.sampling_params, nbengine.outputs; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
