"""Making an engine: everything between a model's name and a thread that is ready for requests."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nbengine.blocks import BlockPool
from nbengine.checks import read_json
from nbengine.core import EngineCore, Runner
from nbengine.errors import NBEngineError
from nbengine.hub import resolve_model
from nbengine.loop import EngineLoop
from nbengine.policy import policy_named
from nbengine.progress import ProgressBars
from nbengine.sampling_params import SamplingParams
from nbengine.scheduler import Scheduler
from nbengine.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

    from nbengine.config import EngineConfig
    from nbengine.mailbox import Mailbox
    from nbengine.memory import MemoryPlan
    from nbengine.models.loading import LoadedModel
    from nbengine.trace import Trace

log = logging.getLogger("nbengine")
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine turned out to be: plain values, no tensors."""

    architecture: str
    implementation: str  # "nbengine" or "transformers"
    parameters: int
    device: str
    dtype: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    memory: MemoryPlan
    eos_token_ids: tuple[int, ...]
    default_params: SamplingParams
    load_seconds: float


@dataclass(frozen=True, slots=True)
class Started:
    """What the engine's handle keeps: nothing of it holds a tensor once the thread has ended."""

    thread: threading.Thread
    scheduler: Scheduler  # to be read, not touched
    trace: Trace
    info: EngineInfo
    tokenizer: Tokenizer | None


class _Abort:
    """Lets whoever waits for a load end it: the loading thread meets the interrupt at its next report of progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.asked = threading.Event()

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self.asked.is_set():
            raise InterruptedError("the load was interrupted")
        self.progress(phase, done, total)


def start(config: EngineConfig, mailbox: Mailbox, name: str, progress: Progress | None) -> Started:
    """Start the engine's thread, let it load, and wait until it is ready. An interrupt ends the load, the showing of it included."""
    began = perf_counter()
    _let_idle_threads_sleep()
    with contextlib.closing(ProgressBars()) as bars:
        abort = _Abort(progress or bars)
        folder = resolve_model(
            config.model,
            revision=config.revision,
            download_dir=config.download_dir,
            token=config.hf_token,
            progress=abort,
            weights=config.load_format != "dummy",
        )
        tokenizer = None if config.skip_tokenizer_init else _tokenizer(config, folder, abort)
        defaults = _default_params(config, folder)
        eos_token_ids = _eos_token_ids(folder, tokenizer)
        info: list[EngineInfo] = []

        def build() -> EngineCore:
            core, loaded, memory = _build(config, folder, abort)
            info.append(_info(core, loaded, memory, eos_token_ids, defaults, perf_counter() - began))
            return core

        loop = EngineLoop(mailbox, build, name)
        loop.thread.start()
        try:
            core = loop.ready.result()
            bars.close()
        except BaseException:
            abort.asked.set()
            with contextlib.suppress(NBEngineError):
                mailbox.call("close")  # should it become ready all the same
            loop.thread.join()
            raise
    log.info(
        "loaded %s in %.1f s: %s, %s on %s, %s",
        config.model,
        info[0].load_seconds,
        info[0].architecture,
        info[0].dtype,
        info[0].device,
        info[0].memory.told(),
    )
    return Started(loop.thread, core.scheduler, core.trace, info[0], tokenizer)


def _let_idle_threads_sleep() -> None:
    """Have torch's CPU threads spin for microseconds, not milliseconds, before they sleep.

    Spinning threads take the cores from those they wait for as soon as anything else runs (a notebook server, another kernel):
    with the library's own setting, decoding was about ten times slower on two busy cores. Without any spinning it took twice
    as long on two idle ones. The library reads the variable when torch is imported, so it changes nothing where that has
    happened, and nothing where the user has chosen.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _tokenizer(config: EngineConfig, folder: Path, progress: Progress) -> Tokenizer:
    if config.tokenizer is not None:
        folder = resolve_model(config.tokenizer, download_dir=config.download_dir, token=config.hf_token, progress=progress, weights=False)
    return Tokenizer.from_folder(folder, trust_remote_code=config.trust_remote_code)


def _build(config: EngineConfig, folder: Path, progress: Progress) -> tuple[EngineCore, LoadedModel, MemoryPlan]:
    """Runs in the engine's thread: whatever holds tensors is made here."""
    if "torch" not in sys.modules:
        progress("importing torch", 0, 0)  # what takes longest with a small model
    from nbengine.device_runner import DeviceRunner
    from nbengine.memory import plan_memory
    from nbengine.models.loading import load_model
    from nbengine.runner import LocalRunner

    loaded = load_model(folder, config, lambda limit: _model_len(config, limit), progress)
    length = _model_len(config, loaded.max_position_embeddings)
    sequences = config.max_num_seqs or (1024 if _large(loaded.device) else 256)
    memory = plan_memory(
        config,
        loaded.device,
        weights=loaded.weight_bytes,
        block_bytes=loaded.block_bytes(config.block_size),
        max_model_len=length,
        max_num_seqs=sequences,
    )
    length = _fitting(config, length, memory.num_blocks * config.block_size)
    tokens = _batched_tokens(config, loaded, length)
    places = {"num_blocks": memory.num_blocks, "block_size": config.block_size, "max_rows": sequences, "max_model_len": length}
    runner: Runner
    if _overlaps(loaded):
        runner = DeviceRunner(loaded, max_tokens=tokens, cuda_graphs=config.cuda_graphs, **places)
    else:
        runner = LocalRunner(loaded, **places)
    if config.ops:
        runner.use(dict(config.ops))
    scheduler = Scheduler(
        BlockPool(memory.num_blocks, config.block_size),
        policy_named(config.scheduling_policy),
        max_num_batched_tokens=tokens,
        max_num_seqs=sequences,
        chunked_prefill=config.enable_chunked_prefill,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        prefix_caching=config.enable_prefix_caching,
        rotation=loaded.spec if loaded.rope_by_length else None,
    )
    if _overlaps(loaded):
        progress("warming up", 0, 0)
        runner.warm_up()
    core = EngineCore(
        scheduler,
        runner,
        seed=config.seed,
        trace_steps=config.trace_steps,
        max_model_len=length,
        overlap=config.overlap,
        run_ahead_s=config.run_ahead_ms / 1e3,
    )
    return core, loaded, memory


def _overlaps(loaded: LoadedModel) -> bool:
    """Whether there is a device that computes while the host goes on; transformers' code waits for it too often."""
    return loaded.device.type == "cuda" and loaded.spec is not None


def _large(device: torch.device) -> bool:
    """Whether a card has memory for a thousand sequences."""
    if device.type != "cuda":
        return False
    import torch

    return torch.cuda.get_device_properties(device).total_memory >= 70 << 30


def _model_len(config: EngineConfig, limit: int) -> int:
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the {limit} positions the model was made for: ask for at most that"
        )
    return config.max_model_len


def _fitting(config: EngineConfig, length: int, slots: int) -> int:
    """The length that the pool can hold: a sequence alone must always fit."""
    if length <= slots:
        return length
    if config.max_model_len is not None:
        raise ValueError(
            f"max_model_len={length} does not fit: the KV cache holds {slots} tokens. Lower max_model_len, or give the cache more "
            "(kv_cache_memory_bytes, num_gpu_blocks_override, gpu_memory_utilization)"
        )
    log.warning("max_model_len is %d, what the KV cache holds, and not the model's %d", slots, length)
    return slots


def _batched_tokens(config: EngineConfig, loaded: LoadedModel, length: int) -> int:
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    usual = 512 if loaded.device.type == "cpu" else 16384 if _large(loaded.device) else 8192
    return usual if config.enable_chunked_prefill else max(usual, length)


def _default_params(config: EngineConfig, folder: Path) -> SamplingParams:
    if config.generation_config != "auto":
        return SamplingParams()
    return SamplingParams.from_generation_config(read_json(folder / "generation_config.json"))


def _eos_token_ids(folder: Path, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    """Whatever ends an output, by any of the places where a model says so."""
    files = [read_json(folder / name) for name in ("generation_config.json", "config.json")]
    found = {i for file in files for i in _ids(file.get("eos_token_id"))}
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    return tuple(sorted(found))


def _info(
    core: EngineCore,
    loaded: LoadedModel,
    memory: MemoryPlan,
    eos_token_ids: tuple[int, ...],
    default_params: SamplingParams,
    seconds: float,
) -> EngineInfo:
    return EngineInfo(
        **loaded.info,
        device=str(loaded.device),
        dtype=str(loaded.dtype).removeprefix("torch."),
        vocab_size=loaded.vocab_size,
        max_model_len=core.max_model_len,
        max_num_seqs=core.scheduler.max_num_seqs,
        max_num_batched_tokens=core.scheduler.max_num_batched_tokens,
        memory=memory,
        eos_token_ids=eos_token_ids,
        default_params=default_params,
        load_seconds=seconds,
    )


def _ids(value: Any) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
