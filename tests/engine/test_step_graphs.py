"""The shapes that steps are padded to. The graphs themselves are tested in tests/gpu."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbengine.step_graphs import MIXED_ROWS, MIXED_TOKENS, StepGraphs, paying_tokens


@given(max_rows=st.integers(1, 1500), mixed_tokens=st.integers(0, 3000), data=st.data())
def test_every_step_fits_the_shape_that_it_is_padded_to(max_rows, mixed_tokens, data):
    graphs = StepGraphs(max_rows, mixed_tokens, None)
    rows = data.draw(st.integers(1, max_rows))
    assert rows <= graphs.size_for(rows) <= max_rows
    tokens = data.draw(st.integers(rows, 3000))
    shape = graphs.shape_for(rows, tokens)
    padded = min((size for size in MIXED_ROWS if rows <= size <= max_rows), default=None)
    room = max((size for size in MIXED_TOKENS if size <= mixed_tokens), default=0)
    assert (shape is None) == (padded is None or max(tokens, padded + 1) > room)
    if shape is not None:
        assert shape[0] == padded
        assert max(tokens, shape[0] + 1) <= shape[1] <= mixed_tokens  # as many tokens as rows would be a step of one token a row
        assert shape[1] <= max(2 * tokens, 2 * (shape[0] + 1), 16)


def test_a_prompt_and_its_neighbours_are_padded_by_little():
    graphs = StepGraphs(1024, 2304, None)
    assert graphs.shape_for(1, 100) == (1, 128)
    assert graphs.shape_for(30, 129) == (32, 192)
    assert graphs.shape_for(65, 2048 + 64) == (128, 2304)
    assert graphs.shape_for(8, 8) == (8, 16)
    assert graphs.shape_for(1, 2305) is None
    assert graphs.shape_for(257, 500) is None


def test_what_takes_longer_to_compute_than_to_launch_is_not_captured():
    assert 400 < paying_tokens(32, 8_000_000_000, 132) < 512
    assert paying_tokens(28, 600_000_000, 132) > 2304
    assert paying_tokens(28, 600_000_000, 40) < 2304  # a T4


class Recorded(StepGraphs):
    """Captures without a GPU, and keeps what was done."""

    def __init__(self, max_rows):
        super().__init__(max_rows, 0, Calls(self))
        self.log = []

    def _captured(self, body):
        body(capturing=True)
        return Graph()


class Graph:
    def raw_cuda_graph_exec(self):
        return id(self)


class Calls:
    def __init__(self, graphs):
        self.graphs = graphs

    def launch(self, handle):
        self.graphs.log.append("replayed")


def body_of(graphs, fails=False):
    def body(capturing=False):
        graphs.log.append("captured" if capturing else "run")
        if fails:
            raise RuntimeError("not now")

    return body


def test_a_shape_is_run_then_captured_and_replayed_from_then_on():
    graphs = Recorded(8)
    for _ in range(4):
        graphs.run((4, 4, True), body_of(graphs))
    assert graphs.log == ["run", "captured", "replayed", "replayed", "replayed"]
    graphs.clear()
    graphs.run((4, 4, True), body_of(graphs))
    assert graphs.log[5:] == ["run"]


def test_one_that_was_captured_ahead_is_replayed_at_once():
    graphs = Recorded(8)
    graphs.capture((4, 4, True), body_of(graphs))
    graphs.run((4, 4, True), body_of(graphs))
    assert graphs.log == ["captured", "replayed"]


def test_what_goes_wrong_in_a_capture_is_told_and_the_next_step_tries_again():
    graphs = Recorded(8)
    graphs.run((4, 4, True), body_of(graphs))
    with pytest.raises(RuntimeError, match="not now"):
        graphs.run((4, 4, True), body_of(graphs, fails=True))
    graphs.run((4, 4, True), body_of(graphs))
    assert graphs.log == ["run", "captured", "captured", "replayed"]
