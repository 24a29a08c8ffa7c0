"""Loading a real checkpoint, beside what the disk gives when the same files are only read."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

from nbengine import Engine
from nbengine.bench.measure import Settings, engine_options, give_back
from nbengine.bench.results import Results, say, table
from nbengine.bench.shapes import model_folder, shape

TARGET = 0.8  # of the rate at which the files can be read
PIECE = 16 << 20
READERS = (1, 4, 8)  # threads that are tried for the plain read; the fastest counts


def measure(models: list[str], settings: Settings, results: Results) -> list[dict[str, Any]]:
    """Write the weights, drop them from memory, read them; drop them again, load them."""
    rows = []
    for model in models:
        if not settings.allows(f"loading {model} from disk"):
            continue
        folder, size = write_checkpoint(model, settings)
        try:
            raw, loading = [], []
            for turn in range(settings.repeats or 2):
                raw += [_read(folder, readers) for readers in READERS[: 1 if turn else None]]
                loading.append(_load(model, folder, settings))
        finally:
            shutil.rmtree(folder)
        read, load = size / min(raw), size / min(seconds for seconds, _ in loading)
        row = {
            "model": model, "bytes": size, "dropped_by_root": os.geteuid() == 0, "disk_GB_s": read / 1e9, "load_GB_s": load / 1e9,
            "of_disk": load / read, "target": TARGET, "load_weights_s": min(seconds for seconds, _ in loading),
            "ready_s": min(seconds for _, seconds in loading),
        }  # fmt: skip
        rows.append(results.add("disk", row))
        say(f"{model}: {size / 1e9:.2f} GB read at {read / 1e9:.2f} GB/s, loaded at {load / 1e9:.2f} GB/s")
    shown = [(row["model"], row["bytes"] / 1e9, row["disk_GB_s"], row["load_GB_s"], row["of_disk"], TARGET, row["ready_s"]) for row in rows]
    table("a checkpoint from disk", ("model", "GB", "disk GB/s", "load GB/s", "ratio", "target", "ready s"), shown)
    return rows


def write_checkpoint(model: str, settings: Settings) -> tuple[Path, int]:
    """Random weights as a real checkpoint, in files of up to 5 GB; its folder and its size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = settings.folder / "checkpoints" / Path(model).name
    shutil.rmtree(folder, ignore_errors=True)
    config = AutoConfig.from_pretrained(model_folder(model, settings.folder))
    with settings.device:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="5GB")
    give_back(settings.device)
    return folder, sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def drop_from_memory(folder: Path) -> None:
    """Have the next read of these files come from the disk."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    if os.geteuid() == 0 and os.access("/proc/sys/vm/drop_caches", os.W_OK):
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("1")


def _read(folder: Path, readers: int) -> float:
    """Seconds to read every byte once, each thread its own pieces."""
    drop_from_memory(folder)
    pieces = [(file, offset) for file in sorted(folder.glob("*.safetensors")) for offset in range(0, file.stat().st_size, PIECE)]
    began = perf_counter()
    with ThreadPoolExecutor(readers) as pool:
        list(pool.map(lambda share: _read_pieces(pieces[share::readers]), range(readers)))
    return perf_counter() - began


def _read_pieces(pieces: list[tuple[Path, int]]) -> None:
    buffer = bytearray(PIECE)
    descriptors: dict[Path, int] = {}
    try:
        for file, offset in pieces:
            if file not in descriptors:
                descriptors[file] = os.open(file, os.O_RDONLY)
            os.preadv(descriptors[file], [buffer], offset)
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def _load(model: str, folder: Path, settings: Settings) -> tuple[float, float]:
    """Seconds from the first to the last report of loaded weights, and from construction to ready."""
    drop_from_memory(folder)
    reports: list[tuple[float, int]] = []

    def progress(phase: str, done: int, total: int) -> None:  # noqa: ARG001 - the engine's signature
        if phase == "loading weights":
            reports.append((perf_counter(), done))

    longest = min(settings.max_model_len, int(shape(model)["max_position_embeddings"]))
    began = perf_counter()
    engine = Engine(folder, progress=progress, **engine_options(model, settings, load_format="auto", max_model_len=longest))
    ready = perf_counter() - began
    engine.close()
    del engine
    give_back(settings.device)
    return reports[-1][0] - reports[0][0], ready
