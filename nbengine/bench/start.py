"""From nothing to the first token, with the kernels compiled before and not."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

from nbengine.bench.measure import Settings, engine_options
from nbengine.bench.opening import open_elsewhere
from nbengine.bench.recorded import READY_SECONDS
from nbengine.bench.results import Results, say, table
from nbengine.bench.shapes import model_folder

READY, FIRST_TOKEN = 5.0, 1.0  # seconds allowed with a warm cache


def measure(models: list[str], settings: Settings, results: Results) -> list[dict[str, Any]]:
    """Each in processes of its own: one with an empty Triton cache, then others that find what it compiled. The best of those counts."""
    rows = []
    for model in models:
        folder, options = model_folder(model, settings.folder), engine_options(model, settings)
        with TemporaryDirectory(prefix="triton-cache-") as cache:
            for label in ("cold", *["warm"] * (settings.repeats or 2)):
                if settings.allows(f"a {label} start of {model}"):
                    times = open_elsewhere(folder, options, TRITON_CACHE_DIR=cache)
                    rows.append(results.add("start", {"model": model, "triton_cache": label, **times}))
                    say(f"{model}, {label}: ready after {times['ready_s']:.2f} s, first token {times['first_token_s']:.2f} s later")
    shown = [
        (
            f"{row['model']}, {row['triton_cache']} cache",
            row["import_torch_s"],
            row["ready_s"],
            row["first_token_s"],
            row["second_first_token_s"],
        )
        for row in rows
    ]
    columns = ("case", "import torch", "construct to ready", "first token", "the next one's")
    table(f"seconds; with a warm cache {READY:g} and {FIRST_TOKEN:g} are allowed; recorded to ready: {READY_SECONDS}", columns, shown)
    return rows
