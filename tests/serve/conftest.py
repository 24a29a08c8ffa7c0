"""One engine on tales behind one server for each module, and clients of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from nbengine import Engine, SamplingParams
from nbengine.serve.server import Server

BLOCKS = 1024


@pytest.fixture(autouse=True, scope="session")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Announcements of tests are nobody else's."""
    folder = str(tmp_path_factory.mktemp("runtime"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_RUNTIME_DIR", folder)
        yield folder


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("tales", num_gpu_blocks_override=BLOCKS, progress=lambda *_: None) as engine:
        engine.front.call(int).result()  # its thread begins here, and not in a test
        yield engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Server]:
    with engine.serve() as server:
        yield server


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain client that has the key."""
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.api_key}"}, timeout=60) as client:
        yield client


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.base_url, api_key=server.api_key, max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture
def refused(http: httpx.Client) -> Callable[..., dict[str, Any]]:
    """What is wrong with a body that is to be refused with 400."""

    def post(path: str, status: int = 400, **body: Any) -> dict[str, Any]:
        answer = http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()["error"]

    return post


@pytest.fixture
def untouched(engine: Engine, until: Callable[..., None]) -> Iterator[None]:
    """After the test nothing runs, no block is held, and the engine answers as before."""
    yield
    until(lambda: engine.stats()["num_running"] == 0 and engine.stats()["num_waiting"] == 0)
    until(lambda: engine.stats()["blocks_used"] == 0)
    until(lambda: engine.http_stats()["open_sequences"] == 0 and engine.http_stats()["active_requests"] == 0)
    assert engine.generate("Once upon a time", SamplingParams(max_tokens=1))[0].finished


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, all of them JSON, the mark of the end behind them."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.fixture
def stream(http: httpx.Client) -> Callable[..., list[dict[str, Any]]]:
    """The events that a body brings."""

    def post(path: str, **body: Any) -> list[dict[str, Any]]:
        answer = http.post(path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        return events(answer.text)

    return post
