"""The draw: its distribution, its independence of the batch, its cuts against transformers' warpers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nbengine.kernels import sample as kernel
from nbengine.kernels.sample import gumbel_noise, sample_reference


def draw(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seeds=None, positions=None):
    """sample_reference with one value for all rows where a number is given."""
    rows = logits.shape[0]

    def column(value, dtype):
        return value if isinstance(value, torch.Tensor) else torch.full((rows,), value, dtype=dtype)

    seeds = torch.arange(rows) if seeds is None else seeds
    positions = torch.arange(rows) * 7 if positions is None else positions
    cuts = (column(temperature, torch.float32), column(top_k, torch.int64), column(top_p, torch.float64), column(min_p, torch.float64))
    return sample_reference(logits, *cuts, column(seeds, torch.int64), column(positions, torch.int64))


def warped(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The same cuts by transformers: -inf where a token is out."""
    scores = TemperatureLogitsWarper(float(temperature))(None, logits)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores


def chi_square_is_plausible(counts, probabilities):
    """Whether counts could come from these probabilities: Wilson and Hilferty's normal score of the statistic under 4.5."""
    expected = probabilities * counts.sum()
    assert not counts[expected == 0].any()
    rare = expected < 8
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    if expected[-1] < 8:  # too little even together
        counts, expected = counts[:-1], expected[:-1]
    free = len(counts) - 1
    statistic = ((counts - expected) ** 2 / expected).sum()
    score = ((statistic / free) ** (1 / 3) - (1 - 2 / (9 * free))) / math.sqrt(2 / (9 * free))
    return score < 4.5


# ---------------------------------------------------------------------------------------------------------------- the noise


def written_out(seed, position, token):
    """The noise from its docstring, in Python's own integers and double precision."""

    def mix64(z):
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    def mix32(h):
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % 2**32
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % 2**32
        return h ^ (h >> 16)

    key = mix64((mix64(seed % 2**64) + 0x9E3779B97F4A7C15 * (position + 1)) % 2**64)
    h = mix32((mix32(token ^ (key % 2**32)) + (key >> 32)) % 2**32)
    v = min((h >> 1) * 2.0**-31 + 2.0**-32, 1 - 2.0**-24)
    return -math.log(-math.log1p(-v))


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**20), st.lists(st.integers(0, 2**20), min_size=1, max_size=70))
@settings(max_examples=100, deadline=None)
def test_noise_is_the_hash_that_its_docstring_writes_out(seed, position, tokens):
    noise = gumbel_noise(torch.tensor([seed]), torch.tensor([position]), torch.tensor(tokens, dtype=torch.int32))[0].double()
    expected = torch.tensor([written_out(seed, position, t) for t in tokens], dtype=torch.float64)
    torch.testing.assert_close(torch.exp(-torch.exp(-noise)), torch.exp(-torch.exp(-expected)), rtol=0, atol=3e-7)
    torch.testing.assert_close(noise.clamp(min=0), expected.clamp(min=0), rtol=2e-6, atol=2e-6)  # where float32 makes v exact enough


def test_noise_is_gumbel_distributed_down_to_its_rare_large_values():
    noise = gumbel_noise(torch.arange(200), torch.arange(200), torch.arange(20_000, dtype=torch.int32)).flatten().double()
    assert noise.isfinite().all()
    uniform = torch.exp(-torch.exp(-noise)).sort().values
    steps = torch.arange(1, len(uniform) + 1, dtype=torch.float64) / len(uniform)
    assert (uniform - steps).abs().max() < 2 / math.sqrt(len(noise))  # Kolmogorov and Smirnov, p about 1e-3 two-sided
    large = int((noise > -math.log(1e-5)).sum())  # expected 40
    assert 15 < large < 75
    assert len(noise[noise > 9].unique()) > 0.98 * (noise > 9).sum()  # no coarse steps where the winners are


@pytest.mark.parametrize("apart", ["token", "position", "seed", "seed bit", "seed against position", "high seed bit"])
def test_noise_is_independent_of_its_neighbours(apart):
    rows, tokens = 300, 2000
    seeds, positions, ids = torch.arange(rows), torch.full((rows,), 5), torch.arange(tokens, dtype=torch.int32)
    other = {
        "token": (seeds, positions, ids + 1),
        "position": (seeds, positions + 1, ids),
        "seed": (seeds + 1, positions, ids),
        "seed bit": (seeds ^ 1024, positions, ids),
        "seed against position": (seeds + 1, positions - 1, ids),
        "high seed bit": (seeds ^ -(2**63), positions, ids),
    }[apart]
    a, b = (torch.exp(-torch.exp(-gumbel_noise(*arguments).double())).flatten() for arguments in ((seeds, positions, ids), other))
    assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 4.5 / math.sqrt(len(a))
    joint = torch.bincount((a * 8).long() * 8 + (b * 8).long(), minlength=64)
    assert chi_square_is_plausible(joint.numpy(), np.full(64, 1 / 64))


def test_one_rows_noise_never_repeats_a_token_and_two_rows_share_none():
    noise = gumbel_noise(torch.tensor([3, 3, 4]), torch.tensor([0, 1, 0]), torch.arange(5000, dtype=torch.int32))
    assert len(noise.unique()) > 0.998 * noise.numel()


# ---------------------------------------------------------------------------------------------------------- the distribution


@pytest.mark.parametrize(
    "cuts",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"min_p": 0.02, "top_k": 12, "top_p": 0.8, "temperature": 1.5},
    ],
)
@pytest.mark.parametrize("by", ["seed", "position"])
def test_frequencies_follow_transformers_probabilities(cuts, by):
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 2
    many = torch.arange(20_000)
    ids = draw(
        logits.expand(len(many), -1), **cuts, **({"seeds": many, "positions": 3} if by == "seed" else {"seeds": 11, "positions": many})
    )
    probabilities = torch.softmax(warped(logits, **cuts).double(), -1)[0].numpy()
    assert chi_square_is_plausible(np.bincount(ids.numpy(), minlength=50), probabilities)


def test_frequencies_are_right_where_the_nucleus_is_wider_than_the_candidates():
    logits = torch.randn(1, 600, generator=torch.Generator().manual_seed(2)) * 0.5
    for cuts in ({"top_p": 0.8}, {"top_p": 0.4}, {"top_k": 300}, {"top_k": 400, "min_p": 0.2, "top_p": 0.9}):
        allowed = warped(logits, **cuts)
        assert allowed.isfinite().sum() > kernel._CANDIDATES
        ids = draw(logits.expand(10_000, -1), **cuts)
        assert chi_square_is_plausible(np.bincount(ids.numpy(), minlength=600), torch.softmax(allowed.double(), -1)[0].numpy())


def test_successive_draws_of_one_seed_are_independent():
    ids = draw(torch.zeros(40_000, 8), seeds=5, positions=torch.arange(40_000))
    pairs = np.bincount((ids[:-1] * 8 + ids[1:]).numpy(), minlength=64)
    assert chi_square_is_plausible(pairs, np.full(64, 1 / 64))


# ------------------------------------------------------------------------------------------------- the cuts, draw for draw


@pytest.mark.parametrize("vocab", [1, 63, 128, 129, 1000, 5003])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize(
    "cuts",
    [
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 300},
        {"top_p": 0.03},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8, "temperature": 0.6},
        {"top_k": 500, "top_p": 0.9, "min_p": 0.02, "temperature": 1.3},
    ],
)
def test_each_draw_is_the_best_of_transformers_scores_with_the_noise_added(vocab, spread, cuts):
    rows = 40
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * spread
    seeds, positions = torch.arange(rows), torch.arange(rows) + 100
    scores = warped(logits, **{k: min(v, vocab) if k == "top_k" else v for k, v in cuts.items()})
    expected = (scores + gumbel_noise(seeds, positions, torch.arange(vocab, dtype=torch.int32))).argmax(-1)
    before = logits.clone()
    assert draw(logits, **cuts, seeds=seeds, positions=positions).tolist() == expected.tolist()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("vocab", [40, 700])
@pytest.mark.parametrize("top_p", [0.1, 0.3, 0.57, 0.8])
def test_top_p_splits_equal_logits_at_its_edge_and_keeps_the_higher_ids(vocab, top_p):
    logits = (torch.arange(vocab) * 7 % 3)[None].float()  # three levels of exact ties
    order = sorted(range(vocab), key=lambda i: (-float(logits[0, i]), -i))
    weights = torch.softmax(logits.double(), -1)[0]
    kept, mass = [], 0.0
    while mass < top_p:
        kept.append(order[len(kept)])
        mass += float(weights[kept[-1]])
    assert float(logits[0, order[len(kept)]]) == float(logits[0, kept[-1]])  # or this would test nothing
    ids = draw(logits.expand(6000, -1), top_p=top_p)
    assert set(ids.tolist()) <= set(kept)
    probabilities = torch.zeros(vocab, dtype=torch.float64)
    probabilities[kept] = weights[kept] / weights[kept].sum()
    assert chi_square_is_plausible(np.bincount(ids.numpy(), minlength=vocab), probabilities.numpy())
    by_transformers = warped(logits, top_p=top_p)[0].isfinite()
    assert sorted(logits[0, kept].tolist()) == sorted(logits[0, by_transformers].tolist())


def test_top_p_keeps_the_smallest_set_that_reaches_it_exactly():
    for p in (0.1, 0.3, 0.5, 0.7, 0.9):
        assert len(set(draw(torch.zeros(3000, 10), top_p=p).tolist())) == round(p * 10)
    for p in (0.25, 0.5, 0.75):
        assert len(set(draw(torch.zeros(15_000, 1024), top_p=p).tolist())) == 1024 * p


def test_top_k_keeps_all_that_tie_with_its_last_as_transformers_does():
    logits = torch.tensor([[3.0, 2.0, 1.0, 2.0, 2.0, 0.0]])
    ids = draw(logits.expand(2000, -1), top_k=2)
    assert set(ids.tolist()) == set(warped(logits, top_k=2)[0].isfinite().nonzero()[:, 0].tolist()) == {0, 1, 3, 4}


# --------------------------------------------------------------------------------------------------------- batches and ends

some_rows = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        st.sampled_from([0, 1, 5, 200]),
        st.sampled_from([1.0, 0.2, 0.9]),
        st.sampled_from([0.0, 0.05]),
    ),
    min_size=2,
    max_size=41,
)


@given(some_rows, st.randoms(use_true_random=False), st.sampled_from([17, 300, 2000]))
@settings(max_examples=60, deadline=None)
def test_a_rows_token_is_the_same_alone_and_among_others_in_any_order(rows, random, vocab):
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(len(rows))) * 1.5
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*rows, strict=True))
    arguments = (logits, temperature, top_k, top_p, min_p, torch.arange(len(rows)) * 3, torch.arange(len(rows)) + 9)
    together = sample_reference(*arguments)
    order = random.sample(range(len(rows)), len(rows))
    assert sample_reference(*(t[order] for t in arguments)).tolist() == together[order].tolist()
    for i in range(len(rows)):
        assert sample_reference(*(t[i : i + 1] for t in arguments)).tolist() == [together[i]]


def test_blocks_of_rows_change_nothing(monkeypatch):
    logits = torch.randn(37, 900)
    whole = [draw(logits, **cuts).tolist() for cuts in ({}, {"top_p": 0.9}, {"top_k": 5})]
    monkeypatch.setattr(kernel, "_BLOCK", 2000)
    assert [draw(logits, **cuts).tolist() for cuts in ({}, {"top_p": 0.9}, {"top_k": 5})] == whole


def test_greedy_is_the_argmax_whatever_the_cuts():
    logits = torch.randn(30, 500)
    assert draw(logits, temperature=0.0, top_k=3, top_p=0.1, min_p=0.5).tolist() == logits.argmax(-1).tolist()
    assert draw(logits, temperature=9e-6).tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("cuts", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 200, "top_p": 0.9}])
@pytest.mark.parametrize("vocab", [20, 700])
def test_a_broken_row_gives_minus_one_and_leaves_the_others_alone(cuts, vocab):
    logits = torch.randn(6, vocab)
    healthy = draw(logits, **cuts)
    broken = logits.clone()
    broken[0] = torch.nan
    broken[1] = -torch.inf
    broken[2, vocab // 2] = torch.nan
    broken[3, 4] = torch.inf
    assert draw(broken, **cuts).tolist() == [-1, -1, -1, -1, *healthy[4:].tolist()]


@pytest.mark.parametrize("cuts", [{}, {"top_k": 3}, {"top_k": 300}, {"top_p": 0.99}, {"min_p": 0.001}])
def test_a_forbidden_token_is_never_drawn(cuts):
    logits = torch.full((3000, 400), -torch.inf)
    logits[:, [7, 300]] = 0.0
    assert set(draw(logits, **cuts).tolist()) == {7, 300}


def test_no_rows_give_no_tokens():
    assert draw(torch.empty(0, 50)).shape == (0,)


def test_extreme_temperatures_stay_finite():
    logits = torch.randn(50, 300) * 10
    assert draw(logits, temperature=1e-4, seeds=1).tolist() == logits.argmax(-1).tolist()
    assert len(set(draw(logits[:1].expand(4000, -1), temperature=1e6).tolist())) == 300
