"""Cells that nobody would write on purpose, and what must not follow from them."""

from __future__ import annotations

import pytest
from kernel_client import QUICK, Kernel, stopped

ENGINE = "e = get_ipython().find_line_magic('engine').__self__.session.engines.find()\nimport nbengine, asyncio, time"
LONG = "-m 1500 --ignore-eos --no-chat --out g"
PARAMS = "nbengine.SamplingParams(max_tokens=1500, ignore_eos=True)"


@pytest.fixture(autouse=True)
def engine(kernel):
    kernel.run(ENGINE)
    yield
    kernel.run("%engine cancel --all")
    kernel.run("while e.status == 'running': time.sleep(0.01)")


@pytest.mark.parametrize(
    "cell",
    [
        f"%generate {LONG} hi",
        f"e.generate('hi', {PARAMS})",
        f"for piece in e.stream('hi', {PARAMS}): pass",
        f"e.submit('hi', {PARAMS}).result()",
        f"%generate --bg {LONG} hi\ng.wait()",
    ],
)
def test_the_stop_button_is_heard_in_a_cell_that_awaits_something_else(kernel, cell):
    ran, seconds = stopped(kernel, f"await asyncio.sleep(0)\nprint('on', flush=True)\n{cell}")
    assert ran.status == "error"
    assert seconds < QUICK


def test_an_interrupt_while_a_request_is_queued_leaves_none_running(kernel):
    kernel.run("S = get_ipython().find_line_magic('engine').__self__.session\nimport os, signal\nbind = S.bind")
    kernel.run("def interrupted(*args):\n    bind(*args)\n    os.kill(os.getpid(), signal.SIGINT)\nS.bind = interrupted")
    assert kernel.run(f"for _ in '1':\n    %generate {LONG} hi", check=False).ename == "KeyboardInterrupt"
    kernel.run("S.bind = bind\ng.settle(5)")
    assert kernel.value("(g.finish_reason, e.stats()['num_running'])") == ("abort", 0)


def test_a_cancelled_task_of_a_cell_does_not_end_the_kernel(kernel):
    kernel.run(
        "task = asyncio.create_task(get_ipython().find_cell_magic('generate').__self__.awaited('generate', "
        f"{LONG!r}, 'x'))\nawait asyncio.sleep(0.3)\ntask.cancel()\nawait asyncio.sleep(0.5)"
    )
    assert kernel.value("(task.done(), g.finish_reason)") == (True, "abort")


@pytest.mark.parametrize("name", ["class", "None", "print", "get_ipython", "Out", "a.b", "2x"])
@pytest.mark.parametrize("cell", ["%%generate --out {}\nhi", "%engine load tales --name x --out {}"])
def test_no_name_of_pythons_or_ipythons_own_is_bound(kernel, cell, name):
    assert kernel.run(cell.format(name), check=False).ename == "UsageError"
    assert kernel.value("callable(get_ipython) and callable(print)")


def test_a_view_that_fails_ends_nothing(kernel):
    kernel.run("import nbengine.notebook.render as render\nline_text = render.line_text")
    kernel.run("def failing(generation):\n    raise OSError('front end gone')\nrender.line_text = failing", check=False)
    kernel.run(
        "def sometimes(generation):\n    if len(generation.token_ids) > 3: raise OSError('front end gone')\n    return line_text(generation)"
    )
    kernel.run("render.line_text = sometimes")
    kernel.run("%%generate -m 40 --ignore-eos --out g\nhi")
    kernel.run("render.line_text = line_text")
    assert kernel.value("(g.finish_reason, len(g.token_ids))") == ("length", 40)
    assert "front end gone" in kernel.run("%engine log 60").text


def test_a_broken_widget_library_leaves_the_text(tmp_path):
    (tmp_path / "anywidget.py").write_text("raise RuntimeError('broken anywidget')\n")
    kernel = Kernel({"PYTHONPATH": str(tmp_path)})
    try:
        kernel.run("%load_ext nbengine\n%engine load tales --num-gpu-blocks-override 128")
        ran = kernel.run("%%generate -m 100 --ignore-eos --out g\nhi")
        assert kernel.value("len(g.token_ids)") == 100
        assert ran.shown[0]["text/plain"] == kernel.value("g.text")
        assert not ran.widgets
    finally:
        kernel.close()


@pytest.mark.parametrize(
    "cell",
    [
        "%%capture cap\n%generate -m 3 --out zz hi",
        "%%capture cap\n%%generate -m 3 --out zz\nhi",
        "%%time\n%generate -m 3 --out zz hi",
        "%time %generate -m 3 --out zz hi",
    ],
)
def test_magics_that_run_a_cell_run_ours(kernel, cell):
    kernel.run("zz = None")
    kernel.run(cell)
    assert kernel.value("len(zz.token_ids)") == 3


@pytest.mark.parametrize(
    "cell", ["x = 1\n%generate --out q -m 2 what?", "q = %generate -m 2 what?", "if True:\n    %generate -m 2 --out q what?"]
)
def test_a_question_mark_ends_a_prompt_anywhere(kernel, cell):
    kernel.run("q = None")
    kernel.run(cell)
    assert "what?" in kernel.value("q.requests[0].prompt")


def test_a_conversation_is_not_changed_while_it_is_answered(kernel):
    kernel.run("%%chat busy -m 3\none")
    kernel.run("%%chat busy --bg -m 1500 --ignore-eos --out g\ntwo")
    for command in ("undo busy", "reset busy", "fork busy other"):
        assert "still being answered" in kernel.run(f"%chat {command}", check=False).evalue
    assert "being answered: two" in kernel.run("%chat show busy").text
    kernel.run("g.cancel(); g.settle(5)")
    assert "[2] user: two" in kernel.run("%chat show busy").text
    assert "already" in kernel.run("%chat fork busy busy", check=False).evalue
    assert "not one of yours" in kernel.run("%%chat busy --edit 1\nchanged", check=False).evalue


def test_each_takes_items_that_are_alike(kernel):
    kernel.run("same = ['hello'] * 3")
    kernel.run("%%generate --each same -m 1 --no-chat --out g\n{item}")
    assert kernel.value("len(g)") == 3
    assert "names none of" in kernel.run("%%generate --each same -m 1\nnothing", check=False).evalue
    assert "--raw" in kernel.run("%%generate --each same --raw -m 1\n{item}", check=False).evalue
    kernel.run("%%generate --each same -m 1 --no-chat --out g\n")
    assert kernel.value("[r.prompt for r in g.requests]") == ["hello"] * 3


def test_a_users_own_logging_shows_nothing_of_ours(kernel):
    kernel.run("import logging\nlogging.basicConfig(force=True, level=logging.INFO)")
    ran = kernel.run("%%generate -t -1\nhi", check=False)
    assert ran.err.strip() == f"UsageError: {ran.evalue}"
    assert "temperature must be" in kernel.run("%engine log").text


def test_the_log_is_bounded(kernel):
    kernel.run("import logging\nfor i in range(3000): logging.getLogger('nbengine').info('line %d', i)")
    assert kernel.value("len(get_ipython().find_line_magic('engine').__self__.session.log.lines)") == 500
    assert "line 2999" in kernel.run("%engine log 1").text
    assert kernel.run("%engine log 0", check=False).ename == "UsageError"


def test_a_cell_leaves_no_widget_behind(kernel):
    count = "len(__import__('comm').get_comm_manager().comms)"
    kernel.run("%%generate -m 80 --ignore-eos\nhi")
    before = kernel.value(count)
    for _ in range(3):
        assert kernel.run("%%generate -m 80 --ignore-eos\nhi").widgets
    assert kernel.value(count) == before


def test_an_engine_of_the_users_own_outlives_the_extension(fresh_kernel):
    fresh_kernel.run("import nbengine\nmine = nbengine.Engine('tales', num_gpu_blocks_override=64)\n%load_ext nbengine\n%engine use mine")
    fresh_kernel.run("%unload_ext nbengine")
    assert fresh_kernel.value("mine.status") == "idle"
    fresh_kernel.run("mine.close()")
