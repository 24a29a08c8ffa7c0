"""Paged attention as one of transformers' attention implementations, so that its own model code can run over our cache.

transformers calls it by name. What one step needs (its inputs, the engine's caches and ops) hangs on the attention modules of
the engine's own model: engines do not see one another's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from nbengine.errors import UnsupportedModelError
from nbengine.step_inputs import CacheSpec, LayerCache, StepInputs

if TYPE_CHECKING:
    from nbengine.ops import Ops

PAGED = "nbengine_paged"  # no mask function goes with it, so transformers builds no mask
PROBE = "nbengine_probe"  # the same attention; masks carry what they hide, for the layers to be read off in a trial step
_STEP = "nbengine_step"  # the attribute under which every module of a model finds its step
_MASK_LIMIT = 1 << 18  # positions up to which a mask is looked at

# What attention may be handed without a difference to its result.
_HARMLESS = {
    "cache_position",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "use_cache",
}


class Step(threading.local):
    """What attention has to know of the step that is being computed; each thread sees its own."""

    def __init__(self, ops: Ops) -> None:
        self.ops = ops
        self.inputs: StepInputs | None = None
        self.caches: list[LayerCache] = []
        self.layers: list[CacheSpec] = []
        self.probe: Probe | None = None

    @contextmanager
    def running(self, inputs: StepInputs, caches: list[LayerCache], layers: list[CacheSpec]) -> Iterator[None]:
        self.inputs, self.caches, self.layers = inputs, caches, layers
        try:
            yield
        finally:
            self.inputs, self.caches, self.layers = None, [], []


class Probe:
    """Reads off a trial step what every layer keeps, and gives each a poisoned cache of `blocks` blocks as it is met."""

    def __init__(self, blocks: int, dtype: torch.dtype) -> None:
        self.blocks = blocks
        self.dtype = dtype
        self.layers: dict[int, CacheSpec] = {}
        self.caches: dict[int, LayerCache] = {}

    def meet(self, layer: int, key: torch.Tensor, window: int | None, block_size: int) -> None:
        if layer in self.layers:
            raise UnsupportedModelError(f"layer {layer} attends more than once in a step, and nbengine keeps one cache a layer")
        _, kv_heads, _, head_dim = key.shape
        shape = (self.blocks, block_size, kv_heads, head_dim)
        self.layers[layer] = CacheSpec(kv_heads, head_dim, window)
        self.caches[layer] = LayerCache(*(torch.full(shape, float("nan"), dtype=self.dtype, device=key.device) for _ in range(2)))


def register() -> None:
    """Make the names known to transformers; again and again without a difference."""
    for name in (PAGED, PROBE):
        AttentionInterface.register(name, paged_attention)
    AttentionMaskInterface.register(PROBE, _probe_mask)


def attach(model: torch.nn.Module, ops: Ops) -> Step:
    """Give all modules of a model the step that its attention goes by."""
    step = Step(ops)
    for module in model.modules():
        setattr(module, _STEP, step)
    return step


def set_implementation(model: torch.nn.Module, name: str) -> None:
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation"):
            config._attn_implementation = name  # noqa: SLF001 - its public setter refuses models whose source it does not recognise


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention of a flat step, query [1, heads, tokens, head_dim] -> [1, tokens, heads, head_dim], by transformers' convention."""
    step: Step | None = getattr(module, _STEP, None)
    if step is None or step.inputs is None:
        raise RuntimeError(f"the attention implementation {PAGED!r} works inside an nbengine engine only; load the model with another")
    _refuse_unknown(module, query, value, dropout, others)
    layer: int = module.layer_idx  # type: ignore[assignment]
    if step.probe is not None:
        step.probe.meet(layer, key, _window_of_probe_mask(attention_mask, sliding_window), step.inputs.block_size)
        cache, window = step.probe.caches[layer], step.probe.layers[layer].window
    else:
        assert attention_mask is None, f"{_name(module)} has a mask that the trial step did not"
        cache, window = step.caches[layer], step.layers[layer].window
    _, kv_heads, tokens, head_dim = key.shape
    for kept, new in ((cache.keys, key), (cache.values, value)):
        kept.view(-1, kv_heads, head_dim).index_copy_(0, step.inputs.slots, new[0].transpose(0, 1).to(kept.dtype))
    q = query[0].transpose(0, 1).to(cache.keys.dtype).contiguous()  # [tokens, heads, head_dim]
    scale = head_dim**-0.5 if scaling is None else float(scaling)
    out = step.ops.paged_attention(q, cache, step.inputs, scale, window, softcap)
    return out.view(1, tokens, -1, head_dim).to(query.dtype), None


_PAGED_CANNOT = "paged attention cannot do; use a model without it, or transformers itself"


def _refuse_unknown(module: torch.nn.Module, query: torch.Tensor, value: torch.Tensor, dropout: float, others: dict[str, Any]) -> None:
    unknown = [name for name, given in others.items() if given is not None and given is not False and name not in _HARMLESS]
    if unknown:
        raise UnsupportedModelError(f"{_name(module)} hands its attention {', '.join(map(repr, unknown))}, which {_PAGED_CANNOT}")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        raise UnsupportedModelError(f"{_name(module)} attends in both directions, so it cannot generate; load a causal language model")
    if value.shape[-1] != query.shape[-1]:
        raise UnsupportedModelError(f"{_name(module)} has keys and values of different sizes, which {_PAGED_CANNOT}")
    if getattr(module, "layer_idx", None) is None:
        raise UnsupportedModelError(f"{_name(module)} does not know which layer it is in, so nbengine cannot tell which cache is its own")
    assert dropout == 0.0, "the model is not in eval mode"
    assert query.shape[0] == 1, "a step is one flat row of tokens"


def _name(module: torch.nn.Module) -> str:
    return type(module).__name__


# ── what a model hides, read off its masks ──────────────────────────────────────────────────────────────────────────────


def _probe_mask(q_length: int, kv_length: int, mask_function: Callable[..., Any], **others: Any) -> torch.Tensor:
    """In place of a mask, one that holds the number of keys a query sees (0: all before it), whatever is cut from it on its way."""
    config, device = others["config"], others.get("device", "cpu")
    window = None if others.get("use_vmap") else _window(mask_function, config, device)
    if window is None:
        raise UnsupportedModelError(
            f"{config.model_type} hides keys by a rule of its own (neither causal nor a sliding window), which {_PAGED_CANNOT}"
        )
    return torch.full((1, 1, q_length, kv_length), window, dtype=torch.int64, device=device)


def _window(mask_function: Callable[..., Any], config: Any, device: torch.device | str) -> int | None:
    """The width of the window, 0 for a plainly causal mask, None for any other."""
    limit = min(getattr(config.get_text_config(), "max_position_embeddings", None) or 4096, _MASK_LIMIT)
    zero, keys = torch.zeros((), dtype=torch.int64, device=device), torch.arange(limit + 1, device=device)

    def seen(position: int) -> torch.Tensor:
        return mask_function(zero, zero, torch.tensor(position, device=device), keys).expand(limit + 1)

    try:
        width = int(seen(limit - 1).sum())
        for position in {0, 1, limit // 3, limit // 2, limit // 2 + 1, limit - 2, limit - 1} & set(range(limit)):
            if not torch.equal(seen(position), (keys <= position) & (keys > position - width)):
                return None
    except (IndexError, RuntimeError):  # a rule that looks at this batch's tokens
        return None
    return 0 if width == limit else width


def _window_of_probe_mask(mask: torch.Tensor | None, sliding_window: int | None) -> int | None:
    """What the mask hides is what holds; `sliding_window` is for implementations without masks, as long as they agree."""
    if mask is None:
        return sliding_window
    if mask.dtype is not torch.int64 or not bool((mask == mask.flatten()[0]).all()):
        raise UnsupportedModelError(f"this model changes its attention masks, which {_PAGED_CANNOT}")
    window = int(mask.flatten()[0]) or None
    if sliding_window is not None and window is not None and sliding_window != window:
        raise UnsupportedModelError(f"this model's mask and its sliding window of {sliding_window} disagree; {_PAGED_CANNOT}")
    return window
