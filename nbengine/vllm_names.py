"""vLLM's names that are not here, and what to use in their place."""

from __future__ import annotations

_POOLING = "this engine generates only: no model that pools or scores is built"

OF_THE_PACKAGE = {
    "AsyncEngineArgs": "pass its options to Engine",
    "AsyncLLMEngine": "use Engine, which has agenerate() and astream()",
    "BeamSearchParams": "sample n outputs instead, with SamplingParams(n=...)",
    "ClassificationOutput": _POOLING,
    "ClassificationRequestOutput": _POOLING,
    "EmbeddingOutput": _POOLING,
    "EmbeddingRequestOutput": _POOLING,
    "EngineArgs": "pass its options to LLM or Engine",
    "LLMEngine": "use Engine",
    "ModelRegistry": "model_impl='transformers' runs a model by transformers' own code",
    "PoolingOutput": _POOLING,
    "PoolingParams": _POOLING,
    "PoolingRequestOutput": _POOLING,
    "PromptType": "use nbengine.prompts.Prompt",
    "ScoringOutput": _POOLING,
    "ScoringRequestOutput": _POOLING,
    "initialize_ray_cluster": "an engine is in one process, on one device",
    "lora": "adapters are not built",
}

OF_LLM = {
    "apply_model": "LLM.engine.use(ops=...) exchanges parts of the model, LLM.engine.update_weights() its weights",
    "beam_search": "sample n outputs instead, with SamplingParams(n=...)",
    "classify": _POOLING,
    "collective_rpc": "an engine is in one process, on one device; LLM.engine has what can be asked of it",
    "embed": _POOLING,
    "encode": _POOLING,
    "llm_engine": "use LLM.engine, which is nbengine's own",
    "model_config": "use LLM.engine.info and LLM.engine.config",
    "reward": _POOLING,
    "score": _POOLING,
    "start_profile": "LLM.engine.trace always has every step and how long it took",
    "stop_profile": "LLM.engine.trace always has every step and how long it took",
}


def advice(name: str, names: dict[str, str]) -> str:
    """`: it is vLLM's and not built here; use Engine` for a name of vLLM's, or an empty string."""
    return f": it is vLLM's and not built here; {names[name]}" if name in names else ""
