"""What peers reached on the same cells, measured once and written down, and what this engine is to reach."""

from __future__ import annotations

from dataclasses import dataclass

PROVENANCE = {
    "card": "NVIDIA H200 (141 GB)",
    "vllm": "0.24.0",
    "transformers": "5.17",
    "torch": "2.11 (CUDA 13)",
    "triton": "3.6",
    "python": "3.12",
    "how": (
        "bf16, random weights, token ids in and out, temperature 1, end of sequence ignored, all requests at once through LLM.generate, "
        "fresh prompts in every repeat, prefill included. vLLM with its defaults (V1 engine, FlashAttention 3, CUDA graphs, torch.compile; "
        "FlashInfer's sampler off, which this workload does not use), max_model_len=4096, gpu_memory_utilization=0.85, "
        "skip_tokenizer_init=True, load_format='dummy'; one warm-up request, then one timed run (the best of three for single and fifty)"
    ),
}


@dataclass(frozen=True, slots=True)
class Recorded:
    """Output tokens a second."""

    limit: float  # at 4.3 TB/s and 790 TFLOP/s
    vllm: float
    goal: float
    transformers: float | None = None  # generate, in one batch where it takes all; 256 at a time for sharegpt


RECORDED = {
    ("qwen3-0.6b", "single"): Recorded(3_514, 606, 1_100, 60),
    ("qwen3-0.6b", "fifty"): Recorded(77_423, 20_734, 32_000, 3_005),
    ("qwen3-0.6b", "nano"): Recorded(35_741, 23_377, 28_000),
    ("qwen3-0.6b", "sharegpt"): Recorded(74_036, 37_235, 50_000, 503),
    ("qwen2.5-1.5b", "single"): Recorded(1_386, 477, 750),
    ("qwen2.5-1.5b", "fifty"): Recorded(56_431, 20_631, 28_000),
    ("qwen2.5-1.5b", "nano"): Recorded(65_420, 30_397, 42_000),
    ("qwen2.5-1.5b", "sharegpt"): Recorded(111_712, 35_207, 55_000),
    ("llama-3.1-8b", "single"): Recorded(285, 202, 240),
    ("llama-3.1-8b", "fifty"): Recorded(11_570, 8_163, 9_200),
    ("llama-3.1-8b", "nano"): Recorded(13_486, 9_741, 11_000),
    ("llama-3.1-8b", "sharegpt"): Recorded(22_997, 16_042, 18_000),
}
READY_SECONDS = {"vLLM 0.24.0": (48, 59), "transformers 5.17": (5, 7)}  # from constructing the model, with random weights
