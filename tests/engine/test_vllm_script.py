"""Scripts for vLLM's offline interface run when their import line is changed."""

import pytest

import nbengine
from nbengine import LLM
from nbengine.metrics import Counter, Gauge

BASIC = """
from vllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)


def main():
    llm = LLM(model="MODEL", tensor_parallel_size=1, gpu_memory_utilization=0.5, enforce_eager=True, max_model_len=256, trust_remote_code=True)
    outputs = llm.generate(prompts, sampling_params)
    print("-" * 60)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt:    {prompt!r}")
        print(f"Output:    {generated_text!r}")
        print("-" * 60)


if __name__ == "__main__":
    main()
"""

CHAT = """
from vllm import LLM, SamplingParams, RequestOutput
from vllm.inputs import TokensPrompt

llm = LLM("MODEL", dtype="float32", seed=0, swap_space=0, disable_log_stats=True, enable_sleep_mode=True, max_num_seqs=8, max_model_len=512)
tokenizer = llm.get_tokenizer()
params = llm.get_default_sampling_params()
params.max_tokens = 5
conversation = [
    {"role": "system", "content": "You are a helpful assistant"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello! How can I assist you today?"},
    {"role": "user", "content": "Write an essay about the importance of higher education."},
]
outputs = llm.chat(conversation, params, use_tqdm=False)
outputs += llm.chat([conversation for _ in range(3)], params, use_tqdm=True)
text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
assert outputs[0].prompt == text, (outputs[0].prompt, text)
ids = tokenizer(text, add_special_tokens=False)["input_ids"]
outputs += llm.generate(TokensPrompt(prompt_token_ids=ids), params)
outputs += llm.generate({"prompt_token_ids": ids}, params)
assert [o.prompt_token_ids for o in outputs] == [ids] * 6
outputs = llm.generate(["a", "b"], [SamplingParams(n=2, logprobs=1, max_tokens=4), SamplingParams(temperature=0, stop=["x"], prompt_logprobs=1)])
for output in outputs:
    assert isinstance(output, RequestOutput)
    for completion in output.outputs:
        assert completion.finish_reason in ("stop", "length"), completion
        assert completion.index < 2 and completion.token_ids is not None
assert len(outputs[0].outputs) == 2 and list(outputs[0].outputs[0].logprobs[0].values())[0].logprob < 0
assert outputs[1].prompt_logprobs[0] is None
assert outputs[0].finished
metrics = {metric.name: metric.value for metric in llm.get_metrics()}
assert metrics["vllm:generation_tokens"] > 0 and metrics["vllm:num_requests_running"] == 0, metrics
llm.reset_prefix_cache()
llm.sleep(level=1)
llm.wake_up()
del llm
print("done")
"""


@pytest.mark.parametrize("text", [BASIC, CHAT], ids=["basic", "chat"])
def test_it_runs_unchanged_but_for_its_import_line(script, tiny, text):
    text = text.replace("MODEL", str(tiny.folder)).replace("from vllm import", "from nbengine import")
    text = text.replace("from vllm.", "from nbengine.")
    code, out, err = script(text).end()
    assert code == 0, err
    assert "done" in out or out.count("Output:") == 4
    assert "Processed prompts: 100%" in err
    assert "Warning" not in err


def test_metrics_have_vllms_kinds_and_labels(tiny):
    with LLM(str(tiny.folder), max_model_len=64, num_gpu_blocks_override=8) as llm:
        llm.generate(["a", "b"], use_tqdm=False)
        kinds = {metric.name: type(metric) for metric in llm.get_metrics()}
        assert kinds["vllm:prompt_tokens"] is Counter
        assert kinds["vllm:kv_cache_usage_perc"] is Gauge
        assert all(metric.labels == {"model_name": str(tiny.folder)} for metric in llm.get_metrics())


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("beam_search", "sample n outputs"),
        ("llm_engine", "use LLM.engine"),
        ("embed", "generates only"),
        ("start_profile", "LLM.engine.trace"),
    ],
)
def test_what_vllms_llm_has_and_this_has_not_says_what_to_use(tiny, name, says):
    with LLM(str(tiny.folder), max_model_len=64, num_gpu_blocks_override=8) as llm:
        with pytest.raises(AttributeError, match=f"'LLM' object has no attribute '{name}': it is vLLM's and not built here; .*{says}"):
            getattr(llm, name)
        with pytest.raises(AttributeError, match=r"'LLM' object has no attribute 'nothing'$"):
            llm.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "says"), [("EngineArgs", "pass its options to LLM"), ("AsyncLLMEngine", "use Engine"), ("lora", "not built")]
)
def test_what_vllm_exports_and_this_does_not_says_what_to_use(name, says):
    with pytest.raises(ImportError, match=f"cannot import name '{name}' from 'nbengine': it is vLLM's and not built here; .*{says}"):
        exec(f"from nbengine import {name}")
    assert not hasattr(nbengine, "nothing")
