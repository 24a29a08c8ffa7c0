"""Every lesson runs from top to bottom, through the program that `make demo` uses."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("*.ipynb"))
VIEW = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|usr|opt|var|mnt)/\w|[A-Z]:\\\\?Users|site-packages|\.venv")


def run(notebook: Path, out: Path, *, check: bool = True) -> str:
    """What the terminal shows of it."""
    command = [sys.executable, str(NOTEBOOKS / "run.py"), str(notebook), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stdout[-4000:] + done.stderr
    return done.stdout if check else f"{done.returncode}\n{done.stdout}"


def write(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def code_cells(notebook: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


@pytest.fixture(scope="module", params=LESSONS, ids=lambda path: path.stem)
def lesson(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A lesson as it is saved, and as it was executed just now."""
    out = tmp_path_factory.mktemp("executed")
    run(request.param, out)
    return request.param, out / request.param.name


@pytest.mark.parametrize("which", ["saved", "executed"])
def test_the_lesson_has_run_in_order_and_without_errors(lesson: tuple[Path, Path], which: str) -> None:
    cells = code_cells(lesson[which == "executed"])
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert [cell.id for cell in cells for output in cell.outputs if output.output_type == "error" or output.get("name") == "stderr"] == []


def test_the_lesson_is_saved_with_outputs_that_need_no_kernel_and_no_script(lesson: tuple[Path, Path]) -> None:
    saved, executed = (code_cells(path) for path in lesson)
    assert [cell.source for cell in saved] == [cell.source for cell in executed]
    assert [bool(cell.outputs) for cell in saved] == [bool(cell.outputs) for cell in executed]
    shown = [output.get("data", {}) for cell in saved for output in cell.outputs]
    assert {kind for data in shown for kind in data} <= {"text/plain", "text/html", "text/markdown", "image/png", "image/svg+xml", VIEW}
    pictures = [after for data, after in pairwise([*shown, {}]) if VIEW in data]
    assert all("image/svg+xml" in picture for picture in pictures), "each live view has its picture right after it"
    assert "widgets" not in nbformat.read(lesson[0], as_version=4).metadata
    text = lesson[0].read_text()
    assert MACHINE_PATH.findall(text) == []
    assert "<script" not in text


def test_a_path_of_a_machine_would_be_found() -> None:
    for text in ('File "/home/ann/x.py"', "in /tmp/ipykernel_1/2.py", "C:\\Users\\ann", "lib/site-packages/torch"):
        assert MACHINE_PATH.search(text), text


def test_output_comes_while_the_cell_still_runs(tmp_path: Path) -> None:
    notebook = write(tmp_path / "slow.ipynb", "import time\nprint('first', flush=True)\ntime.sleep(3)\nprint('second')")
    times = {}
    command = [sys.executable, str(NOTEBOOKS / "run.py"), str(notebook), "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
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
    shown = run(notebook, tmp_path / "out")
    assert "1001 steps" in shown
    assert "1005 tokens generated" in shown
    assert str(tmp_path / "out" / "stats.ipynb") in shown


def test_a_cell_that_fails_ends_the_run_and_is_shown(tmp_path: Path) -> None:
    notebook = write(tmp_path / "bad.ipynb", "print('before')", "1 / 0", "print('after')")
    shown = run(notebook, tmp_path / "out", check=False)
    assert shown.startswith("1\n")
    assert "before" in shown
    assert "ZeroDivisionError" in shown
    assert "\nafter" not in shown
    assert (tmp_path / "out" / "bad.ipynb").is_file()
