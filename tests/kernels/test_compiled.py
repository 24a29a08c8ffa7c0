"""The kernels compiled for cards that are not there: they must fit in registers and shared memory, and use the matrix units."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from nbengine.ops import OP_NAMES

pytest.importorskip("triton")
PROGRAM = Path(__file__).with_name("ahead_of_time.py")
MODULES = [import_module(f"nbengine.kernels.{name}") for name in OP_NAMES]
WRAPPERS = {name for op in OP_NAMES for name in (op, f"{op}_invariant") if any(hasattr(module, name) for module in MODULES)}
SHARED_MEMORY = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 90: 227 << 10}


def compiled(tmp_path, *words):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, PROGRAM, *words], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(reports):
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY[report["sm"]], report
        assert report["local"] == 0, report
        # attention keeps some registers in memory, most with a window and a cap: for a prompt on an H200 larger tiles are worth it
        assert report["stack"] <= {"prefill_attention_kernel": 384, "decode_attention_kernel": 16}.get(report["kernel"], 0), report


@pytest.mark.parametrize(("capability", "dtype"), [("75", "float16"), ("80", "bfloat16"), ("90", "bfloat16")])
def test_every_kernel_fits_the_card(tmp_path, capability, dtype):
    reports = compiled(tmp_path, capability, dtype)
    check(reports)
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    not_used = {"linear_some_kernel"} if capability == "75" else set()  # a T4's matrix units are out of reach: its products are cuBLAS's
    assert {report["kernel"] for report in reports} == kernels - not_used
    assert {report["op"] for report in reports} == WRAPPERS
    if capability == "90":
        assert all(report["wgmma"] for report in reports if report["kernel"] == "prefill_attention_kernel")
        for report in reports:  # nothing that another launch writes is read before that has ended; weights may be
            alone = report["kernel"] in {"copy_blocks_kernel", "linear_invariant_kernel", "linear_some_kernel"}
            assert report["follows"] is not alone, report
            assert alone or not report["loads_before"] or report["kernel"] == "linear_few_kernel", report


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["75", "80", "86", "90"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_head_size_fits_the_card(tmp_path, capability, dtype):
    check(compiled(tmp_path, capability, dtype, "every"))
