"""Each bad input gets an error that says what to do, before anything is queued; afterwards the engine serves as before."""

import json
import math
import struct

import numpy as np
import pytest

from nbengine import LLM, Engine, RequestOutputKind, SamplingParams
from nbengine.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
GOOD = [{"prompt_token_ids": [5, 6, 7]}, "good"]

PROMPTS = {
    "empty text": ("", ValueError, "the prompt is empty: give at least one character"),
    "empty ids": ({"prompt_token_ids": []}, ValueError, "the prompt is empty: give at least one token id"),
    "empty list": ([], ValueError, "the prompt is empty"),
    "empty dict": ({}, ValueError, "a prompt dict holds 'prompt' or 'prompt_token_ids'"),
    "dict of None": ({"prompt": None}, ValueError, "needs a value for 'prompt' or 'prompt_token_ids'"),
    "unknown key": ({"prompt": "x", "multi_modal_data": 1}, ValueError, "not .'multi_modal_data'."),
    "text of a wrong type": ({"prompt": 5}, TypeError, "'prompt' must be a string, not int"),
    "None": (None, TypeError, "a prompt must be a string, .* not NoneType"),
    "a number": (5, TypeError, "a prompt must be .* not int"),
    "bytes": (b"abc", TypeError, "a prompt must be .* not bytes"),
    "a set": ({5, 6}, TypeError, "a prompt must be .* not set"),
    "ids as text": ({"prompt_token_ids": "567"}, TypeError, "token ids must be a list of whole numbers, not str"),
    "ids as a number": ({"prompt_token_ids": 5}, TypeError, "token ids must be a list of whole numbers, not int"),
    "fractions": ({"prompt_token_ids": [5, 1.5]}, TypeError, "token ids must be whole numbers, not 1.5"),
    "texts": (["The cat", "The dog"], TypeError, r"not a list of prompts: that goes to generate\(\); submit\(\) and stream\(\) take one"),
    "dicts": ([{"prompt": "x"}], TypeError, r"not a list of prompts: that goes to generate\(\)"),
    "fractions in a plain list": ([5, 1.5], TypeError, "token ids must be whole numbers, not 1.5"),
    "truth": ({"prompt_token_ids": [5, True]}, TypeError, "token ids must be whole numbers, not True"),
    "text among ids": ({"prompt_token_ids": [5, "6"]}, TypeError, "token ids must be whole numbers, not '6'"),
    "numpy fractions": ({"prompt_token_ids": np.array([1.0])}, TypeError, "token ids must be whole numbers"),
    "a matrix": ({"prompt_token_ids": np.ones((2, 2), int)}, TypeError, "token ids must be whole numbers"),
    "negative": ({"prompt_token_ids": [5, -1]}, ValueError, r"token id -1 is outside the vocabulary \[0, 320\)"),
    "too large": ({"prompt_token_ids": [5, 320]}, ValueError, r"token id 320 is outside the vocabulary \[0, 320\)"),
    "huge": ({"prompt_token_ids": [1 << 70]}, ValueError, "is outside the vocabulary"),
    "no room": ({"prompt_token_ids": [5] * 128}, ValueError, "128 tokens and max_model_len is 128, which leaves no room"),
    "far too long": ("a b " * 500, ValueError, "leaves no room for output: shorten the prompt or raise max_model_len"),
}

PARAMS = {
    "negative temperature": ({"temperature": -1}, ValueError, "temperature must be .*use 0 for greedy"),
    "NaN temperature": ({"temperature": math.nan}, ValueError, "temperature must be"),
    "infinite temperature": ({"temperature": math.inf}, ValueError, "temperature must be finite"),
    "temperature as text": ({"temperature": "0"}, TypeError, "temperature must be a number, not '0'"),
    "top_p of zero": ({"top_p": 0}, ValueError, "top_p must be .*> 0"),
    "top_p above one": ({"top_p": 1.1}, ValueError, "top_p must be .*<= 1"),
    "top_k below -1": ({"top_k": -2}, ValueError, "top_k must be >= -1"),
    "fractional top_k": ({"top_k": 1.5}, TypeError, "top_k must be an integer"),
    "min_p above one": ({"min_p": 2}, ValueError, "min_p must be"),
    "no outputs": ({"n": 0}, ValueError, "n must be >= 1"),
    "n is True": ({"n": True}, TypeError, "n must be an integer"),
    "no tokens": ({"max_tokens": 0}, ValueError, "max_tokens must be >= 1"),
    "min above max": ({"min_tokens": 9, "max_tokens": 8}, ValueError, "min_tokens=9 is more than max_tokens=8"),
    "presence": ({"presence_penalty": 3}, ValueError, "presence_penalty must be"),
    "repetition": ({"repetition_penalty": 0}, ValueError, "repetition_penalty must be"),
    "seed": ({"seed": 1.5}, TypeError, "seed must be an integer"),
    "stop": ({"stop": [5]}, TypeError, "stop must hold strings only"),
    "empty stop": ({"stop": ""}, ValueError, "empty string"),
    "stop without text": ({"stop": "x", "detokenize": False}, ValueError, "set detokenize=True"),
    "logprobs": ({"logprobs": -2}, ValueError, "logprobs must be >= -1"),
    "bias": ({"logit_bias": {5: math.nan}}, ValueError, "logit_bias.5. must be finite"),
    "allowed none": ({"allowed_token_ids": []}, ValueError, "allowed_token_ids is empty"),
    "processor": ({"logits_processors": [5]}, TypeError, "must hold callables"),
    "processor's arguments": ({"logits_processors": [lambda: 1]}, TypeError, "must take"),
    "a flag": ({"ignore_eos": 1}, TypeError, "ignore_eos must be True or False"),
    "misspelt": ({"temprature": 1}, TypeError, "did you mean 'temperature'"),
    "unbuilt": ({"use_beam_search": True}, ValueError, "beam search is not built"),
    "kind": ({"output_kind": "delta"}, TypeError, "RequestOutputKind"),
}

FOR_THE_MODEL = {
    "min_tokens above the room": ({"min_tokens": 100_000, "max_tokens": None}, ValueError, "min_tokens=100000, and beside .* has room for"),
    "stop token outside": ({"stop_token_ids": [320]}, ValueError, "stop_token_ids holds .320., outside this model's vocabulary of 320"),
    "allowed outside": ({"allowed_token_ids": [1, 1000]}, ValueError, "allowed_token_ids holds .1000."),
    "bias outside": ({"logit_bias": {400: 1.0}}, ValueError, "logit_bias holds .400."),
    "too many logprobs": ({"logprobs": 21}, ValueError, "max_logprobs=20: ask for fewer or raise max_logprobs"),
    "all logprobs": ({"prompt_logprobs": -1}, ValueError, "prompt_logprobs=-1 is more than this engine's max_logprobs=20"),
}


@pytest.fixture(scope="module")
def engine(tiny):
    with Engine(tiny.folder, max_model_len=128, num_gpu_blocks_override=64) as engine:
        yield engine


@pytest.fixture
def untouched(engine):
    """Nothing was queued by what failed, and the engine serves as it did."""
    expected = [o.outputs[0].token_ids for o in engine.generate(GOOD, GREEDY)]
    before = engine.stats()
    yield
    after = engine.stats()
    for name in ("steps", "prompt_tokens", "num_waiting", "num_running"):
        assert after[name] == before[name], name
    assert [o.outputs[0].token_ids for o in engine.generate(GOOD, GREEDY)] == expected
    assert engine.status == "idle"


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(engine, case):
    prompt, error, message = PROMPTS[case]
    with pytest.raises(error, match=message):
        engine.submit(prompt, GREEDY)
    with pytest.raises(error, match=message):
        engine.generate([*GOOD, prompt], GREEDY)  # two good ones and a bad one
    with pytest.raises(error, match=message):
        engine.stream(prompt, GREEDY)  # at the call, not when the first text is asked for
    with pytest.raises(error, match=message):
        engine.astream(prompt, GREEDY)


@pytest.mark.parametrize("case", PARAMS)
def test_params(case):
    values, error, message = PARAMS[case]
    with pytest.raises(error, match=message):
        SamplingParams(**values)


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("case", [name for name, (values, *_) in PARAMS.items() if hasattr(GREEDY, next(iter(values)))])
def test_params_that_were_changed_after_they_were_made(engine, case):
    values, error, message = PARAMS[case]
    params = SamplingParams()
    for name, value in values.items():
        setattr(params, name, value)
    with pytest.raises(error, match=message):
        engine.submit("x", params)
    with pytest.raises(error, match=message):
        engine.generate(["a", "b"], [GREEDY, params])


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("case", FOR_THE_MODEL)
def test_params_that_do_not_fit_the_model(engine, case):
    values, error, message = FOR_THE_MODEL[case]
    with pytest.raises(error, match=message):
        engine.submit("x", SamplingParams(**values))
    with pytest.raises(error, match=message):
        engine.generate(["a", "b"], [GREEDY, SamplingParams(**values)])


@pytest.mark.usefixtures("untouched")
def test_a_batch_with_one_wrong_part_queues_nothing(engine):
    with pytest.raises(TypeError, match="params must be SamplingParams"):
        engine.submit("x", {"temperature": 0})
    with pytest.raises(TypeError, match="params must be SamplingParams"):
        engine.submit("x", "greedy")
    with pytest.raises(TypeError, match="params must hold SamplingParams, not None"):
        engine.generate(["a", "b"], [GREEDY, None])
    with pytest.raises(ValueError, match="3 params for 2 prompts: give one for all, or one for each"):
        engine.generate(["a", "b"], [GREEDY] * 3)
    with pytest.raises(ValueError, match="1 priority for 2 prompts"):
        engine.generate(["a", "b"], GREEDY, priority=[1])
    with pytest.raises(TypeError, match="priority must be int"):
        engine.submit("a", GREEDY, priority="high")
    with pytest.raises(TypeError, match="priority must be int"):
        engine.submit("a", GREEDY, priority=True)
    with pytest.raises(TypeError, match="priority must be int"):
        engine.submit("a", GREEDY, priority=1.5)
    with pytest.raises(TypeError, match="prompts must be a string"):
        engine.generate(5, GREEDY)
    with pytest.raises(TypeError, match="prompts must be a string"):
        engine.generate(None, GREEDY)
    for call in (engine.submit, engine.generate, engine.agenerate, engine.stream, engine.astream):
        with pytest.raises(TypeError, match="has no parameter 'prioritty'; did you mean 'priority'"):
            call("x", GREEDY, prioritty=1)


def test_what_belongs_into_sampling_params_or_a_prompt_is_said_with_its_values(engine, tiny):
    with LLM(str(tiny.folder), max_model_len=128, num_gpu_blocks_override=64) as llm:
        for call in (engine.submit, engine.generate, engine.agenerate, engine.stream, engine.astream, llm.generate, llm.chat):
            with pytest.raises(TypeError, match=r"has no parameter '\w+'; pass SamplingParams\(temperature=0, max_tokens=2\)$"):
                call("x", temperature=0, max_tokens=2)
        for call in (engine.generate, llm.generate):
            with pytest.raises(TypeError, match=r"has no parameter 'prompt_token_ids'; pass {'prompt_token_ids': \[...\]} as a prompt$"):
                call(prompt_token_ids=[5, 6])
            with pytest.raises(TypeError, match=r"params must be SamplingParams, .*; pass SamplingParams\(max_tokens=3, stop='a'\)$"):
                call("x", {"max_tokens": 3, "stop": "a"})
            with pytest.raises(TypeError, match=r"params must hold SamplingParams, .*; pass SamplingParams\(max_tokens=3\)$"):
                call(["x"], [{"max_tokens": 3}])


def test_mistaken_kinds_of_ops_and_weights_say_what_to_pass(engine):
    for wrong in ("linear", ["linear"], 5):
        with pytest.raises(TypeError, match=r"ops must be a dict .*such as {'linear': 'reference'}, not"):
            engine.use(ops=wrong)
    for wrong in (None, "weights", [("lm_head.weight", None)]):
        with pytest.raises(TypeError, match="weights must be a dict from names in the checkpoint to tensors"):
            engine.update_weights(wrong)
    assert engine.generate("x", GREEDY)[0].finished


@pytest.mark.filterwarnings("error")
def test_the_hottest_temperature_draws_from_all_tokens(engine):
    params = SamplingParams(temperature=1e308, max_tokens=100, ignore_eos=True, seed=1)
    tokens = engine.generate("x", params)[0].outputs[0].token_ids
    assert len(set(tokens)) > 50
    assert max(tokens) < 320
    assert params.temperature == 1e308


def test_a_number_that_is_no_timeout_is_refused(engine):
    request = engine.submit("x", GREEDY)
    request.result()
    for wrong in ("soon", math.nan, [1]):
        with pytest.raises(TypeError, match="timeout must be a number of seconds"):
            request.result(timeout=wrong)


def test_the_offline_interface_refuses_the_same(tiny):
    llm = LLM(str(tiny.folder), max_model_len=128, num_gpu_blocks_override=64)
    try:
        with pytest.raises(TypeError, match="params must be SamplingParams"):
            llm.generate("x", {"temperature": 0})
        with pytest.raises(TypeError, match="params must be SamplingParams"):
            llm.generate("x", 5)
        with pytest.raises(TypeError, match="params must hold SamplingParams"):
            llm.generate(["x"], [{"temperature": 0}])
        with pytest.raises(ValueError, match="2 params for 1 prompts"):
            llm.generate(["x"], [GREEDY, GREEDY])
        with pytest.raises(TypeError, match=r"LLM.generate has no parameter 'sampling_parms'; did you mean 'sampling_params'"):
            llm.generate("x", sampling_parms=GREEDY)
        with pytest.raises(ValueError, match="lora_request=1 is not supported yet"):
            llm.generate("x", GREEDY, lora_request=1)
        with pytest.raises(ValueError, match="prompt is empty"):
            llm.generate(["x", ""], GREEDY)
        for wrong in ("hello", [], None, 5, {"role": "user"}, ["hello"], [["hello"]], [[]], [{"role": "user", "content": "x"}, "hello"]):
            with pytest.raises((TypeError, ValueError), match=r"messages must be|a message is a dict|conversation is empty"):
                llm.chat(wrong, GREEDY)
        with pytest.raises(ValueError, match="chat template does not take these messages"):
            llm.chat([{"role": "user", "content": "x"}], GREEDY, chat_template="{{ raise_exception('no') }}")
        question = [{"role": "user", "content": "x"}]
        with pytest.raises(ValueError, match="this chat template never reads 'tools'"):
            llm.chat(question, GREEDY, tools=[{"type": "function"}])
        with pytest.raises(ValueError, match=r"never reads 'breif'.*did you mean 'brief'"):
            llm.chat(question, GREEDY, chat_template_kwargs={"breif": True})
        with pytest.raises(TypeError, match="chat_template_kwargs must be a dict"):
            llm.chat(question, GREEDY, chat_template_kwargs="brief")
        with pytest.raises(ValueError, match="takes text only"):
            llm.chat([question, [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]], GREEDY)
        assert llm.engine.stats()["steps"] == 0
    finally:
        llm.engine.close()


def test_without_a_tokenizer_only_ids_are_taken(tiny):
    with Engine(tiny.folder, skip_tokenizer_init=True, max_model_len=64, num_gpu_blocks_override=8) as engine:
        assert engine.generate([5, 6], GREEDY)[0].outputs[0].text == ""
        for bad, message in (
            (lambda: engine.submit("x"), "a text prompt needs a tokenizer"),
            (lambda: engine.submit([5], SamplingParams(stop="x")), "stop strings need a tokenizer"),
            (lambda: engine.submit([5], SamplingParams(bad_words=["x"])), "bad_words needs a tokenizer"),
            (engine.get_tokenizer, "no tokenizer"),
        ):
            with pytest.raises(ValueError, match=message):
                bad()
        assert list(engine.submit([5], GREEDY)) == []


def test_a_prompt_that_no_step_can_take_is_refused(tiny):
    options = {"enable_chunked_prefill": False, "max_num_batched_tokens": 32, "max_model_len": 128, "num_gpu_blocks_override": 64}
    with Engine(tiny.folder, **options) as engine:
        with pytest.raises(ValueError, match="max_num_batched_tokens=32 takes in one step: set enable_chunked_prefill=True"):
            engine.submit([5] * 33, GREEDY)
        assert engine.generate([[5] * 32], GREEDY)[0].finished


def test_output_beyond_the_room_is_capped(engine):
    output = engine.generate([[5] * 120], SamplingParams(max_tokens=1000, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == 8
    assert output.outputs[0].finish_reason == "length"


# ── models ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def folder(tiny, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in tiny.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def load(folder, **options):
    Engine(folder, max_model_len=64, num_gpu_blocks_override=8, **options).close()


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rewrite(file, change):
    """Change a safetensors file's tensors."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_a_good_copy_loads(folder):
    load(folder)


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_the_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def no_safetensors_at_all(folder):
    (folder / "model.safetensors").write_bytes(b"<html>404</html>" * 100)


def broken_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 20) + b"{" * 20)


def pickled_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


MODELS = {
    "truncated weights": (truncated, CheckpointError, r"cut short: .*needs bytes up to .*Delete it and download it again"),
    "cut in the header": (cut_in_the_header, CheckpointError, "ends within its header"),
    "not safetensors": (no_safetensors_at_all, CheckpointError, "does not begin with a safetensors header"),
    "broken header": (broken_header, CheckpointError, "its header cannot be read"),
    "pickled": (pickled_only, CheckpointError, "convert them to safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "holds no .*safetensors: download the model again"),
    "a missing tensor": (
        lambda f: rewrite(f / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        CheckpointError,
        r"holds no tensor model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "a wrong shape": (
        lambda f: rewrite(f / "model.safetensors", lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:5].clone()})),
        CheckpointError,
        r"model\.norm\.weight in .* has shape \[5\], and the model needs \[32\]",
    ),
    "a config of another model": (
        lambda f: edit(f / "config.json", lambda c: c.update(hidden_size=64)),
        CheckpointError,
        "config.json beside",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ModelNotFoundError, r"no config\.json"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), CheckpointError, r"config\.json is not valid JSON"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, "holds no JSON object"),
    "no tokenizer": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")],
        ModelNotFoundError,
        "holds no tokenizer .*skip_tokenizer_init=True",
    ),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), CheckpointError, r"tokenizer\.json cannot be read"),
    "quantised": (
        lambda f: edit(f / "config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})),
        UnsupportedModelError,
        r"quantised \(awq\).*load the unquantised checkpoint",
    ),
    "an unknown activation": (
        lambda f: edit(f / "config.json", lambda c: c.update(hidden_act="mish")),
        UnsupportedModelError,
        "no activation 'mish'",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_models(folder, case):
    change, error, message = MODELS[case]
    change(folder)
    with pytest.raises(error, match=message):
        load(folder)


def test_a_folder_without_tokenizer_serves_ids(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    load(folder, skip_tokenizer_init=True)


def test_a_folder_that_is_not_there():
    with pytest.raises(ModelNotFoundError, match="there is no folder /nowhere/at/all"):
        Engine("/nowhere/at/all")


def test_every_kind_of_output_is_known():
    assert len(RequestOutputKind) == 3
