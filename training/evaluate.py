"""Held-out bits per byte of a checkpoint.

python -m training.evaluate --model nbengine/tales --corpus FOLDER
"""

import argparse
import logging
import math
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from training.corpus import split_stories
from training.data import END_ID

log = logging.getLogger("training.evaluate")
STRIDE = 1024


@torch.no_grad()
def story_nats(model: PreTrainedModel, story: torch.Tensor, window: int = 2048, stride: int = STRIDE) -> float:
    """Return the nats of a story `[tokens]` after its first token.

    Windows slide by `stride`: but for the first window, each token is read with `window - stride` or more before it.
    """
    nats, scored = 0.0, 1
    for begin in range(0, max(1, len(story) - 1), stride):
        piece = story[begin : begin + window + 1].to(model.device)
        new = len(piece) - (scored - begin)
        logits = model(input_ids=piece[None, :-1]).logits[0, -new:].float()
        nats += F.cross_entropy(logits, piece[-new:], reduction="sum").item()
        scored += new
        if scored >= len(story):
            break
    return nats


def bits_per_byte(model: PreTrainedModel, stories: list[torch.Tensor], num_bytes: int) -> float:
    """Return the bits to write all stories, their end-of-text tokens included, for each byte of their text."""
    training = model.training
    model.eval()
    nats = sum(story_nats(model, story) for story in stories)
    model.train(training)
    return nats / math.log(2) / num_bytes


def main() -> None:
    """Evaluate a checkpoint in the precision it is stored in, computing in float32 on the CPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--corpus", type=Path, required=True, help="folder with tales-valid.txt")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    stories = split_stories((args.corpus / "tales-valid.txt").read_text(encoding="utf-8"))
    tokens = [torch.tensor([END_ID, *tokenizer.encode(story, add_special_tokens=False), END_ID]) for story in stories]
    size = sum(len(story.encode()) for story in stories)
    total = sum(map(len, tokens))
    log.info("%d stories, %d bytes, %.2f bytes a token", len(stories), size, size / total)
    log.info("held-out bits per byte: %.4f", bits_per_byte(model, tokens, size))


if __name__ == "__main__":
    main()
