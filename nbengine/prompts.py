"""Prompts in every form that a caller may give, checked and turned into token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from nbengine.checks import as_int

if TYPE_CHECKING:
    from nbengine.tokenizer import Tokenizer


class TextPrompt(TypedDict):
    """vLLM's name for a prompt as text."""

    prompt: str


class TokensPrompt(TypedDict):
    """vLLM's name for a prompt as token ids, with its text where that is known."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str]


Prompt = str | Mapping[str, Any] | Sequence[int]
_FORMS = "a string, a list of token ids, {'prompt': text} or {'prompt_token_ids': ids}"


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], **options: Any) -> TokensPrompt:
    """A conversation written by a chat template, which writes its own special tokens, so none are added."""
    text = tokenizer.apply_chat_template(messages, **options)
    return {"prompt": text, "prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def read_prompt(prompts: Sequence[Prompt], tokenizer: Tokenizer | None, vocab_size: int) -> tuple[list[str | None], list[list[int]]]:
    """Each prompt's text, where it has one, and its token ids; texts are tokenised together."""
    texts: list[str | None] = []
    ids: list[list[int] | None] = []
    for prompt in prompts:
        text, tokens = _parts(prompt)
        texts.append(text)
        ids.append(None if tokens is None else _checked(tokens, vocab_size))
    plain = [text for text, tokens in zip(texts, ids, strict=True) if tokens is None and text is not None]
    if plain and tokenizer is None:
        raise ValueError("a text prompt needs a tokenizer, and this engine has none (skip_tokenizer_init=True): pass prompt_token_ids")
    encoded = iter(tokenizer.encode_batch(plain) if plain and tokenizer is not None else [])
    return texts, [next(encoded) if tokens is None else tokens for tokens in ids]


def _parts(prompt: Any) -> tuple[str | None, Any]:
    text: Any
    if isinstance(prompt, str):
        text, tokens = prompt, None
    elif isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or not prompt:
            raise ValueError(f"a prompt dict holds 'prompt' or 'prompt_token_ids'{f', not {sorted(map(str, unknown))}' if unknown else ''}")
        text, tokens = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if text is None and tokens is None:
            raise ValueError("a prompt dict needs a value for 'prompt' or 'prompt_token_ids'")
        if text is not None and not isinstance(text, str):
            raise TypeError(f"'prompt' must be a string, not {type(text).__name__}")
    elif isinstance(prompt, Sequence) and not isinstance(prompt, bytes):
        if prompt and isinstance(prompt[0], str | Mapping):
            raise TypeError(f"a prompt must be {_FORMS}, not a list of prompts: that goes to generate(); submit() and stream() take one")
        text, tokens = None, prompt
    else:
        raise TypeError(f"a prompt must be {_FORMS}, not {type(prompt).__name__}")
    if tokens is None and text is not None and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the prompt is no valid Unicode text ({error.reason} at character {error.start}): remove lone surrogates"
            ) from None
    if tokens is None and text == "":
        raise ValueError("the prompt is empty: give at least one character, or token ids such as [bos_token_id]")
    return text, tokens


def _checked(tokens: Any, vocab_size: int) -> list[int]:
    if isinstance(tokens, str | bytes) or not hasattr(tokens, "__iter__"):
        raise TypeError(f"token ids must be a list of whole numbers, not {type(tokens).__name__}")
    if tokens.__class__ is list and set(map(type, tokens)) == {int} and min(tokens) >= 0 and max(tokens) < vocab_size:
        return list(tokens)
    ids = []
    for token in tokens:  # anything else that is a whole number, or what is wrong
        number = as_int(token)
        if number is None:
            raise TypeError(f"token ids must be whole numbers, not {token!r}")
        if not 0 <= number < vocab_size:
            raise ValueError(f"token id {number} is outside the vocabulary [0, {vocab_size})")
        ids.append(number)
    if not ids:
        raise ValueError("the prompt is empty: give at least one token id")
    return ids
