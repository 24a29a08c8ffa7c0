"""The kernels around a step on a GPU: `make test-gpu`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine")]
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

from step_cases import MUTANTS, check_keeping, check_preparing, check_updates  # noqa: E402 - found there


@pytest.mark.parametrize("check", [check_preparing, check_updates, check_keeping])
def test_kernels_around_a_step_do_as_their_references(check):
    check("cuda")


@pytest.mark.parametrize(("check", "mutant"), MUTANTS, ids=[mutant.__name__ for _, mutant in MUTANTS])
def test_a_kernel_gone_wrong_is_found(check, mutant):
    with pytest.raises(AssertionError):
        check("cuda", mutant)
