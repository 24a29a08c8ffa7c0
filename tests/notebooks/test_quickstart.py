"""What the quickstart shows is so: both as it is saved and as it runs now."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
QUICKSTART = NOTEBOOKS / "01_quickstart.ipynb"
SECONDS = 60


class Outputs:
    """The plain text of each output, by its cell's id."""

    def __init__(self, path: Path) -> None:
        self.cells = {cell.id: cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"}

    def __getitem__(self, cell: str) -> list[str]:
        return [output.get("text") or output.data["text/plain"] for output in self.cells[cell].outputs]

    def html(self, cell: str, output: int = 0) -> str:
        return self.cells[cell].outputs[output].data["text/html"]

    def source(self, cell: str) -> str:
        return self.cells[cell].source


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The notebook that a run leaves behind, and what the terminal showed of it."""
    out = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, str(NOTEBOOKS / "run.py"), str(QUICKSTART), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    return out / QUICKSTART.name, done.stdout


@pytest.fixture(params=["saved", "executed"])
def shown(request: pytest.FixtureRequest, executed: tuple[Path, str]) -> Outputs:
    return Outputs(QUICKSTART if request.param == "saved" else executed[0])


def test_a_cell_shows_its_text_and_a_quiet_line(shown):
    text, line = shown["generate"]
    assert len(text) > 100
    assert re.fullmatch(r"\d+ tokens · first after \d.* · \d+ tokens/s · (length|stop)", line)


def test_a_stop_text_ends_the_sea(shown):
    text, line = shown["options"]
    assert line.endswith("stop")
    assert "." not in text


def test_a_variable_is_filled_and_other_braces_stay(shown):
    [prompt] = shown["filled-prompt"]
    assert 'about a hedgehog. Do not touch {this} or {"colour": ["red"]}.' in prompt


def test_n_and_each_make_a_row_for_every_output(shown):
    assert shown.html("several").count("<tr>") == 1 + 3
    assert shown["each-item"][1].startswith("4 prompts · ")
    rows = shown.html("each-row")
    assert "There was once a tailor, who lived in the forest, and" in rows
    assert "There was once a goose, who lived at the mill, and" in rows
    assert shown.html("to-frame").count("<tr") == 1 + 3


def test_tokens_are_coloured_by_probability(shown):
    html = shown.html("logprobs")
    assert html.count("<span") > 20
    assert "background" in html
    assert "%" in html


def test_two_generations_in_the_background_end_under_their_own_cells(shown):
    for cell, tokens in (("background-wolf", 200), ("background-goose", 120)):
        text, line = shown[cell]
        assert len(text) > 2 * tokens
        assert line.startswith(f"{tokens} tokens")
    assert "2 sequences" in shown["background-wait"][-1]


def test_a_conversation_uses_the_prefix_cache_more_and_more(shown):
    cached = [re.search(r"(\d+) of (\d+) prompt tokens cached", shown[cell][1]) for cell in ("chat-one", "chat-two", "chat-three")]
    assert cached[0] is None
    assert cached[1] is not None
    assert cached[2] is not None
    assert int(cached[2][1]) > int(cached[1][1]) >= 16
    [history] = shown["chat-history"]
    assert re.findall(r"^\[\d\] (\w+):", history, re.MULTILINE) == ["user", "assistant"] * 3


def test_a_step_of_prefill_reads_the_prompt_and_a_step_of_decode_one_token(shown):
    columns = ("step", "sequences", "prefill", "decode", "sampled")
    [prefill] = [dict(zip(columns, map(int, row.split()[:5]), strict=True)) for row in shown["step-prefill"][0].splitlines()[1:]]
    decodes = [dict(zip(columns, map(int, row.split()[:5]), strict=True)) for row in shown["step-decode"][0].splitlines()[1:]]
    assert (prefill["prefill"] > 10, prefill["decode"]) == (True, 0)
    assert [(row["prefill"], row["decode"], row["sampled"]) for row in decodes] == [(0, 1, 1), (0, 1, 1)]
    assert shown["paused-request"][1].startswith("5 tokens")


def test_what_a_later_cell_cancels_keeps_its_text(shown):
    assert shown["cancel"] == ["1 request cancelled"]
    assert shown["cancelled"] == ["('abort', True)"]
    text, line = shown["endless"]
    assert len(text) > 20
    assert line.endswith("abort")


def test_python_streams_too(shown):
    for cell in ("stream", "astream"):
        [text] = shown[cell]
        assert len(text.split()) > 10


def test_the_engine_is_told_of_and_gone_in_the_end(shown):
    assert "found in the prefix cache" in shown["status"][0]
    assert "loaded as tales" in shown["models"][0]
    assert "KV per token" in shown["plan"][0]
    assert "loaded tales" in shown["log"][0]
    assert "'num_running': 0" in shown["stats"][0]
    assert shown["unload"][0].startswith("unloaded tales: ")


def test_the_terminal_shows_each_text_once_and_what_the_engine_did(executed):
    path, printed = executed
    outputs = Outputs(path)
    for cell in ("generate", "options", "several", "each-item", "logprobs", "chat-three"):
        text, line = outputs[cell]
        assert printed.count(f"{text}\n{line}\n") == 1, cell
        assert printed.count(text[:40]) == 1 + outputs["chat-history"][0].count(text[:40]), cell
    for cell in ("background-wolf", "background-goose", "endless"):
        text, line = outputs[cell]
        assert printed.count(text[:40]) == printed.count(line) == 1, cell
    assert "What the engine did" in printed
    ran = re.search(rf"{len(outputs.cells)} cells ran in (\d+\.\d) s", printed)
    assert ran is not None
    assert float(ran[1]) < SECONDS
