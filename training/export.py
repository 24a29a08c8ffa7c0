"""The checkpoint as it ships: bf16 safetensors, config, generation defaults and tokenizer files."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from training.corpus import END
from training.tokenizer import PAD, SPECIAL, TURN_END

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
GENERATION = {
    "do_sample": True,
    "temperature": 0.9,
    "top_p": 0.9,
    "top_k": 50,
    "repetition_penalty": 1.1,
    "eos_token_id": [SPECIAL.index(END), SPECIAL.index(TURN_END)],
    "pad_token_id": SPECIAL.index(PAD),
}


def export(model: PreTrainedModel, tokenizer_folder: Path, out: Path) -> None:
    """Write everything that `AutoModelForCausalLM.from_pretrained(out)` needs."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embeddings
    }
    _save(weights, out)
    config = model.config.to_diff_dict()
    config |= {"architectures": [type(model).__name__], "dtype": "bfloat16", "use_cache": True}
    config.pop("transformers_version", None)
    _write(out / "config.json", config)
    _write(out / "generation_config.json", GENERATION)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_folder / name, out / name)


def average(folders: list[Path], out: Path) -> None:
    """Write the checkpoint whose weights are the mean of others of the same shape; the rest is as in the first."""
    shutil.copytree(folders[0], out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("training.json", "work"))
    every = [load_file(folder / "model.safetensors") for folder in folders]
    mean = {name: torch.stack([weights[name].float() for weights in every]).mean(0).bfloat16() for name in every[0]}
    _save(mean, out)


def _save(weights: dict[str, torch.Tensor], out: Path) -> None:
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)


def _write(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
