"""The kernels around a step, under Triton's interpreter, against their references."""

from __future__ import annotations

import pytest
from step_cases import MUTANTS, check_keeping, check_preparing, check_updates

from nbengine.kernels.keep_drawn import keep_drawn_reference


def test_inputs_are_prepared_as_the_reference_does():
    check_preparing("cpu")


def test_tables_are_updated_as_the_reference_does():
    check_updates("cpu")


def test_drawn_tokens_are_kept_and_counted_as_the_reference_does():
    check_keeping("cpu")
    check_keeping("cpu", keep_drawn_reference)


@pytest.mark.parametrize(("check", "mutant"), MUTANTS, ids=[mutant.__name__ for _, mutant in MUTANTS])
def test_a_kernel_gone_wrong_is_found(check, mutant):
    with pytest.raises(AssertionError):
        check("cpu", mutant)
