"""What the engine does on a CPU, beside transformers in the same process: `python benchmarks/cpu.py [--quick] [--out FILE]`.

Each comparison alternates the two sides several times and takes each side's median, so that a slow moment of the machine
hits both. One thread pool, one dtype, the same weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch

from nbengine import LLM, Engine, SamplingParams

SMOL = {  # SmolLM2-135M's shape; the weights are random, which speed does not notice
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "head_dim": 64, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "rope_theta": 100000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    "attention_bias": False, "mlp_bias": False, "dtype": "bfloat16",
}  # fmt: skip


def ids(count: int, seed: int, vocab: int) -> list[int]:
    return torch.randint(10, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def alternate(
    sides: dict[str, Callable[[int], float]], repeats: int, of: Callable[[list[float]], float] = statistics.median
) -> dict[str, float]:
    """Each side's median seconds (or another statistic) over rounds that run all sides in turn; a first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in list(sides.items())[:: 1 if turn % 2 else -1]:  # in turn first and second
            taken = side(turn)
            if turn:
                seconds[name].append(taken)
    return {name: of(taken) for name, taken in seconds.items()}


class Peer:
    """transformers' generate on the same model, greedy, as its users call it."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def generate(self, prompt: list[int], new: int) -> float:
        tokens = torch.tensor([prompt])
        began = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
            )
        assert out.shape[1] == len(prompt) + new
        return time.perf_counter() - began


def compare(name: str, folder: Path, dtype: str, quick: bool) -> dict:
    """One request against `generate`, and 32 at once against 32 one by one."""
    new, repeats, alone = (24, 1, 2) if quick else (128, 3, 3)
    llm = LLM(str(folder), dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=False, max_model_len=1024)
    peer = Peer(folder, dtype)
    vocab = llm.engine.info.vocab_size
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)

    def ours(count: int) -> Callable[[int], float]:
        def run(turn: int) -> float:
            prompts = [{"prompt_token_ids": ids(64, 100 * turn + i, vocab)} for i in range(count)]
            began = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False)
            taken = time.perf_counter() - began
            assert all(len(o.outputs[0].token_ids) == new for o in outputs)
            return taken

        return run

    single = alternate({"nbengine": ours(1), "transformers": lambda turn: peer.generate(ids(64, 100 * turn, vocab), new)}, repeats)

    def one_by_one(turn: int) -> float:  # a few of the 32, scaled: each takes as long as the next
        return sum(peer.generate(ids(64, 100 * turn + i, vocab), new) for i in range(alone)) * 32 / alone

    batch = alternate({"nbengine": ours(32), "transformers": one_by_one}, max(1, repeats // 2))
    llm.engine.close()
    return {
        "case": f"{name} {dtype}",
        "decode_1_nbengine_tok_s": new / single["nbengine"],
        "decode_1_transformers_tok_s": new / single["transformers"],
        "decode_1_ratio": single["transformers"] / single["nbengine"],
        "batch_32_nbengine_tok_s": 32 * new / batch["nbengine"],
        "batch_32_transformers_tok_s": 32 * new / batch["transformers"],
        "batch_32_ratio": batch["transformers"] / batch["nbengine"],
    }


def cached_prefix(name: str, folder: Path, quick: bool) -> dict:
    """Time to the first token of a prompt whose first 90% is cached, and of one that is new."""
    size, repeats = (320, 2) if quick else (1600, 7)
    with Engine(str(folder), skip_tokenizer_init=True, max_model_len=2048) as engine:
        vocab = engine.info.vocab_size
        shared = ids(size * 9 // 10, 1, vocab)
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        engine.generate({"prompt_token_ids": shared}, params)

        def first_token(head: list[int], turn: int) -> float:
            output = engine.generate({"prompt_token_ids": head + ids(size - len(head), 1000 + turn, vocab)}, params)[0]
            assert output.metrics.time_to_first_token is not None
            return output.metrics.time_to_first_token

        taken = alternate({"cached": lambda turn: first_token(shared, turn), "new": lambda turn: first_token([], turn)}, repeats)
    return {
        "case": f"{name} prompt of {size}, 90% cached",
        "cached_ms": 1e3 * taken["cached"],
        "new_ms": 1e3 * taken["new"],
        "ratio": taken["new"] / taken["cached"],
    }


def trace_cost(folder: Path, quick: bool) -> dict:
    """32 requests at once with the trace on and off, in many short pairs: the median of their ratios, since what is looked for is below the noise."""
    new, pairs = (16, 4) if quick else (32, 60)
    engines = {
        "on": Engine(str(folder), skip_tokenizer_init=True, max_model_len=1024),
        "off": Engine(str(folder), skip_tokenizer_init=True, max_model_len=1024, trace_steps=0),
    }
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)

    def run(engine: Engine, turn: int) -> float:
        prompts = [{"prompt_token_ids": ids(32, 100 * turn + i, engine.info.vocab_size)} for i in range(32)]
        began = time.perf_counter()
        engine.generate(prompts, params)
        return time.perf_counter() - began

    ratios, seconds = [], {"on": [], "off": []}
    for turn in range(pairs):
        pair = {name: run(engines[name], turn) for name in (("on", "off") if turn % 2 else ("off", "on"))}
        ratios.append(pair["on"] / pair["off"])
        for name, taken in pair.items():
            seconds[name].append(taken)
    for engine in engines.values():
        engine.close()
    low, middle, high = (100 * (quarter - 1) for quarter in statistics.quantiles(ratios, n=4))
    return {
        "case": "trace on against off, 32 requests",
        "on_s": statistics.median(seconds["on"]),
        "off_s": statistics.median(seconds["off"]),
        "overhead_percent": middle,
        "overhead_percent_lower_quartile": low,
        "overhead_percent_upper_quartile": high,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs, not how fast")
    parser.add_argument("--only", choices=("decode", "prefix", "trace"), help="one part; the others' rows stay as they are in the file")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu.json")
    args = parser.parse_args()
    tales = Path(__file__).parents[1] / "nbengine" / "tales"
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        smol = Path(folder) / "smollm2-135m-shaped"
        if args.only != "trace":
            write_dummy(smol)
        if args.only in {None, "decode"}:
            for name, model in (("tales", tales), ("smollm2-135m", smol)):
                for dtype in ("float32", "bfloat16"):
                    rows.append(show(compare(name, model, dtype, args.quick)))
                    gc.collect()
        if args.only in {None, "prefix"}:
            rows += [show(cached_prefix(name, model, args.quick)) for name, model in (("tales", tales), ("smollm2-135m", smol))]
    if args.only in {None, "trace"}:
        rows.append(show(trace_cost(tales, args.quick)))
    args.out.parent.mkdir(exist_ok=True)
    before = json.loads(args.out.read_text())["rows"] if args.only and args.out.exists() else []
    fresh = {row["case"] for row in rows}
    rows = [row for row in before if row["case"] not in fresh] + rows
    args.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    print(f"written to {args.out}")


def write_dummy(folder: Path) -> None:
    """Random weights of SmolLM2-135M's shape, on disk so that both sides load the same."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**{k: v for k, v in SMOL.items() if k not in {"architectures", "dtype"}}), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)


def machine() -> dict:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    import transformers

    return {
        "cpu": cpu, "threads": torch.get_num_threads(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "date": datetime.now(UTC).date().isoformat(), "commit": commit,
    }  # fmt: skip


def show(row: dict) -> dict:
    print(row["case"], *(f"{key}={value:.4g}" for key, value in row.items() if key != "case"), sep="  ", flush=True)
    return row


if __name__ == "__main__":
    main()
