import pytest

from nbengine.bench.limits import H200, Card, Work, limit
from nbengine.bench.recorded import RECORDED
from nbengine.bench.shapes import MEASURED, SHAPES
from nbengine.bench.workloads import WORKLOADS, lengths


def test_every_cell_has_a_recorded_figure():
    assert set(RECORDED) == {(model, name) for model in MEASURED for name in WORKLOADS}


@pytest.mark.parametrize(("model", "name"), RECORDED)
def test_the_limits_are_those_of_the_recorded_table(model, name):
    assert round(limit(SHAPES[model], lengths(name))) == RECORDED[model, name].limit


@pytest.mark.parametrize("cell", RECORDED)
def test_what_is_recorded_stands_in_the_only_order_that_makes_sense(cell):
    known = RECORDED[cell]
    assert (known.transformers or 0) < known.vllm < known.goal < known.limit


def test_the_weights_are_as_many_as_the_models_are_named_for():
    parameters = {model: Work.of(SHAPES[model]).body + Work.of(SHAPES[model]).head for model in MEASURED}
    assert parameters["qwen3-0.6b"] == pytest.approx(0.6e9, rel=0.02)
    assert parameters["qwen2.5-1.5b"] == pytest.approx(1.54e9, rel=0.02)
    assert parameters["llama-3.1-8b"] == pytest.approx(7.5e9, rel=0.01)  # its embedding is not read as a whole


def test_one_token_after_another_takes_as_long_as_reading_the_weights_and_the_cache():
    config = SHAPES["llama-3.1-8b"]
    work = Work.of(config)
    card = Card(1e12, 1e30)  # products cost nothing
    seconds = sum(work.weight_bytes + work.token_bytes * (100 + step) for step in range(10)) / card.bandwidth
    assert limit(config, [(100, 10)], card) == pytest.approx(10 / seconds)


def test_a_card_twice_as_fast_doubles_the_limit():
    config, sizes = SHAPES["qwen3-0.6b"], lengths("nano", 20)
    assert limit(config, sizes, Card(2 * H200.bandwidth, 2 * H200.rate)) == pytest.approx(2 * limit(config, sizes))


def test_the_limit_is_for_the_model_that_is_measured():
    sizes = lengths("fifty")
    assert limit({**SHAPES["qwen3-0.6b"], "num_hidden_layers": 56}, sizes) < limit(SHAPES["qwen3-0.6b"], sizes)
