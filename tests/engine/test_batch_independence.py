"""In float32 on the CPU a request's tokens do not depend on what shares its batch."""

import pytest

from nbengine import Engine, SamplingParams


def variety(i):
    return SamplingParams(
        temperature=(0.0, 0.7, 1.3)[i % 3],
        top_p=(1.0, 0.9)[i % 2],
        top_k=(0, 50, 5)[i % 3],
        min_p=(0.0, 0.02)[i % 2],
        repetition_penalty=(1.0, 1.2)[i % 2],
        presence_penalty=(0.0, 0.5, -0.5)[i % 3],
        logit_bias={7: 1.5} if i % 4 == 0 else None,
        min_tokens=3 * (i % 2),
        seed=i,
        max_tokens=10 + i % 30,
        ignore_eos=i % 5 != 0,
        n=1 + (i % 7 == 0),
    )


def tokens_of(output):
    return [one.token_ids for one in output.outputs]


@pytest.fixture(scope="module")
def alone(tiny, prompts):
    """40 different requests, each run by itself in an empty cache."""
    given = prompts(40, seed=3)
    with Engine(tiny.folder, enable_prefix_caching=False, max_model_len=256, num_gpu_blocks_override=64) as engine:
        return given, [tokens_of(engine.generate([p], variety(i))[0]) for i, p in enumerate(given)]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_num_batched_tokens": 20},
        {"num_gpu_blocks_override": 30, "max_model_len": 128},
        {"max_num_seqs": 5, "block_size": 1, "max_model_len": 256},
        {"scheduling_policy": "static", "block_size": 64, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_forty_mixed_requests_equal_each_alone(make_engine, alone, config):
    given, expected = alone
    engine = make_engine(**config)
    params = [variety(i) for i in range(40)]
    assert [tokens_of(o) for o in engine.generate(given, params)] == expected
    order = [(7 * i) % 40 for i in range(40)]  # in another order, with warm prefixes
    again = engine.generate([given[i] for i in order], [params[i] for i in order])
    assert [tokens_of(o) for o in again] == [expected[i] for i in order]


def test_a_sampled_request_is_the_same_whatever_runs_beside_it(make_engine, prompts):
    engine = make_engine()
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=100, ignore_eos=True)
    expected = engine.generate([[9, 8, 7]], params)[0].outputs[0].token_ids
    crowd = SamplingParams(temperature=1.0, max_tokens=60, ignore_eos=True)
    for size in (1, 7, 8, 30):
        around = engine.submit_all(prompts(size, seed=size), crowd)
        assert engine.generate([[9, 8, 7]], params)[0].outputs[0].token_ids == expected
        for request in around:
            request.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_many_mixtures(make_engine, prompts, seed):
    engine = make_engine(num_gpu_blocks_override=80, max_model_len=256, max_num_batched_tokens=16 + 7 * seed)
    given = prompts(40, seed=100 + seed, longest=120)
    params = [variety(i + seed) for i in range(40)]
    expected = [tokens_of(engine.generate([p], q)[0]) for p, q in zip(given, params, strict=True)]
    engine.reset_prefix_cache()
    assert [tokens_of(o) for o in engine.generate(given, params)] == expected
