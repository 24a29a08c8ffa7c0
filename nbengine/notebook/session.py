"""What one shell has of nbengine: its engines, its conversations, what runs in the background, the log."""

from __future__ import annotations

import builtins
import keyword
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from IPython.core.error import UsageError

from nbengine.notebook.conversation import Conversations
from nbengine.notebook.engines import Engines
from nbengine.notebook.generation import Generation
from nbengine.notebook.log_ring import LogRing
from nbengine.notebook.pump import Pump

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nbengine.engine import Engine
    from nbengine.prompts import Prompt
    from nbengine.sampling_params import SamplingParams


class Session:
    """Belongs to the magics of one shell, and goes with them."""

    def __init__(self, shell: InteractiveShell) -> None:
        self.shell = shell
        self.engines = Engines()
        self.conversations = Conversations()
        self.pump = Pump()
        self.log = LogRing()

    def generate(
        self, engine: Engine, asked: Sequence[Prompt], values: Mapping[str, Any], *, max_tokens: int | None, priority: int = 0, **about: Any
    ) -> Generation:
        """Queue prompts and remember them as one generation, which nothing can come between."""
        params = [params_of(engine, _own_seed(values, index), max_tokens) for index in range(len(asked))]
        handles = engine.submit_all(asked, params, priority=priority)
        return Generation(handles, engine, **about)

    def bind(self, name: str, value: object) -> None:
        """Give the user a variable."""
        self.shell.push({name: value}, interactive=True)

    def close(self) -> list[str]:
        """End everything; the names of the engines that were open."""
        for generation in self.pump.running():
            generation.cancel()
        self.log.close()
        return self.engines.close()


def _own_seed(values: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    """Each prompt of a cell draws from a seed of its own, or all would make the same choices; its outputs take the seeds between."""
    if values.get("seed") is None:
        return values
    return {**values, "seed": values["seed"] + index * values.get("n", 1)}


def params_of(engine: Engine, values: Mapping[str, Any], max_tokens: int | None) -> SamplingParams:
    """The model's defaults, with what was typed in their place."""
    params = engine.default_params()
    params.max_tokens = max_tokens
    for name, value in values.items():
        setattr(params, name, value)
    return params  # checked when it is submitted


def checked_name(shell: Any, name: str | None) -> str | None:
    """The name of a variable to bind."""
    if name is None:
        return None
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(f"--out {name}: a variable's name has letters, digits and underscores, and is no word of Python's")
    if hasattr(builtins, name) or name in shell.user_ns_hidden:
        raise UsageError(f"--out {name}: that would hide Python's or IPython's own {name}: choose another name")
    return name
