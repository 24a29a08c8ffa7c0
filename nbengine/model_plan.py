"""What an engine would take and hold, worked out before a weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbengine.config import EngineConfig
from nbengine.memory import MemoryPlan, free_memory, plan_memory, size
from nbengine.startup import _fitting, _let_idle_threads_sleep, _model_len

if TYPE_CHECKING:
    import torch

    from nbengine.models.shape import ModelShape

DEFAULT_NUM_SEQS = 256  # what an engine takes that is not told max_num_seqs
TYPICAL_LENGTHS = (512, 2048, 8192)  # tokens
UNTRIED = "whether transformers' code for it runs over a paged cache is tried when it is loaded"


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """What `Engine(model, **config)` would be on this machine now: plain values, sizes in bytes.

    >>> plan_model("tales").architecture
    'Qwen3ForCausalLM'
    """

    model: str
    architecture: str
    implementation: str  # "nbengine" or "transformers"
    parameters: int
    dtype: str
    device: str
    layers: int
    windows: tuple[tuple[int, int], ...]  # (window, how many layers see no further)
    weights: int
    download: int  # of which is still to be fetched from the hub, with what goes with them
    free: int  # on the device now
    kv_per_token: int
    block_size: int  # tokens
    block_bytes: int
    num_blocks: int
    kv_cache: int
    max_position_embeddings: int
    max_model_len: int
    max_num_seqs: int
    sequences: tuple[tuple[int, int], ...]  # (tokens, how many sequences of that length the cache holds at once)
    problems: tuple[str, ...]  # why it would not load, and what to change; empty: it fits
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def kv_tokens(self) -> int:
        """Tokens of all sequences together."""
        return self.num_blocks * self.block_size

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `fits`, as JSON takes them."""
        plain = {name: _plain(value) for name, value in dataclasses.asdict(self).items()}
        return {**plain, "kv_tokens": self.kv_tokens, "fits": self.fits}

    def __repr__(self) -> str:
        return "\n".join([f"<ModelPlan {self.model}>", *(f"  {label:<14} {text}" for label, text in self._rows())])

    def _repr_html_(self) -> str:
        cell = "text-align:left;vertical-align:top;padding:2px 12px 2px 0;border:none;background:none"
        rows = "".join(
            f'<tr style="background:none"><th style="{cell};font-weight:normal;opacity:.65">{escape(label)}</th>'
            f'<td style="{cell}">{escape(text)}</td></tr>'
            for label, text in self._rows()
        )
        title = f'<caption style="text-align:left;font-weight:bold;color:inherit">{escape(self.model)}</caption>'
        return f'<table style="border:none;border-collapse:collapse">{title}{rows}</table>'

    def _rows(self) -> Iterator[tuple[str, str]]:
        code = "nbengine's own decoder" if self.implementation == "nbengine" else "transformers' code"
        yield "model", f"{self.architecture} through {code}, {_count(self.parameters)} parameters, {self.layers} layers"
        yield "weights", f"{size(self.weights)} in {self.dtype} on {self.device}, where {size(self.free)} are free"
        if self.download:
            yield "download", f"{size(self.download)} are not on this machine yet"
        yield "KV per token", f"{size(self.kv_per_token)}, {size(self.block_bytes)} a block of {self.block_size}"
        yield "KV cache", f"{size(self.kv_cache)}: {self.num_blocks:,} blocks, {self.kv_tokens:,} tokens"
        yield "max_model_len", f"{self.max_model_len:,} tokens{self._shortened()}"
        yield "at once", self._at_once()
        for window, layers in self.windows:
            yield "window", f"{layers} of {self.layers} layers see {window} tokens back; their KV of earlier ones is kept all the same"
        yield from (("note", note) for note in self.notes)
        yield from (("does not fit", problem) for problem in self.problems)

    def _shortened(self) -> str:
        return f" (the model's limit is {self.max_position_embeddings})" if self.max_model_len < self.max_position_embeddings else ""

    def _at_once(self) -> str:
        capped = [length for length, count in self.sequences if count == self.max_num_seqs]
        parts = [f"{self.max_num_seqs:,} sequences (max_num_seqs) of up to {max(capped):,} tokens"] if capped else []
        rest = [(length, count) for length, count in self.sequences if length not in capped]
        return ", ".join(parts + [f"{count:,} sequence{'s' * (count != 1)} of {length:,}" for length, count in rest])


def plan_model(model: str | Path, *, devices: Any = None, **config: Any) -> ModelPlan:
    """What `Engine(model, **config)` would take and hold, without its weights: of a hub model only the small files are fetched.

    `devices` is another way to give `device`, alone or in a list of one. Raises what loading raises for a model that is not
    there or cannot be read; one that merely does not fit is told of in `problems`.

    >>> plan_model("tales", max_model_len=512, num_gpu_blocks_override=64).sequences
    ((512, 2),)
    """
    asked = EngineConfig.of(model, **_with_device(devices, config))
    _let_idle_threads_sleep()  # torch may be imported here first, and an engine comes after
    from nbengine.models.loading import kv_bytes, pick_device
    from nbengine.models.shape import ModelShape

    device = pick_device(asked.device)
    free = free_memory(device)
    shape = ModelShape.of(asked, device)
    length, most = _model_len(asked, shape.max_position_embeddings), asked.max_num_seqs or DEFAULT_NUM_SEQS
    block_bytes = kv_bytes(shape.layers, shape.dtype, asked.block_size)
    memory, problems = _fit(asked, device, shape, free, block_bytes, length, most)
    slots = memory.num_blocks * asked.block_size
    if asked.max_model_len is None and slots:
        length = min(length, slots)  # as an engine that was not told is made shorter
    sequences = _sequences(memory.num_blocks, asked.block_size, length, most)
    windows = [layer.window for layer in shape.layers if layer.window is not None]
    return ModelPlan(
        model=asked.model,
        architecture=shape.architecture,
        implementation=shape.implementation,
        parameters=shape.parameters,
        dtype=str(shape.dtype).removeprefix("torch."),
        device=str(device),
        layers=len(shape.layers),
        windows=tuple((window, windows.count(window)) for window in sorted(set(windows))),
        weights=shape.weights,
        download=shape.download,
        free=free,
        kv_per_token=kv_bytes(shape.layers, shape.dtype, 1),
        block_size=asked.block_size,
        block_bytes=block_bytes,
        num_blocks=memory.num_blocks,
        kv_cache=memory.kv_cache,
        max_position_embeddings=shape.max_position_embeddings,
        max_model_len=length,
        max_num_seqs=most,
        sequences=sequences,
        problems=tuple(problems),
        notes=tuple(_notes(shape, sequences, most, fits=not problems)),
    )


def _with_device(devices: Any, config: dict[str, Any]) -> dict[str, Any]:
    if devices is None:
        return config
    given = list(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else [devices]
    if "device" in config:
        raise TypeError("give device or devices, not both")
    if len(given) != 1:
        raise ValueError(f"an engine runs on one device, and devices names {len(given)}: plan for each by itself")
    return {**config, "device": given[0]}


def _fit(
    config: EngineConfig, device: torch.device, shape: ModelShape, free: int, block_bytes: int, length: int, most: int
) -> tuple[MemoryPlan, list[str]]:
    """The engine's own sizing, and its own refusal where it would refuse."""
    nothing = MemoryPlan(shape.weights, 0, 0, block_bytes, max(0, free - shape.weights))
    if shape.weights > free:
        smaller = f", or pass dtype='bfloat16' ({size(shape.weights // 2)})" if shape.dtype.itemsize == 4 else ""
        problem = (
            f"the weights take {size(shape.weights)} and {size(free)} are free on {device}: free memory (tensors of other cells, another "
            f"engine's close()), choose a smaller model{smaller}"
        )
        return nothing, [problem]
    try:
        memory = plan_memory(
            config,
            device,
            weights=shape.weights,
            block_bytes=block_bytes,
            max_model_len=length,
            max_num_seqs=most,
            free=nothing.free_before,
        )
    except MemoryError as error:
        return nothing, [str(error)]
    if config.max_model_len is None:
        return memory, []
    try:
        _fitting(config, length, memory.num_blocks * config.block_size)
    except ValueError as error:
        return memory, [str(error)]
    return memory, []


def _sequences(blocks: int, block_size: int, length: int, most: int) -> tuple[tuple[int, int], ...]:
    lengths = [*(typical for typical in TYPICAL_LENGTHS if typical < length), length]
    return tuple((tokens, min(most, blocks // -(-tokens // block_size))) for tokens in lengths)


def _notes(shape: ModelShape, sequences: tuple[tuple[int, int], ...], most: int, *, fits: bool) -> Iterator[str]:
    length, count = sequences[-1]
    if fits and count < most:
        yield (
            f"{count} of max_num_seqs={most} sequences fit at once when each has {length} tokens, and the rest wait: lower max_model_len "
            "or max_num_seqs to plan for shorter or fewer, or give the KV cache more"
        )
    if shape.implementation == "transformers":
        yield UNTRIED


def _count(parameters: int) -> str:
    """`12.6 M`."""
    for unit, scale in (("B", 1e9), ("M", 1e6)):
        if parameters >= scale:
            return f"{parameters / scale:.1f} {unit}"
    return str(parameters)


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
