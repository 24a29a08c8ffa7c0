"""`python -m nbengine.bench COMMAND [OPTIONS]`; `--help` after a command lists its options."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from nbengine.bench.shapes import MEASURED, shape
from nbengine.bench.workloads import WORKLOADS

if TYPE_CHECKING:
    from nbengine.bench.limits import Card
    from nbengine.bench.measure import Settings
    from nbengine.bench.results import Results

OUT = Path("benchmarks/results/gpu.json")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for, a row at a time, and print a table."""
    given = parser().parse_args(arguments)
    for model in given.models or ():
        shape(model)  # an unknown one ends it here, before anything is measured
    with TemporaryDirectory(prefix="nbengine-bench-", dir=given.folder) as folder:
        settings, results, card = begin(given, Path(folder))
        given.run(given, settings, results, card)
    if results.file is not None and results.rows:
        from nbengine.bench.results import say

        say(f"{len(results.rows)} rows were added to {results.file}")


def parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--out", type=Path, help=f"the file that rows are added to (default: {OUT} on a GPU, on a CPU none)")
    shared.add_argument("--no-out", action="store_true", help="only print")
    shared.add_argument("--quick", action="store_true", help="a tenth of the requests, short ones: shows that it runs, not how fast")
    shared.add_argument("--pace", "--minutes", dest="minutes", type=float, metavar="MINUTES", help="begin nothing new after this long")
    shared.add_argument(
        "--repeats",
        type=_count,
        help="of each workload; the best counts (default: 3 of single and fifty, of mixed and of busy, 2 of start, 1 of others)",
    )
    shared.add_argument("--device", default=None, help="cuda or cpu (default: cuda where there is one)")
    shared.add_argument("--max-model-len", type=_count, default=4096)
    shared.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    shared.add_argument(
        "--folder", type=Path, help="where models' files are written meanwhile, a real disk for `start` (default: as TMPDIR)"
    )
    shared.add_argument(
        "--config", type=json.loads, default={}, metavar="JSON", help="further options of the engine: '{\"block_size\": 32}'"
    )

    whole = argparse.ArgumentParser(prog="python -m nbengine.bench", description=__doc__)
    commands = whole.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, about: str, models: Sequence[str] | None, workloads: Sequence[str] | None) -> argparse.ArgumentParser:
        one = commands.add_parser(name, parents=[shared], help=about, description=about)
        one.set_defaults(run=run)
        one.add_argument("--models", nargs="+", default=models and list(models), metavar="MODEL", help="(default: %(default)s)")
        if workloads is not None:
            one.add_argument("--workloads", nargs="+", default=list(workloads), choices=WORKLOADS, help="(default: %(default)s)")
        return one

    cells = command("cells", _cells, "the twelve cells, beside vLLM's figures and the limits", MEASURED, list(WORKLOADS))
    cells.add_argument("--peer", action="append", default=[], choices=("transformers", "vllm"), help="measure this engine too")
    cells.add_argument("--peer-requests", type=_count, help="at most so many requests of a workload for a peer")
    cells.add_argument("--peer-batch", type=_count, nargs="+", default=[256], help="batch sizes of transformers' generate")

    small = MEASURED[:1]
    command("mixed", _mixed, "sharegpt as text, a third of it with top-p and penalties and read as it comes", small, None)
    switches = command("switches", _switches, "what each optimisation is worth", small, ["single", "fifty"])
    switches.add_argument("--ops", nargs="*", help="of the kernels, exchange only these for their references (default: each in turn)")
    switches.add_argument("--only", default="", metavar="TEXT", help="change only what has this in its name: deterministic, say")
    online = command("online", _online, "latency under random arrivals, and of a long prompt among others", small, None)
    online.add_argument("--no-long", dest="long", action="store_false", help="only the random arrivals")
    command("busy", _busy, "what a busy main thread costs", small, ["sharegpt", "single"])
    command("kernel", _kernel, "three cells from a real Jupyter kernel", small, ["single", "fifty", "sharegpt"])
    start = command(
        "start", _start, "time to ready and to the first token, loading from disk, memory given back, sleep", MEASURED[2:], None
    )
    start.add_argument("--parts", nargs="+", default=["ready", "disk", "memory"], choices=("ready", "disk", "memory"))
    start.add_argument("--rounds", type=_count, help="of load, generate and close (default: 20)")
    command("all", _all, "every command with its defaults, one after the other", None, None)
    return whole


def begin(given: argparse.Namespace, folder: Path) -> tuple[Settings, Results, Card]:
    """The ceilings of this machine come first: every row carries them."""
    import torch

    from nbengine.bench.ceilings import ceilings
    from nbengine.bench.measure import Settings
    from nbengine.bench.results import Results, machine, say

    device = torch.device(given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = Settings(
        device, folder, given.quick, given.repeats, given.minutes, given.max_model_len, given.gpu_memory_utilization, config=given.config
    )
    out = None if given.no_out else given.out or (OUT if device.type == "cuda" else None)
    card = ceilings(device, given.quick)
    about = machine(device, card)
    say(", ".join(f"{name} {value}" for name, value in about.items() if name != "versions"))
    return settings, Results(out, about, quick=given.quick), card


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return number


def _cells(given: argparse.Namespace, settings: Settings, results: Results, card: Card) -> None:
    from nbengine.bench.cells import measure
    from nbengine.bench.peers import PEERS, Transformers

    peers = [
        Transformers(given.peer_requests, tuple(given.peer_batch)) if name == "transformers" else PEERS[name](given.peer_requests)
        for name in given.peer
    ]
    measure(given.models, given.workloads, settings, results, card, peers)


def _mixed(given: argparse.Namespace, settings: Settings, results: Results, card: Card) -> None:  # noqa: ARG001 - as its neighbours
    from nbengine.bench.mixed import measure

    measure(given.models, settings, results)


def _switches(given: argparse.Namespace, settings: Settings, results: Results, card: Card) -> None:  # noqa: ARG001
    from nbengine.bench.switches import measure

    measure(given.models, given.workloads, settings, results, given.ops, given.only)


def _online(given: argparse.Namespace, settings: Settings, results: Results, card: Card) -> None:  # noqa: ARG001
    from nbengine.bench.online import measure

    measure(given.models, settings, results, long=given.long)


def _busy(given: argparse.Namespace, settings: Settings, results: Results, card: Card) -> None:  # noqa: ARG001
    from nbengine.bench.busy import measure

    measure(given.models, given.workloads, settings, results)


def _kernel(given: argparse.Namespace, settings: Settings, results: Results, card: Card) -> None:  # noqa: ARG001
    from nbengine.bench.kernel import measure

    measure(given.models, given.workloads, settings, results)


def _start(given: argparse.Namespace, settings: Settings, results: Results, card: Card) -> None:  # noqa: ARG001
    from nbengine.bench import disk, giving_back, start

    if "ready" in given.parts:
        start.measure(given.models, settings, results)
    if "disk" in given.parts:
        disk.measure(given.models, settings, results)
    if "memory" in given.parts:
        giving_back.measure(given.models, settings, results, given.rounds)


def _all(given: argparse.Namespace, settings: Settings, results: Results, card: Card) -> None:
    from nbengine.bench.results import say

    for name in ("cells", "mixed", "kernel", "busy", "online", "start", "switches"):  # what matters most first, should time run out
        one = parser().parse_args([name, *(["--models", *given.models] if given.models else [])])
        say(f"\n== {name}")
        try:
            one.run(one, settings, results, card)
        except SystemExit as refused:
            say(str(refused))


if __name__ == "__main__":
    main()
