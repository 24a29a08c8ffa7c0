"""Other engines on the same cells, in the same run: transformers, and vLLM where it is installed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib.util import find_spec
from time import perf_counter
from typing import Any

import torch

from nbengine.bench.measure import Run, Settings, give_back
from nbengine.bench.results import Results, installed, say
from nbengine.bench.shapes import load_format, model_folder, shape
from nbengine.bench.workloads import Job, workload

MOST_REQUESTS = 256  # that transformers is given: it would take many minutes for all of sharegpt
Way = Callable[[list[Job]], Run]


class Peer(ABC):
    """One engine to compare with."""

    name: str
    package: str

    def __init__(self, most_requests: int | None = None) -> None:
        if find_spec(self.package) is None:
            raise SystemExit(
                f"--peer {self.name}: {self.package} is not installed here. Install it (in an environment of its own where it pins "
                f"another torch), or leave --peer {self.name} out; its recorded figures are compared with in any case"
            )
        self.most_requests = most_requests

    @abstractmethod
    def ways(self, model: str, settings: Settings) -> dict[str, Way]:
        """The model in memory, and the ways to run jobs through it."""

    def measure(self, model: str, workloads: list[str], settings: Settings, results: Results) -> None:
        ways = self.ways(model, settings)
        vocab_size = shape(model)["vocab_size"]
        for label, way in ways.items():
            for name in workloads:
                if not settings.allows(f"{label} on {model} {name}"):
                    continue
                row = {"peer": label, "peer_version": installed(self.package), "model": model, "workload": name}
                try:
                    way(workload("single", fresh="warm-up", vocab_size=vocab_size, quick=settings.quick))  # whole: its first is slow
                    runs = [
                        way(workload(name, fresh=(label, turn), vocab_size=vocab_size, quick=settings.quick)[: self.most_requests])
                        for turn in range(settings.repeats_of(name))
                    ]
                except Exception as error:  # noqa: BLE001 - a peer's own; what was measured before and comes after is kept
                    results.add("peer", {**row, "error": f"{type(error).__name__}: {error}"})
                    say(f"{label} on {model} {name}: failed with {type(error).__name__}: {error}")
                    continue
                run = max(runs, key=lambda run: run.rate)
                rates = [run.rate for run in runs]
                results.add("peer", {**row, "requests": run.requests, "tok_s": run.rate, "runs_tok_s": rates, "seconds": run.seconds})
                say(f"{label} on {model} {name}: {run.rate:,.0f} tok/s with {run.requests} requests")
        ways.clear()
        give_back(settings.device)


class Transformers(Peer):
    """`generate` in batches, padded to the left, and `generate_batch`, which batches continuously."""

    name = package = "transformers"

    def __init__(self, most_requests: int | None = None, batches: tuple[int, ...] = (256,)) -> None:
        super().__init__(most_requests or MOST_REQUESTS)
        self.batches = batches

    def ways(self, model: str, settings: Settings) -> dict[str, Way]:
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = model_folder(model, settings.folder)
        if load_format(model) == "dummy":
            with settings.device:
                loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        loaded = torch.nn.Module.to(loaded, settings.device)
        loaded.eval()
        loaded.generation_config.eos_token_id = None
        ways: dict[str, Way] = {f"transformers generate, {size} at once": _batched(loaded, size) for size in self.batches}
        if hasattr(loaded, "generate_batch") and settings.device.type == "cuda":
            ways["transformers generate_batch"] = _continuous(loaded)
        return ways


def _batched(model: Any, size: int) -> Way:
    def run(jobs: list[Job]) -> Run:
        began = perf_counter()
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            longest, new = max(len(prompt) for prompt, _ in batch), max(new for _, new in batch)
            tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
            mask = torch.zeros_like(tokens)
            for row, (prompt, _) in enumerate(batch):
                tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            with torch.inference_mode():
                out = model.generate(
                    tokens.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=new, do_sample=True, temperature=1.0,
                    top_k=0, top_p=1.0, pad_token_id=0,
                )  # fmt: skip
            assert out.shape[1] == longest + new
        return Run(perf_counter() - began, sum(new for _, new in jobs), len(jobs))  # only what was asked for counts

    return run


def _continuous(model: Any) -> Way:
    """The manager behind `generate_batch`, which alone takes each request's own length."""

    def run(jobs: list[Job]) -> Run:
        from transformers import GenerationConfig

        config = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=-1, pad_token_id=0, max_new_tokens=max(new for _, new in jobs)
        )
        with model.continuous_batching_context_manager(generation_config=config) as manager:
            began = perf_counter()
            for number, (prompt, new) in enumerate(jobs):
                manager.add_request(prompt, request_id=str(number), max_new_tokens=new, eos_token_id=-1)
            tokens, waiting = 0, len(jobs)
            while waiting:
                result = manager.get_result(timeout=60)
                if result is None:
                    if not manager.is_running():
                        raise RuntimeError("transformers' generate_batch ended before its requests did; its log says why")
                elif result.is_finished():
                    tokens, waiting = tokens + len(result.generated_tokens), waiting - 1
            return Run(perf_counter() - began, tokens, len(jobs))

    return run


class VLLM(Peer):
    """vLLM's offline interface with its defaults, as the recorded figures were measured."""

    name = package = "vllm"

    def ways(self, model: str, settings: Settings) -> dict[str, Way]:
        from vllm import LLM, SamplingParams

        llm = LLM(
            str(model_folder(model, settings.folder)),
            load_format=load_format(model),
            skip_tokenizer_init=True,
            max_model_len=min(settings.max_model_len, shape(model)["max_position_embeddings"]),
            gpu_memory_utilization=settings.gpu_memory_utilization,
        )

        def run(jobs: list[Job]) -> Run:
            params = [SamplingParams(temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False) for _, new in jobs]
            began = perf_counter()
            outputs = llm.generate([{"prompt_token_ids": prompt} for prompt, _ in jobs], params, use_tqdm=False)
            return Run(perf_counter() - began, sum(len(output.outputs[0].token_ids) for output in outputs), len(jobs))

        return {"vllm": run}


PEERS: dict[str, type[Peer]] = {"transformers": Transformers, "vllm": VLLM}
