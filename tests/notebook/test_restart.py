"""Restart and shutdown leave no thread, process, socket or file behind."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest
from jupyter_core.paths import jupyter_runtime_dir
from kernel_client import WAIT, Kernel


def children(pid: int) -> set[int]:
    return {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _parent(entry) == pid}


def _parent(entry: Path) -> int | None:
    try:
        return int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return None


def sockets(pid: int) -> set[str]:
    found = set()
    for link in (Path("/proc") / str(pid) / "fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.add(str(link.readlink()))
    return {target for target in found if target.startswith("socket:")}


def gone(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not Path(f"/proc/{pid}").exists()


def ended(kernel: Kernel) -> bool:
    deadline = time.monotonic() + 10
    while kernel.manager.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    return not kernel.manager.is_alive()


@pytest.mark.parametrize("busy", [False, True])
def test_a_shutdown_ends_the_process_at_once_also_in_mid_stream(busy):
    kernel = Kernel()
    try:
        pid = kernel.value("__import__('os').getpid()")
        before = sockets(pid)
        files = set(Path(jupyter_runtime_dir()).glob("*nbengine*"))
        kernel.run("%load_ext nbengine\n%engine load tales --num-gpu-blocks-override 256")
        assert children(pid) == set()
        kernel.run("%%generate -m 2\nHello")
        kernel.run("%engine unload")
        assert sockets(pid) == before
        kernel.run("%engine load tales --num-gpu-blocks-override 256")
        if busy:
            kernel.run("%generate --bg -m 1500 --ignore-eos --no-chat Once")
        began = time.monotonic()
        kernel.client.shutdown()  # as a front end asks: the kernel ends itself
        assert ended(kernel)
        assert time.monotonic() - began < 5
        assert set(Path(jupyter_runtime_dir()).glob("*nbengine*")) == files
    finally:
        kernel.close()


def test_a_restart_in_mid_stream_gives_a_clean_kernel():
    kernel = Kernel()
    try:
        kernel.run("%load_ext nbengine\n%engine load tales --num-gpu-blocks-override 256")
        kernel.start("%%generate -m 1500 --ignore-eos --no-chat\nOnce")
        pid = kernel.manager.provisioner.process.pid
        time.sleep(0.3)
        began = time.monotonic()
        kernel.manager.restart_kernel(now=False)
        assert gone(pid)
        assert time.monotonic() - began < 10
        kernel.client.wait_for_ready(timeout=WAIT)
        assert kernel.value("[t.name for t in __import__('threading').enumerate() if 'nbengine' in t.name]") == []
        kernel.run("%load_ext nbengine\n%engine load tales --num-gpu-blocks-override 256")
        assert kernel.run("%%generate -m 2\nHello").status == "ok"
    finally:
        kernel.close()
