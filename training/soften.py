"""Soft targets: what teachers expect at each token of stories that they did not see.

Each teacher was trained without one fold of the stories (`--fold`), and speaks for that fold alone. What it says there
is a prediction, not a memory, so the student learns how sure a well-read model would be.

python -m training.soften --work WORK --out SOFT --fold 0 --folds 3 --teacher TEACHER
"""

import argparse
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from training.data import END_ID, load_prepared
from training.evaluate import STRIDE
from training.model import CONTEXT

log = logging.getLogger("training.soften")

TOP = 128
"""Tokens kept for each place; together they have nearly all of the probability."""


@dataclass(frozen=True)
class SoftTargets:
    """For each place of the stream: its likeliest tokens and their probabilities, both `[tokens, TOP]`."""

    tokens: torch.Tensor  # int16
    probabilities: torch.Tensor  # float16

    @classmethod
    def load(cls, folder: Path, device: torch.device) -> "SoftTargets":
        """Put the folds' files together."""
        tokens = probabilities = None
        for path in sorted(folder.glob("*.npz")):
            with np.load(path) as file:
                if tokens is None:
                    tokens = torch.zeros(int(file["size"]), TOP, dtype=torch.int16, device=device)
                    probabilities = torch.zeros(int(file["size"]), TOP, dtype=torch.float16, device=device)
                where = torch.from_numpy(file["where"]).to(device)
                tokens[where] = torch.from_numpy(file["tokens"]).to(device)
                probabilities[where] = torch.from_numpy(file["probabilities"]).to(device)
        if tokens is None or probabilities is None:
            raise FileNotFoundError(f"no soft targets in {folder}; make them with `python -m training.soften`")
        return cls(tokens, probabilities)

    def at(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return tokens and probabilities, both `[..., TOP]`, that add up to one."""
        probabilities = self.probabilities[places].float()
        return self.tokens[places].long(), probabilities / probabilities.sum(-1, keepdim=True).clamp(min=1e-6)


@torch.no_grad()
def predict(teacher: PreTrainedModel, story: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the likeliest tokens and their probabilities at each place of a story `[tokens]`."""
    inputs = torch.cat([story.new_tensor([END_ID]), story[:-1]]).to(teacher.device)
    tokens, probabilities, done = [], [], 0
    for begin in range(0, len(inputs), STRIDE):
        logits = teacher(input_ids=inputs[None, begin : begin + CONTEXT]).logits[0, done - begin :]
        top = logits.float().softmax(-1).topk(TOP)
        tokens.append(top.indices.short().cpu())
        probabilities.append(top.values.half().cpu())
        done += len(logits)
        if done >= len(inputs):
            break
    return torch.cat(tokens), torch.cat(probabilities)


def soften(work: Path, teacher_folder: Path, fold: int, folds: int, out: Path) -> None:
    """Write the soft targets of one fold."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream = load_prepared(work).stories
    teacher = AutoModelForCausalLM.from_pretrained(teacher_folder, dtype=torch.bfloat16).to(device).eval()
    places = stream.documents()[fold::folds]
    tokens, probabilities = zip(*(predict(teacher, stream.tokens[slice(*place)]) for place in places), strict=True)
    out.mkdir(parents=True, exist_ok=True)
    np.savez(
        out / f"fold{fold}.npz",
        where=np.concatenate([np.arange(*place) for place in places]),
        tokens=torch.cat(tokens).numpy(),
        probabilities=torch.cat(probabilities).numpy(),
        size=len(stream.tokens),
    )
    mass = torch.cat(probabilities).float().sum(-1).mean()
    log.info("fold %d: %d stories, mean mass kept %.3f", fold, len(places), mass)


def main() -> None:
    """Read the command line and soften one fold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the tokens that `train` prepared")
    parser.add_argument("--out", type=Path, required=True, help="folder for the soft targets of all folds")
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint trained without this fold")
    parser.add_argument("--fold", type=int, required=True)
    parser.add_argument("--folds", type=int, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    soften(args.work, args.teacher, args.fold, args.folds, args.out)


if __name__ == "__main__":
    main()
