"""What an update of a view costs can be measured: the benchmark's stand-in for an engine has what views ask of one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks/views.py"


def test_updates_are_measured_without_a_model():
    command = [sys.executable, str(SCRIPT), "--synthetic", "--count", "20", "--blocks", "2000", "--every", "40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["updates"] >= 2
    assert all(0 < milliseconds < 1000 for milliseconds in found["ms"].values())
