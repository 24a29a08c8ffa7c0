"""Checks of what a user gives, shared by everything that takes options."""

from __future__ import annotations

import functools
import inspect
import json
import operator
import sys
import traceback
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from nbengine.errors import CheckpointError, nearest

P = ParamSpec("P")
R = TypeVar("R")


def as_int(value: Any) -> int | None:
    """The value as an int if it is a whole number (numpy's and torch's included), None if it is anything else; True is no number."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def told(error: BaseException) -> str:
    """What went wrong in a user's code that was called where this is, and on which line: an error itself would keep its frames."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    where = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"{type(error).__name__}{where}: {error}"


def callers_level() -> int:
    """The stacklevel that makes a warning, given where this is called, point at the line outside of nbengine."""
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 - what warnings uses, too
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("nbengine."):
        level, frame = level + 1, frame.f_back
    return level


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


def _hint(name: str, given: Mapping[str, Any], known: AbstractSet[str]) -> str:
    """Where a keyword belongs that a function does not have, or the nearest one that it has."""
    from nbengine.sampling_params import SamplingParams  # which needs this module

    if not known.isdisjoint(("params", "sampling_params")):
        sampling = {f.name for f in fields(SamplingParams) if f.init} - known
        if name in sampling:
            return f"; pass SamplingParams({as_keywords({key: value for key, value in given.items() if key in sampling})})"
        if name == "prompt_token_ids":
            return "; pass {'prompt_token_ids': [...]} as a prompt"
    return nearest(name, known)


def as_keywords(values: Mapping[Any, Any]) -> str:
    """Values as they are written in a call: temperature=0, max_tokens=2."""
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def checks_keywords(**neutral: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function name the nearest keyword when it is given an unknown one, and take neutral values of what is not built."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known = inspect.signature(function).parameters.keys()

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            for name in kwargs.keys() - known:
                if name not in neutral:
                    raise TypeError(f"{function.__qualname__} has no parameter {name!r}{_hint(name, kwargs, known | neutral.keys())}")
                if kwargs[name] != neutral[name]:
                    raise ValueError(f"{name}={kwargs[name]!r} is not supported yet; leave it out")
                del kwargs[name]
            return function(*args, **kwargs)

        return checked

    return decorate
