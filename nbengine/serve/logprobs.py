"""Log-probabilities as completions and as chat completions tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nbengine.completion import named

if TYPE_CHECKING:
    from nbengine.batch import TokenLogprobs
    from nbengine.request import Request
    from nbengine.tokenizer import Tokenizer

LEAST = -9999.0  # JSON has no minus infinity; vLLM writes this


class TokenNames:
    """The text of a token, or token_id:N where a client asked for that."""

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._pieces = tokenizer.pieces(False)

    def __call__(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._tokenizer.token_text(token)

    def text(self, token: int) -> str:
        """What it adds to the text, whatever it is called."""
        return self._tokenizer.token_text(token)

    def octets(self, token: int) -> list[int]:
        """Its bytes in UTF-8, those of half a character too."""
        piece = self._tokenizer.token_text(token) if self._pieces is None else self._pieces[token]
        return list(piece if isinstance(piece, bytes) else piece.encode())


def finite(value: float) -> float:
    return max(value, LEAST)


def completion_logprobs(
    tokens: Sequence[int], entries: Sequence[TokenLogprobs | None], most: int, names: TokenNames, offset: int = 0
) -> dict[str, Any]:
    """Of a run of tokens; `offset` characters of text stand before it. A prompt's first token has no entry."""
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, entry in zip(tokens, entries, strict=True):
        found["tokens"].append(names(token))
        found["text_offset"].append(offset)
        offset += len(names.text(token))
        if entry is None:
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        found["token_logprobs"].append(finite(entry.values[0]))
        top: dict[str, float] = {}
        for other, value in [*list(zip(entry.ids, entry.values, strict=True))[1 : most + 1], (entry.ids[0], entry.values[0])]:
            top.setdefault(names(other), finite(value))
        found["top_logprobs"].append(top)
    return found


def chat_logprobs(tokens: Sequence[int], entries: Sequence[TokenLogprobs], most: int, names: TokenNames) -> dict[str, Any]:
    """Of a run of tokens."""

    def one(token: int, value: float) -> dict[str, Any]:
        return {"token": names(token), "logprob": finite(value), "bytes": names.octets(token)}

    content = []
    for token, entry in zip(tokens, entries, strict=True):
        likely = list(zip(entry.ids, entry.values, strict=True))[1 : most + 1]
        content.append({**one(token, entry.values[0]), "top_logprobs": [one(*other) for other in likely]})
    return {"content": content}


def prompt_logprobs(request: Request, tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """vLLM's: for each token of the prompt, its likely ones by id; none for the first."""
    return [
        None,
        *(
            {
                str(token): {"logprob": finite(found.logprob), "rank": found.rank, "decoded_token": found.decoded_token}
                for token, found in named(entry, tokenizer).items()
            }
            for entry in request.prompt_entries
        ),
    ]
