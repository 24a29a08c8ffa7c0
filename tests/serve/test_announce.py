"""Announcements: private, whole, gone with their process, and not mistaken for another process's."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from nbengine.serve import announce


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "runtime"))
    return tmp_path / "runtime"


def write(**changed):
    return announce.write(**{"url": "http://127.0.0.1:1", "secret": "s", "models": ["tales"], **changed})


def test_what_is_written_is_found_and_private(runtime):
    file = write()
    assert file.parent == runtime
    assert file.stat().st_mode & 0o777 == 0o600
    [told] = announce.list_live()
    assert told == {
        "version": 1, "pid": os.getpid(), "started": announce.started(os.getpid()), "kernel_id": None,
        "url": "http://127.0.0.1:1", "secret": "s", "models": ["tales"], "engine": "", "state": "ready",
    }  # fmt: skip
    announce.remove(file)
    announce.remove(file)
    assert announce.list_live() == []


def test_two_servers_of_a_process_have_a_file_each_and_a_new_state_keeps_the_file():
    one, two = write(), write(url=None, socket="/tmp/s")
    assert one != two
    assert write(file=one, state="asleep") == one
    assert [told["state"] for told in announce.list_live()] == ["asleep", "ready"]
    assert announce.list_live()[1]["socket"] == "/tmp/s"
    assert "url" not in announce.list_live()[1]


def test_what_a_dead_process_left_is_not_listed_and_is_removed(runtime):
    code = "from nbengine.serve import announce; print(announce.write(url='http://127.0.0.1:1', secret='s', models=[])); import os; os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert list(runtime.glob("nbengine-*.json"))
    assert done.stdout.strip().startswith(str(runtime))
    assert announce.list_live() == []
    assert not list(runtime.glob("nbengine-*.json"))


def test_another_process_of_the_same_number_is_not_taken_for_it():
    file = write()
    told = json.loads(file.read_text())
    file.write_text(json.dumps({**told, "started": told["started"] - 1.0}))
    assert announce.list_live() == []


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', '{"version": 2}', '{"version": 1, "pid": 1}'])
def test_what_is_no_announcement_is_left_alone(runtime, content):
    write()
    other = runtime / f"nbengine-{os.getpid()}-7.json"
    other.write_text(content)
    other.chmod(0o600)
    assert len(announce.list_live()) == 1
    assert other.exists()


def test_a_file_that_others_may_read_or_a_link_is_not_believed(runtime):
    file = write()
    file.chmod(0o644)
    assert announce.list_live() == []
    file.chmod(0o600)
    file.rename(runtime / "elsewhere")
    file.symlink_to(runtime / "elsewhere")
    assert announce.list_live() == []


def test_it_needs_no_torch_and_nothing_of_the_server():
    code = "import nbengine.serve.announce, sys; print([n for n in ('torch', 'tornado', 'msgspec', 'prometheus_client', 'numpy') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
