"""Clients that are not OpenAI's."""

from __future__ import annotations

import pytest
from huggingface_hub import InferenceClient

MESSAGES = [{"role": "user", "content": "Tell me a tale about a fox."}]
pytestmark = pytest.mark.usefixtures("untouched")


def test_hugging_faces_client(server):
    client = InferenceClient(base_url=server.base_url, api_key=server.api_key, timeout=60)
    told = client.chat_completion(MESSAGES, model="tales", max_tokens=8, temperature=0.5, seed=1, stop=["."], logprobs=True, top_logprobs=1)
    assert told.usage.completion_tokens == len(told.choices[0].logprobs.content)
    parts = list(client.chat_completion(MESSAGES, model="tales", max_tokens=8, stream=True, seed=1, temperature=0.5))
    assert "".join(part.choices[0].delta.content or "" for part in parts)
    assert parts[-1].choices[0].finish_reason == "length"


def test_litellm(server, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # its price list is to come from the package, not from the network
    litellm = pytest.importorskip("litellm", reason="the test group of pyproject.toml has it")
    about = {"model": "openai/tales", "api_base": server.base_url, "api_key": server.api_key, "messages": MESSAGES, "max_tokens": 8}
    told = litellm.completion(**about, temperature=0)
    assert told.usage.completion_tokens == 8
    parts = list(litellm.completion(**about, temperature=0, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == told.choices[0].message.content
    text = litellm.text_completion(
        model="text-completion-openai/tales", api_base=server.base_url, api_key=server.api_key, prompt="Once upon a time", max_tokens=5
    )
    assert text.usage.completion_tokens == 5
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(**about, temperature=-1)
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(**{**about, "api_key": "wrong"})
