"""Which safetensors of a folder hold its model's weights. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path

from nbengine.errors import CheckpointError

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[tuple[Path, list[str] | None]]:
    """The files to open, each with the names to take from it; None takes all."""
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    if (folder / "model.safetensors").is_file():
        return [(folder / "model.safetensors", None)]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return [(file, None) for file in files]
    if any(any(folder.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        raise CheckpointError(
            f"{folder} holds pickled weights only (.bin or .pt), and loading those can run any code: convert them to safetensors "
            "with `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)`, or use a revision of the model that has them"
        )
    if any(folder.glob("*.gguf")):
        raise CheckpointError(f"{folder} holds GGUF weights, which are not supported: use the model's safetensors version")
    raise CheckpointError(f"{folder} holds no *.safetensors: download the model again, or pass load_format='dummy' for random weights")


def _indexed_files(folder: Path) -> list[tuple[Path, list[str] | None]]:
    index = folder / INDEX
    try:
        weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(file, []).append(name)
        outside = [file for file in by_file if Path(file).is_absolute() or ".." in Path(file).parts]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}): download it again") from error
    if outside:
        raise CheckpointError(f"{index} is damaged (it names {outside[0]}, which lies outside its folder): download it again")
    missing = sorted(file for file in by_file if not (folder / file).is_file())
    if missing:
        raise CheckpointError(f"{index} names {', '.join(missing)}, which {folder} does not hold: finish the download (it resumes)")
    return [(folder / file, names) for file, names in sorted(by_file.items())]
