"""Train one model. `python -m training.make` runs the whole recipe of `tales`; this trains any other.

python -m training.train --corpus FOLDER --out FOLDER --size deep --epochs 5
"""

import argparse
import json
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from training.data import IGNORED, Prepared, load_prepared, prepare
from training.evaluate import bits_per_byte
from training.export import export
from training.model import CONTEXT, SIZES, add_dropout, build, describe
from training.muon import Muon
from training.soften import SoftTargets

log = logging.getLogger("training.train")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how training goes, besides the data and the size."""

    epochs: float = 14.0
    batch: int = 16  # windows in a step
    length: int = CONTEXT
    lr: float = 0.01
    weight_decay: float = 0.3
    dropout: float = 0.15
    warmup: int = 50
    chat: float = 0.2  # share of conversations in a batch, in the last part of training
    chat_from: float = 0.5
    soft: float = 0.5  # weight of the soft targets in the loss of stories, when there are any
    reports: int = 8  # times that the held-out stories are scored
    seed: int = 0

    def steps(self, tokens: int) -> int:
        """Return the number of optimiser steps."""
        return max(1, round(self.epochs * tokens / (self.batch * self.length)))

    def speed(self, done: float) -> float:
        """Return the learning rate's factor at a share of training: straight down to zero."""
        return 1 - done


@dataclass(frozen=True)
class Batch:
    """What one step reads: stories first, then conversations."""

    inputs: torch.Tensor  # [batch, length]
    labels: torch.Tensor  # [batch, length]
    places: torch.Tensor  # [stories, length]: where in the stream of stories the labels are

    def to(self, device: torch.device) -> "Batch":
        """Move to a device."""
        parts = (part.to(device, non_blocking=True) for part in (self.inputs, self.labels, self.places))
        return Batch(*parts)


def batches(data: Prepared, recipe: Recipe, steps: int) -> Iterator[Batch]:
    """Yield the batches of a run; conversations come in where `chat_from` says."""
    generator = torch.Generator().manual_seed(recipe.seed)
    for step in range(steps):
        chats = round(recipe.batch * recipe.chat) if step >= recipe.chat_from * steps else 0
        stories = data.stories.windows(recipe.batch - chats, recipe.length, generator)
        chat = data.chat.windows(chats, recipe.length, generator)
        yield Batch(
            inputs=torch.cat([data.stories.tokens[stories[:, :-1]], data.chat.tokens[chat[:, :-1]]]),
            labels=torch.cat([data.stories.labels[stories[:, 1:]], data.chat.labels[chat[:, 1:]]]),
            places=stories[:, 1:],
        )


def make_optimizers(model: PreTrainedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embeddings and norms."""
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        Muon(blocks, lr=recipe.lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(rest, lr=recipe.lr / 2, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def loss_of(logits: torch.Tensor, labels: torch.Tensor, target: tuple[torch.Tensor, torch.Tensor] | None, soft: float) -> torch.Tensor:
    """Cross entropy with the labels, mixed on the stories (the first rows) with that to the soft targets."""
    losses = -logits.float().log_softmax(-1)  # [batch, length, vocab]
    known = labels != IGNORED
    each = losses.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * known
    if target is not None:
        tokens, probabilities = target  # [stories, length, top]
        rows = len(tokens)
        softly = (losses[:rows].gather(-1, tokens) * probabilities).sum(-1)
        each = torch.cat([(1 - soft) * each[:rows] + soft * softly, each[rows:]])
    return each.sum() / known.sum()


def train(model: PreTrainedModel, data: Prepared, recipe: Recipe, soft: SoftTargets | None = None) -> list[dict[str, float]]:
    """Train in place; return the history of held-out bits per byte."""
    torch.manual_seed(recipe.seed)
    device = model.device
    steps = recipe.steps(len(data.stories.tokens))
    on_gpu = device.type == "cuda"
    autocast = torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext()
    add_dropout(model, recipe.dropout)
    model.train()
    if on_gpu:
        for layer in model.model.layers:
            layer.compile()
    criterion = torch.compile(loss_of) if on_gpu else loss_of
    optimizers = make_optimizers(model, recipe)
    history, began = [], time.monotonic()
    for step, batch in enumerate(batches(data, recipe, steps)):
        here = batch.to(device)
        factor = min(1.0, (step + 1) / recipe.warmup) * recipe.speed(step / steps)
        with autocast:
            logits = model(input_ids=here.inputs).logits
            target = soft.at(here.places) if soft else None
            loss = criterion(logits, here.labels, target, recipe.soft)
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("first_lr", group["lr"]) * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if (step + 1) % max(1, steps // recipe.reports) == 0 or step + 1 == steps:
            with autocast, torch.compiler.set_stance("force_eager"):
                held_out = bits_per_byte(model, data.valid, data.valid_bytes)
            history.append({"step": step + 1, "loss": loss.item(), "bits_per_byte": held_out})
            seconds = time.monotonic() - began
            log.info("step %d/%d loss %.4f held-out %.4f bits/byte, %.0f s", step + 1, steps, loss.item(), held_out, seconds)
    return history


@dataclass(frozen=True)
class Run:
    """One model: where it comes from, where it goes."""

    corpus: Path
    out: Path
    size: str = "base"
    work: Path | None = None  # keeps the tokens between runs; `out/work` if not given
    start: Path | None = None  # a checkpoint to go on from
    soft_targets: Path | None = None
    fold: int = -1  # the fold of stories to leave out, to make a teacher; -1 for none
    folds: int = 3


def fit(run: Run, recipe: Recipe) -> None:
    """Prepare the corpus, train one model, write its checkpoint."""
    size, work = SIZES[run.size], run.work or run.out / "work"
    prepare(run.corpus, work, size.vocab, CONTEXT)
    data = load_prepared(work)
    if data.tokenizer.get_vocab_size() > size.vocab:
        raise SystemExit(f"{work} holds tokens of another vocabulary; give size {run.size} a work folder of its own")
    if run.fold >= 0:
        data = replace(data, stories=data.stories.without(run.fold, run.folds))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    model = build(size).to(device)
    if run.start:
        model.load_state_dict(load_file(run.start / "model.safetensors"), strict=False)  # all but the tied head
    log.info("%s: %s; %s", run.out.name, describe(size, model), recipe)
    soft = SoftTargets.load(run.soft_targets, device) if run.soft_targets else None
    history = train(model, data, recipe, soft)
    export(model, work, run.out)
    record = {"size": asdict(size), "recipe": asdict(recipe), "soft_targets": soft is not None, "history": history}
    (run.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with the two corpus files")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--work", type=Path, help="folder that keeps the tokens between runs (default: OUT/work)")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--start", type=Path, help="checkpoint of the same size and tokens to go on from")
    parser.add_argument("--soft-targets", type=Path, help="folder that `training.soften` wrote, to learn from as well")
    parser.add_argument("--fold", type=int, default=-1, help="leave this fold of the stories out, to make a teacher")
    parser.add_argument("--folds", type=int, default=3)
    for name, value in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help="(default: %(default)s)")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = vars(parser.parse_args())
    recipe = Recipe(**{name: args.pop(name) for name in asdict(Recipe())})
    fit(Run(**args), recipe)


if __name__ == "__main__":
    main()
