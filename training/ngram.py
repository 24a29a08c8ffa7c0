"""The baseline: an interpolated 5-gram with modified Kneser-Ney smoothing (Chen and Goodman, 1998).

python -m training.ngram --corpus FOLDER --tokenizer nbengine/tales   # over the model's own tokens
python -m training.ngram --corpus FOLDER                              # over bytes
"""

import argparse
import logging
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from training.corpus import load_corpus
from training.data import END_ID

log = logging.getLogger("training.ngram")
Array = np.ndarray


def find(sorted_keys: Array, keys: Array) -> Array:
    """Return where each key is, or -1."""
    at = np.searchsorted(sorted_keys, keys).clip(max=len(sorted_keys) - 1)
    return np.where(sorted_keys[at] == keys, at, -1)


class Ngram:
    """Counts of n-grams, each known by a number; an n-gram's key is its prefix's number and its last symbol."""

    def __init__(self, symbols: Array, vocab: int, order: int = 5) -> None:
        """Count the n-grams of a sequence."""
        self.vocab, self.order = vocab, order
        self.keys: list[Array] = []  # by order: the sorted keys of all n-grams
        numbers = [np.zeros(len(symbols) + 1, np.int64)]  # of the n-gram that ends at each place, by n
        for n in range(1, order + 1):
            unique, number = np.unique(numbers[-1][:-1] * vocab + symbols[n - 1 :], return_inverse=True)
            self.keys.append(unique)
            numbers.append(number)
        self.tables = [self._table(n, numbers) for n in range(1, order + 1)]

    def _table(self, n: int, numbers: list[Array]) -> tuple[Array, Array, Array]:
        """Return for order `n`: discounted counts, and by prefix the total and the discounted mass.

        Below the highest order a count is of the different symbols seen before the n-gram.
        """
        keys = self.keys[n - 1]
        if n == self.order:
            counts = np.bincount(numbers[n], minlength=len(keys))
        else:
            suffix = np.zeros(len(self.keys[n]), np.int64)
            suffix[numbers[n + 1]] = numbers[n][1:]
            counts = np.bincount(suffix, minlength=len(keys))
        discounts = discounts_of(counts)[counts.clip(max=3)]
        prefix = keys // self.vocab if n > 1 else np.zeros(len(keys), np.int64)
        total = np.bincount(prefix, counts)
        return counts - discounts, total, np.bincount(prefix, discounts)

    def bits(self, symbols: Array) -> float:
        """Return the bits of a sequence after its first symbol, which is only read."""
        probability = np.full(len(symbols), 1 / self.vocab)
        prefix = np.zeros(len(symbols), np.int64)  # number of the (n-1)-gram before each place, -1 if never seen
        for n in range(1, self.order + 1):
            counts, total, mass = self.tables[n - 1]
            known = (prefix >= 0) & (prefix < len(total))
            known[known] = total[prefix[known]] > 0
            number = np.where(prefix >= 0, find(self.keys[n - 1], prefix * self.vocab + symbols), -1)
            seen = np.where(number >= 0, counts[number], 0.0)[known]
            at = prefix[known]
            probability[known] = (seen + mass[at] * probability[known]) / total[at]
            prefix = np.concatenate([[-1], number[:-1]])
        return float(-np.log2(probability[1:]).sum())


def discounts_of(counts: Array) -> Array:
    """Return what to take off a count of 0, 1, 2, and 3 or more, from how many n-grams have 1 to 4."""
    n1, n2, n3, n4 = np.bincount(counts, minlength=5)[1:5].clip(min=1)
    y = n1 / (n1 + 2 * n2)
    raw = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return raw.clip(0.0, [0.0, 1.0, 2.0, 3.0])


def main() -> None:
    """Count the cleaned training stories, score the held-out ones."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the two corpus files")
    parser.add_argument("--tokenizer", type=Path, help="folder with tokenizer.json; bytes without it")
    parser.add_argument("--order", type=int, default=5)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    corpus = load_corpus(args.corpus)
    if args.tokenizer:
        tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
        vocab = tokenizer.get_vocab_size()
        encoded = [[[*tokenizer.encode(s).ids, END_ID] for s in part] for part in (corpus.train, corpus.valid)]
    else:
        vocab = 257  # a byte's symbol is one more than the byte; 0 ends a story
        encoded = [[[*(b + 1 for b in s.encode()), END_ID] for s in part] for part in (corpus.train, corpus.valid)]
    train, valid = (np.concatenate([[END_ID], *map(np.array, part)]).astype(np.int64) for part in encoded)
    bits = Ngram(train, vocab, args.order).bits(valid)
    unit = "tokens" if args.tokenizer else "bytes"
    log.info("%d-gram over %s, held-out bits per byte: %.4f", args.order, unit, bits / corpus.valid_bytes)


if __name__ == "__main__":
    main()
