"""From what a client sent to requests of the engine: everything is checked, and ready to be queued at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from nbengine.errors import nearest
from nbengine.policy import heeds_priority
from nbengine.prompts import chat_prompt
from nbengine.serve.protocol import UNBUILT, ChatRequest, CompletionRequest, DetokenizeRequest, Sampled, TokenizeRequest
from nbengine.serve.refusal import Refusal

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.prompts import Prompt
    from nbengine.request import Request
    from nbengine.sampling_params import SamplingParams

DEEPEST = 32  # levels of nesting in messages and template arguments
MOST_BIAS = 100.0  # OpenAI's bound; beyond these, logits stop being finite
PENALTIES = (0.01, 100.0)
COMPLETION_TOKENS = 16  # of a completion that does not say: OpenAI's default
SAME_NAMES = (
    "n", "seed", "stop", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "logit_bias", "min_tokens", "stop_token_ids", "bad_words", "allowed_token_ids", "include_stop_str_in_output", "ignore_eos",
    "skip_special_tokens", "prompt_logprobs",
)  # fmt: skip
UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`(?: - at `\$\.?([^`]*)`)?")
AT_FIELD = re.compile(r"- at (?:`key` in )?`\$\.?([^`]*)`")
MISSING_FIELD = re.compile(r"missing required field `([^`]*)`")
WORD = re.compile(r"[a-z_]+")


@dataclass(slots=True)
class Asked:
    """One client's request, ready to be queued: what it is answered from."""

    requests: list[Request]
    body: Sampled
    chat: bool
    before: list[str] = field(default_factory=list)  # text that each prompt's answers begin with (echo)
    silent: bool = False  # the tokens that the engine makes are not shown: the prompt was to be scored only

    @property
    def n(self) -> int:
        return self.requests[0].params.n


def decode(decoder: msgspec.json.Decoder[Any], data: bytes) -> Any:
    """Read a body, or say which field is wrong."""
    try:
        return decoder.decode(data)
    except msgspec.ValidationError as error:
        raise _refused_field(str(error), decoder.type) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal(400, f"the body is no valid JSON in UTF-8: {error}", code="invalid_json") from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply", code="invalid_json") from None


def _refused_field(message: str, struct: Any) -> Refusal:
    if (unknown := UNKNOWN_FIELD.search(message)) is not None:
        name, where = unknown[1], unknown[2] or ""
        hint = "" if where else nearest(name, struct.__struct_fields__)
        return Refusal(
            400, f"unknown field {name!r}{f' in {where}' if where else ''}{hint}", param=_first(where) or name, code="unknown_field"
        )
    found = AT_FIELD.search(message) or MISSING_FIELD.search(message)
    param = found[1] if found else None
    return Refusal(400, message.replace("`", "'").replace(" - at '$.", ", at '"), param=_first(param or ""), code="invalid_type")


def _first(path: str) -> str | None:
    """The field of the body that a place in it belongs to."""
    return re.split(r"[.\[]", path)[0] or None


def refuse_unbuilt(body: Any) -> None:
    """A field that is not built, and has a value that asks for it, is refused by name."""
    for name in body.__struct_fields__:
        if name not in UNBUILT or (value := getattr(body, name)) is None:
            continue
        neutral, advice = UNBUILT[name]
        if name == "best_of" and value == (body.n or 1) and not isinstance(value, bool):
            continue
        if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral):
            raise Refusal(400, f"{name} is not supported: {advice}", param=name, code="unsupported_field")
    response_format = getattr(body, "response_format", None)
    if response_format is not None and (response_format.type != "text" or response_format.json_schema is not None):
        kind = "json_schema" if response_format.type == "text" else response_format.type
        raise Refusal(
            400, f"response_format {kind!r} is not supported yet: only 'text' is", param="response_format", code="unsupported_field"
        )


def naming_fields(fields: Sequence[str], function: Callable[[], Any], *, otherwise: str, renamed: dict[str, str] | None = None) -> Any:
    """Call it; what it finds wrong is a refusal that names the field, which the message begins with or has in it."""
    try:
        return function()
    except (ValueError, TypeError) as error:
        message = str(error)
        found = next((word for word in WORD.findall(message) if word in fields), otherwise)
        raise Refusal(400, message, param=(renamed or {}).get(found, found), code="invalid_value") from None
    except RecursionError:
        raise Refusal(400, "the messages are nested too deeply", param=otherwise, code="invalid_value") from None


# ── completions ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask_completion(engine: Engine, body: CompletionRequest) -> Asked:
    """A completion request's prompts; called from the front or from a thread of its own."""
    _check_sampled(body)
    prompts = _prompts(body.prompt)
    params = _params(engine, body)
    silent = bool(body.echo) and body.max_tokens == 0
    params.max_tokens = COMPLETION_TOKENS if body.max_tokens is msgspec.UNSET else 1 if silent else body.max_tokens
    if silent:
        params.min_tokens = 0
    params.logprobs = body.logprobs
    if body.echo and body.logprobs is not None:
        params.prompt_logprobs = body.logprobs if params.prompt_logprobs is None else max(params.prompt_logprobs, body.logprobs)
    if body.add_special_tokens is False:
        tokenizer = engine.get_tokenizer()
        prompts = [
            {"prompt": one, "prompt_token_ids": tokenizer.encode(one, add_special_tokens=False)} if isinstance(one, str) and one else one
            for one in prompts
        ]
    requests = _prepared(engine, prompts, params, body, otherwise="prompt")
    before = []
    if body.echo:
        tokenizer = engine.get_tokenizer()
        before = [r.prompt if r.prompt is not None else tokenizer.decode(r.prompt_token_ids, skip_special_tokens=False) for r in requests]
    return Asked(requests, body, chat=False, before=before, silent=silent)


def _prompts(given: Any) -> list[Prompt]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise Refusal(400, "prompt is an empty list", param="prompt", code="invalid_value")
    kinds = set(map(type, given))
    if kinds <= {int, bool}:
        return [given]
    if kinds in ({str}, {list}):
        return list(given)
    raise Refusal(
        400, "prompt must be a text, a list of texts, token ids, or a list of lists of token ids", param="prompt", code="invalid_type"
    )


# ── chat ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def ask_chat(engine: Engine, body: ChatRequest) -> Asked:
    """A conversation; called from the front or from a thread of its own."""
    _check_sampled(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs=true", param="top_logprobs", code="invalid_value")
    if None not in {body.max_tokens, body.max_completion_tokens} and body.max_tokens != body.max_completion_tokens:
        raise Refusal(
            400, "max_tokens is the older name of max_completion_tokens: send one of them", param="max_tokens", code="invalid_value"
        )
    params = _params(engine, body)
    params.max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    params.logprobs = (body.top_logprobs or 0) if body.logprobs else None
    prompt = _conversation(engine, body)
    last = body.messages[-1] if body.messages else {}
    before = _text_of(last.get("content")) if body.echo and last.get("role") == "assistant" else ""
    renamed = {"max_tokens": "max_completion_tokens"} if body.max_tokens is None else {}
    if body.logprobs:
        renamed["logprobs"] = "top_logprobs"
    requests = _prepared(engine, [prompt], params, body, otherwise="messages", renamed=renamed)
    return Asked(requests, body, chat=True, before=[before] if before else [])


def _conversation(engine: Engine, body: ChatRequest | TokenizeRequest) -> Any:
    """The conversation as the model's template writes it."""
    extra = body.chat_template_kwargs or {}
    documents = getattr(body, "documents", None)
    if deeper_than([body.messages, extra, documents], DEEPEST + 1):
        raise Refusal(400, f"messages are nested more than {DEEPEST} levels deep", param="messages", code="invalid_value")
    for name in ("messages", "tools", "chat_template", "documents", "add_generation_prompt", "continue_final_message"):
        if name in extra:
            raise Refusal(400, f"chat_template_kwargs holds {name}, which has a field of its own", param="chat_template_kwargs")
    if "tokenizer" in extra:
        raise Refusal(400, "chat_template_kwargs holds tokenizer, which no template reads", param="chat_template_kwargs")
    tokenizer = engine.get_tokenizer()
    for place, message in enumerate(body.messages or []):
        for name in naming_fields((), lambda: tokenizer.unread_fields(message, engine.config.chat_template), otherwise="messages"):  # noqa: B023
            raise Refusal(
                400,
                f"messages[{place}] has {name!r}, which this model's chat template never reads, so the model would not see it: leave it out",
                param="messages",
                code="unsupported_field",
            )
    goes_on = bool(body.continue_final_message)
    options: dict[str, Any] = {
        "continue_final_message": goes_on,
        "add_generation_prompt": (not goes_on) if body.add_generation_prompt is None else body.add_generation_prompt,
        "chat_template": engine.config.chat_template,
        **({} if documents is None else {"documents": documents}),
        **extra,
    }
    prompt = naming_fields(
        ("continue_final_message", "add_generation_prompt", "documents", *extra),
        lambda: chat_prompt(tokenizer, body.messages or [], **options),
        otherwise="messages",
        renamed=dict.fromkeys(extra, "chat_template_kwargs"),
    )
    if body.add_special_tokens:
        prompt["prompt_token_ids"] = tokenizer.encode(prompt["prompt"])
    return prompt


def _text_of(content: Any) -> str:
    if isinstance(content, list):
        return "\n".join(part if isinstance(part, str) else str(part.get("text", "")) for part in content)
    return content or ""


# ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def tokens_of(engine: Engine, body: TokenizeRequest) -> list[int]:
    """The token ids of a prompt or a conversation."""
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "send either prompt or messages", param="prompt", code="invalid_value")
    if body.messages is not None:
        return list(_conversation(engine, body)["prompt_token_ids"])
    for name in ("add_generation_prompt", "continue_final_message", "chat_template_kwargs"):
        if getattr(body, name) is not None:
            raise Refusal(400, f"{name} belongs to messages, and this is a prompt", param=name, code="invalid_value")
    text, special = body.prompt or "", body.add_special_tokens is not False
    return list(naming_fields((), lambda: engine.get_tokenizer().encode(text, add_special_tokens=special), otherwise="prompt"))


def text_of(engine: Engine, body: DetokenizeRequest) -> str:
    """The text of token ids."""
    size = engine.info.vocab_size
    outside = next((token for token in body.tokens if not 0 <= token < size), None)
    if outside is not None:
        raise Refusal(400, f"tokens hold {outside}, and this vocabulary has {size} tokens", param="tokens", code="invalid_value")
    return engine.get_tokenizer().decode(body.tokens, skip_special_tokens=False)


# ── what they share ─────────────────────────────────────────────────────────────────────────────────────────────────────


def deeper_than(value: Any, levels: int) -> bool:
    """Whether lists and dicts stand in one another more than this deep."""
    level = [value]
    while level and levels >= 0:
        level = [inner for one in level for inner in (one.values() if isinstance(one, dict) else one) if isinstance(inner, dict | list)]
        levels -= 1
    return bool(level)


def _check_sampled(body: Sampled) -> None:
    refuse_unbuilt(body)
    options = body.stream_options
    if options is not None:
        if not body.stream:
            raise Refusal(400, "stream_options needs stream=true", param="stream_options", code="invalid_value")
        if options.continuous_usage_stats and not options.include_usage:
            raise Refusal(400, "continuous_usage_stats needs include_usage=true", param="stream_options", code="invalid_value")
        if options.include_obfuscation:
            raise Refusal(400, "include_obfuscation is not supported: leave it out", param="stream_options", code="unsupported_field")
    for token, bias in (body.logit_bias or {}).items():
        if not -MOST_BIAS <= bias <= MOST_BIAS:
            raise Refusal(
                400, f"logit_bias of token {token} must be from -100 to 100, not {bias}", param="logit_bias", code="invalid_value"
            )
    if body.repetition_penalty is not None and not PENALTIES[0] <= body.repetition_penalty <= PENALTIES[1]:
        raise Refusal(
            400,
            f"repetition_penalty must be from {PENALTIES[0]} to {PENALTIES[1]}, not {body.repetition_penalty}; use 1 for none",
            param="repetition_penalty",
            code="invalid_value",
        )
    if body.stream and body.prompt_logprobs is not None:
        raise Refusal(400, "prompt_logprobs come with whole answers only: send stream=false", param="prompt_logprobs", code="invalid_value")


def _params(engine: Engine, body: Sampled) -> SamplingParams:
    """The model's own defaults with what was sent in their place; checked when it is submitted."""
    params = engine.default_params()
    for name in SAME_NAMES:
        value = getattr(body, name)
        if value is not None:
            setattr(params, name, value)
    return params


def _prepared(
    engine: Engine, prompts: list[Any], params: SamplingParams, body: Sampled, *, otherwise: str, renamed: dict[str, str] | None = None
) -> list[Request]:
    if body.priority and not heeds_priority(engine.policy):
        raise Refusal(
            400,
            "priority changes nothing under this engine's scheduling policy: leave it out, or load the engine with scheduling_policy='priority'",
            param="priority",
            code="unsupported_field",
        )
    fields = [*SAME_NAMES, "max_tokens", "logprobs", "priority"]
    result: list[Request] = naming_fields(
        fields, lambda: engine.prepare(prompts, params, body.priority or 0), otherwise=otherwise, renamed=renamed
    )
    return result
