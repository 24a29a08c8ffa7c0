"""The corpus: a folder with `tales-train.txt` and `tales-valid.txt`, one `<|endoftext|>` line after each story.

python -m training.corpus --corpus FOLDER            # what is dropped, and why
python -m training.corpus --corpus FOLDER --out DIR  # the cleaned training file as well
"""

import argparse
import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

from training.suitability import judge

END = "<|endoftext|>"

_STRAIGHT = str.maketrans({
    "\u2018": "'", "\u2019": "'", "\u201a": "'", "\u201c": '"', "\u201d": '"', "\u201e": '"',
    "\u2013": "-", "\u2014": "--", "\u2026": "...", "\u00a0": " ", "\ufeff": None, "\r": None,
})  # fmt: skip
_MARKERS = re.compile(r"\[(?:Illustration|Footnote|Transcriber|Pg|\d)[^\]]*\]", re.IGNORECASE)
_HEADING = re.compile(r"^(?:chapter\b.*|[ivxlc]+\.?|the end\.?|contents|\*[\s*]*)$", re.IGNORECASE | re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """Cleaned training stories, and the held-out stories exactly as they are in the file."""

    train: list[str]
    valid: list[str]
    dropped: dict[str, list[str]]  # reason -> stories
    cuts: int  # paragraphs cut out of stories that were kept

    @property
    def valid_bytes(self) -> int:
        """Bytes of the held-out stories, without the lines between them."""
        return sum(len(story.encode()) for story in self.valid)


def split_stories(text: str) -> list[str]:
    """Split a corpus file at its `<|endoftext|>` lines."""
    return [story for part in text.split(END) if (story := part.strip())]


def normalise(story: str) -> str:
    """Straighten quotes and spaces; remove chapter heads, footnote and illustration markers."""
    story = _MARKERS.sub("", story.translate(_STRAIGHT)).replace("_", "")
    story = _HEADING.sub("", story)
    story = re.sub(r"[ \t]+", " ", story)
    story = re.sub(r" ?\n ?", "\n", story)
    return re.sub(r"\n{3,}", "\n\n", story).strip()


def load_corpus(folder: Path) -> Corpus:
    """Read a corpus folder: normalise the training stories and drop the unsuitable ones."""
    kept: list[str] = []
    dropped: dict[str, list[str]] = {}
    cuts = 0
    for story in map(normalise, split_stories((folder / "tales-train.txt").read_text(encoding="utf-8"))):
        verdict = judge(story)
        cuts += verdict.cuts
        if verdict.text is None:
            dropped.setdefault(verdict.reason, []).append(story)
        else:
            kept.append(verdict.text)
    valid = split_stories((folder / "tales-valid.txt").read_text(encoding="utf-8"))
    return Corpus(kept, valid, dropped, cuts)


def join_stories(stories: list[str]) -> str:
    """Join stories the way the corpus files do."""
    return "".join(f"{story}\n{END}\n" for story in stories)


def _report(corpus: Corpus) -> None:
    log = logging.getLogger("training.corpus")
    text = join_stories(corpus.train).encode()
    log.info("kept %d stories, %d bytes, %d paragraphs cut out", len(corpus.train), len(text), corpus.cuts)
    for reason, stories in sorted(corpus.dropped.items()):
        log.info("dropped for %-8s %4d stories %8d bytes", reason, len(stories), sum(map(len, stories)))
    log.info("sha256 of the cleaned file: %s", hashlib.sha256(text).hexdigest())


def main() -> None:
    """Show what is dropped, and write the cleaned file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the two corpus files")
    parser.add_argument("--out", type=Path, help="folder for the cleaned training file")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    corpus = load_corpus(args.corpus)
    _report(corpus)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "tales-clean.txt").write_text(join_stories(corpus.train), encoding="utf-8")


if __name__ == "__main__":
    main()
