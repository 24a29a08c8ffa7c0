"""The offline interface."""

import contextlib
import io
import pickle

import pytest

from nbengine import LLM, RequestOutput, SamplingParams
from nbengine.errors import RequestError

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


@pytest.fixture
def llm(tiny):
    llm = LLM(str(tiny.folder), max_model_len=512, num_gpu_blocks_override=256)
    yield llm
    llm.engine.close()


def test_strings_and_token_dicts_give_the_same(llm, tiny):
    ids = llm.engine.get_tokenizer().encode("Once upon a time")
    outputs = [
        llm.generate(given, GREEDY, use_tqdm=False)
        for given in ("Once upon a time", ["Once upon a time"], {"prompt": "Once upon a time"}, {"prompt_token_ids": ids}, ids, [ids])
    ]
    expected = tiny.greedy(ids, 8)
    for (output,) in outputs:
        assert isinstance(output, RequestOutput)
        assert output.outputs[0].token_ids == expected
        assert output.prompt_token_ids == ids
        assert output.finished
        assert output.outputs[0].finish_reason == "length"
    assert outputs[0][0].prompt == "Once upon a time"
    assert outputs[3][0].prompt is None
    assert outputs[0][0].outputs[0].text == llm.engine.get_tokenizer().decode(expected)


def test_numpy_ids_are_token_ids(llm):
    np = pytest.importorskip("numpy")
    plain = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    assert llm.generate(list(np.array([5, 6, 7])), GREEDY, use_tqdm=False)[0].outputs[0].token_ids == plain
    assert llm.generate({"prompt_token_ids": np.array([5, 6, 7])}, GREEDY, use_tqdm=False)[0].outputs[0].token_ids == plain


def test_outputs_come_in_the_order_of_the_prompts(llm, tiny, prompts):
    given = prompts(12)
    lengths = [1 + 3 * (i % 4) for i in range(12)]
    params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
    outputs = llm.generate([{"prompt_token_ids": p} for p in given], params, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == given
    assert [o.outputs[0].token_ids for o in outputs] == [tiny.greedy(p, n) for p, n in zip(given, lengths, strict=True)]
    assert len({o.request_id for o in outputs}) == 12


def test_no_prompts_give_no_outputs(llm):
    assert llm.generate([]) == []
    assert llm.engine.generate([]) == []


def test_without_params_the_models_generation_config_counts(llm):
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.7, 40, 0.9, 24)
    assert len(llm.generate({"prompt_token_ids": [9, 8]}, use_tqdm=False)[0].outputs[0].token_ids) <= 24
    params.temperature = 0.0
    assert llm.get_default_sampling_params().temperature == 0.7


def test_neutral_defaults_on_request(tiny):
    llm = LLM(str(tiny.folder), generation_config="vllm", max_model_len=64, num_gpu_blocks_override=8)
    assert llm.get_default_sampling_params() == SamplingParams()
    llm.engine.close()


def test_the_progress_bar_counts_prompts_and_tokens(llm):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        llm.generate(["one", "two", "three"], GREEDY)
    shown = err.getvalue()
    assert "Processed prompts: 100%" in shown
    assert "3/3" in shown
    assert "tok/s" in shown
    assert "generated: 0 tok/s]" not in shown.rsplit("\r", 1)[-1]


def test_no_bar_when_none_is_wanted(llm):
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        llm.generate(["one"], GREEDY, use_tqdm=False)
        llm.engine.generate(["one"], GREEDY)
    assert err.getvalue() == ""


def test_a_bar_of_the_users_own_and_vllms_neutral_arguments(llm):
    from tqdm import tqdm

    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            bars.append(self)
            super().__init__(*args, **kwargs, file=io.StringIO())

    llm.generate(["one", "two"], GREEDY, use_tqdm=Bar, lora_request=None)
    llm.chat([{"role": "user", "content": "x"}], GREEDY, use_tqdm=Bar, chat_template_content_format="auto")
    assert [bar.n for bar in bars] == [2, 1]


def test_the_bar_is_closed_when_a_request_fails(llm):
    from tqdm.auto import tqdm

    before = len(tqdm._instances)
    with pytest.raises(RequestError, match="broken"), contextlib.redirect_stderr(io.StringIO()):
        llm.generate("x", SamplingParams(logits_processors=[_broken]))
    assert len(tqdm._instances) == before


def test_chat_writes_the_models_own_template(llm, tiny):
    messages = [{"role": "user", "content": "hello world"}]
    (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
    assert output.prompt == "<s><|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    assert output.prompt_token_ids[0] == 0  # the template's own <s>, and no second one
    assert output.prompt_token_ids.count(0) == 1
    assert output.outputs[0].token_ids == tiny.greedy(output.prompt_token_ids, 8)
    assert (
        output.prompt_token_ids == llm.get_tokenizer().apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    )


def test_chat_takes_many_conversations_and_template_options(llm):
    conversations = [[{"role": "user", "content": "one"}], [{"role": "system", "content": "s"}, {"role": "user", "content": "two"}]]
    outputs = llm.chat(conversations, GREEDY, use_tqdm=False, chat_template_kwargs={"brief": True})
    assert [o.prompt.endswith("(briefly) ") for o in outputs] == [True, True]
    (output,) = llm.chat(conversations[0], GREEDY, use_tqdm=False, chat_template="{{ messages[0].content }}!")
    assert output.prompt == "one!"
    reply = [*conversations[0], {"role": "assistant", "content": "I am"}]
    (output,) = llm.chat(reply, GREEDY, use_tqdm=False, continue_final_message=True, add_generation_prompt=False)
    assert output.prompt.endswith("<|im_start|>assistant\nI am")


def test_content_in_parts_is_the_same_as_text(llm):
    texts = [{"role": "user", "content": "one\ntwo"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}]
    whole, joined = (llm.chat(m, GREEDY, use_tqdm=False)[0] for m in (texts, parts))
    assert whole.prompt == joined.prompt
    assert whole.outputs[0].token_ids == joined.outputs[0].token_ids


def test_an_engines_chat_template_replaces_the_models(tiny):
    llm = LLM(str(tiny.folder), chat_template="T:{{ messages[0].content }}", max_model_len=64, num_gpu_blocks_override=8)
    assert llm.chat([{"role": "user", "content": "x"}], GREEDY, use_tqdm=False)[0].prompt == "T:x"
    llm.engine.close()


def test_outputs_can_be_pickled_and_shown(llm):
    params = SamplingParams(temperature=0, max_tokens=4, n=1, logprobs=2, prompt_logprobs=1)
    outputs = llm.generate(["a b c", "d"], params, use_tqdm=False)
    again = pickle.loads(pickle.dumps(outputs))
    assert again == outputs
    assert "CompletionOutput" in repr(outputs[0])
    assert "LlamaForCausalLM" in repr(llm)
    assert repr(outputs[0].metrics).startswith("RequestMetrics(")
    assert len(repr(outputs)) < 2000


def test_results_stay_readable_after_close(tiny):
    llm = LLM(str(tiny.folder), max_model_len=64, num_gpu_blocks_override=8)
    outputs = llm.generate("a", GREEDY, use_tqdm=False)
    request = llm.engine.submit("b", GREEDY)
    request.result()
    llm.engine.close()
    assert len(outputs[0].outputs[0].token_ids) == 8
    assert len(request.result().outputs[0].token_ids) == 8
    assert request.text
    assert "closed" in repr(llm)
    assert llm.engine.status == "closed"
    assert len(llm.engine.trace) > 0


def test_get_tokenizer_is_a_transformers_tokenizer(llm):
    tokenizer = llm.get_tokenizer()
    assert tokenizer.decode(tokenizer("hello")["input_ids"]) == "hello"
    assert tokenizer.eos_token == "</s>"


def test_the_prefix_cache_is_reset(llm):
    prompt = {"prompt_token_ids": list(range(4, 100))}
    llm.generate(prompt, GREEDY, use_tqdm=False)
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens > 0
    assert llm.reset_prefix_cache() is True
    assert llm.generate(prompt, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def _broken(_output, _logits):
    raise KeyError("broken")
