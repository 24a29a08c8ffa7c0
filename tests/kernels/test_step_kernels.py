"""The kernels around a step, under Triton's interpreter, against their references."""

from __future__ import annotations

from step_cases import check_keeping, check_preparing, check_updates


def test_inputs_are_prepared_as_the_reference_does():
    check_preparing("cpu")


def test_tables_are_updated_as_the_reference_does():
    check_updates("cpu")


def test_drawn_tokens_are_kept_and_counted_as_the_reference_does():
    check_keeping("cpu")
