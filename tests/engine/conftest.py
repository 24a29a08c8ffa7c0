"""A tiny random Llama with a byte-level tokenizer, engines that are closed after each test, and what transformers says."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers_greedy import greedily

from nbengine import Engine, SamplingParams

ROOT = Path(__file__).parents[2]
CORPUS = [
    "Once upon a time there was a little fox, and the fox said: hello world! 12345",
    "naïve café — 你好世界, привет мир, 🙂🙃",
    "def f(x):\n\treturn x\n\n",
]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if brief %}(briefly) {% endif %}{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
LLAMA: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GENERATION = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "max_new_tokens": 24, "do_sample": True, "bos_token_id": 0, "eos_token_id": 1}


def write_tokenizer(folder: Path) -> None:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_model(folder: Path, model: torch.nn.Module, generation: dict[str, Any] | None = None) -> Path:
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation or {}))
    return folder


def random_llama(seed: int = 0, **changed: Any) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changed})).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.15))
    model.generation_config.eos_token_id = None
    return model


@dataclasses.dataclass
class TinyModel:
    """A folder, and the same weights in transformers."""

    folder: Path
    model: torch.nn.Module

    def greedy(self, prompt: list[int], new_tokens: int) -> list[int]:
        return self.scored(prompt, new_tokens)[0]

    def scored(self, prompt: list[int], new_tokens: int) -> tuple[list[int], torch.Tensor]:
        """Greedy tokens, and the log-probabilities [new_tokens, vocab] that they were taken from."""
        return greedily(self.model, prompt, new_tokens)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """What each position says of the next one, [tokens, vocab]."""
        return self.model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("tiny")
    write_tokenizer(folder)
    model = random_llama()
    write_model(folder, model, GENERATION)
    return TinyModel(folder, model)


@pytest.fixture
def make_engine(tiny: TinyModel) -> Iterator[Callable[..., Engine]]:
    """Engines on the tiny model (or another), closed when the test ends."""
    with contextlib.ExitStack() as stack:

        def make(model: Path | str | None = None, **config: Any) -> Engine:
            return stack.enter_context(Engine(model or tiny.folder, **{"max_model_len": 1024, "num_gpu_blocks_override": 512, **config}))

        yield make


@pytest.fixture
def engine(make_engine: Callable[..., Engine]) -> Engine:
    return make_engine()


@pytest.fixture(scope="session")
def prompts() -> Callable[..., list[list[int]]]:
    """Random prompts of many lengths."""

    def make(count: int, seed: int = 0, longest: int = 60, vocab: int = 320) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
        return [torch.randint(4, vocab, (length,), generator=generator).tolist() for length in lengths]

    return make


class Gate:
    """A logits processor that holds the engine's thread in the middle of a step until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.opened = threading.Event()

    def __call__(self, _output: list[int], logits: torch.Tensor) -> torch.Tensor:
        self.reached.set()
        assert self.opened.wait(60)
        return logits


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def long() -> SamplingParams:
    """A request that takes a while: it ends at the length limit of its engine."""
    return SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)


@dataclasses.dataclass
class Script:
    """A Python process, its output read when it has ended or line by line."""

    process: subprocess.Popen

    def line(self) -> str:
        return self.process.stdout.readline().strip()

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def end(self, timeout: float = 120) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """Run a text as a script of its own."""
    started: list[Script] = []

    def run(text: str, *args: object, command: tuple[str, ...] = (sys.executable, "-u")) -> Script:
        file = tmp_path / f"script{len(started)}.py"
        file.write_text(text)
        env = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "IPYTHONDIR": str(tmp_path / "ipython"),
            "PYTHONFAULTHANDLER": "1",
        }
        process = subprocess.Popen(
            [*command, str(file), *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            env=env,
        )
        started.append(Script(process))
        return started[-1]

    yield run
    for one in started:
        one.process.kill()
        one.process.wait()
        one.process.stdout.close()
        one.process.stderr.close()
