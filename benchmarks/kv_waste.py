"""How much of the KV cache is allocated and not used: paging beside the reserving of maxima, on ShareGPT-shaped requests.

`python benchmarks/kv_waste.py` prints a table and writes results/kv_waste.json. It runs the scheduler with a runner that
computes nothing, so it takes seconds on any machine; every step counts the same, and the pool never runs short.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nbengine.batch import Batch, Sampled
from nbengine.bench.workloads import Job, workload
from nbengine.blocks import BlockPool
from nbengine.core import EngineCore, NewRequest
from nbengine.policy import Policy, ReserveMaximum
from nbengine.sampling_params import SamplingParams
from nbengine.scheduler import Scheduler
from nbengine.sequence import Sequence

BLOCK_SIZE = 16
MAX_MODEL_LEN = 2048
MAX_NUM_SEQS = 256


class ReserveModelLength(Policy):
    """Room for the longest sequence that the model takes, whatever was asked for."""

    def reserve(self, sequence: Sequence) -> int:  # noqa: ARG002
        return MAX_MODEL_LEN


@dataclass
class Waste:
    """What one run allocated; shares are of allocated slots."""

    steps: int
    mean_unused: float  # the mean over all steps of the share unused
    unused_slots: float  # all slots unused in all steps, as a share of all allocated
    peak_blocks: int
    minimum_at_peak: int  # what the same sequences' tokens fill, each sequence's last block rounded up
    mean_running: float


class Watch:
    """A runner that computes nothing and looks at the pool while each step runs."""

    overlaps = ready = False

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.seen: list[tuple[int, int, int, int]] = []  # blocks allocated, slots used, blocks needed, sequences

    def launch(self, batch: Batch) -> None:
        self.batch = batch
        running, pool = self.scheduler.running.values(), self.scheduler.pool
        assert sum(len(s.blocks) for s in running) == pool.num_used, "no block is shared: the prompts are random"
        needed = sum(pool.blocks_for(s.computed) for s in running)
        self.seen.append((pool.num_used, sum(s.computed for s in running), needed, len(running)))

    def sample(self, mask: Any = None) -> Sampled:  # noqa: ARG002
        count = len(self.batch.sample_index)
        return Sampled(np.zeros((count, 1), np.int32), np.ones(count, np.int32))


def measure(policy: Policy, jobs: list[Job], *, max_num_batched_tokens: int = 8192) -> Waste:
    """Run the jobs, all there at once, and see what was allocated in each step."""
    pool = BlockPool(MAX_NUM_SEQS * MAX_MODEL_LEN // BLOCK_SIZE, BLOCK_SIZE)
    scheduler = Scheduler(pool, policy, max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=MAX_NUM_SEQS)
    watch = Watch(scheduler)
    core = EngineCore(scheduler, watch, trace_steps=0)
    for i, (prompt, output) in enumerate(jobs):
        params = SamplingParams(max_tokens=output, ignore_eos=True).resolve((), None)
        core.add(NewRequest(str(i), prompt, params, len(prompt) + output))
    while core.has_work():
        core.step()
    blocks, used, needed, running = np.array(watch.seen).T
    slots = blocks * BLOCK_SIZE
    peak = int(blocks.argmax())
    return Waste(
        steps=len(blocks),
        mean_unused=float(np.mean(1 - used / slots)),
        unused_slots=float(1 - used.sum() / slots.sum()),
        peak_blocks=int(blocks[peak]),
        minimum_at_peak=int(needed[peak]),
        mean_running=float(running.mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--date", default=dt.datetime.now(dt.UTC).date().isoformat())
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kv_waste.json")
    arguments = parser.parse_args()
    jobs = workload("sharegpt", arguments.requests)
    runs = {
        "paged, blocks as they are needed": measure(Policy(), jobs),
        "reserved: prompt + max_tokens": measure(ReserveMaximum(), jobs),
        f"reserved: max_model_len = {MAX_MODEL_LEN}": measure(ReserveModelLength(), jobs),
    }
    print(f"{'ShareGPT-shaped, ' + str(len(jobs)) + ' requests':36} {'unused, mean':>12} {'peak blocks':>12} {'minimum then':>13}")
    for name, run in runs.items():
        print(f"{name:36} {run.mean_unused:12.2%} {run.peak_blocks:12,} {run.minimum_at_peak:13,}")
    result = {
        "date": arguments.date,
        "commit": commit(),
        "workload": {"name": "sharegpt", "requests": len(jobs), "seed": 0},
        "block_size": BLOCK_SIZE,
        "max_num_seqs": MAX_NUM_SEQS,
        "runs": {name: asdict(run) for name, run in runs.items()},
    }
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


def commit() -> str | None:
    """The commit measured, where there is one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "--quiet", "HEAD"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() or None


if __name__ == "__main__":
    main()
