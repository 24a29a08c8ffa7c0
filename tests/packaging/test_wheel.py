"""The wheel holds the tree: nothing forgotten in the package list, nothing that belongs elsewhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

FOLDERS = {"nbengine": "nbengine", "kernels": "nbengine/kernels", "widgets": "nbengine/widgets"}  # in the tree: in the wheel
JUNK = shutil.ignore_patterns("__pycache__", "*.pyc", ".ipynb_checkpoints")


def build(source: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-P", "-m", "build", "--no-isolation", "--outdir", str(out), *options, str(source)]
    done = subprocess.run(command, cwd=out.parent, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would be ignored" not in done.stdout + done.stderr


def contents(wheel: Path, *, data: bool = False) -> dict[str, bytes]:
    """What goes where Python looks for packages or, with `data`, what goes elsewhere, by its path in the environment."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        return {name.partition(".data/data/")[2] or name: archive.read(name) for name in names if (".data/" in name) == data}


@pytest.fixture(scope="module")
def tree(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tracked folders that the build may look at, without what earlier builds left beside them."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in (*FOLDERS, "tests", "notebooks"):
        shutil.copytree(root / folder, copy / folder, ignore=JUNK)
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(root / name, copy)
    return copy


@pytest.fixture(scope="module")
def dist(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source archive and the wheel made from it, as `make wheel` builds them."""
    out = tmp_path_factory.mktemp("build") / "dist"
    build(tree, out)
    return out


def test_the_wheel_holds_every_file_of_the_tree_and_no_other(tree: Path, dist: Path) -> None:
    expected = {
        f"{target}/{path.relative_to(tree / folder).as_posix()}": path.read_bytes()
        for folder, target in FOLDERS.items()
        for path in (tree / folder).rglob("*")
        if path.is_file() and path not in {tree / "kernels/README.md", tree / "widgets/README.md"}
    }
    found = contents(next(dist.glob("*.whl")))
    assert sorted(found) == sorted(expected)
    assert found == expected
    assert "nbengine/py.typed" in found
    assert "nbengine/kernels/__init__.py" not in found


def test_the_wheel_built_from_the_tree_and_the_one_from_the_source_archive_are_the_same(tree: Path, dist: Path) -> None:
    direct = dist.parent / "direct"
    build(tree, direct, "--wheel")
    assert contents(next(direct.glob("*.whl"))) == contents(next(dist.glob("*.whl")))


def test_the_wheel_installs_one_top_level_package(dist: Path) -> None:
    assert {name.partition("/")[0] for name in contents(next(dist.glob("*.whl")))} == {"nbengine"}


def test_the_wheel_makes_a_jupyter_server_load_the_extension(dist: Path) -> None:
    [(path, config)] = contents(next(dist.glob("*.whl")), data=True).items()
    assert path == "etc/jupyter/jupyter_server_config.d/nbengine.json"
    assert json.loads(config) == {"ServerApp": {"jpserver_extensions": {"nbengine": True}}}


def test_the_archives_carry_the_licence_and_no_tests(dist: Path) -> None:
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as archive:
        assert any(name.endswith(".dist-info/licenses/LICENSE") for name in archive.namelist())
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert "LICENSE" in names
    assert not [name for name in names if name.startswith("tests")]
