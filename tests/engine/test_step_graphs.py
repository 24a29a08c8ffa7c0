"""The shapes that steps are padded to. The graphs themselves are tested in tests/gpu."""

from hypothesis import given
from hypothesis import strategies as st

from nbengine.step_graphs import MIXED_ROWS, MIXED_TOKENS, StepGraphs


@given(max_rows=st.integers(1, 1500), max_tokens=st.integers(1, 20_000), data=st.data())
def test_every_step_fits_the_shape_that_it_is_padded_to(max_rows, max_tokens, data):
    graphs = StepGraphs(max_rows, max_tokens, None)
    rows = data.draw(st.integers(1, min(max_rows, max_tokens)))
    assert rows <= graphs.size_for(rows) <= max_rows
    tokens = data.draw(st.integers(rows, max_tokens))
    shape = graphs.shape_for(rows, tokens)
    if shape is None:
        assert (
            rows > max(graphs.rows)
            or tokens > MIXED_TOKENS[-1]
            or max(tokens, MIXED_ROWS[0] + 1) > max([*graphs.tokens, 0])
            or tokens < 300
        )
    else:
        assert rows <= shape[0] <= max_rows
        assert max(tokens, shape[0] + 1) <= shape[1] <= max_tokens  # as many tokens as rows would be a step of one token a row


def test_a_prompt_and_its_neighbours_are_padded_by_little():
    graphs = StepGraphs(1024, 16384, None)
    assert graphs.shape_for(1, 100) == (1, 128)
    assert graphs.shape_for(30, 129) == (32, 192)
    assert graphs.shape_for(65, 2048 + 64) == (128, 2304)
    assert graphs.shape_for(8, 8) == (8, 16)
    assert graphs.shape_for(1, 2305) is None
    assert graphs.shape_for(257, 500) is None
