"""What importing nbengine costs, and what it brings along."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

HEAVY = {
    "IPython", "anywidget", "huggingface_hub", "ipykernel", "ipywidgets", "jupyter_server", "msgspec", "numpy", "pandas", "plotly", "prometheus_client",
    "safetensors", "tokenizers", "torch", "tornado", "transformers", "triton",
}  # fmt: skip
NOTEBOOK = ["IPython", "anywidget", "ipykernel", "ipywidgets", "jupyter_server", "nest_asyncio2", "notebook", "plotly", "tornado"]

BLOCK = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in sys.argv[1:]:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
"""


def test_import_takes_less_than_50_milliseconds(fresh: Callable[..., Any]) -> None:
    code = """
        import time
        start = time.perf_counter()
        import nbengine
        print(time.perf_counter() - start)
    """
    assert min(fresh(code) for _ in range(5)) < 0.05


def test_import_pulls_in_nothing_heavy(fresh: Callable[..., Any]) -> None:
    loaded = fresh("import nbengine, sys, json; print(json.dumps(list(sys.modules)))")
    assert HEAVY.intersection(loaded) == set()


def test_every_exported_name_is_there(fresh: Callable[..., Any]) -> None:
    code = """
        import nbengine, json
        assert set(nbengine.__all__) <= set(dir(nbengine))
        print(json.dumps({name: getattr(nbengine, name).__name__ for name in nbengine.__all__}))
    """
    names = fresh(code)
    assert all(name == exported for name, exported in names.items())


@pytest.mark.parametrize("module", ["batch", "blocks", "errors", "policy", "sampling_params", "scheduler", "sequence", "trace"])
def test_the_bookkeeping_needs_no_torch(fresh: Callable[..., Any], module: str) -> None:
    loaded = fresh(f"import nbengine.{module}, sys, json; print(json.dumps(list(sys.modules)))")
    assert {"torch", "transformers", "triton"}.intersection(loaded) == set()


def test_the_engine_generates_without_ipython_or_any_notebook_package(fresh: Callable[..., Any]) -> None:
    code = """
    import json
    from nbengine import LLM, SamplingParams

    llm = LLM("tales", max_model_len=64)
    [output] = llm.generate(["Once upon a time"], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True), use_tqdm=True)
    llm.engine.close()
    print(json.dumps([len(output.outputs[0].token_ids), [name for name in sys.argv[1:] if name in sys.modules]]))
    """
    assert fresh(BLOCK + code, *NOTEBOOK) == [4, []]


def test_the_engine_generates_without_triton(fresh: Callable[..., Any]) -> None:
    code = """
    from nbengine import LLM, SamplingParams

    with LLM("tales", max_model_len=64, device="cpu").engine as engine:
        print(len(engine.generate(["Once upon a time"], SamplingParams(max_tokens=4, ignore_eos=True))[0].outputs[0].token_ids))
    """
    assert fresh(BLOCK + code, "triton") == 4


def test_a_jupyter_server_loads_the_extension_without_torch_or_anything_else_of_the_engine(fresh: Callable[..., Any]) -> None:
    code = """
    import json
    import pkgutil
    import nbengine.server_extension
    from importlib import import_module
    from jupyter_server.extension.manager import ExtensionPackage

    for module in pkgutil.iter_modules(nbengine.server_extension.__path__, "nbengine.server_extension."):
        import_module(module.name)
    import nbengine.serve.openapi
    assert nbengine.serve.openapi.description()
    package = ExtensionPackage(name="nbengine", enabled=True)
    print(json.dumps([package.validate(), package.version, list(package.extension_points), [name for name in sys.argv[1:] if name in sys.modules]]))
    """
    engine = ["IPython", "huggingface_hub", "ipykernel", "numpy", "safetensors", "tokenizers", "torch", "transformers", "triton"]
    valid, version, points, loaded = fresh(BLOCK + code, *engine)
    assert (valid, points, loaded) == (True, ["nbengine"], [])
    assert version == import_module("nbengine").__version__


def test_the_blocker_blocks(fresh: Callable[..., Any]) -> None:
    code = """
    try:
        import IPython.display
    except ModuleNotFoundError as error:
        print(f'"{error.name}"')
    """
    assert fresh(BLOCK + code, "IPython") == "IPython"


def test_no_top_level_kernels_can_be_imported(fresh: Callable[..., Any]) -> None:
    """transformers looks for a package of that name: see kernels/README.md."""
    code = """
    import json
    from importlib.util import find_spec
    print(json.dumps([find_spec(name) is not None for name in ("kernels", "nbengine.kernels", "nbengine.widgets")]))
    """
    assert fresh(code) == [False, True, True]
