"""What a runner is asked for on a CPU and on a GPU alike."""

from __future__ import annotations

from typing import Any

from nbengine import RequestOutput

WISHES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "top-p": {"seed": 3, "top_p": 0.9},
    "n": {"seed": 3, "n": 3},
    "repetition": {"temperature": 0, "repetition_penalty": 1.3},
    "frequency": {"seed": 5, "frequency_penalty": 0.7, "presence_penalty": 0.2},
    "bias": {"seed": 5, "min_tokens": 20, "logit_bias": {300: 3.0}},
    "bad words": {"temperature": 0, "bad_words": ["the", "little girl"]},
    "stop": {"temperature": 0, "stop": ["and"]},
}


def tokens(outputs: list[RequestOutput]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in output.outputs] for output in outputs]
