"""What is filled is a variable of the user's; all else comes through to the letter."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell

from nbengine.notebook.fill import fill, names, users_variables

VARIABLES = {name: f"<{name.upper()}>" for name in ("x", "n", "i", "a", "b", "name", "first", "last", "doc", "key", "code", "equation")}

FILLED = {
    "alone": ("{name}", "<NAME>"),
    "in prose": ("Dear {name}, how are you?", "Dear <NAME>, how are you?"),
    "like XML": ("<doc>{doc}</doc>", "<doc><DOC></doc>"),
    "in quotes": ('Translate "{name}"', 'Translate "<NAME>"'),
    "in a fence": ("Explain\n```python\n{code}\n```\n", "Explain\n```python\n<CODE>\n```\n"),
    "in inline code": ("`{name}`", "`<NAME>`"),
    "after an equals sign": ("n={n}", "n=<N>"),
    "after a number sign": ("Question #{n}:", "Question #<N>:"),
    "in a file's name": ("file_{n}.txt", "file_<N>.txt"),
    "two joined by an underscore": ("{first}_{last}", "<FIRST>_<LAST>"),
    "two side by side": ("{first}{last}", "<FIRST><LAST>"),
    "as a value in JSON": ('{"a": {n}, "b": [{x}]}', '{"a": <N>, "b": [<X>]}'),
    "in JSON within a string": (r'"{\"name\": \"{name}\"}"', r'"{\"name\": \"<NAME>\"}"'),
    "in a path with doubled backslashes": (r"C:\\Users\\{name}", r"C:\\Users\\<NAME>"),
    "between prices": ("It costs $5, and {name} has $6.", "It costs $5, and <NAME> has $6."),
    "before a price": ("{name} has $6 and 7$", "<NAME> has $6 and 7$"),
    "between two formulas": ("$a$ and {name} and $b$", "$a$ and <NAME> and $b$"),
    "dollars that a blank line parts": ("one $x\n\n{name}\n\n2$ two", "one $x\n\n<NAME>\n\n2$ two"),
    "dollars that a fence parts": ("echo $x\n```\n{code}\n```\n2$", "echo $x\n```\n<CODE>\n```\n2$"),
    "after a command with a space": (r"\item {name}", r"\item <NAME>"),
    "after an argument and a space": (r"\textbf{Dear} {name}", r"\textbf{Dear} <NAME>"),
    "in an environment of text": (r"\begin{itemize} {name} \end{itemize}", r"\begin{itemize} <NAME> \end{itemize}"),
    "after an f-string": ('f"{x}" is {x}', 'f"{x}" is <X>'),
    "beside the letter f in quotes": ('"f" {x} "g"', '"f" <X> "g"'),
    "after an f-string's quote that never closes": ('a f" and\n{x}', 'a f" and\n<X>'),
    "an argument that a blank line cuts": ("\\n{\n\n{name}", "\\n{\n\n<NAME>"),
    "in a formula that is none, for its spaces": ("$ {x} $", "$ <X> $"),
}

LEFT = {
    "doubled braces": "{{name}}",
    "tripled braces": "{{{name}}}",
    "a template literal": "`${name}`",
    "a shell variable": "echo ${name}",
    "an escaped one": r"\${name}",
    "spaces": "{ name }",
    "an attribute": "{name.upper}",
    "an index": "{name[0]}",
    "a format": "{n:.2f} {n!r} {n=}",
    "a call": "{name()}",
    "nothing": "{} {0}",
    "not a variable": "{unknown}",
    "JSON": '{"name": "x", "n": {"a": 1}}',
    "a function's body": "fn f() { name }",
    "a formula": "$f({x})$",
    "a formula over lines": "$$\n{x} + {n}\n$$",
    "a formula in parentheses": r"\({x}\)",
    "a formula in brackets": r"\[ {x} \]",
    "an environment of formulas": "\\begin{align*}\n{x} &= {n}\n\\end{align*}",
    "an environment with arguments": r"\begin{array}{cc} {x} \end{array}",
    "an environment's name": r"\begin{equation} \end{equation}",
    "the first argument of a command": r"\textbf{x}",
    "a later argument": r"\frac{a}{b}",
    "an argument after an optional one": r"\cite[p. 3]{key}",
    "an argument after a star": r"\section*{name}",
    "an optional argument": r"\item[{name}]",
    "within an argument": r"\section{About {name}}",
    "an accent": r"\"{a} \'{i}",
    "escaped braces": r"\{x\}",
    "an exponent": "2^{n}",
    "an index of one letter": "x_{i}",
    "an index with a factor before it": "2x_{i}",
    "an index after a group": "{a+b}_{i}",
    "an index after an index": "x_{i}_{n}",
    "an index after a parenthesis": "f(t)_{n}",
    "both after a command": r"\sum_{i}^{n}",
    "an f-string": 'print(f"{x}")',
    "an f-string in single quotes": "F'{x} {n}'",
    "a raw f-string": 'rf"{x}" fR"{n}" Rf"{a}"',
    "an f-string in quotes": "'f\"{x}\"'",
    "an f-string with quotes inside": """f"{d["k"]} {x}" """,
    "an f-string with escapes": r'f"\"{x}"',
    "an f-string over lines": 'f"""\n{x}\n\n{n}\n"""',
    "a string of C#": '$"{x}"',
}


@pytest.mark.parametrize(("text", "expected"), FILLED.values(), ids=FILLED)
def test_it_is_filled(text, expected):
    assert fill(text, VARIABLES) == expected


@pytest.mark.parametrize("text", LEFT.values(), ids=LEFT)
def test_it_is_left_alone(text):
    assert fill(text, VARIABLES) == text
    assert fill(f"{text}\n\n{{name}}", VARIABLES) == f"{text}\n\n<NAME>"  # and what follows is not


def test_values_are_inserted_once_and_not_looked_through():
    assert fill("{a} {b}", {"a": "{b}", "b": "{a} $1 \\1"}) == "{b} {a} $1 \\1"
    assert fill("{a}{b}", {"a": "{", "b": "a}"}) == "{a}"


def test_any_value_is_written_as_str_writes_it():
    assert fill("{a} {b} {n}", {"a": [1, "x"], "b": None, "n": 0.5}) == "[1, 'x'] None 0.5"


def test_names_are_those_that_would_be_filled():
    assert names('{b} {a} {b} f"{x}" {{n}} $y_{i}$ { c }') == ["b", "a"]
    assert [names(text) for text in LEFT.values()] == [["unknown"] if text == "{unknown}" else [] for text in LEFT.values()]


CODE = [
    '{"role": "user", "content": {"n": [1, {}]}}',
    "interface Person<T> { name: string; next?: { [key: string]: T } }",
    "const f = ({ name, ...rest }) => `${name} ${{ a: 1 }.a}`;",
    'fn main() { let v = vec![1]; println!("{:?} {0} {v:?}", v); match v { _ => {} } }',
    "body { margin: 0 } .a::after { content: '{'; }",
    'def f(x):\n    return f"{x!r:>{n}} {{}}" + {"a": {1, 2}}["a"]',
    r"\begin{tabular}{l|r} \multicolumn{2}{c}{$x_{i}^{2}$} \\ \end{tabular}",
    r"\[ \int_{0}^{n} \frac{a}{b}\,dx \] and $\mathbb{R}^{n}$",
    "{{#each items}}{{name}}{{/each}} {% if x %}{{ x }}{% endif %}",
    'f"""\n{x}\n"""',
    "```json\n{\n}\n```",
]
noise = st.text(st.sampled_from("{}[]()$\\_^\"'fxn1 \n`:.") | st.characters(codec="utf-8"), max_size=30)


@given(st.lists(st.sampled_from(CODE) | noise, max_size=8).map("".join))
def test_a_text_that_names_no_variable_comes_through_to_the_letter(text):
    assert fill(text, {"no_such_name": "!"}) == text
    assert fill(text, {}) == text


@given(
    st.lists(st.sampled_from(CODE), max_size=6),
    st.text(max_size=20),
    st.sampled_from(["{p}", "<t>{p}</t>", '"{p}"', "p={p}", "```\n{p}\n```"]),
)
def test_a_clear_placeholder_between_pieces_of_code_is_filled_exactly(pieces, value, clear):
    parted = f"\n\n{clear}\n\n"
    text = parted + parted.join([*pieces, ""])
    assert fill(text, {"p": value}) == text.replace("{p}", value)


@given(noise, noise)
def test_what_changes_is_nothing_but_placeholders(before, after):
    text = f"{before}{{n}}{after}"
    parts = fill(text, {"n": "\0value\0"}).split("\0value\0")
    assert "{n}".join(parts) == text


@given(st.lists(st.sampled_from(CODE) | noise | st.just("{n}"), max_size=8).map("".join))
def test_names_and_fill_agree(text):
    assert (fill(text, {"n": ""}) != text) == ("n" in names(text))


PIECES = ["{", "\\frac{", "\\a[", "$x ", "$$", 'f"{', 'f"{}', "f'''{", "_{", "x^{", "\\(", "\\begin{align}", "\n  ", "\\", "x_{n}", "{x"]


@pytest.mark.parametrize("piece", PIECES)
def test_the_time_grows_with_the_length(piece):
    """A megabyte takes seconds at most, closed at its end or not; anything quadratic would take hours."""
    text = piece * (1_000_000 // len(piece)) + "}" * 1000
    began = time.perf_counter()
    fill(text + "\n\n{a}", {"a": 1})
    assert time.perf_counter() - began < 20


def test_the_users_variables_are_what_the_user_made():
    shell = InteractiveShell()
    code = "import math\nfrom math import pi\nx = 1\nquit = 'mine'\n_y = 2\ndef f(): pass\nclass C: pass\ng = lambda: 0\nh = len\nc = C()\nwords = ['a']"
    shell.run_cell(code)
    assert set(users_variables(shell)) == {"pi", "x", "quit", "c", "words"}
    assert users_variables(shell)["pi"] == math.pi
    assert users_variables(SimpleNamespace(user_ns={"In": (old := []), "z": 3}, user_ns_hidden={"In": old})) == {"z": 3}
