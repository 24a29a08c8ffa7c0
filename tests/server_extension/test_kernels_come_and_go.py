"""Kernels that restart, load, close their engine or are shut down; and that count as active while they answer."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
from stand_in import KERNELS, told

PROMPT = {"model": "tales", "prompt": "The fox"}
PATH = "/v1/completions"
FULL = f"tales@{KERNELS[0][:8]}"


@pytest.mark.parametrize("name", ["tales", FULL])
async def test_a_restarted_kernel_is_503_until_its_new_engine_is_found(serve, ask, mortal, name):
    old = await serve(pid=mortal.pid)
    old.answers[PATH] = {"by": "old"}
    assert json.loads((await ask(PATH, {**PROMPT, "model": name})).body) == {"by": "old"}
    mortal.kill()
    mortal.wait()
    await old.close()
    for _ in range(2):
        response = await ask(PATH, {**PROMPT, "model": name})
        assert (response.code, response.headers["Retry-After"]) == (503, "1")
        assert told(response)["code"] == "kernel_restarted"
        assert "%engine load" in told(response)["message"]
    assert (await ask(f"/kernels/{KERNELS[0]}{PATH}", PROMPT)).code == 503
    assert (await ask(PATH, {**PROMPT, "model": "another"})).code == 404
    new = await serve()
    new.answers[PATH] = {"by": "new"}
    assert json.loads((await ask(PATH, {**PROMPT, "model": name})).body) == {"by": "new"}


async def test_a_killed_kernel_whose_announcement_stays_is_503_too(serve, ask, mortal):
    old = await serve(pid=mortal.pid)
    await ask("/v1/models")
    mortal.kill()
    mortal.wait()
    assert told(await ask(PATH, PROMPT))["code"] == "kernel_restarted"
    assert not old.file.exists()


async def test_a_restarted_kernel_that_serves_another_model_no_longer_promises_the_old(serve, ask, mortal):
    old = await serve(pid=mortal.pid)
    await ask("/v1/models")
    mortal.kill()
    mortal.wait()
    await old.close()
    await serve(models=["another"])
    assert told(await ask(PATH, PROMPT))["code"] == "model_not_found"


async def test_an_engine_that_was_closed_is_404(serve, ask):
    engine = await serve()
    await ask("/v1/models")
    await engine.close()
    assert told(await ask(PATH, PROMPT))["code"] == "model_not_found"


async def test_a_kernel_that_was_shut_down_is_404(serve, ask, mortal, kernels):
    await serve(pid=mortal.pid)
    await ask("/v1/models")
    mortal.kill()
    mortal.wait()
    del kernels[KERNELS[0]]
    assert told(await ask(PATH, PROMPT))["code"] == "model_not_found"


async def test_a_loading_engine_is_503_and_found_when_it_is_ready(serve, ask):
    engine = await serve(state="loading")
    engine.answers[PATH] = {}
    assert told(await ask(PATH, PROMPT))["code"] == "model_loading"
    assert engine.asked == []
    engine.announce(state="asleep")  # the engine itself says so
    assert (await ask(PATH, PROMPT)).code == 200
    engine.announce(state="ready")
    assert (await ask(PATH, PROMPT)).code == 200


async def test_a_kernel_and_its_server_count_as_active_while_it_answers(serve, ask, kernels, extension, jp_serverapp):
    engine, other = await serve(), KERNELS[1]
    long_ago = datetime.now(UTC) - timedelta(hours=1)
    for kernel in kernels.values():
        kernel.last_activity = long_ago
    jp_serverapp.kernel_manager.last_kernel_activity = long_ago
    seen = []

    async def answer(handler):
        for _ in range(2):
            jp_serverapp.web_app.settings["api_last_activity"] = kernels[KERNELS[0]].last_activity = long_ago
            await asyncio.sleep(1.2)
            seen.append(datetime.now(UTC) - kernels[KERNELS[0]].last_activity)
            seen.append(datetime.now(UTC) - jp_serverapp.web_app.settings["api_last_activity"])
        handler.finish({})

    engine.answers[PATH] = answer
    assert (await ask(PATH, PROMPT)).code == 200
    assert max(seen) < timedelta(seconds=1.2)
    assert kernels[other].last_activity == long_ago
    assert datetime.now(UTC) - kernels[KERNELS[0]].last_activity < timedelta(seconds=1)
    assert datetime.now(UTC) - jp_serverapp.kernel_manager.last_kernel_activity < timedelta(seconds=1)
    kernels[KERNELS[0]].last_activity = long_ago
    await asyncio.sleep(1.2)
    assert kernels[KERNELS[0]].last_activity == long_ago  # it is over


async def test_a_look_at_what_there_is_keeps_no_kernel_and_no_server_alive(serve, ask, kernels, jp_serverapp):
    engine = await serve()
    engine.answers["/metrics"] = {}
    long_ago = kernels[KERNELS[0]].last_activity = datetime.now(UTC) - timedelta(hours=1)
    jp_serverapp.web_app.settings["api_last_activity"] = long_ago
    for path in ("/v1/models", "/metrics", "/health", "/load", "/", f"/kernels/{KERNELS[0]}/metrics"):
        await ask(path)
    assert await ask(PATH, {"model": "another"})
    assert kernels[KERNELS[0]].last_activity == jp_serverapp.web_app.settings["api_last_activity"] == long_ago


async def test_a_kernel_that_is_shut_down_while_it_answers_does_no_harm(serve, ask, kernels):
    engine = await serve()

    async def answer(handler):
        del kernels[KERNELS[0]]
        await asyncio.sleep(1.2)
        handler.finish({})

    engine.answers[PATH] = answer
    assert (await ask(PATH, PROMPT)).code == 200
