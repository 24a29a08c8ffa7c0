"""What an engine is told when it is made: vLLM's names, checked before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from nbengine.checks import as_int
from nbengine.errors import nearest
from nbengine.policy import Policy, policy_named

# vLLM's names for what is not built yet, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "quantization": (None,),
    "kv_cache_dtype": ("auto",),
    "enable_lora": (False, None),
    "speculative_config": (None,),
    "swap_space": (0, None),
    "cpu_offload_gb": (0, None),
    "enable_expert_parallel": (False,),
    "distributed_executor_backend": (None,),
    "disable_log_stats": (True, False),
    "tokenizer_mode": ("auto",),
    "max_loras": (None, 1),
    "limit_mm_per_prompt": (None,),
    "task": (None, "auto", "generate"),
    "runner": ("auto", "generate"),
    "enable_sleep_mode": (True, False),
    "async_scheduling": (None, True),
    "compilation_config": (None, {}),
    "max_seq_len_to_capture": (None, 8192),
    "hf_overrides": (None, {}),
    "served_model_name": (None,),
}
_INSTEAD = {  # what does here what some of these do
    "async_scheduling": "overlap=False plans a step only after the one before it",
    "compilation_config": "cuda_graphs=False does without CUDA graphs",
    "max_seq_len_to_capture": "cuda_graphs=False does without CUDA graphs",
    "hf_overrides": "change config.json in a copy of the model's folder",
    "served_model_name": "engine.serve(served_model_name=...) takes it",
}

MOST_SEQUENCES = 1 << 16  # at once
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_FORMATS = ("auto", "safetensors", "dummy")
MODEL_IMPLS = ("auto", "nbengine", "transformers")
GENERATION_CONFIGS = ("auto", "vllm", None)
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_SHORT_DTYPES = {"half": "float16", "float": "float32"}  # vLLM's


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything an engine can be told. None means: worked out from the model and the machine.

    >>> EngineConfig.of("tales", max_model_len=512).block_size
    16
    """

    model: str
    tokenizer: str | None = None  # folder or hub id, when not the model's own
    skip_tokenizer_init: bool = False  # token ids in and out only
    chat_template: str | None = None  # in place of the model's own
    trust_remote_code: bool = False  # only for a tokenizer or model that brings code of its own
    revision: str | None = None
    download_dir: str | None = None
    hf_token: str | None = None
    load_format: str = "auto"
    model_impl: str = "auto"  # "transformers" runs the model through transformers' own code
    dtype: str = "auto"  # the checkpoint's; on a CPU float32 where that fits well
    device: str = "auto"
    generation_config: str | None = "auto"  # the model's own sampling defaults; "vllm" for neutral ones
    max_model_len: int | None = None
    seed: int = 0  # for requests without a seed of their own
    max_logprobs: int = 20  # -1: as many as there are

    block_size: int = 16
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9  # of the card, the user's own tensors counted as used
    kv_cache_memory_bytes: int | None = None  # exactly this much for the cache
    num_gpu_blocks_override: int | None = None  # exactly this many blocks

    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = (
        2048  # while others decode, longer prompts compute so many tokens a step, all together; 0: no such limit
    )
    overlap: bool = True  # plan and launch a step while the GPU computes the one before
    run_ahead_ms: float = 20.0  # launch as many steps ahead as take this long, while nobody can end or arrive; 0: none
    cuda_graphs: bool = True
    deterministic: bool = False  # on a GPU: a request's tokens are the same to the bit whatever shares its batch, at some cost
    scheduling_policy: str | Policy | type[Policy] = "fcfs"
    ops: dict[str, str | Callable[..., Any]] | None = None  # implementations in place of the default ones

    trace_steps: int = 4096  # records kept; 0 keeps none

    @classmethod
    def of(cls, model: str | Path, **config: Any) -> EngineConfig:
        """A checked config from keyword arguments; unknown names and unbuilt features are refused."""
        known = [f.name for f in fields(cls)]
        if not isinstance(model, str | Path):
            raise TypeError(f"model must be a folder, a hub id or 'tales', not {model!r}")
        if "enforce_eager" in config:  # vLLM's name
            eager = config.pop("enforce_eager")
            if not isinstance(eager, bool):
                raise TypeError(f"enforce_eager must be True or False, not {eager!r}")
            config["cuda_graphs"] = config.get("cuda_graphs", True) and not eager
        for name in list(config):
            if name in _NEUTRAL:
                value = config.pop(name)
                if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in _NEUTRAL[name]):
                    instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
                    raise ValueError(f"{name}={value!r} is not supported yet; leave it at {_NEUTRAL[name][0]!r}{instead}")
            elif name not in known:
                raise TypeError(f"unknown engine option {name!r}{nearest(name, [*known, *_NEUTRAL, 'enforce_eager'])}")
        if "dtype" in config:
            dtype = str(config["dtype"]).removeprefix("torch.")
            config["dtype"] = _SHORT_DTYPES.get(dtype, dtype)
        for name in ("tokenizer", "download_dir"):
            if isinstance(config.get(name), Path):
                config[name] = str(config[name])
        if type(config.get("device")).__name__ == "device":  # torch's
            config["device"] = str(config["device"])
        return cls(model=str(model), **config)

    def __post_init__(self) -> None:
        choices = {"dtype": DTYPES, "load_format": LOAD_FORMATS, "model_impl": MODEL_IMPLS, "generation_config": GENERATION_CONFIGS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {getattr(self, name)!r}")
        for name in ("max_model_len", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_num_batched_tokens", "max_num_seqs"):
            _whole(name, getattr(self, name), least=1, optional=True)
        if self.max_num_seqs is not None and self.max_num_seqs > MOST_SEQUENCES:
            raise ValueError(f"max_num_seqs must be at most {MOST_SEQUENCES}, not {self.max_num_seqs}")
        _whole("block_size", self.block_size, least=1)
        _whole("trace_steps", self.trace_steps, least=0)
        _whole("long_prefill_token_threshold", self.long_prefill_token_threshold, least=0)
        _whole("seed", self.seed)
        _whole("max_logprobs", self.max_logprobs, least=-1)
        if isinstance(self.gpu_memory_utilization, bool) or not isinstance(self.gpu_memory_utilization, int | float):
            raise TypeError(f"gpu_memory_utilization must be a number, not {self.gpu_memory_utilization!r}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is a share of the card's memory, above 0 and at most 1, not {self.gpu_memory_utilization!r}"
            )
        if isinstance(self.run_ahead_ms, bool) or not isinstance(self.run_ahead_ms, int | float):
            raise TypeError(f"run_ahead_ms must be a number of milliseconds, not {self.run_ahead_ms!r}")
        if not 0 <= self.run_ahead_ms <= 1000:
            raise ValueError(f"run_ahead_ms must be from 0 to 1000, not {self.run_ahead_ms!r}: control and arrivals wait for as long")
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "bool" and not isinstance(value, bool):
                raise TypeError(f"{f.name} must be True or False, not {value!r}")
            if f.type in {"str", "str | None"} and not isinstance(value, str) and not (f.type == "str | None" and value is None):
                raise TypeError(f"{f.name} must be a string, not {value!r}")
        if not DEVICE.fullmatch(self.device):
            raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', not {self.device!r}")
        if self.ops is not None and not isinstance(self.ops, Mapping):
            raise TypeError(
                f"ops must be a dict from an op's name to an implementation, such as {{'linear': 'reference'}}, not {self.ops!r}"
            )
        policy_named(self.scheduling_policy)


def _whole(name: str, value: Any, least: int | None = None, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    number = as_int(value)
    if number is None:
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, not {number}")
