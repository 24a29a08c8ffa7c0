"""Which engine a request goes to, what goes along, and what comes back."""

from __future__ import annotations

import json
import os
from urllib.parse import unquote

import pytest
from stand_in import KERNELS, told

ONE, TWO = (kernel[:8] for kernel in KERNELS)
BODY = b'{"model": "tales",  "prompt":"The fox \xe2\x82\xac", "temperature": 0.30000000000000004, "seed": 12345678901234567890123}'
PATHS = ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_request_goes_to_the_engine_that_serves_its_model_as_it_is(serve, ask, path):
    engine, other = await serve(), await serve(KERNELS[1], models=["other"])
    engine.answers[path] = {"id": "cmpl-1", "model": "tales"}
    response = await ask(path, BODY)
    assert (response.code, json.loads(response.body)) == (200, {"id": "cmpl-1", "model": "tales"})
    [asked] = engine.asked
    assert asked.body == BODY
    assert other.asked == []


async def test_an_engine_at_a_unix_socket_is_reached(serve, ask, tmp_path):
    engine = await serve(socket=str(tmp_path / "s"))
    engine.answers["/v1/completions"] = {"id": "cmpl-1"}
    assert json.loads((await ask("/v1/completions", BODY)).body) == {"id": "cmpl-1"}


async def test_two_kernels_with_the_same_model_are_told_apart_by_its_full_name(serve, ask):
    engines = [await serve(kernel) for kernel in KERNELS]
    for engine in engines:
        engine.answers["/v1/completions"] = {"by": engine.kernel_id}
    response = await ask("/v1/completions", BODY)
    assert response.code == 400
    assert (told(response)["param"], told(response)["code"]) == ("model", "ambiguous_model")
    assert f"'tales@{ONE}' or 'tales@{TWO}'" in told(response)["message"]
    for engine, name in zip(engines, [f"tales@{ONE}", f"tales@{KERNELS[1]}"], strict=True):
        response = await ask("/v1/completions", BODY.replace(b"tales", name.encode()))
        assert json.loads(response.body) == {"by": engine.kernel_id}
        [asked] = engine.asked
        assert json.loads(asked.body) == json.loads(BODY)
        assert b"0.30000000000000004" in asked.body
        assert b"12345678901234567890123" in asked.body  # nothing but the name was changed


async def test_the_last_engine_of_a_kernel_answers_and_the_others_by_their_number(serve, ask):
    engines = [await serve(number=number) for number in (2, 10)]
    for engine in engines:
        engine.answers["/v1/completions"] = {"by": engine.number}
    models = [model["id"] for model in json.loads((await ask("/v1/models")).body)["data"]]
    assert models == [f"tales@{ONE}.2", "tales"]
    for name, number in [("tales", 10), (f"tales@{ONE}", 10), (f"tales@{ONE}.2", 2), (f"tales@{ONE}.10", 10)]:
        assert json.loads((await ask("/v1/completions", {"model": name})).body) == {"by": number}
    assert json.loads((await ask("/v1/completions", {"prompt": "x"})).body) == {"by": 10}
    assert json.loads((await ask(f"/kernels/{ONE}/v1/completions", BODY)).body) == {"by": 10}
    assert json.loads((await ask(f"/kernels/{ONE}.2/v1/completions", BODY)).body) == {"by": 2}
    for engine in engines:
        engine.answers["/load"] = {"server_load": 3}
    assert json.loads((await ask("/load")).body) == {"server_load": 6}


async def test_the_full_name_works_where_the_plain_one_is_enough_and_a_models_own_at_is_no_kernel(serve, ask):
    engine = await serve(models=["tales", "org/model@main"])
    engine.answers["/v1/completions"] = {}
    for name, plain in [(f"tales@{ONE}", "tales"), ("org/model@main", "org/model@main"), (f"org/model@main@{ONE}", "org/model@main")]:
        assert (await ask("/v1/completions", {"model": name})).code == 200
        assert json.loads(engine.asked[-1].body) == {"model": plain}


@pytest.mark.parametrize("name", ["tale", "tales@", "tales@1a2b3c4", f"tales@{TWO}", f"tales@{ONE}.7", "@", "", "tales@" + "9" * 5000])
async def test_an_unknown_model_is_404_naming_what_there_is(serve, ask, name):
    await serve(models=["tales", "qwen"])
    response = await ask("/v1/completions", {"model": name})
    assert response.code == 404
    assert (told(response)["param"], told(response)["code"]) == ("model", "model_not_found")
    assert "'tales', 'qwen'" in told(response)["message"]


async def test_without_any_engine_the_message_says_what_to_run(ask, kernels):
    response = await ask("/v1/completions", {"model": "tales"})
    assert response.code == 404
    assert "%engine serve" in told(response)["message"]
    assert (await ask("/v1/completions", {"prompt": "x"})).code == 503


async def test_a_request_without_a_model_goes_to_the_only_engine(serve, ask):
    engine = await serve()
    engine.answers["/v1/completions"] = {"id": "1"}
    assert json.loads((await ask("/v1/completions", {"prompt": "x"})).body) == {"id": "1"}
    await serve(KERNELS[1], models=["other"])
    assert told(await ask("/v1/completions", {"prompt": "x"}))["code"] == "missing_model"


async def test_a_kernel_may_be_named_in_the_path(serve, ask):
    engines = [await serve(kernel) for kernel in KERNELS]
    for engine in engines:
        engine.answers |= {"/v1/completions": {"by": engine.kernel_id}, "/health": {"well": engine.kernel_id}}
    assert json.loads((await ask(f"/kernels/{TWO}/v1/completions", BODY)).body) == {"by": KERNELS[1]}
    assert json.loads((await ask(f"/kernels/{KERNELS[0]}/health")).body) == {"well": KERNELS[0]}
    assert told(await ask("/kernels/00000000/health"))["code"] == "kernel_not_found"


async def test_only_this_servers_kernels_are_found(serve, ask):
    await serve(None)
    await serve("99999999-0000-4000-8000-000000000003", number=1)
    assert told(await ask("/v1/completions", {"model": "tales"}))["code"] == "model_not_found"
    assert json.loads((await ask("/v1/models")).body)["data"] == []


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
async def test_an_announcement_that_others_may_read_is_not_believed(serve, ask, mode):
    engine = await serve()
    engine.file.chmod(mode)
    assert json.loads((await ask("/v1/models")).body)["data"] == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give a file away")
async def test_an_announcement_of_another_user_is_not_believed(serve, ask):
    engine = await serve()
    os.chown(engine.file, 12345, -1)
    assert json.loads((await ask("/v1/models")).body)["data"] == []


@pytest.mark.parametrize("url", ["http://192.0.2.1:80", "https://127.0.0.1:1", "http://127.0.0.1", "http://127.0.0.1.example.org:1", "x"])
async def test_no_secret_is_sent_beyond_this_machine(serve, ask, extension, url):
    engine = await serve()
    engine.announce(url=url)
    assert extension.engines.live() == []
    assert json.loads((await ask("/v1/models")).body)["data"] == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"model": 3}', b'{"model": "\xff"}', b"\xff\xfe", b'{"a":' * 5000, b"[" * 90_000]
)
async def test_a_body_that_names_no_model_is_400(serve, ask, body):
    engine = await serve()
    response = await ask("/v1/completions", body, method="POST")
    assert response.code == 400
    assert told(response)["code"] == "invalid_body"
    assert engine.asked == []


async def test_what_an_engine_refuses_is_told_in_its_words(serve, ask):
    engine = await serve()
    engine.answers["/v1/completions"] = 400

    async def full(handler):
        handler.set_status(429)
        handler.set_header("Retry-After", "7")
        handler.finish({"error": {"message": "the queue is full"}})

    response = await ask("/v1/completions", BODY)
    assert (response.code, json.loads(response.body)["error"]) == (400, {"message": "upstream says 400", "param": "x"})
    engine.answers["/v1/completions"] = full
    response = await ask("/v1/completions", BODY)
    assert (response.code, response.headers["Retry-After"]) == (429, "7")


async def test_nothing_but_what_is_needed_goes_from_one_side_to_the_other(serve, ask, jp_serverapp):
    engine = await serve()

    async def answer(handler):
        for name in ("Set-Cookie", "X-Secret", "Access-Control-Allow-Origin", "Authorization"):
            handler.set_header(name, engine.secret)
        handler.set_header("Connection", "X-Hop")
        handler.set_header("X-Hop", engine.secret)
        handler.finish({})

    engine.answers["/v1/completions"] = answer
    token = jp_serverapp.identity_provider.token
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"a={token}", "X-Request-Id": "r1", "X-XSRFToken": token, "Forwarded": token}
    response = await ask("/v1/completions", BODY, headers=headers, params={"token": token, "echo": "1"})
    assert response.code == 200
    assert engine.secret not in str(list(response.headers.get_all()))
    [asked] = engine.asked
    assert token not in str(list(asked.headers.get_all())) + asked.uri
    assert asked.headers["X-Request-Id"] == "r1"
    assert asked.headers["Authorization"] == f"Bearer {engine.secret}"


async def test_a_body_over_the_limit_is_413_and_never_reaches_the_engine(serve, ask, jp_asyncio_loop):
    engine = await serve()
    engine.answers["/v1/completions"] = {}
    assert (await ask("/v1/completions", {"model": "tales", "prompt": "x" * 99_000})).code == 200
    response = await ask("/v1/completions", {"model": "tales", "prompt": "x" * 700_000})
    assert response.code == 413
    assert "100000" in told(response)["message"]
    assert len(engine.asked) == 1


@pytest.mark.parametrize("odd", ["?x=1", " HTTP/1.0", "\r\nX-Injected: 1", "#", "/../../health", "%2e%2e", "é"])
async def test_an_odd_path_is_one_path_to_the_engine_too(serve, ask, odd):
    engine = await serve()
    assert (await ask(f"/kernels/{ONE}/v1/x{odd}")).code == 404
    [asked] = engine.asked
    assert unquote(asked.path) == f"/v1/x{odd}"
    assert "X-Injected" not in asked.headers


async def test_there_is_nothing_at_other_addresses(serve, ask):
    await serve()
    for path in ("/v2/completions", "/v1", "/kernels/x"):
        response = await ask(path)
        assert response.code == 404
        assert "nbengine/v1" in told(response)["message"]
    assert (await ask("/v1/completions")).code == 405
