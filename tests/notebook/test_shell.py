"""The magics in a plain IPython shell, as in a terminal: no kernel, no displays to update, nothing awaited."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell

from nbengine.notebook.extension import load_ipython_extension, unload_ipython_extension


class RaisingShell(InteractiveShell):
    """What goes wrong in a cell is raised, so that a failing magic fails its test."""

    def run_cell(self, *args, **kwargs):
        result = super().run_cell(*args, **kwargs)
        result.raise_error()
        return result


@pytest.fixture(scope="module")
def shell():
    InteractiveShell.clear_instance()
    RaisingShell.clear_instance()
    shell = RaisingShell.instance()
    load_ipython_extension(shell)
    shell.run_cell("%engine load tales --num-gpu-blocks-override 128")
    yield shell
    unload_ipython_extension(shell)
    RaisingShell.clear_instance()


def test_a_failing_magic_raises(shell):
    for cell in ("%%generate --bogus\nHi", "%engine bogus", "%%chat --bogus\nHi", "%generate -t -1 Hi"):
        with pytest.raises(UsageError):
            shell.run_cell(cell)


def test_text_is_printed_as_it_comes_and_the_line_under_it(shell, capsys):
    shell.run_cell("%%generate -m 12 --ignore-eos --out r\nHello")
    printed = capsys.readouterr().out
    result = shell.user_ns["r"]
    assert printed.startswith(f"{result.text}\n\n12 tokens · ")


def test_a_line_may_end_in_a_question_mark(shell):
    shell.run_cell("%generate -m 2 --no-chat --out r Who is it?")
    assert shell.user_ns["r"].requests[0].prompt == "Who is it?"


def test_several_outputs_are_printed_at_the_end(shell, capsys):
    shell.run_cell("words = ['fox', 'sea']")
    shell.run_cell("%%generate --each words -m 3\n{item}")
    assert "[0] " in capsys.readouterr().out


def test_status_and_steps_are_plain_tables(shell, capsys):
    shell.run_cell("%engine")
    assert "Qwen3ForCausalLM" in capsys.readouterr().out


def test_a_chat_keeps_its_history(shell):
    shell.run_cell("%%chat tom -m 3\nHello")
    shell.run_cell("%%chat tom -m 3\nAgain")
    assert len(shell.run_line_magic("chat", "show tom")) == 4


PIECES = st.sampled_from(
    [
        '{"a": 1}',
        "{x}",
        "{ name }",
        "${name}",
        "{{name}}",
        "\\frac{name}{2}",
        "{name.x}",
        "{1}",
        "{}",
        "}",
        "{",
        "$",
        "%",
        "\\",
        "'",
        '"',
        "\n",
        "?",
        "!ls",
        "é",
        "word ",
    ]
)


@settings(max_examples=60)
@given(st.lists(PIECES, min_size=1, max_size=12))
def test_a_cell_without_variables_of_that_name_comes_through_to_the_letter(shell, pieces):
    text = "a" + "".join(pieces)
    shell.user_ns.pop("name", None)
    shell.user_ns.pop("x", None)
    result = shell.run_cell_magic("generate", "--no-chat -m 1", text + "\n")
    assert result.requests[0].prompt == text


@settings(max_examples=60)
@given(st.lists(PIECES, max_size=8), st.lists(PIECES, max_size=8))
def test_a_variable_on_a_line_of_its_own_is_filled_and_nothing_else_changes(shell, before, after):
    shell.user_ns["thing"] = "VALUE {x} {thing}"
    head = "".join(before).replace('"', "").replace("'", "").replace("$", "").replace("\\", "")
    tail = "".join(after)
    result = shell.run_cell_magic("generate", "--no-chat -m 1", f"a{head}\n\nsee {{thing}} here\n\n{tail}z\n")
    assert result.requests[0].prompt == f"a{head}\n\nsee VALUE {{x}} {{thing}} here\n\n{tail}z"
