"""Checks of what a user gives, shared by everything that takes options."""

from __future__ import annotations

import json
import operator
from pathlib import Path
from typing import Any

from nbengine.errors import CheckpointError


def as_int(value: Any) -> int | None:
    """The value as an int if it is a whole number (numpy's and torch's included), None if it is anything else; True is no number."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model's folder; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON ({error}): download or save it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object: download or save it again")
    return content
