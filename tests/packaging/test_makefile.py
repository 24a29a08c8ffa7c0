"""`make` tells what it can do."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path


def test_every_target_is_documented_in_make_help(root: Path) -> None:
    targets = set(re.search(r"^\.PHONY:(.*)$", (root / "Makefile").read_text(), re.MULTILINE)[1].split())
    shown = subprocess.run(["make", "-C", str(root)], capture_output=True, text=True, check=True).stdout
    documented = dict(re.findall(r"^  make (\S+) +(\S.*)$", shown, re.MULTILINE))
    assert set(documented) == targets
    assert {"demo", "lab", "lint", "test", "test-all", "test-gpu", "wheel"} <= targets


def test_every_target_that_the_makefile_defines_is_phony_or_a_file(root: Path) -> None:
    makefile = (root / "Makefile").read_text()
    defined = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    assert defined == set(re.search(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)[1].split())
