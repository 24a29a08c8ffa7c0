"""Prompts as text, and a model's folder with a tokenizer: the bundled one, its vocabulary filled up to the model's with made-up words.

So every token that random weights can draw has a text of its own, as with a real model, and takes the same work to turn into text.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from nbengine.bench.shapes import TALES, model_folder, shape
from nbengine.bench.workloads import lengths

TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja")  # and not what a cell would sample by and a script would not
SPACE = "\u0120"  # how a byte-level vocabulary writes the space before a word


def folder_with_tokenizer(name: str, root: Path) -> Path:
    """A folder for `load_format="dummy"` whose tokenizer has as many tokens as the model; a folder that was named is left as it is."""
    folder = model_folder(name, root / "with-tokenizer")
    if root not in folder.parents:
        return folder
    for file in TOKENIZER_FILES:
        shutil.copy(TALES / file, folder)
    tokenizer = _tokenizer(TALES)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary.update({f"{SPACE}word{number}": number for number in range(len(vocabulary), shape(name)["vocab_size"])})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    return folder


def text_prompts(name: str, folder: Path, *, fresh: object, quick: bool = False) -> list[tuple[str, int]]:
    """A workload's prompts as text of whole words, each a token of its own, and how many tokens to generate."""
    rng = random.Random(f"{name}/text/{fresh}")
    known = [token for token in _tokenizer(folder)["model"]["vocab"] if token[:1] == SPACE and token[1:].isascii() and token[1:].isalpha()]
    return [("".join(" " + token[1:] for token in rng.choices(known, k=tokens)), new) for tokens, new in lengths(name, quick=quick)]


def _tokenizer(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    return read
