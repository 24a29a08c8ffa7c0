"""What an update of a view costs can be measured: the benchmark's stand-in for an engine has what views ask of one."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks/views.py"


def test_updates_are_measured_without_a_model():
    command = [sys.executable, str(SCRIPT), "--synthetic", "--count", "20", "--blocks", "2000", "--every", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["updates"] >= 2
    assert all(0 < milliseconds < 1000 for milliseconds in found["ms"].values())


def test_what_is_lost_is_told_with_how_sure_that_is():
    """Of runs that followed each other: a machine that slows down meanwhile costs neither kind."""
    lost = runpy.run_path(str(SCRIPT))["lost"]
    speeds = lambda *found: [{"tokens_per_s": one} for one in found]  # noqa: E731
    assert lost(speeds(100, 50, 10), speeds(98, 49, 9.8)) == {"throughput_lost": 0.02, "standard_error": 0}
    found = lost(speeds(100, 100), speeds(98, 100))
    assert found == {"throughput_lost": 0.01, "standard_error": pytest.approx(0.01)}
    assert lost(speeds(100), speeds(90)) == {"throughput_lost": 0.1, "standard_error": None}
