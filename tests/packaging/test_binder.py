"""binder/ by repo2docker's rules, as far as they can be checked without building the image."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

READ = {"requirements.txt", "runtime.txt", "postBuild", "start"}  # by repo2docker's Python buildpack
TAKES_OVER = {
    "Dockerfile",
    "environment.yml",
    "install.R",
    "DESCRIPTION",
    "Project.toml",
    "REQUIRE",
    "Pipfile",
    "Pipfile.lock",
    "default.nix",
}
SCRIPTS = ["postBuild", "start"]


@pytest.fixture(scope="module")
def binder(root: Path) -> Path:
    return root / "binder"


@pytest.fixture(scope="module")
def lines(binder: Path) -> list[str]:
    found = [line.partition(" #")[0].strip() for line in (binder / "requirements.txt").read_text().splitlines()]
    return [line for line in found if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines if not line.startswith(("-", "."))]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


@pytest.fixture(scope="module")
def pins(root: Path) -> dict[str, Version]:
    found = [line.split("==") for line in (root / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in found}


def test_every_file_is_one_that_is_read(binder, root):
    assert {path.name for path in binder.iterdir()} == READ | {"README.md"}
    assert not (root / ".binder").exists()  # repo2docker refuses both


def test_no_file_hides_the_requirements(binder):
    assert not TAKES_OVER & {path.name for path in binder.iterdir()}


def test_nbengine_comes_from_this_checkout(lines, binder, root):
    assert "." in lines  # pip runs in the root of the repository; binder/ keeps repo2docker from installing it itself
    assert (root / "pyproject.toml").is_file()
    [constraints] = [line.split()[1] for line in lines if line.startswith("-c")]
    assert (binder / constraints).resolve() == (root / "constraints.txt").resolve()  # relative to the file that names it


def test_torch_is_the_cpu_build_of_the_pinned_version(lines, requirements, pins):
    [pin] = requirements["torch"].specifier
    assert (pin.operator, pin.version) == ("==", f"{pins['torch']}+cpu")
    assert "--extra-index-url https://download.pytorch.org/whl/cpu" in lines
    assert SpecifierSet(f"=={pins['torch']}").contains(pin.version)  # or pip could not obey the constraints
    assert "triton" not in requirements


def test_what_is_asked_for_agrees_with_the_pins(requirements, pins):
    assert {"torch", "jupyterlab", "ipykernel"} <= set(requirements)
    for name, requirement in requirements.items():
        wanted = pins[name] if name != "torch" else Version(f"{pins[name]}+cpu")
        assert requirement.specifier.contains(wanted), name


def test_what_is_asked_for_satisfies_the_project(requirements: dict[str, Requirement], pyproject: dict[str, Any]):
    groups = pyproject["dependency-groups"]
    bounds = [
        Requirement(line) for line in [*pyproject["project"]["dependencies"], *groups["lab"], *groups["test"]] if isinstance(line, str)
    ]
    checked = set()
    for bound in bounds:
        asked = requirements.get(canonicalize_name(bound.name))
        exact = [specifier.version for specifier in asked.specifier if specifier.operator == "=="] if asked else []
        assert all(bound.specifier.contains(version) for version in exact), bound
        checked.update([bound.name] if exact else [])
    assert {"torch", "jupyterlab"} <= checked


def test_the_broken_ipykernel_is_kept_out(requirements):
    allowed = requirements["ipykernel"].specifier
    assert [allowed.contains(version) for version in ("6.28.0", "6.29.5", "7.0.0", "7.0.1", "7.1.0", "7.4.0")] == [
        False,
        True,
        False,
        False,
        True,
        True,
    ]


def test_the_python_is_one_that_the_project_supports(binder, pyproject):
    name, _, version = (binder / "runtime.txt").read_text().strip().partition("-")
    assert name == "python"
    assert re.fullmatch(r"3\.\d+", version)
    assert version in SpecifierSet(pyproject["project"]["requires-python"])
    assert f"Programming Language :: Python :: {version}" in pyproject["project"]["classifiers"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_bash_without_errors(binder, name):
    script = binder / name
    assert os.access(script, os.X_OK)
    assert script.read_bytes().startswith(b"#!/bin/bash\n")
    assert b"\r" not in script.read_bytes()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_an_error_in_the_build_ends_it(binder):
    assert re.search(r"^set -e", (binder / "postBuild").read_text(), re.MULTILINE)


def test_start_sets_one_thread_and_becomes_the_server(binder):
    shown = subprocess.run([binder / "start", "env"], capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]}).stdout
    assert {"OMP_NUM_THREADS=1", "MKL_NUM_THREADS=1", "TOKENIZERS_PARALLELISM=false"} <= set(shown.splitlines())
    assert subprocess.run([binder / "start", "bash", "-c", "exit 7"], check=False).returncode == 7
    assert subprocess.run([binder / "start", "printf", "%s|", "a b", "c"], capture_output=True, text=True, check=True).stdout == "a b|c|"


def test_the_notebook_that_it_opens_is_there(binder, root):
    opened = re.findall(r"lab/tree/(\S+\.ipynb)", (binder / "README.md").read_text())
    assert opened
    assert all((root / path).is_file() for path in opened)
