"""Tokens ready for training, made once and kept in a work folder."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training.chat import Conversations
from training.corpus import load_corpus
from training.tokenizer import render, save_tokenizer, train_tokenizer

END_ID = 0  # `<|endoftext|>`, the first special token
IGNORED = -100


@dataclass(frozen=True)
class Stream:
    """Documents laid end to end, with the labels to learn and the places where documents start."""

    tokens: torch.Tensor  # [tokens] int64
    labels: torch.Tensor  # [tokens] int64, `IGNORED` where nothing is to be learnt
    starts: torch.Tensor  # [documents]

    def windows(self, count: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """Draw places `[count, length + 1]` of windows, a quarter of them where a document starts."""
        last = len(self.tokens) - length - 1
        at = torch.randint(last, (count,), generator=generator)
        start = self.starts[torch.randint(len(self.starts), (count,), generator=generator)].clamp(max=last)
        at = torch.where(torch.rand(count, generator=generator) < 0.25, start, at)
        return at[:, None] + torch.arange(length + 1)

    def documents(self) -> list[tuple[int, int]]:
        """Return where each document starts and stops."""
        stops = [*self.starts.tolist()[1:], len(self.tokens)]
        return list(zip(self.starts.tolist(), stops, strict=True))

    def without(self, fold: int, folds: int) -> "Stream":
        """Leave out every document whose number is `fold` modulo `folds`."""
        kept = [torch.arange(*place) for number, place in enumerate(self.documents()) if number % folds != fold]
        lengths = torch.tensor([0, *map(len, kept)])
        where = torch.cat(kept)
        return Stream(self.tokens[where], self.labels[where], lengths.cumsum(0)[:-1])


@dataclass(frozen=True)
class Prepared:
    """All that training reads."""

    stories: Stream
    chat: Stream
    valid: list[torch.Tensor]  # held-out stories, each with `END_ID` on both sides
    valid_bytes: int
    tokenizer: Tokenizer


def prepare(corpus_folder: Path, work: Path, vocab_size: int, context: int, chats_per_story: int = 6) -> None:
    """Clean the corpus, train the tokenizer and write both streams to `work`, unless they are there."""
    if (work / "prepared.json").exists():
        return
    corpus = load_corpus(corpus_folder)
    tokenizer = train_tokenizer(corpus.train, vocab_size)
    save_tokenizer(tokenizer, work, context)
    stories = [[(story, True)] for story in corpus.train]
    chats = [render(messages) for messages in Conversations(corpus.train).draw(chats_per_story)]
    np.savez_compressed(work / "stories.npz", **_encode(tokenizer, stories))
    np.savez_compressed(work / "chat.npz", **_encode(tokenizer, chats))
    np.savez_compressed(work / "valid.npz", *[np.array([END_ID, *tokenizer.encode(s).ids, END_ID], "u2") for s in corpus.valid])
    (work / "prepared.json").write_text(json.dumps({"valid_bytes": corpus.valid_bytes}), encoding="utf-8")
    logging.getLogger(__name__).info("prepared %d stories and %d conversations", len(stories), len(chats))


def _encode(tokenizer: Tokenizer, documents: list[list[tuple[str, bool]]]) -> dict[str, np.ndarray]:
    tokens: list[int] = []
    learn: list[bool] = []
    starts: list[int] = []
    for document in documents:
        starts.append(len(tokens))
        for text, learnt in [*document, (None, document[0][1])]:  # then the end-of-text token
            ids = [END_ID] if text is None else tokenizer.encode(text).ids
            tokens += ids
            learn += [learnt] * len(ids)
    return {"tokens": np.array(tokens, "u2"), "learn": np.array(learn), "starts": np.array(starts)}


def load_prepared(work: Path) -> Prepared:
    """Read what `prepare` wrote."""
    with np.load(work / "valid.npz") as file:
        valid = [torch.from_numpy(file[name].astype(np.int64)) for name in file.files]
    return Prepared(
        stories=_load_stream(work / "stories.npz"),
        chat=_load_stream(work / "chat.npz"),
        valid=valid,
        valid_bytes=json.loads((work / "prepared.json").read_text(encoding="utf-8"))["valid_bytes"],
        tokenizer=Tokenizer.from_file(str(work / "tokenizer.json")),
    )


def _load_stream(path: Path) -> Stream:
    with np.load(path) as file:
        tokens = torch.from_numpy(file["tokens"].astype(np.int64))
        labels = torch.where(torch.from_numpy(file["learn"]), tokens, IGNORED)
        return Stream(tokens, labels, torch.from_numpy(file["starts"]))
