"""Ten samples, taken as they come: fixed prompts, seeds 1 to 10, the settings of `generation_config.json`.

python -m training.samples --model nbengine/tales
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

COMPLETIONS = (
    "Once upon a time",
    "There was once a poor miller who had three daughters",
    "The fox looked at the moon and said,",
    "Long, long ago, in a country by the sea,",
    '"Where are you going?" asked the rabbit.',
)
QUESTIONS = (
    "Tell me a story about a fox and a wolf.",
    "Tell me a tale about a princess and a frog.",
    "How does a tale begin?",
    "Continue this story: The old king had lost his golden ring, and nobody in the castle could find it.",
    "Who are you?",
)


def render(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Write a question the way the chat template does."""
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, seed: int, length: int) -> tuple[str, bool]:
    """Return the text after a prompt, and whether the model ended it by itself."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=length)[0, inputs["input_ids"].shape[1] :]
    ended = output[-1].item() in model.generation_config.eos_token_id
    return tokenizer.decode(output, skip_special_tokens=True), ended


def samples(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, length: int, first_seed: int = 1) -> Iterator[str]:
    """Yield the ten samples as Markdown."""
    prompts = [(text, text) for text in COMPLETIONS] + [(text, render(tokenizer, text)) for text in QUESTIONS]
    for seed, (title, prompt) in enumerate(prompts, start=first_seed):
        text, ended = sample(model, tokenizer, prompt, seed, length)
        kind = "completion" if title == prompt else "chat"
        end = "ended by itself" if ended else f"cut at {length} tokens"
        body = (f"**{title}**" if title == prompt else f"**{title}**\n\n") + text.rstrip()
        yield f"### Seed {seed}, {kind}, {end}\n\n" + "\n".join(f"> {line}".rstrip() for line in body.split("\n")) + "\n"


def main() -> None:
    """Print the samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--length", type=int, default=250, help="most new tokens (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--temperature", type=float, help="another one than the checkpoint's")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if args.temperature:
        model.generation_config.temperature = args.temperature
    for text in samples(model, tokenizer, args.length, args.first_seed):
        sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
