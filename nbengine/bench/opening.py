"""One engine opened in a process of its own: `python -m nbengine.bench.opening FOLDER OPTIONS` prints its times as JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any


def open_elsewhere(folder: Path, options: dict[str, Any], **environment: str) -> dict[str, float]:
    """Seconds of each part, in a fresh process."""
    path = os.pathsep.join(part for part in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-m", "nbengine.bench.opening", str(folder), json.dumps(options)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    began = perf_counter()
    import torch

    if options["device"] == "cuda":
        torch.cuda.init()
    imported = perf_counter()

    from nbengine import LLM, SamplingParams

    constructed = perf_counter()
    llm = LLM(folder, **options)
    ready = perf_counter()
    firsts = []
    for number in range(2):
        prompt = {"prompt_token_ids": list(range(10 + number, 138 + number))}
        [output] = llm.generate([prompt], SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True), use_tqdm=False)
        firsts.append(output.metrics.time_to_first_token)
    close = perf_counter()
    llm.close()
    closed = perf_counter()
    times = {
        "import_torch_s": imported - began, "ready_s": ready - constructed, "first_token_s": firsts[0], "second_first_token_s": firsts[1],
        "close_s": closed - close,
    }  # fmt: skip
    sys.stdout.write(json.dumps(times) + "\n")


if __name__ == "__main__":
    main()
