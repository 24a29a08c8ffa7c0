"""What `make demo` prints of displays that a notebook updates in place."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nbformat
import pytest

RUN = Path(__file__).parents[2] / "notebooks" / "run.py"

SHOW = """\
from IPython.display import display
def show(text):
    return display({"text/plain": text}, raw=True, display_id=True)
def change(handle, text):
    handle.update({"text/plain": text}, raw=True)
"""
TWO_DISPLAYS = """\
body, line = show(""), show("0 tokens, waiting")
for n in range(1, 4):
    change(body, " ".join(["one", "two", "three"][:n]))
    change(line, f"{n} tokens, running")
change(line, "3 tokens, stop")
publisher = get_ipython().display_pub
earlier = {"header": publisher.parent_header}
"""
LATE = """\
own = {"header": publisher.parent_header}
publisher.set_parent(earlier)  # as a message that was sent between the two cells
change(line, "changed after its cell")
publisher.set_parent(own)
"""


@pytest.fixture(scope="module")
def run_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("notebooks_run", RUN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def terminal(run_module):
    terminal = run_module.Terminal()
    terminal.begin("a cell")
    return terminal


def test_only_what_a_text_grew_by_is_printed(terminal, capsys):
    terminal.add("body", "")
    capsys.readouterr()
    printed = []
    for text in ("Once", "Once upon", "Once upon a time"):
        terminal.update("body", text)
        printed.append(capsys.readouterr().out)
    assert printed == ["Once", " upon", " a time"]
    terminal.end()
    assert capsys.readouterr().out == "\n"


def test_what_is_rewritten_is_printed_once_when_it_is_final(terminal, capsys):
    terminal.add("body", "")
    terminal.add("line", "0 tokens")
    capsys.readouterr()
    for count, text in enumerate(("Once", "Once upon"), start=1):
        terminal.update("body", text)
        terminal.update("line", f"{count} tokens")
    terminal.end()
    terminal.end()
    assert capsys.readouterr().out == "Once upon\n2 tokens\n"


def test_a_growing_text_that_is_rewritten_in_the_end_is_printed_whole(terminal, capsys):
    terminal.add("body", "")
    capsys.readouterr()
    terminal.update("body", '{"a"')
    terminal.update("body", '{"a":1}')
    terminal.update("body", '{\n  "a": 1\n}')
    terminal.end()
    assert capsys.readouterr().out == '{"a":1}\n{\n  "a": 1\n}\n'


def test_what_goes_on_under_an_earlier_cell_is_named_and_waits_for_the_end_of_this_one(terminal, capsys):
    terminal.add("body", "")
    terminal.end()
    terminal.begin("the next cell")
    capsys.readouterr()
    terminal.update("body", "Once")
    terminal.update("body", "Once upon")
    assert capsys.readouterr().out == ""
    assert terminal.goes_on_elsewhere()
    terminal.stream("printed here")
    terminal.end()
    assert capsys.readouterr().out == "printed here\ncell 1 went on:\nOnce upon\n"
    assert not terminal.goes_on_elsewhere()


def test_a_notebook_with_updated_displays_is_shown_and_saved_as_it_ends(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in (SHOW, TWO_DISPLAYS, LATE)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "displays.ipynb")
    command = [sys.executable, str(RUN), str(tmp_path / "displays.ipynb"), "--out", str(tmp_path / "out")]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.count("one two three\n3 tokens, stop\n") == 1
    assert "running\n" not in shown
    assert "cell 2 went on:\nchanged after its cell\n" in shown
    saved = nbformat.read(tmp_path / "out" / "displays.ipynb", as_version=4).cells[1].outputs
    assert [output.data["text/plain"] for output in saved] == ["one two three", "changed after its cell"]
