"""The dashboard as a person sees it in JupyterLab: it appears, moves while a cell runs, is brushed, and its buttons act."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect

LOAD = "from nbengine.burst import burst\nb = burst(e, 'fixed', count={count}, prompt=40, output={output}, seed={seed})"


@pytest.fixture(scope="module")
def board(notebook):
    """The cell of an open dashboard whose charts have been drawn, over an engine that has done something."""
    notebook.run("%load_ext nbengine")
    notebook.run("%engine load tales --num-gpu-blocks-override 256 --max-model-len 512 --max-num-seqs 8 --out e")
    notebook.run(LOAD.format(count=12, output=30, seed=1) + "\nfor request in b.requests: request.result()")
    cell = notebook.run("from nbengine.widgets import Dashboard\nboard = Dashboard(e)\nboard")
    cell.box.locator(".nbengine-charts[data-drawn]").wait_for()
    cell.box.scroll_into_view_if_needed()
    return cell


def drawn(cell) -> int:
    return int(cell.box.locator(".nbengine-charts").get_attribute("data-drawn"))


def test_it_appears_with_its_charts(notebook, board):
    expect(board.box.locator(".nbengine-charts .scatterlayer .trace")).not_to_have_count(0)
    notebook.shoot("dashboard-light", board)


def test_two_traces_are_compared(notebook, board):
    notebook.run(
        "from nbengine import Engine, SamplingParams\nfrom nbengine.widgets import compare\n"
        "def run(policy):\n"
        "    with Engine('tales', num_gpu_blocks_override=128, max_model_len=256, max_num_seqs=4, scheduling_policy=policy) as engine:\n"
        "        engine.generate(['Once', 'The fox', 'A king'] * 4, [SamplingParams(max_tokens=10 + 12 * i % 60, ignore_eos=True) for i in range(12)])\n"
        "        return engine.trace\n"
        "static, continuous = run('static'), run('fcfs')"
    )
    cell = notebook.run("compare(static, continuous, labels=('static', 'continuous'))")
    cell.box.locator("canvas").first.wait_for()
    cell.box.scroll_into_view_if_needed()
    notebook.shoot("compare-light", cell)
