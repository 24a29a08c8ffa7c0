"""nbengine: an LLM inference engine that lives in the notebook kernel."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# In a checkout kernels/ and widgets/ stand beside this package; an installed wheel has them inside it. (The root
# then counts as part of the package's path, so `nbengine.tests` would import from a checkout: harmless.)
_here = Path(__file__).parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.llm import LLM
    from nbengine.nested_loops import allow_nested_loops
    from nbengine.outputs import CompletionOutput, RequestOutput
    from nbengine.prompts import TextPrompt, TokensPrompt
    from nbengine.request import Request
    from nbengine.sampling_params import RequestOutputKind, SamplingParams

_exports = {
    "LLM": "nbengine.llm",
    "CompletionOutput": "nbengine.outputs",
    "Engine": "nbengine.engine",
    "Request": "nbengine.request",
    "RequestOutput": "nbengine.outputs",
    "RequestOutputKind": "nbengine.sampling_params",
    "SamplingParams": "nbengine.sampling_params",
    "TextPrompt": "nbengine.prompts",
    "TokensPrompt": "nbengine.prompts",
    "_jupyter_server_extension_points": "nbengine.server_extension",
    "allow_nested_loops": "nbengine.nested_loops",
    "load_ipython_extension": "nbengine.notebook.extension",
    "unload_ipython_extension": "nbengine.notebook.extension",
}

__all__ = [
    "LLM",
    "CompletionOutput",
    "Engine",
    "Request",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "TextPrompt",
    "TokensPrompt",
    "allow_nested_loops",
]


def __getattr__(name: str) -> Any:
    if name in _exports:
        return getattr(import_module(_exports[name]), name)
    from nbengine.vllm_names import OF_THE_PACKAGE, advice

    if name in OF_THE_PACKAGE:  # `from nbengine import ...` would not show the text of an AttributeError
        raise ImportError(f"cannot import name {name!r} from 'nbengine'{advice(name, OF_THE_PACKAGE)}", name=__name__)
    raise AttributeError(f"module 'nbengine' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
