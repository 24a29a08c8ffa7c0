"""Names of models: whatever kernels serve, every name that is shown means one engine, and the one that it is shown for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nbengine.server_extension.engines import Engine, Engines

MODELS = ["tales", "qwen", "org/model", "org/model@main"]
SERVERS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 12), st.lists(st.sampled_from(MODELS), min_size=1, max_size=3, unique=True)),
    max_size=8,
    unique_by=lambda server: server[:2],
)


class Known(Engines):
    """Engines that are given, instead of found."""

    def __init__(self, servers: list[tuple[int, int, list[str]]]) -> None:
        super().__init__(list)
        self.engines = [
            Engine(f"{kernel}a2b3c4d-0000-4000-8000-000000000000", number, 100 + kernel, tuple(models), "ready", secret="s")
            for kernel, number, models in sorted(servers)
        ]

    def live(self) -> list[Engine]:
        return self.engines


@given(SERVERS)
def test_every_name_that_is_shown_means_the_engine_that_it_is_shown_for(servers):
    engines = Known(servers)
    names = engines.names(engines.live())
    assert len(names) == sum(len(engine.models) for engine in engines.live())  # none hides another
    for name, (engine, model) in names.items():
        assert engines.find(name) == (engine, model)
        assert engines.find(f"{model}@{engine.label}") == (engine, model)
        assert engines.find(f"{model}@{engine.kernel_id}.{engine.number}") == (engine, model)
        assert engines.called(engine.label) == engine


@given(SERVERS)
def test_a_name_is_plain_where_one_kernel_serves_the_model(servers):
    engines = Known(servers)
    names = engines.names(engines.live())
    for model in MODELS:
        kernels = {engine.kernel_id for engine in engines.live() if model in engine.models}
        assert (model in names) == (len(kernels) == 1)


def test_an_engine_does_not_show_its_secret():
    [engine] = Known([(1, 0, ["tales"])]).engines
    assert "secret=" not in repr(engine)
