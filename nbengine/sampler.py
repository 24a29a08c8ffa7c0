"""From logits to tokens: each row's own parameters, history and log-probabilities, on the runner's side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nbengine.batch import NewRow, Sampled, TokenLogprobs
from nbengine.kernels.sample import sample_reference
from nbengine.penalty_tables import has_penalties
from nbengine.sampling_params import takes_prompt

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from nbengine.sampling_params import SamplingParams

_ALWAYS = np.iinfo(np.int64).max
_CHUNK = 1 << 22  # logits looked at together for log-probabilities: bounds the memory of a long prompt's


class Sampler:
    """The sampling state of up to max_rows sequences, one state row each; draws a token for some of them at a time.

    `op` draws the tokens, with the signature of `nbengine.kernels.sample.sample_reference`.
    """

    def __init__(
        self, vocab_size: int, max_rows: int, device: torch.device | str = "cpu", *, op: Callable[..., torch.Tensor] = sample_reference
    ) -> None:
        self.vocab_size = vocab_size
        self.device = torch.device(device)
        self.op = op
        self._edits: list[Edits | None] = [None] * max_rows
        self._lengths = np.zeros(max_rows, np.int64)  # tokens of the sequence so far: where the next one will stand
        self._edit_until = np.zeros(max_rows, np.int64)  # the row's logits are edited while its length is below this
        self._logprobs = np.full(max_rows, -1, np.int64)  # most likely tokens wanted beside the drawn one; -1: no logprobs
        self._arguments: tuple[NDArray[Any], ...] = (  # of the op: temperature, top_k, top_p, min_p, seeds
            np.zeros(max_rows, np.float32),
            np.zeros(max_rows, np.int64),
            np.ones(max_rows, np.float64),
            np.zeros(max_rows, np.float64),
            np.zeros(max_rows, np.int64),
        )

    def admit(self, new: NewRow) -> None:
        """Give a state row to a sequence; whatever was there is gone."""
        params, row = new.params, new.row
        seed = (new.seed + 2**63) % 2**64 - 2**63  # the same 64 bits, signed
        for table, value in zip(self._arguments, (params.temperature, params.top_k, params.top_p, params.min_p, seed), strict=True):
            table[row] = value
        self._lengths[row] = len(new.prompt) + len(new.output)
        wanted = params.logprobs
        self._logprobs[row] = -1 if wanted is None else self.vocab_size if wanted == -1 else min(wanted, self.vocab_size)
        edits = Edits(new, self.vocab_size, self.device)
        self._edit_until[row] = _ALWAYS if edits.always else len(new.prompt) + params.min_tokens if len(edits.stops) else 0
        self._edits[row] = edits if self._edit_until[row] else None

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, rows: NDArray[np.integer]) -> Sampled:
        """Draw one token for each of these state rows from logits [samples, vocab] float32, which stay as they are.

        The drawn tokens join the rows' histories. A sample that fails takes no token, and the others do not notice.
        """
        assert logits.shape == (len(rows), self.vocab_size)
        assert logits.dtype == torch.float32
        failed: dict[int, str] = {}
        edited = np.flatnonzero(self._lengths[rows] < self._edit_until[rows]).tolist()
        scores = logits.clone() if edited else logits
        for j in edited:
            try:
                self._edits[rows[j]].apply(scores[j], len(self._edits[rows[j]].output))
            except ProcessorError as e:
                failed[j] = str(e)
        arguments = [torch.from_numpy(table[rows]).to(self.device) for table in (*self._arguments, self._lengths)]
        ids = self.op(scores, *arguments)
        tokens = ids.cpu().numpy().astype(np.int32)
        for j in np.flatnonzero(tokens < 0).tolist():
            failed.setdefault(j, why_nothing(logits[j], scores[j]))
        counts = np.ones(len(rows), np.int32)
        counts[list(failed)] = 0
        self._lengths[rows] += counts
        for j in edited:
            if j not in failed:
                self._edits[rows[j]].append(int(tokens[j]))
        wanted = np.flatnonzero((self._logprobs[rows] >= 0) & (counts > 0))
        logprobs: dict[int, list[TokenLogprobs]] = {}
        if len(wanted):
            tops = self._logprobs[rows[wanted]]
            picked = torch.from_numpy(wanted).to(self.device)
            entries = token_logprobs(logits if len(wanted) == len(rows) else logits[picked], ids[picked], int(tops.max()))
            for j, top, entry in zip(wanted.tolist(), tops.tolist(), entries, strict=True):
                logprobs[j] = [TokenLogprobs(entry.ids[: top + 1], entry.values[: top + 1], entry.rank)]
        return Sampled(tokens=(tokens * counts)[:, None], counts=counts, logprobs=logprobs, failed=failed)

    @torch.inference_mode()
    def prompt_logprobs(self, logits: torch.Tensor, targets: torch.Tensor | Sequence[int], top: int) -> list[TokenLogprobs]:
        """What logits [tokens, vocab] say of the tokens that follow, targets [tokens]; top most likely ones each, -1 is all."""
        return token_logprobs(logits, torch.as_tensor(targets, device=logits.device), self.vocab_size if top == -1 else top)


LogprobTensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # ids [n, 1 + top], values [n, 1 + top], ranks [n, 1]


def logprob_tensors(logits: torch.Tensor, targets: torch.Tensor, top: int) -> Iterator[LogprobTensors]:
    """Log-probabilities of targets [n] and of the top most likely tokens under logits [n, vocab], piece by piece, where the logits are."""
    for piece, target in zip(*(t.split(max(1, _CHUNK // logits.shape[1])) for t in (logits.float(), targets.long())), strict=True):
        chosen = piece.gather(1, target[:, None])
        best, ids = piece.topk(min(top, piece.shape[1]))
        values = torch.cat([chosen, best], 1) - piece.logsumexp(-1, keepdim=True)
        yield torch.cat([target[:, None], ids], 1), values, (piece > chosen).sum(-1) + 1


def logprob_entries(ids: torch.Tensor, values: torch.Tensor, ranks: torch.Tensor) -> list[TokenLogprobs]:
    """The same as the host reads it; equals share the better rank."""
    return [TokenLogprobs(*entry) for entry in zip(ids.tolist(), values.tolist(), ranks.tolist(), strict=True)]


def token_logprobs(logits: torch.Tensor, targets: torch.Tensor, top: int) -> list[TokenLogprobs]:
    """Log-probabilities of targets [n] and of the top most likely tokens under logits [n, vocab]; equals share the better rank."""
    return [entry for piece in logprob_tensors(logits, targets, top) for entry in logprob_entries(*piece)]


class ProcessorError(Exception):
    """A user's logits processor went wrong: one sample's failure."""


def has_edits(params: SamplingParams) -> bool:
    """Whether there may be anything for `Edits` to do beyond penalties."""
    asked = params.min_tokens, params.logit_bias, params._bad_words_ids, params.logits_processors  # noqa: SLF001
    return params.allowed_token_ids is not None or any(asked)


class Edits:
    """What one sequence's parameters do to its logits before they are scaled and drawn from."""

    def __init__(self, new: NewRow, vocab_size: int, device: torch.device, *, penalties: bool = True) -> None:
        params = new.params
        self.params = params
        self.prompt = new.prompt
        self.output = list(new.output)
        self.stops = _index([i for i in sorted(params.all_stop_token_ids) if i < vocab_size] if params.min_tokens else [], device)
        self.forbidden: torch.Tensor | None = None  # [vocab] where not allowed
        if params.allowed_token_ids is not None:
            self.forbidden = torch.ones(vocab_size, dtype=torch.bool, device=device)
            self.forbidden[_index(params.allowed_token_ids, device)] = False
        bias = params.logit_bias or {}
        self.bias_ids, self.bias = _index(list(bias), device), torch.tensor(list(bias.values()), dtype=torch.float32, device=device)
        bad_words = params._bad_words_ids  # noqa: SLF001  (the sampler is what they were resolved for)
        self.never = _index([ids[0] for ids in bad_words if len(ids) == 1], device)
        self.bad_words = [ids for ids in bad_words if len(ids) > 1]
        self.processors = [(f, takes_prompt(f)) for f in params.logits_processors or ()]
        self.seen: _Seen | None = None
        if penalties and has_penalties(params):
            self.seen = _Seen(new.prompt, new.output)

    @property
    def always(self) -> bool:
        """Whether there is more to do than to hold back the stop tokens of the first min_tokens."""
        return (
            self.forbidden is not None
            or self.seen is not None
            or bool(len(self.bias) or len(self.never) or self.bad_words or self.processors)
        )

    def append(self, token: int) -> None:
        self.output.append(token)
        if self.seen is not None:
            self.seen.add(token)

    def apply(self, x: torch.Tensor, produced: int) -> None:
        """Edit logits [vocab] of a sequence with `produced` tokens of output, in place; ProcessorError where a processor failed."""
        if self.forbidden is not None:
            x.masked_fill_(self.forbidden, -torch.inf)
        if produced < self.params.min_tokens:
            x[self.stops] = -torch.inf
        if len(self.bias):
            x[self.bias_ids] += self.bias
        if len(self.never):
            x[self.never] = -torch.inf
        for *start, last in self.bad_words:
            if self.output[len(self.output) - len(start) :] == start:
                x[last] = -torch.inf
        for processor, with_prompt in self.processors:
            before = (list(self.prompt),) if with_prompt else ()
            _process(processor, (*before, list(self.output)), x)
        if self.seen is not None:
            self.seen.penalise(x, self.params.repetition_penalty, self.params.frequency_penalty, self.params.presence_penalty)


class _Seen:
    """The different tokens of a sequence, and how often its output has each."""

    def __init__(self, prompt: Sequence[int], output: Sequence[int]) -> None:
        self.ids = np.unique(np.asarray(prompt, np.int64))
        self.counts = np.zeros(len(self.ids), np.float32)
        self.places = {token: place for place, token in enumerate(self.ids.tolist())}
        for token in output:
            self.add(int(token))

    def add(self, token: int) -> None:
        place = self.places.setdefault(token, len(self.places))
        if place == len(self.ids):  # full: the entries past len(places) are room to grow
            self.ids = np.concatenate([self.ids, np.zeros(place + 64, np.int64)])
            self.counts = np.concatenate([self.counts, np.zeros(place + 64, np.float32)])
        self.ids[place] = token
        self.counts[place] += 1

    def penalise(self, x: torch.Tensor, repetition: float, frequency: float, presence: float) -> None:
        ids, counts = (torch.from_numpy(table[: len(self.places)]).to(x.device) for table in (self.ids, self.counts))
        values = x[ids]
        values = torch.where(values > 0, values / repetition, values * repetition)
        x[ids] = values - frequency * counts - presence * (counts > 0)


def _process(processor: Callable[..., Any], history: tuple[list[int], ...], x: torch.Tensor) -> None:
    name = getattr(processor, "__name__", None) or type(processor).__name__
    try:
        new = processor(*history, x)
    except BaseException as e:  # noqa: BLE001  (whatever the user's code raises, sys.exit() too, is this sample's failure)
        raise ProcessorError(f"logits processor {name} raised {type(e).__name__}: {e}") from None
    if not isinstance(new, torch.Tensor):
        raise ProcessorError(f"logits processor {name} returned {type(new).__name__}; return the logits, a torch.Tensor")
    if new.shape != x.shape or not new.is_floating_point():
        raise ProcessorError(
            f"logits processor {name} returned {new.dtype} of shape {tuple(new.shape)}; return floating-point logits of shape {tuple(x.shape)}"
        )
    x.copy_(new)
    if x.isnan().any():
        raise ProcessorError(f"logits processor {name} returned NaN for {int(x.isnan().sum())} tokens; use -inf to forbid a token")
    if (forced := x == torch.inf).any():  # +inf means: this one, or one of these
        x.fill_(-torch.inf).masked_fill_(forced, 0.0)


def why_nothing(logits: torch.Tensor, scores: torch.Tensor) -> str:
    if logits.isnan().any():
        return (
            f"the model's logits hold NaN for {int(logits.isnan().sum())} of {len(logits)} tokens; try dtype='float32' or check its weights"
        )
    if not logits.amax().isfinite():
        return f"the model's largest logit is {float(logits.amax())}; try dtype='float32' or check its weights"
    if (scores == -torch.inf).all():
        return (
            "no token is left to draw: allowed_token_ids, min_tokens, logit_bias, bad_words and logits_processors "
            "together forbid every one; leave at least one allowed"
        )
    return "the logits are no longer finite after logit_bias, penalties and temperature; use smaller values"


def _index(ids: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=device)
