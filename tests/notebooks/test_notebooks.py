"""Every lesson runs from top to bottom, through the program that `make demo` uses."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def command(notebook: Path, out: Path) -> list[str]:
    return [sys.executable, str(NOTEBOOKS / "run.py"), str(notebook), "--out", str(out)]


def write(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_lesson_runs(notebook: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(notebook, tmp_path), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    executed = nbformat.read(tmp_path / notebook.name, as_version=4)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")
    assert "Warning" not in "".join(out.text for cell in executed.cells for out in cell.get("outputs", []) if out.get("name") == "stderr")


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_the_lesson_is_stored_without_outputs(notebook: Path) -> None:
    cells = nbformat.read(notebook, as_version=4).cells
    assert [cell.id for cell in cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)] == []


def test_output_comes_while_the_cell_still_runs(tmp_path: Path) -> None:
    notebook = write(tmp_path / "slow.ipynb", "import time\nprint('first', flush=True)\ntime.sleep(3)\nprint('second')")
    times = {}
    with subprocess.Popen(command(notebook, tmp_path / "out"), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            times[line.strip()] = time.monotonic()
    assert process.returncode == 0
    assert times["second"] - times["first"] > 1.5


def test_what_the_engine_did_is_summed_up(tmp_path: Path) -> None:
    counters = (
        "steps",
        "num_preemptions",
        "prompt_tokens",
        "prefix_cache_hits",
        "generation_tokens",
        "blocks_used",
        "blocks_total",
        "blocks_cached",
    )
    notebook = write(tmp_path / "stats.ipynb", f"stats = {dict(zip(counters, range(1001, 1009), strict=True))}")
    shown = subprocess.run(command(notebook, tmp_path / "out"), capture_output=True, text=True, check=True).stdout
    assert "1001 steps" in shown
    assert "1005 tokens generated" in shown
    assert str(tmp_path / "out" / "stats.ipynb") in shown


def test_a_cell_that_fails_ends_the_run_and_is_shown(tmp_path: Path) -> None:
    notebook = write(tmp_path / "bad.ipynb", "print('before')", "1 / 0", "print('after')")
    done = subprocess.run(command(notebook, tmp_path / "out"), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "before" in done.stdout
    assert "ZeroDivisionError" in done.stdout
    assert "\nafter" not in done.stdout
    assert (tmp_path / "out" / "bad.ipynb").is_file()
