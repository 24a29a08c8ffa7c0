"""Whether a model of transformers' runs right over a paged cache: tried before an engine is given it, never assumed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from nbengine.errors import UnsupportedModelError
from nbengine.models.transformers_attention import PAGED, PROBE, Probe, set_implementation
from nbengine.step_inputs import CacheSpec, StepInputs

if TYPE_CHECKING:
    from nbengine.models.transformers_model import TransformersModel

_BLOCK_SIZE = 4
_BLOCKS = [[5, 2, 7], [0, 6, 1], [3, 8, 4]]  # of the trial's three sequences
_TOLERANCE = {torch.float32: 1e-3}  # relative RMS error of the logits; 0.1 in 16 bits

_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)  # of code that was not made for what we ask


class Trial:
    """A few tokens at the first positions, and at the last that will be asked for; and what transformers alone makes of both."""

    @torch.inference_mode()
    def __init__(self, causal: Any, num_positions: int, device: torch.device) -> None:
        config = causal.config.get_text_config()
        count = min(12, num_positions)
        self.num_layers: int = config.num_hidden_layers
        self.tokens = (torch.arange(count, device=device) * 7919 + 11) % config.vocab_size
        self.far = num_positions - count
        set_implementation(causal, "eager")  # the one that leaves nothing out: sdpa knows neither soft caps nor sinks
        near = causal(input_ids=self.tokens[None], use_cache=False).logits[0]
        self.near_logits = near.float()  # [count, vocab]
        self.far_logits: torch.Tensor | None = None  # [count, vocab]; None: the model cannot begin there
        positions = torch.arange(self.far, num_positions, device=device)
        try:
            far = causal(input_ids=self.tokens[None], position_ids=positions[None], past_key_values=_Before(self.far)).logits[0]
            self.far_logits = far.float()
        except torch.OutOfMemoryError:
            raise
        except _FAILURES:
            pass


class _Before(DynamicCache):
    """Says that `seen` tokens went before, which nobody sees: what a model makes of positions it makes of this."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.seen = seen

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return self.seen

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:  # noqa: ARG002
        return query_length, self.seen


@torch.inference_mode()
def read_layers(model: TransformersModel, trial: Trial, dtype: torch.dtype, name: str) -> list[CacheSpec]:
    """What each layer keeps, read off a trial; UnsupportedModelError where the paged run is not the stock one.

    The trial: a sequence in two chunks, and beside the second one the same sequence at once and far from its start, in blocks
    out of order.
    """
    count, num_layers = len(trial.tokens), trial.num_layers
    first = count * 2 // 3
    model.step.probe = probe = Probe(sum(map(len, _BLOCKS)), dtype)
    set_implementation(model.body, PROBE)
    try:
        early = model.forward(_step(trial.tokens, [(0, first, 0)]), [])
        _refuse_other_layers(set(probe.layers), num_layers, name)
        layers = [probe.layers[index] for index in range(num_layers)]
        caches = [probe.caches[index] for index in range(num_layers)]
        model.step.probe, model.layers = None, layers
        set_implementation(model.body, PAGED)
        late = model.forward(_step(trial.tokens, [(first, count, 0), (0, count, 0), (0, count, trial.far)]), caches)
        got = model.logits(torch.cat((early, late)))
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except _FAILURES as error:
        raise UnsupportedModelError(
            f"{name} cannot run on one flat row of tokens over a paged cache ({type(error).__name__}: {error}). Use another model, or "
            "transformers itself"
        ) from error.with_traceback(None)  # whose frames would keep the weights
    finally:
        model.step.probe = None
    if trial.far_logits is None:
        raise UnsupportedModelError(
            f"{name} cannot go on from a cache in transformers itself, so nbengine cannot run it; use another model"
        )
    expected = torch.cat((trial.near_logits, trial.near_logits, trial.far_logits))
    if not (difference := _relative_error(got, expected)) <= _TOLERANCE.get(dtype, 0.1):
        raise UnsupportedModelError(
            f"{name} does not give the same over a paged cache as in transformers alone (relative error {difference:.2g}): it goes by more than "
            "each token's keys, values and position. Use a model without that, or transformers itself"
        )
    return layers


def _refuse_other_layers(met: set[int], num_layers: int, name: str) -> None:
    if not met:
        raise UnsupportedModelError(
            f"{name} does not go through transformers' attention interface (it computes attention in place, perhaps with ALiBi, or has "
            "none), so nbengine cannot give it a paged cache. Use another model, or transformers itself"
        )
    if met != set(range(num_layers)):
        raise UnsupportedModelError(
            f"of {name}'s {num_layers} layers {len(met)} attend, so others keep something else than keys and values (a state, "
            "a convolution), which nbengine has no cache for. Use another model, or transformers itself"
        )


def _relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Against how much the logits differ from token to token: what all tokens share hides nothing."""
    if got.shape != expected.shape:
        return float("inf")
    spread = (expected - expected.mean(0)).square().mean().sqrt()
    return float((got - expected).square().mean().sqrt() / spread.clamp(min=1e-30))


def _step(tokens: torch.Tensor, rows: list[tuple[int, int, int]]) -> StepInputs:
    """The step that computes tokens [start, end) of every row, all rows being the same sequence, `shift` positions on."""
    device = tokens.device
    places = torch.cat([torch.arange(start, end) for start, end, _ in rows])
    of_row = torch.cat([torch.full((end - start,), row) for row, (start, end, _) in enumerate(rows)])
    tables = torch.tensor(_BLOCKS[: len(rows)])
    slots = tables[of_row, places // _BLOCK_SIZE] * _BLOCK_SIZE + places % _BLOCK_SIZE
    counts, contexts = [end - start for start, end, _ in rows], [end for _, end, _ in rows]
    return StepInputs(
        tokens=tokens[places.to(device)],
        positions=(places + torch.tensor([shift for _, _, shift in rows])[of_row]).to(device),
        slots=slots.to(device),
        block_tables=tables.int().to(device),
        query_starts=torch.tensor([0, *counts]).cumsum(0).int().to(device),
        context_lens=torch.tensor(contexts).int().to(device),
        block_size=_BLOCK_SIZE,
        query_lens_host=counts,
        context_lens_host=contexts,
    )
