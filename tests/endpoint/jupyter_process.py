"""A `jupyter server` process and the kernels that it starts, used as clients use them."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from jupyter_client import BlockingKernelClient
from kernel_replies import WAIT, reply_to, value_of


class Jupyter:
    """Ends, with its kernels, when the `with` block does."""

    def __init__(self, folder: Path, *, base_url: str, runtime: Path | None = None, config: dict[str, Any] | None = None) -> None:
        self.token = secrets.token_hex(16)
        self.runtime = runtime or folder / "runtime"
        self.log = folder / "server.log"
        home, root = folder / "config", folder / "root"
        for made in (home, root):
            made.mkdir()
        enabled = {"ServerApp": {"jpserver_extensions": {"nbengine": True}}, **(config or {})}
        (home / "jupyter_server_config.json").write_text(json.dumps(enabled))
        env = {**os.environ, "JUPYTER_TOKEN": self.token, "IPYTHONDIR": str(folder / "ipython"), "CUDA_VISIBLE_DEVICES": ""}
        env |= {"JUPYTER_CONFIG_DIR": str(home), "JUPYTER_DATA_DIR": str(folder / "data"), "JUPYTER_RUNTIME_DIR": str(self.runtime)}
        env |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONUNBUFFERED": "1"}
        options = ["--no-browser", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", f"--ServerApp.root_dir={root}", "--debug"]
        options += [f"--ServerApp.base_url={base_url}", "--allow-root"]
        with self.log.open("wb") as log:
            self.process = psutil.Popen([sys.executable, "-m", "jupyter_server", *options], env=env, cwd=root, stdout=log, stderr=log)
        self.url = self._address()
        self.base_url = f"{self.url}nbengine/v1"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}, timeout=WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        started = [self.process, *self.process.children(recursive=True)]
        self.process.terminate()
        _, left = psutil.wait_procs(started, timeout=20)
        for process in left:
            process.kill()
        assert not left, f"the server left these processes: {left}"

    def start_kernel(self) -> Kernel:
        return Kernel(self, self.http.post("api/kernels", json={"name": "python3"}).raise_for_status().json()["id"])

    def kernel_ids(self) -> list[str]:
        return [kernel["id"] for kernel in self.http.get("api/kernels").raise_for_status().json()]

    def get(self, path: str) -> Any:
        """What the extension answers."""
        return self.http.get(f"nbengine{path}").raise_for_status().json()

    def _address(self) -> str:
        deadline = time.monotonic() + WAIT
        file = self.runtime / f"jpserver-{self.process.pid}.json"
        while not file.exists() or not file.read_text().endswith("}"):
            assert self.process.is_running(), self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return json.loads(file.read_text())["url"]


class Kernel:
    """A kernel of such a server. Cells go to it past the server, so that only HTTP passes through that."""

    LOAD = "%load_ext nbengine\n%engine load tales --num-gpu-blocks-override 1024 --out engine"

    def __init__(self, server: Jupyter, kernel_id: str) -> None:
        self.server = server
        self.id = kernel_id
        self.short = kernel_id[:8]
        self._connect()

    def _connect(self) -> None:
        self.client = BlockingKernelClient(connection_file=str(self.server.runtime / f"kernel-{self.id}.json"))
        self.client.load_connection_file()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=WAIT)

    def start(self, code: str) -> str:
        return self.client.execute(code, store_history=False, allow_stdin=False)

    def finish(self, cell: str) -> None:
        content = reply_to(self.client, cell)
        assert content["status"] == "ok", content

    def run(self, code: str) -> None:
        self.finish(self.start(code))

    def value(self, expression: str) -> Any:
        return value_of(self.client, expression)

    def restart(self) -> None:
        """As the menu does it."""
        self.client.stop_channels()
        self.server.http.post(f"api/kernels/{self.id}/restart").raise_for_status()
        self._connect()

    def close(self) -> None:
        self.client.stop_channels()
        if self.id in self.server.kernel_ids():
            self.server.http.delete(f"api/kernels/{self.id}")
