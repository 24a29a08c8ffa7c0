"""A whole answer, in the shape of OpenAI's and vLLM's."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, Any

from nbengine.serve.logprobs import TokenNames, chat_logprobs, completion_logprobs, prompt_logprobs

if TYPE_CHECKING:
    from nbengine.completion import Completion
    from nbengine.request import Request
    from nbengine.serve.asks import Asked
    from nbengine.tokenizer import Tokenizer


class Heading:
    """What every part of one answer begins with."""

    def __init__(self, asked: Asked, model: str) -> None:
        self.id = asked.body.request_id or f"{'chatcmpl' if asked.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.created = int(time.time())
        self.model = model
        self.kind = "chat.completion" if asked.chat else "text_completion"

    def fields(self, *, chunk: bool = False) -> dict[str, Any]:
        kind = f"{self.kind}.chunk" if chunk and self.kind == "chat.completion" else self.kind
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}


def usage(asked: Asked) -> dict[str, Any]:
    """Tokens so far; a prompt counts once, however many outputs it has."""
    prompt = sum(len(request.prompt_token_ids) for request in asked.requests)
    made = 0 if asked.silent else sum(len(c.token_ids) for request in asked.requests for c in request.completions)
    cached = sum(request.num_cached_tokens for request in asked.requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def answer(asked: Asked, heading: Heading, tokenizer: Tokenizer) -> dict[str, Any]:
    """Of requests that have ended well."""
    names = TokenNames(tokenizer, as_ids=bool(asked.body.return_tokens_as_token_ids))
    choices = [
        choice(asked, request, completion, i, names) for i, request in enumerate(asked.requests) for completion in request.completions
    ]
    told = {**heading.fields(), "choices": choices, "usage": usage(asked)}
    if asked.chat and asked.body.prompt_logprobs is not None:
        told["prompt_logprobs"] = prompt_logprobs(asked.requests[0], tokenizer)
    if asked.chat and asked.body.return_token_ids:
        told["prompt_token_ids"] = asked.requests[0].prompt_token_ids
    if not asked.chat and asked.body.prompt_logprobs is not None:
        for told_choice in choices:
            told_choice["prompt_logprobs"] = prompt_logprobs(asked.requests[told_choice["index"] // asked.n], tokenizer)
    return told


def choice(asked: Asked, request: Request, completion: Completion, place: int, names: TokenNames) -> dict[str, Any]:
    before = asked.before[place] if asked.before else ""
    ids = [] if asked.silent else completion.token_ids
    text = before + ("" if asked.silent else completion.read_text())
    reason = "length" if asked.silent else completion.finish_reason
    told: dict[str, Any] = {"index": place * asked.n + completion.index}
    if asked.chat:
        told["message"] = {"role": "assistant", "content": text}
        told["logprobs"] = None
        if completion.logprobs is not None:
            told["logprobs"] = chat_logprobs(ids, completion.logprobs, request.params.logprobs or 0, names)
    else:
        told["text"] = text
        told["logprobs"] = None
        if completion.logprobs is not None:
            entries = [*prompt_entries(asked, request), *completion.logprobs[: len(ids)]]
            tokens = [*prompt_tokens(asked, request), *ids]
            told["logprobs"] = completion_logprobs(tokens, entries, request.params.logprobs or 0, names)
    told["finish_reason"] = reason
    told["stop_reason"] = None if asked.silent else completion.stop_reason
    if asked.body.return_token_ids:
        told["token_ids"] = ids
        if not asked.chat:
            told["prompt_token_ids"] = request.prompt_token_ids
    return told


def prompt_tokens(asked: Asked, request: Request) -> list[int]:
    """Those that the answer's log-probabilities begin with."""
    return request.prompt_token_ids if asked.before and not asked.chat else []


def prompt_entries(asked: Asked, request: Request) -> list[Any]:
    return [None, *request.prompt_entries] if asked.before and not asked.chat else []
