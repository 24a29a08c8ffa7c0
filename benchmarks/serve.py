"""What the endpoint costs: streams over HTTP beside LLM.generate, in one process, on the same prompts.

    python benchmarks/serve.py [--model tales] [--streams 64] [--tokens 256] [--rounds 5] [--out FILE]
    python benchmarks/serve.py --shape 0.6b         random weights of a larger model, with tales' tokenizer so that there is text

The clients are another process, which reads bytes and parses what it must, so that it measures the server and not itself. The two
sides take turns, the first round of each is not counted, and each side's median is told: tokens a second (prompts included in the
time), their ratio, and the time to the first token as a client sees it. All prompts differ, so that no prefix is shared.

`inside` is where the time goes: the engine's trace and the clients have one clock (on Linux), which each round begins at 0. When the
requests had arrived, when the first step was launched, how many steps held prompts, when the last of them had landed and when the
last step had, when the last answer was whole, and how long the front's thread worked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.serve.server import Server

SHAPES = {  # of Qwen3; the weights are random, which speed does not notice
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tales")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this size in place of a model")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256, help="of each answer")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="answers at once, without streaming")
    parser.add_argument("--config", type=json.loads, default={}, help="engine options as JSON")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client:
        asyncio.run(clients(json.loads(sys.stdin.readline())))
    else:
        told = measure(given)
        print(json.dumps(told, indent=1))
        if given.out:
            given.out.write_text(json.dumps(told, indent=1) + "\n")


# ── the process with the engine ─────────────────────────────────────────────────────────────────────────────────────────


def measure(given: argparse.Namespace) -> dict:
    from nbengine import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        model, config = given.model, dict(given.config)
        if given.shape:
            model, config = shaped(Path(folder), given.shape), {"load_format": "dummy", **config}
        config.setdefault("max_model_len", given.prompt_tokens + given.tokens + 16)
        llm = LLM(model, **config)
        engine = llm.engine
        vocab = min(4096, engine.info.vocab_size)

        def prompts(turn: int) -> list[list[int]]:
            import random

            rng = random.Random(turn)
            return [[rng.randrange(10, vocab) for _ in range(given.prompt_tokens)] for _ in range(given.streams)]

        params = SamplingParams(
            max_tokens=given.tokens, temperature=1.0, top_k=50, top_p=1.0, repetition_penalty=1.0, ignore_eos=True, seed=1
        )
        rates: dict[str, list[float]] = {"generate": [], "http": []}
        firsts: list[float] = []
        generate_firsts: list[float] = []
        insides: dict[str, list[Inside]] = {"generate": [], "http": []}
        with engine.serve() as server, Clients(server, given) as client:
            for turn in range(given.rounds + 1):
                for side in ("generate", "http") if turn % 2 else ("http", "generate"):
                    asked = prompts(turn)
                    engine.reset_prefix_cache()
                    number, worked = engine.trace.end, front_s(engine)
                    if side == "generate":
                        began = time.perf_counter()
                        outputs = llm.generate([{"prompt_token_ids": one} for one in asked], params, use_tqdm=False)
                        took = time.perf_counter() - began
                        made = sum(len(output.outputs[0].token_ids) for output in outputs)
                        seen = [output.metrics.time_to_first_token for output in outputs]
                    else:
                        took, made, seen, began = client.run(asked)
                    assert made == given.streams * given.tokens, (side, made)
                    if turn:
                        rates[side].append(made / took)
                        (generate_firsts if side == "generate" else firsts).extend(seen)
                        insides[side].append(Inside.of(engine, number, began, took, front_s(engine) - worked))
                    print(
                        f"round {turn} {side:9} {made / took:9.1f} tok/s  first token p50 {1e3 * statistics.median(seen):7.1f} ms",
                        file=sys.stderr,
                    )
            device, rounds = engine.info.device, server._listener.pacer.rounds  # noqa: SLF001
        llm.close()
    generate, http = statistics.median(rates["generate"]), statistics.median(rates["http"])
    return {
        "machine": machine(device),
        "model": given.shape or given.model,
        "streams": given.streams,
        "prompt_tokens": given.prompt_tokens,
        "tokens": given.tokens,
        "streaming": not given.whole,
        "generate_tok_s": round(generate, 1),
        "http_tok_s": round(http, 1),
        "ratio": round(http / generate, 4),
        "ratios": [round(h / g, 4) for h, g in zip(rates["http"], rates["generate"], strict=True)],
        "http_first_token_ms": quantiles(firsts),
        "generate_first_token_ms": quantiles(generate_firsts),
        "rounds_of_writing": rounds,
        "inside": {side: median_of(found) for side, found in insides.items()},
    }


@dataclass
class Inside:
    """One round as the engine saw it, in milliseconds since whoever asked began."""

    arrived_first: float
    arrived_p50: float
    arrived_last: float
    launched: float
    prompts_landed: float
    landed: float
    answered: float
    prompt_steps: float
    steps: float
    front: float

    @classmethod
    def of(cls, engine: Engine, number: int, began: float, took: float, worked: float) -> Self:
        records = engine.trace.since(number)
        prompts = [record for record in records if max(record.counts, default=0) > 1]
        uids = {uid for record in prompts for uid in record.uids}
        arrivals = sorted(engine.trace.sequences[uid].arrival for uid in uids)
        times = [
            arrivals[0],
            statistics.median(arrivals),
            arrivals[-1],
            prompts[0].time,
            max(record.landed for record in prompts),
            max(record.landed for record in records),
            began + took,
        ]
        return cls(*[1e3 * (time - began) for time in times], len(prompts), len(records), 1e3 * worked)


def median_of(found: list[Inside]) -> dict[str, float]:
    return {field.name: round(statistics.median(getattr(one, field.name) for one in found), 2) for field in fields(Inside)}


def front_s(engine: Engine) -> float:
    """Seconds that the front's thread has worked."""
    return engine.front.call(time.thread_time).result()


def quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(1e3 * cuts[49], 2), "p99": round(1e3 * cuts[98], 2)}


def shaped(folder: Path, shape: str) -> str:
    """A folder with tales' tokenizer and the config of a larger model."""
    import nbengine

    tales = Path(nbengine.__file__).parent / "tales"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (folder / name).write_bytes((tales / name).read_bytes())
    config = {**json.loads((tales / "config.json").read_text()), **SHAPES[shape], "head_dim": 128, "max_position_embeddings": 8192}
    config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def machine(device: str) -> dict:
    import torch

    from nbengine.bench.results import commit

    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
    }


class Clients:
    """The other process."""

    def __init__(self, server: Server, given: argparse.Namespace) -> None:
        self.process = subprocess.Popen([sys.executable, __file__, "--client"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        host, port = server.url.removeprefix("http://").rsplit(":", 1)
        self._send({"host": host, "port": int(port), "key": server.api_key, "tokens": given.tokens, "stream": not given.whole})

    def _send(self, what: object) -> None:
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()

    def run(self, prompts: list[list[int]]) -> tuple[float, int, list[float], float]:
        """Seconds, tokens, the time to each first token, and when they began."""
        self._send(prompts)
        told = json.loads(self.process.stdout.readline())
        return told["seconds"], told["tokens"], told["firsts"], told["began"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(30)


# ── the process with the clients ────────────────────────────────────────────────────────────────────────────────────────


async def clients(about: dict) -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        bodies = [body_of(about, prompt) for prompt in json.loads(line)]
        began = time.perf_counter()
        found = await asyncio.gather(*(one(about, body) for body in bodies))
        told = {"began": began, "seconds": time.perf_counter() - began}
        print(json.dumps({**told, "tokens": sum(n for n, _ in found), "firsts": [f for _, f in found]}), flush=True)


def body_of(about: dict, prompt: list[int]) -> bytes:
    body = {
        "prompt": prompt, "max_tokens": about["tokens"], "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0, "ignore_eos": True,
        "seed": 1, "stream": about["stream"], **({"stream_options": {"include_usage": True}} if about["stream"] else {}),
    }  # fmt: skip
    return json.dumps(body).encode()


async def one(about: dict, data: bytes) -> tuple[int, float]:
    """Tokens that came, as the answer's usage counts them, and seconds to the first event with text."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(about["host"], about["port"])
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer {about['key']}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    status = await reader.readline()
    assert b" 200 " in status, status + await reader.read()
    first, tail = 0.0, b""
    while chunk := await reader.read(1 << 16):
        if not first and (b'"text"' in chunk or not about["stream"]):
            first = time.perf_counter() - began
        tail = (tail + chunk)[-(1 << 16) :] if about["stream"] else tail + chunk
    writer.close()
    at = tail.rindex(b'"completion_tokens":')
    return int(tail[at + len(b'"completion_tokens":') :].split(b",", 1)[0]), first


if __name__ == "__main__":
    main()
