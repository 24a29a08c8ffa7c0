"""A Jupyter server with the extension, under a base URL as on JupyterHub, and servers in place of its kernels' engines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytest_jupyter.jupyter_server import *  # noqa: F403 - the fixtures and hooks of the plugin, for this folder alone
from tornado.httpclient import HTTPClientError, HTTPResponse

sys.path.append(str(Path(__file__).parent))  # stand_in, which several files use

from stand_in import KERNELS, Upstream


@pytest.fixture
def jp_server_config():
    return {"ServerApp": {"jpserver_extensions": {"nbengine": True}}, "NBEngineApp": {"max_body_size": 100_000}}


@pytest.fixture
def kernels(jp_serverapp) -> Iterator[dict[str, Any]]:
    """Two kernels that the server's manager believes to run."""
    known = jp_serverapp.kernel_manager._kernels
    known.update({kernel_id: SimpleNamespace(last_activity=datetime.now(UTC), execution_state="idle") for kernel_id in KERNELS})
    yield known
    known.clear()


@pytest.fixture
def extension(jp_serverapp, kernels):
    """The extension's app."""
    return jp_serverapp.web_app.settings["nbengine"]


@pytest.fixture
def serve(jp_asyncio_loop, kernels):
    """Await it for an upstream that listens and is announced."""
    made = []

    async def start(kernel: str | None = KERNELS[0], number: int = 0, *, socket: str | None = None, **told: Any) -> Upstream:
        upstream = Upstream(kernel, number, **told)
        upstream.answers["/v1/models"] = {"object": "list", "data": [{"id": name, "max_model_len": 512} for name in upstream.models]}
        made.append(upstream)
        await upstream.start(socket)
        return upstream

    yield start
    for upstream in made:
        jp_asyncio_loop.run_until_complete(upstream.close())


@pytest.fixture
def mortal() -> Iterator[subprocess.Popen[bytes]]:
    """A process that a test may end, in place of a kernel's."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def ask(jp_fetch):
    """A request with this server's token, or other headers; an error's answer is an answer."""

    async def fetch(
        path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None, **more: Any
    ) -> HTTPResponse:
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        try:
            return await jp_fetch(
                "nbengine" + path, method=method or ("GET" if body is None else "POST"), body=data, headers=dict(headers or {}), **more
            )
        except HTTPClientError as error:
            if error.response is None:
                raise
            return error.response

    return fetch
