"""What a request asks of the sampler: vLLM's names, defaults and meanings."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from numbers import Real
from typing import Any

from nbengine.checks import as_int
from nbengine.errors import nearest

MOST_OUTPUTS = 16384  # of one request
LONGEST_STOP = 1000  # characters of a stop string
MOST_STOPS = 64  # stop strings: each is looked for at each token
MOST_BAD_WORDS = 1024
GREEDY_BELOW = 1e-5  # a temperature under this means: take the most likely token

# Names of vLLM, old and new, that are not built: the values that change nothing, and what to do instead of the others.
_NOT_BUILT: dict[str, tuple[tuple[Any, ...], str]] = {
    "best_of": ((None,), "ask for n outputs and pick the best by .cumulative_logprob"),
    "use_beam_search": ((None, False), "beam search is not built; sample n outputs instead"),
    "length_penalty": ((None, 1.0), "it belongs to beam search, which is not built"),
    "early_stopping": ((None, False), "it belongs to beam search, which is not built"),
    "structured_outputs": ((None,), "write the constraint as a callable in logits_processors"),
    "guided_decoding": ((None,), "write the constraint as a callable in logits_processors"),
    "truncate_prompt_tokens": ((None,), "cut the prompt's token ids before you submit it"),
    "logprob_token_ids": ((None,), "ask for logprobs=-1 and pick these ids"),
    "prompt_logprob_token_ids": ((None,), "ask for prompt_logprobs=-1 and pick these ids"),
    "prompt_logprob_start": ((None, 0), "ask for prompt_logprobs and cut the list"),
    "flat_logprobs": ((None, False), "logprobs come as one dict a token"),
    "stream_interval": ((None, 1), "a request yields as its tokens come"),
    "skip_clone": ((None, False), "parameters are always copied when a request is submitted"),
    "skip_reading_prefix_cache": ((None, False), "turn the cache off for the engine: enable_prefix_caching=False"),
    "thinking_token_budget": ((None, -1), "limit the whole output with max_tokens"),
    "repetition_detection": ((None,), "discourage repetition with repetition_penalty or frequency_penalty"),
    "routed_experts_prompt_start": ((None, 0), "the experts' routing is not returned"),
    "trace_decode_token_ids": ((None,), "force the sequence with a callable in logits_processors"),
    "extra_args": ((None, {}), "nothing reads it; give a custom processor its arguments with functools.partial"),
}


class RequestOutputKind(Enum):
    """What each output that a stream yields holds."""

    CUMULATIVE = 0  # everything so far
    DELTA = 1  # what is new since the last one
    FINAL_ONLY = 2  # nothing before the end

    def __repr__(self) -> str:
        return str(self)


def _explains_keywords(cls: Any) -> Any:
    """Make the class's __init__ refuse unknown keywords with the nearest known one, and accept neutral values of the unbuilt."""
    init = cls.__init__
    known = [f.name for f in fields(cls) if f.init]

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        for name in kwargs.keys() - set(known):
            if name not in _NOT_BUILT:
                raise TypeError(f"SamplingParams has no parameter {name!r}{nearest(name, [*known, *_NOT_BUILT])}")
            neutral, advice = _NOT_BUILT[name]
            value = kwargs.pop(name)
            if name == "best_of":
                neutral = (None, kwargs.get("n", 1))
            if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in neutral):
                raise ValueError(f"{name}={value!r} is not supported: {advice}")
        init(self, *args, **kwargs)

    cls.__init__ = __init__
    return cls


@_explains_keywords
@dataclass(slots=True, repr=False)
class SamplingParams:
    """How to choose the tokens of one request, and when to stop.

    Every value is checked here, and once more when the request is submitted, so attributes may be changed in between.

    >>> SamplingParams(temperature=0.7, top_p=0.9, max_tokens=64)
    SamplingParams(temperature=0.7, top_p=0.9, max_tokens=64)
    """

    n: int = 1  # outputs; they share the prompt's cache
    presence_penalty: float = 0.0  # subtracted once from the logit of each token that the output already has
    frequency_penalty: float = 0.0  # subtracted for each time the output already has the token
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens in prompt or output
    temperature: float = 1.0  # 0 is greedy: the most likely token, and top_p, top_k, min_p mean nothing
    top_p: float = 1.0  # draw from the fewest most likely tokens that have this mass together
    top_k: int = 0  # draw from this many most likely tokens; 0 or -1 is all
    min_p: float = 0.0  # draw from tokens at least this fraction as likely as the most likely one
    seed: int | None = None  # with a seed, the output depends on it and the prompt alone; None or -1 is a fresh one
    stop: str | list[str] | None = None  # strings that end the output; always a list once constructed
    stop_token_ids: list[int] | None = None  # tokens that end the output; always a list once constructed
    bad_words: list[str] | None = None  # words that never come; always a list once constructed
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False  # go on after the model's end-of-sequence tokens
    max_tokens: int | None = 16  # None: as many as max_model_len has room for
    min_tokens: int = 0  # no end-of-sequence token and no stop token before this many
    logprobs: int | None = None  # this many most likely tokens at each position, and the chosen one; -1 is all of them
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    detokenize: bool = True  # False: token ids only, text stays empty
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None  # added to the logits of these tokens; keys are ints once constructed
    allowed_token_ids: list[int] | None = None  # no other token ever comes
    logits_processors: list[Callable[..., Any]] | None = None  # f(output_ids, logits) or f(prompt_ids, output_ids, logits)

    _eos_token_ids: tuple[int, ...] = field(default=(), init=False, compare=False)
    _bad_words_ids: list[list[int]] = field(default_factory=list, init=False, compare=False)
    _all_stop_token_ids: frozenset[int] | None = field(default=None, init=False, compare=False)

    def __post_init__(self) -> None:
        self._check()

    @property
    def needs_history(self) -> bool:
        """Whether a token can be drawn only when the host knows the one before, so that no step runs ahead."""
        return bool(self.logits_processors) or any(len(word) > 1 for word in self._bad_words_ids)

    # ---------------------------------------------------------------- made from

    @classmethod
    def from_optional(cls, **values: Any) -> SamplingParams:
        """Parameters where None means the default, as the fields of an HTTP request do."""
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> SamplingParams:
        """A model's own defaults, from its generation_config.json.

        As in vLLM, `do_sample` is not read: a model that ships `do_sample: false` without a temperature samples at 1.0.
        """
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        values = {name: config.get(name) for name in names} | {"max_tokens": config.get("max_new_tokens")}
        try:
            return cls.from_optional(**values)
        except (TypeError, ValueError) as e:
            raise ValueError(f"the model's generation_config.json cannot be used: {e}") from e

    def clone(self) -> SamplingParams:
        """An equal copy whose lists and dicts are its own; logits processors are shared."""
        new = copy.copy(self)
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, list | dict):
                setattr(new, f.name, value.copy())
        return new

    # ---------------------------------------------------------------- for a model

    def resolve(self, eos_token_ids: Iterable[int] = (), tokenizer: Any = None) -> SamplingParams:
        """A checked copy that knows a model's end-of-sequence tokens and the token ids of its bad words."""
        new = self.clone()
        new._become_resolved(tuple(eos_token_ids), tokenizer)  # noqa: SLF001
        return new

    def _become_resolved(self, eos_token_ids: tuple[int, ...], tokenizer: Any) -> None:
        self._check()
        self._eos_token_ids = () if self.ignore_eos else eos_token_ids
        self._all_stop_token_ids = frozenset(self._eos_token_ids) | frozenset(self.stop_token_ids or ())
        self._bad_words_ids = _bad_words_ids(self.bad_words or [], tokenizer)

    def validate_for(self, vocab_size: int, max_logprobs: int = 20) -> None:
        """Raise ValueError for what this model cannot do: ids outside its vocabulary, more logprobs than the engine allows."""
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            _in_vocabulary(name, getattr(self, name) or (), vocab_size)
        for ids in self._bad_words_ids:
            _in_vocabulary("bad_words", ids, vocab_size)
        for name in ("logprobs", "prompt_logprobs"):
            asked = getattr(self, name)
            if asked is not None and max_logprobs != -1 and (vocab_size if asked == -1 else asked) > max_logprobs:
                raise ValueError(
                    f"{name}={asked} is more than this engine's max_logprobs={max_logprobs}: ask for fewer or raise max_logprobs"
                )

    @property
    def all_stop_token_ids(self) -> frozenset[int]:
        """Every token that ends the output: stop_token_ids and, once resolved and unless ignore_eos, the model's own."""
        return frozenset(self.stop_token_ids or ()) if self._all_stop_token_ids is None else self._all_stop_token_ids

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if f.init and getattr(self, f.name) != _DEFAULTS[f.name])
        return f"SamplingParams({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    # ---------------------------------------------------------------- checks

    def _check(self) -> None:
        """Bring every field to its one form, or say what is wrong with it."""
        self.n = _int("n", self.n, least=1)
        if self.n > MOST_OUTPUTS:
            raise ValueError(f"n must be at most {MOST_OUTPUTS}, got {self.n}: submit several requests for more")
        self.presence_penalty = _float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        self.frequency_penalty = _float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self.repetition_penalty = _float("repetition_penalty", self.repetition_penalty, 0.0, advice="use 1 for none", open_below=True)
        self.temperature = _float("temperature", self.temperature, 0.0, advice="use 0 for greedy")
        self.top_p = _float("top_p", self.top_p, 0.0, 1.0, advice="use 1 for all tokens, temperature=0 for greedy", open_below=True)
        self.top_k = min(max(_int("top_k", self.top_k, least=-1, advice="use 0 for all tokens"), 0), 2**31 - 1)
        self.min_p = _float("min_p", self.min_p, 0.0, 1.0, advice="use 0 for none")
        self.seed = _seed(self.seed)
        self.max_tokens = None if self.max_tokens is None else _int("max_tokens", self.max_tokens, least=1)
        self.min_tokens = _int("min_tokens", self.min_tokens, least=0)
        self.logprobs = _logprobs("logprobs", self.logprobs)
        self.prompt_logprobs = _logprobs("prompt_logprobs", self.prompt_logprobs)
        for f in fields(self):
            if f.type == "bool" and not isinstance(getattr(self, f.name), bool):
                raise TypeError(f"{f.name} must be True or False, not {getattr(self, f.name)!r}")
        self.stop = _strings("stop", [self.stop] if isinstance(self.stop, str) else self.stop)
        if any(len(stop) > LONGEST_STOP for stop in self.stop):
            raise ValueError(f"a stop string must have at most {LONGEST_STOP} characters: its first ones are enough to stop at")
        if len(self.stop) > MOST_STOPS:
            raise ValueError(
                f"stop holds {len(self.stop)} strings, and at most {MOST_STOPS} are looked for: send fewer, or use stop_token_ids"
            )
        self.bad_words = _strings("bad_words", self.bad_words)
        if len(self.bad_words) > MOST_BAD_WORDS:
            raise ValueError(
                f"bad_words holds {len(self.bad_words)} words, and at most {MOST_BAD_WORDS} are taken: send fewer, or ban tokens with logit_bias"
            )
        self.stop_token_ids = list(dict.fromkeys(_ids("stop_token_ids", self.stop_token_ids)))
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty, so no token could come: list some, or use None to allow all")
        self.logit_bias = _logit_bias(self.logit_bias)
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind must be a RequestOutputKind such as RequestOutputKind.DELTA, not {self.output_kind!r}")
        if self.logits_processors is not None:
            if not isinstance(self.logits_processors, list | tuple):
                raise TypeError(f"logits_processors must be a list of callables, not {type(self.logits_processors).__name__}")
            self.logits_processors = list(self.logits_processors)
            for processor in self.logits_processors:
                takes_prompt(processor)
        self._check_together()

    def _check_together(self) -> None:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}: raise max_tokens or lower min_tokens"
            )
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are looked for in the text: set detokenize=True, or stop at tokens with stop_token_ids")
        if not self.spaces_between_special_tokens:
            raise ValueError("spaces_between_special_tokens=False is not supported: leave it out, or decode output.token_ids yourself")


_DEFAULTS: dict[str, Any] = {f.name: f.default for f in fields(SamplingParams) if f.default is not MISSING}
_DEFAULTS |= {"stop": [], "stop_token_ids": [], "bad_words": []}  # their one form


def takes_prompt(processor: Any) -> bool:
    """Whether a logits processor is f(prompt_ids, output_ids, logits) rather than f(output_ids, logits)."""
    if not callable(processor):
        raise TypeError(f"logits_processors must hold callables, not {processor!r}")
    try:
        bind = inspect.signature(processor).bind
    except (TypeError, ValueError):  # a builtin tells nothing about its arguments
        return False
    for args in ((None, None), (None, None, None)):
        try:
            bind(*args)
        except TypeError:
            continue
        return len(args) == 3
    raise TypeError(
        f"the logits processor {processor!r} must take (output_ids, logits) or (prompt_ids, output_ids, logits); bind others with functools.partial"
    )


def _int(name: str, value: Any, least: int | None = None, advice: str = "") -> int:
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be an integer, not {value!r}{_tail(advice)}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be >= {least}, got {number}{_tail(advice)}")
    return number


def _float(name: str, value: Any, low: float, high: float = math.inf, advice: str = "", *, open_below: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, not {value!r}{_tail(advice)}")
    number = float(value)
    if not math.isfinite(number) or number > high or number < low or (open_below and number == low):
        span = f"{'>' if open_below else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
        raise ValueError(f"{name} must be finite and {span}, got {number}{_tail(advice)}")
    return number


def _tail(advice: str) -> str:
    return f"; {advice}" if advice else ""


def _seed(value: Any) -> int | None:
    if value is None:
        return None
    number = _int("seed", value, advice="use None for a fresh one")
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {number}; use a smaller one")
    return None if number == -1 else number


def _logprobs(name: str, value: Any) -> int | None:
    if value is None:
        return None
    return 1 if value is True else _int(name, value, least=-1, advice="use None for none, -1 for the whole vocabulary")


def _strings(name: str, values: Any) -> list[str]:
    if values is None:
        return []
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of strings, not {values!r}")
    strings = list(dict.fromkeys(values))
    for string in strings:
        if not isinstance(string, str):
            raise TypeError(f"{name} must hold strings only, not {string!r}")
        if not string:
            raise ValueError(f"{name} holds an empty string, which is everywhere: take it out")
    return strings


def _ids(name: str, values: Any) -> list[int]:
    if values is None:
        return []
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list of token ids, not {values!r}")
    return [_int(f"each of {name}", value, least=0, advice="a token id is wanted") for value in values]


def _logit_bias(values: Any) -> dict[int, float] | None:
    if values is None:
        return None
    if not isinstance(values, Mapping):
        raise TypeError(f"logit_bias must be a dict from token id to number, not {values!r}")
    bias: dict[int, float] = {}
    for key, value in values.items():
        token = (
            int(key)
            if isinstance(key, str) and key.isdecimal()
            else _int("each key of logit_bias", key, least=0, advice="a token id is wanted")
        )
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"logit_bias[{key!r}] must be a number, not {value!r}")
        if math.isnan(value) or value == math.inf:
            raise ValueError(f"logit_bias[{key!r}] must be finite, got {value}; to force a token use allowed_token_ids")
        bias[token] = float(value)
    return bias


def _in_vocabulary(name: str, ids: Iterable[int], vocab_size: int) -> None:
    outside = [i for i in ids if not 0 <= i < vocab_size]
    if outside:
        raise ValueError(f"{name} holds {outside[:5]}, outside this model's vocabulary of {vocab_size} tokens: use ids below {vocab_size}")


def _bad_words_ids(words: list[str], tokenizer: Any) -> list[list[int]]:
    """The token sequences that write each word, at the start of a text and after a space."""
    if words and tokenizer is None:
        raise ValueError("bad_words needs a tokenizer: load the engine without skip_tokenizer_init, or ban tokens with logit_bias")
    sequences: list[list[int]] = []
    for word in words:
        bare, spaced = (list(tokenizer.encode(prefix + word.lstrip(), add_special_tokens=False)) for prefix in ("", " "))
        if not bare:
            raise ValueError(f"bad_words holds {word!r}, which the tokenizer turns into no token at all: take it out")
        sequences.append(bare)
        if spaced[-len(bare) :] != bare:  # otherwise banning the bare form bans this one too
            sequences.append(spaced)
    return sequences
