"""constraints.txt and pyproject.toml agree."""

from __future__ import annotations

import itertools
import re
import sys
from importlib.metadata import distributions, requires
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

TRITON_OF_TORCH = {"2.11.0": "3.6.0", "2.12.0": "3.7.0", "2.12.1": "3.7.1", "2.13.0": "3.7.1"}  # what torch's CUDA build requires


@pytest.fixture(scope="module")
def pins(root: Path) -> dict[str, Version]:
    lines = [line for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    found = [(canonicalize_name(name), Version(version)) for name, version in (line.split("==") for line in lines)]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.fixture(scope="module")
def requirements(pyproject: dict[str, Any]) -> list[Requirement]:
    project = pyproject["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values(), *pyproject["dependency-groups"].values()]
    names = [entry for entry in itertools.chain(*lists, pyproject["build-system"]["requires"]) if isinstance(entry, str)]
    return [Requirement(name) for name in names]


def test_every_requirement_is_pinned_at_a_version_that_it_allows(requirements: list[Requirement], pins: dict[str, Version]) -> None:
    assert len(requirements) > 25
    for requirement in requirements:
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


BROKEN = {"ipykernel"}  # 7.0 shows what threads display in the wrong place


def test_requirements_have_lower_bounds_only(requirements: list[Requirement]) -> None:
    for requirement in requirements:
        operators = sorted(specifier.operator for specifier in requirement.specifier)
        assert operators == (["!=", ">="] if requirement.name in BROKEN else [">="]), requirement


def test_the_pinned_triton_is_the_one_that_the_pinned_torch_wants(pins: dict[str, Version]) -> None:
    assert TRITON_OF_TORCH[str(pins["torch"])] == str(pins["triton"])
    wanted = [Requirement(line) for line in requires("torch") or [] if re.match(r"triton\b", line)]
    assert all(requirement.specifier.contains(pins["triton"]) for requirement in wanted)  # empty for a CPU build


@pytest.mark.parametrize("python", ["3.11.2", "3.12.0"])  # Debian 12's, and the first 3.12
def test_no_pin_needs_a_newer_python_than_the_oldest_one_supported(pins: dict[str, Version], python: str) -> None:
    pinned = [d for d in distributions() if pins.get(canonicalize_name(d.name)) == Version(Version(d.version).public)]
    assert len(pinned) > 100
    needs = {d.name: d.metadata.get("Requires-Python", "") for d in pinned}
    assert [name for name, specifier in needs.items() if python not in SpecifierSet(specifier)] == []


def test_the_interpreter_that_runs_this_is_one_the_package_claims(pyproject: dict[str, Any]) -> None:
    claimed = {line.rpartition(" ")[2] for line in pyproject["project"]["classifiers"] if "Python :: 3." in line}
    assert f"{sys.version_info.major}.{sys.version_info.minor}" in claimed
    assert pyproject["project"]["requires-python"] == ">=" + min(claimed, key=Version)
