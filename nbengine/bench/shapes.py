"""The models that are measured: their configs, which are all that speed depends on. Weights are random."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nbengine.errors import nearest

_QWEN: dict[str, Any] = {
    "vocab_size": 151936, "tie_word_embeddings": True, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645, "num_hidden_layers": 28,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 3072, "max_position_embeddings": 40960, "attention_bias": False,
    },
    "qwen2.5-1.5b": {
        **_QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 1536, "num_attention_heads": 12,
        "num_key_value_heads": 2, "intermediate_size": 8960, "max_position_embeddings": 32768,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "tie_word_embeddings": False,
        "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128001,
    },
    "tiny": {  # to see the benchmark run on a CPU
        **_QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 4096, "bos_token_id": 1,
        "eos_token_id": 0, "max_position_embeddings": 40960, "attention_bias": False,
    },
}  # fmt: skip
TALES = Path(__file__).parents[1] / "tales"
MEASURED = ("qwen3-0.6b", "qwen2.5-1.5b", "llama-3.1-8b")


def shape(name: str) -> dict[str, Any]:
    """A model's config by its name here, or of a folder; `tales` is the bundled model."""
    if name in SHAPES:
        return SHAPES[name]
    file = _own(name) / "config.json"
    if not file.is_file():
        raise SystemExit(
            f"no model is called {name!r}{nearest(name, SHAPES)}; choose among {', '.join(SHAPES)}, tales, or name a model's folder"
        )
    config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return config


def model_folder(name: str, root: Path) -> Path:
    """A folder that holds the config and nothing else, for `load_format="dummy"`; a folder that was named is left as it is."""
    config = shape(name)
    if name not in SHAPES:
        return _own(name)
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def load_format(name: str) -> str:
    """Random weights for a shape, its own for a folder."""
    return "dummy" if name in SHAPES else "auto"


def _own(name: str) -> Path:
    return TALES if name == "tales" else Path(name)
