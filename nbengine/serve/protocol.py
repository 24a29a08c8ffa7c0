"""What clients may send: OpenAI's fields and vLLM's. What is not built is a field too, so that it is refused by name.

Types are checked as the JSON is read; values by SamplingParams, whose messages say what to do. `known` bounds stand in the
OpenAPI description only.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, UnsetType

from nbengine.sampling_params import MOST_OUTPUTS


def known(about: str = "", **schema: Any) -> Meta:
    """What a field means, and its bounds, for the description."""
    return Meta(description=about or None, extra_json_schema=schema or None)


TOKEN_IDS = list[int]
Penalty = Annotated[float, known(minimum=-2.0, maximum=2.0)]
Share = Annotated[float, known(minimum=0.0, maximum=1.0)]
Count = Annotated[int, known(minimum=1)]
Messages = list[dict[str, Any]]
Prompt = str | list[Any]


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # vLLM's: usage in every event
    include_obfuscation: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    type: Annotated[str, known(enum=["text"])]
    json_schema: Annotated[Any, known(enum=[None])] = None


class Sampled(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What completions and chat completions have in common. None is as good as not given, unless a field says otherwise."""

    model: Annotated[str | None, known("one of /v1/models; the only one where it is left out")] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, known(minimum=1, maximum=MOST_OUTPUTS)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    temperature: Annotated[float, known(minimum=0.0)] | None = None
    top_p: Annotated[float, known(exclusiveMinimum=0.0, maximum=1.0)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[int, float] | None = None
    user: Annotated[str, Meta(max_length=512, description="shown in the server's debug log")] | None = None
    # vLLM's
    top_k: Annotated[int, known(minimum=-1)] | None = None
    min_p: Share | None = None
    repetition_penalty: Annotated[float, known(minimum=0.01, maximum=100.0)] | None = None
    min_tokens: Annotated[int, known(minimum=0)] | None = None
    stop_token_ids: TOKEN_IDS | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: TOKEN_IDS | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, known(minimum=-1)] | None = None
    priority: Annotated[int | None, known("the smallest goes first, under a priority policy")] = None
    request_id: Annotated[str, Meta(min_length=1, max_length=256, description="in place of the id that the answer would have")] | None = (
        None
    )
    return_token_ids: Annotated[bool | None, known("token ids beside the text")] = None
    return_tokens_as_token_ids: Annotated[bool | None, known("tokens of logprobs as token_id:N")] = None
    add_special_tokens: bool | None = None
    # not built
    response_format: ResponseFormat | None = None
    spaces_between_special_tokens: Any = None
    use_beam_search: Any = None
    length_penalty: Any = None
    truncate_prompt_tokens: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    logits_processors: Any = None
    thinking_token_budget: Any = None
    repetition_detection: Any = None
    cache_salt: Any = None
    kv_transfer_params: Any = None
    vllm_xargs: Any = None


class CompletionRequest(Sampled, kw_only=True):
    prompt: Prompt
    max_tokens: Annotated[int | UnsetType | None, known("16 where it is left out; null: as many as there is room for", minimum=0)] = UNSET
    logprobs: Annotated[int, known(minimum=0)] | None = None
    echo: bool | None = None
    # not built
    best_of: Any = None
    suffix: Any = None
    prompt_embeds: Any = None


class ChatRequest(Sampled, kw_only=True):
    messages: Messages
    max_completion_tokens: Annotated[Count | None, known("as many as there is room for where it is left out")] = None
    max_tokens: Annotated[Count | None, known("the older name of max_completion_tokens")] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, known(minimum=0)] | None = None
    # vLLM's
    echo: Annotated[bool | None, known("begin with the last message, if that is the assistant's")] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, known("what the model's template reads")] = None
    # not built
    chat_template: Any = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    reasoning_effort: Any = None
    include_reasoning: Any = None
    verbosity: Any = None
    web_search_options: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    mm_processor_kwargs: Any = None


class TokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Either a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: Annotated[bool | None, known("true for a prompt, false for messages, whose template writes its own")] = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    chat_template: Any = None
    mm_processor_kwargs: Any = None
    tools: Any = None


class DetokenizeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    model: str | None = None
    tokens: Annotated[list[Annotated[int, known(minimum=0)]], known("token ids")]


# Fields that are refused, the values that change nothing apart, and what to do instead.
UNBUILT: dict[str, tuple[tuple[Any, ...], str]] = {
    "spaces_between_special_tokens": ((True,), "decode the token ids yourself (return_token_ids)"),
    "use_beam_search": ((False,), "sample n outputs instead"),
    "length_penalty": ((1.0,), "it belongs to beam search, which is not built"),
    "truncate_prompt_tokens": ((), "cut the prompt before you send it"),
    "structured_outputs": ((), "it is not built yet"),
    "guided_json": ((), "it is not built yet"),
    "guided_regex": ((), "it is not built yet"),
    "guided_choice": ((), "it is not built yet"),
    "guided_grammar": ((), "it is not built yet"),
    "logits_processors": (([],), "they are Python callables: use the engine in its own process"),
    "thinking_token_budget": ((-1,), "limit the whole output with max_tokens"),
    "repetition_detection": ((), "discourage repetition with repetition_penalty or frequency_penalty"),
    "cache_salt": ((), "turn the prefix cache off for the engine: enable_prefix_caching=False"),
    "kv_transfer_params": ((), "the cache stays where it is"),
    "vllm_xargs": (({},), "nothing reads it"),
    "best_of": ((1,), "ask for n outputs and pick the best by their logprobs"),
    "suffix": (("",), "there is no infilling"),
    "prompt_embeds": ((), "send text or token ids"),
    "chat_template": ((), "a template is a program: give it to the engine, as chat_template=..., not with a request"),
    "tools": (([],), "tools are not built yet"),
    "tool_choice": (("none", "auto"), "tools are not built yet"),
    "parallel_tool_calls": ((True, False), "tools are not built yet"),
    "functions": (([],), "tools are not built yet"),
    "function_call": (("none", "auto"), "tools are not built yet"),
    "modalities": ((["text"],), "this engine writes text only"),
    "audio": ((), "this engine writes text only"),
    "prediction": ((), "predicted outputs are not built"),
    "reasoning_effort": ((), "if the model's template reads it, pass it in chat_template_kwargs"),
    "include_reasoning": ((True,), "reasoning is not told apart from the answer"),
    "verbosity": ((), "say it in the prompt"),
    "web_search_options": ((), "there is no web search"),
    "store": ((False,), "nothing is stored"),
    "metadata": (({},), "nothing is stored"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "safety_identifier": ((), "pass user, which is shown in the log"),
    "prompt_cache_key": ((), "prompts that begin alike share their cache without it"),
    "prompt_cache_retention": ((), "the prefix cache keeps what there is room for"),
    "mm_processor_kwargs": (({},), "this engine takes text only"),
}
