"""`training/` is no part of the wheel: it is imported from the checkout."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
if "training" not in sys.modules:  # the package alone: with the root on sys.path, `kernels` would be found there as well
    spec = spec_from_file_location("training", ROOT / "training/__init__.py", submodule_search_locations=[str(ROOT / "training")])
    assert spec is not None
    assert spec.loader is not None
    sys.modules["training"] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules["training"])


@pytest.fixture(scope="session")
def sample():
    return ROOT / "training" / "sample"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices this small gain nothing from a second thread, and lose much where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
