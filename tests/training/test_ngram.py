from collections import Counter

import numpy as np
import pytest

from training.ngram import Ngram, discounts_of

VOCAB, ORDER = 6, 3


def walk(seed, length):
    """Draw a sequence in which each symbol leans on the one before."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.integers(0, VOCAB, length), rng.integers(1, 3, length)).astype(np.int64)


def slow_bits(train, test):
    """Score a sequence by the formula, with dictionaries."""
    raw = {n: Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in range(1, ORDER + 1)}
    counts = {ORDER: raw[ORDER]}
    for n in range(1, ORDER):
        before = Counter(gram[1:] for gram in raw[n + 1])
        counts[n] = {gram: before[gram] for gram in raw[n]}
    discounts = {n: discounts_of(np.array(list(counts[n].values()))) for n in counts}

    def probability(context, symbol):
        if context is None:
            return 1 / VOCAB
        n = len(context) + 1
        lower = probability(context[1:] if context else None, symbol)
        siblings = [gram for gram in counts[n] if gram[:-1] == context]
        total = sum(counts[n][gram] for gram in siblings)
        if not total:
            return lower
        taken = {gram: discounts[n][min(counts[n][gram], 3)] for gram in siblings}
        gram = (*context, symbol)
        return (counts[n].get(gram, 0) - taken.get(gram, 0) + sum(taken.values()) * lower) / total

    return sum(-np.log2(probability(tuple(test[max(0, i - ORDER + 1) : i]), test[i])) for i in range(1, len(test)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_counts_agree_with_the_formula(seed):
    train, test = walk(seed, 300), walk(seed + 100, 40)
    assert Ngram(train, VOCAB, ORDER).bits(test) == pytest.approx(slow_bits(train.tolist(), test.tolist()))


def test_probabilities_add_up_to_one():
    model = Ngram(walk(0, 300), VOCAB, ORDER)
    for context in ([1, 2], [3, 3], [5, 0]):
        alone = model.bits(np.array(context))
        assert sum(2 ** (alone - model.bits(np.array([*context, symbol]))) for symbol in range(VOCAB)) == pytest.approx(1)


def test_a_familiar_order_is_cheaper_than_a_shuffled_one():
    train = walk(0, 2000)
    model = Ngram(train, VOCAB, ORDER)
    test = walk(7, 200)
    assert model.bits(test) < 0.95 * model.bits(np.random.default_rng(0).permutation(test))
