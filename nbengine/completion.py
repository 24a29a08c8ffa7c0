"""One output of a request as its reader sees it: tokens put in by the engine's thread, text made when it is looked at."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from nbengine.detokenizer import Detokenizer
from nbengine.outputs import CompletionOutput, Logprob

if TYPE_CHECKING:
    from nbengine.batch import TokenLogprobs
    from nbengine.outputs import FinishReason
    from nbengine.sampling_params import SamplingParams
    from nbengine.tokenizer import Tokenizer


class Completion:
    """The engine's thread only appends token ids, unless a stop string must be looked for; readers turn them into text."""

    __slots__ = (
        "_complete",
        "_detokenizer",
        "_lock",
        "_params",
        "_read",
        "_tokenizer",
        "finish_reason",
        "index",
        "logprobs",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, index: int, tokenizer: Tokenizer | None, prompt_token_ids: list[int], params: SamplingParams) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._params = params
        self._tokenizer = tokenizer
        self._complete = False  # finished, and every token is here
        self._read = 0  # tokens the detokenizer has seen
        self._lock = threading.Lock()  # the detokenizer's: several readers, and the engine's thread where there are stop strings
        self._detokenizer = None
        if tokenizer is not None and params.detokenize:
            self._detokenizer = Detokenizer(
                tokenizer,
                prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                stop=params.stop or (),
                include_stop_str_in_output=params.include_stop_str_in_output,
                min_tokens=params.min_tokens,
            )

    # ── the engine's thread ─────────────────────────────────────────────────────────────────────────────────────────

    def put(self, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> str | None:
        """Append sampled tokens; the stop string that they complete, if any. `finish` comes before the last ones, `complete` after."""
        if logprobs is not None and self.logprobs is not None:
            self.logprobs.extend(logprobs[: len(tokens)])
        if self._params.stop:
            return self._put_checked(tokens)
        self.token_ids += tokens
        return None

    def _put_checked(self, tokens: list[int]) -> str | None:
        detokenizer = self._detokenizer
        assert detokenizer is not None
        shown = len(tokens) - self._hides_last(tokens)
        with self._lock:
            for kept, token in enumerate(tokens, 1):
                self.token_ids.append(token)
                if kept <= shown and detokenizer.push(token):
                    return detokenizer.stop_reason
            if self.finish_reason is not None and detokenizer.finish():
                return detokenizer.stop_reason
        return None

    def finish(self, reason: FinishReason, stop_reason: int | str | None) -> None:
        """Why it ended: said before the last tokens are put, so that whoever sees them knows whether the last is shown."""
        self.stop_reason = stop_reason
        self.finish_reason = reason

    def complete(self) -> None:
        """It has finished and every token has been put."""
        self._complete = True

    def _hides_last(self, tokens: list[int]) -> bool:
        """Whether the last token is a stop token that is not part of the text."""
        ended = self.finish_reason == "stop" and bool(tokens) and tokens[-1] in self._params.all_stop_token_ids
        return ended and not self._params.include_stop_str_in_output

    # ── readers ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def complete_now(self) -> bool:
        """It has finished, and what is read after this was seen is all of it."""
        return self._complete

    def read_delta(self) -> str:
        """The text that no call of this has given yet."""
        if self._detokenizer is None:
            return ""
        with self._lock:
            self._catch_up(self._detokenizer)
            return self._detokenizer.take_delta()

    def read_text(self) -> str:
        """The text so far."""
        if self._detokenizer is None:
            return ""
        with self._lock:
            self._catch_up(self._detokenizer)
            return self._detokenizer.text

    def _catch_up(self, detokenizer: Detokenizer) -> None:
        complete = self._complete  # read before the tokens: they were put before it
        tokens = self.token_ids[self._read :]
        self._read += len(tokens)
        if not self._params.stop:
            for token in tokens[:-1] if self._hides_last(tokens) else tokens:
                detokenizer.push(token)
        if complete:
            detokenizer.finish()

    def output(self, since_token: int = 0) -> CompletionOutput:
        """What there is now: all the text, and the tokens from one on."""
        complete = self._complete  # read first: why it ended is told with its last token, not before
        text = self.read_text()
        ids = self.token_ids[since_token:]
        logprobs = None
        if self.logprobs is not None:
            logprobs = [named(entry, self._tokenizer) for entry in self.logprobs[since_token : since_token + len(ids)]]
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=ids,
            cumulative_logprob=None if self.logprobs is None else sum(entry.values[0] for entry in self.logprobs),
            logprobs=logprobs,
            finish_reason=self.finish_reason if complete else None,
            stop_reason=self.stop_reason if complete else None,
        )


def named(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """Log-probabilities by token, each with its text: the token in question first, then the most likely."""

    def text(token: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(token)

    chosen, *likely = entry.ids
    found = {chosen: Logprob(entry.values[0], entry.rank, text(chosen))}
    for rank, (token, value) in enumerate(zip(likely, entry.values[1:], strict=True), 1):
        found.setdefault(token, Logprob(value, rank, text(token)))
    return found
